"""The image encoder that `encoder=` names, with its weights, and the features of a set's images, each encoded once."""

from __future__ import annotations

import hashlib
import io
import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file

from brain_models.image_encoders import ImageEncoder, ImageEncoderConfig
from brain_models.images import ImageInput, prepared
from cluster.storage.stores import store_for
from finetune.errors import FinetuneError
from finetune.tasks.rdm_prediction.stimuli import Stimuli
from training.collectives import barrier, this_process
from training.watch.progress import phase

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
VGG, CNN, PIXELS = "vgg16:", "cnn", "pixels"
FEATURES = "features"  # a folder beside the set
IMAGES_AT_ONCE = 32


@dataclass
class ImageConfig:
    """What is taken from the encoder that `encoder=` names: openai/clip-vit-base-patch32 or any other vision model of
    Hugging Face, a local folder of one, vgg16:<file.safetensors>, cnn (trained from scratch), or pixels."""

    layer: str  # projected, or how many blocks deep (VGG16: the module of its classifier)
    max_features: int  # more are projected at random onto so many
    size: int  # of cnn and pixels: the side of their square


def is_local_weights(encoder: str) -> bool:
    """True where the encoder is a folder or file here, whose bytes may change."""
    return Path(encoder.removeprefix(VGG)).exists()


def open_encoder(encoder: str, config: ImageConfig, *, seed: int) -> ImageEncoder:
    """The encoder in evaluation mode, weights of a cnn drawn from the seed; FinetuneError, with the command that
    fetches them, when weights are missing."""
    if encoder in (CNN, PIXELS):
        seen = ImageInput(config.size, None, True, [0.0], [1.0], uses_min_max=encoder == CNN)
        kind = ImageEncoderConfig(encoder, seen, "projected", config.max_features)  # type: ignore[arg-type]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return ImageEncoder(kind).eval()
    if encoder.startswith(VGG):
        return _open_vgg(Path(encoder.removeprefix(VGG)), config)
    return _open_transformers(_folder_of(encoder), encoder, config)


def _open_vgg(path: Path, config: ImageConfig) -> ImageEncoder:
    seen = ImageInput(224, 256, False, *IMAGENET, uses_min_max=False)
    opened = ImageEncoder(ImageEncoderConfig("vgg16", seen, config.layer, config.max_features))
    try:
        opened.network.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        fetch = (
            "import torch, safetensors.torch as s; "
            f"s.save_file(torch.hub.load_state_dict_from_url('{VGG_URL}'), '{path}')"
        )
        raise FinetuneError(
            f"encoder={VGG}{path}: holds no weights of VGG16 ({error}); fetch them by: "
            f"{shlex.join(['python', '-c', fetch])}"
        ) from error
    return opened.eval()


def _folder_of(encoder: str) -> Path:
    """The folder of a Hugging Face model: as named, or of its files that were fetched before."""
    if (Path(encoder) / "config.json").exists():
        return Path(encoder)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(encoder, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError) as error:
        name = encoder if encoder.count("/") == 1 else "<owner>/<name>"
        raise FinetuneError(
            f"encoder={encoder}: no folder with a config.json, and no such model among those fetched from Hugging "
            f"Face; fetch it by: hf download {name} --include '*.json' '*.safetensors'"
        ) from error


def _open_transformers(folder: Path, encoder: str, config: ImageConfig) -> ImageEncoder:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        seen = _input_of(json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8")))
        of_clip = settings.get("model_type", "").startswith("clip")
        loader = transformers.CLIPVisionModelWithProjection if of_clip else transformers.AutoModel
        model = loader.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
    except (OSError, ValueError, KeyError) as error:
        raise FinetuneError(
            f"encoder={encoder}: cannot be opened ({error}); fetch the whole model by: hf download {encoder} --include "
            "'*.json' '*.safetensors'"
        ) from error
    settings = json.loads(model.config.to_json_string(use_diff=False))
    described = ImageEncoderConfig(
        "transformers", seen, config.layer, config.max_features, type(model).__name__, settings
    )
    opened = ImageEncoder(described)
    opened.network.get_submodule("model").load_state_dict(model.state_dict())
    return opened.eval()


def _input_of(settings: dict[str, Any]) -> ImageInput:
    """What preprocessor_config.json says of the images."""
    resized = settings["size"]
    resized = {"shortest_edge": resized} if isinstance(resized, int) else resized
    crop = settings.get("crop_size") if settings.get("do_center_crop", False) else None
    crop = crop["height"] if isinstance(crop, dict) else crop
    shortest = resized.get("shortest_edge")
    size = crop or shortest or resized["height"]
    return ImageInput(
        size, shortest, False, list(settings["image_mean"]), list(settings["image_std"]), uses_min_max=False
    )


def model_hash(encoder: ImageEncoder) -> str:
    """Hex sha256 of the encoder's config and weights."""
    digest = hashlib.sha256(json.dumps(asdict(encoder.config), sort_keys=True).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def features_of(stimuli: Stimuli, encoder: ImageEncoder) -> Float[np.ndarray, "image feature"]:
    """The features of all images: read where this encoder and layer have met this set before, else computed by rank 0
    and kept in <set>/features/."""
    name = f"{FEATURES}/{model_hash(encoder)[:16]}-{stimuli.images_fingerprint[:16]}.npy"
    store = store_for(stimuli.location)
    if not store.exists(name) and this_process().is_main:
        phase(f"encoding {len(stimuli.names):,} images, once for this encoder and set")
        file = io.BytesIO()
        np.save(file, encoded(stimuli, encoder))
        store.put(name, file.getvalue())
    barrier()
    return np.load(io.BytesIO(store.read(name)), allow_pickle=False)


def encoded(stimuli: Stimuli, encoder: ImageEncoder) -> Float[np.ndarray, "image feature"]:
    """The features of all images, in the order of their names."""
    with torch.inference_mode():
        parts = [encoder(torch.from_numpy(batch)).numpy() for batch in _batches(stimuli, encoder.config.input)]
    return np.concatenate(parts)


def inputs_of(stimuli: Stimuli, spec: ImageInput) -> UInt8[np.ndarray, "image y x colour"]:
    """All images as the encoder reads them."""
    return np.concatenate(list(_batches(stimuli, spec)))


def _batches(stimuli: Stimuli, spec: ImageInput) -> Iterator[UInt8[np.ndarray, "image y x colour"]]:
    for start in range(0, len(stimuli.names), IMAGES_AT_ONCE):
        rows: Sequence[int] = range(start, min(start + IMAGES_AT_ONCE, len(stimuli.names)))
        yield np.stack([prepared(image, spec) for image in stimuli.images(rows)])
