"""Image encoders read files as their authors' code does, hold their whole architecture, and travel in bundles."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from brain_models import bundle
from brain_models.bundle import Bundle
from brain_models.image_encoders import ImageEncoder, ImageEncoderConfig, sparse_projection
from brain_models.image_rdm import ImageRdm, ImageRdmConfig
from brain_models.images import ImageError, ImageInput, prepared, read_image
from brain_models.pair_heads import PairHeadConfig, make_head
from brain_models.served import ServedModel
from finetune.errors import FinetuneError
from finetune.tasks.rdm_prediction.encoders import ImageConfig, model_hash, open_encoder

PROJECTED = ImageConfig("projected", 4096, 16)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as Hugging Face keeps CLIP's vision half, tiny and random."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    settings = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        projection_dim=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    CLIPVisionModelWithProjection(settings).save_pretrained(folder)
    preprocessing = {
        "size": {"shortest_edge": 20},
        "do_center_crop": True,
        "crop_size": {"height": 16, "width": 16},
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 0.28],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder


def picture(path: Path, *, seed: int = 0) -> Path:
    """Smooth random colours, 40 x 30 pixels."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    Image.fromarray(small).resize((40, 30), Image.Resampling.BICUBIC).save(path)
    return path


def test_features_are_those_of_the_model_with_its_own_image_processor(clip: Path, tmp_path: Path) -> None:
    from transformers import CLIPImageProcessorPil

    image = picture(tmp_path / "a.png")
    model = CLIPVisionModelWithProjection.from_pretrained(clip).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(clip)(Image.open(image), return_tensors="pt")["pixel_values"]
    for layer, expected in (
        ("projected", model(pixels).image_embeds),
        ("2", model(pixels, output_hidden_states=True).hidden_states[2].flatten(1)),
    ):
        encoder = open_encoder(str(clip), ImageConfig(layer, 4096, 16), seed=0)
        square = prepared(read_image(image), encoder.config.input)
        with torch.no_grad():
            found = encoder(torch.from_numpy(square.copy())[None])
        torch.testing.assert_close(found, expected.detach(), atol=2e-3, rtol=1e-3)
        assert encoder.num_features() == found.shape[1]


def test_layers_of_an_encoder_hold_every_parameter_once_from_the_top_down(clip: Path) -> None:
    layers = open_encoder(str(clip), PROJECTED, seed=0).layers()
    assert [name for name, _ in layers] == ["output", "block2", "block1", "block0", "input"]
    held = [id(parameter) for _, each in layers for parameter in each]
    encoder = open_encoder(str(clip), PROJECTED, seed=0)
    assert len(held) == len(set(held)) == len(list(encoder.parameters()))


def test_the_hash_of_an_encoder_changes_with_a_weight_and_with_the_layer(clip: Path) -> None:
    encoder = open_encoder(str(clip), PROJECTED, seed=0)
    before = model_hash(encoder)
    assert before == model_hash(open_encoder(str(clip), PROJECTED, seed=0))
    assert before != model_hash(open_encoder(str(clip), ImageConfig("1", 4096, 16), seed=0))
    with torch.no_grad():
        next(encoder.parameters()).view(-1)[0] += 1e-3
    assert before != model_hash(encoder)


def test_a_network_to_be_trained_starts_alike_on_every_rank_and_in_every_attempt() -> None:
    first, second, other = (model_hash(open_encoder("cnn", PROJECTED, seed=seed)) for seed in (3, 3, 4))
    assert first == second != other


def test_missing_weights_are_told_with_the_command_that_fetches_them(tmp_path: Path, clip: Path) -> None:
    with pytest.raises(FinetuneError, match=r"encoder=openai/none: .*hf download openai/none --include '\*\.json'"):
        open_encoder("openai/none", PROJECTED, seed=0)
    with pytest.raises(FinetuneError, match=r"holds no weights of VGG16.*load_state_dict_from_url.*vgg16-397923af"):
        open_encoder(f"vgg16:{tmp_path}/vgg16.safetensors", PROJECTED, seed=0)
    (tmp_path / "config.json").write_text((clip / "config.json").read_text())
    with pytest.raises(FinetuneError, match=r"preprocessor_config.json.*fetch the whole model by: hf download"):
        open_encoder(str(tmp_path), PROJECTED, seed=0)


def test_vgg16_loads_torchvisions_names_and_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("brain_models.image_encoders.VGG_WIDTH", 8)
    monkeypatch.setattr("brain_models.image_encoders.VGG_BLOCKS", ((2, 2), (2, 2), (2, 3), (2, 3), (3, 3)))
    seen = ImageInput(224, 256, False, [0.5] * 3, [0.2] * 3, uses_min_max=False)
    torch.manual_seed(0)
    made = ImageEncoder(ImageEncoderConfig("vgg16", seen, "projected", 4096))
    weights = made.network.state_dict()
    convolutions = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]  # torchvision's numbers
    expected = {f"features.{number}.{kind}" for number in convolutions for kind in ("weight", "bias")}
    expected |= {f"classifier.{number}.{kind}" for number in (0, 3, 6) for kind in ("weight", "bias")}
    assert set(weights) == expected
    assert weights["classifier.0.weight"].shape == (8, 3 * 49)
    save_file(weights, tmp_path / "vgg.safetensors")
    opened = open_encoder(f"vgg16:{tmp_path}/vgg.safetensors", PROJECTED, seed=0)
    assert model_hash(opened) != model_hash(open_encoder("pixels", PROJECTED, seed=0))
    assert opened.num_features() == 8


def test_a_sparse_projection_keeps_distances_and_never_changes() -> None:
    features = torch.randn(12, 20_000, generator=torch.Generator().manual_seed(0))
    found = sparse_projection(features, 2048)
    assert found.shape == (12, 2048)
    torch.testing.assert_close(torch.pdist(found), torch.pdist(features), rtol=0.1, atol=0)
    assert torch.equal(found[:3], sparse_projection(features[:3], 2048))
    assert torch.equal(sparse_projection(features, 20_000), features)


def test_a_wide_image_loses_its_sides_and_a_squeezed_one_keeps_them() -> None:
    image = np.zeros((10, 30, 3), dtype=np.uint8)
    image[:, :10], image[:, 20:] = (255, 0, 0), (0, 0, 255)
    cut = prepared(image, ImageInput(10, 10, False, [0.0] * 3, [1.0] * 3, uses_min_max=False))
    assert cut[:, 2:8].max() == 0
    squeezed = prepared(image, ImageInput(10, None, False, [0.0] * 3, [1.0] * 3, uses_min_max=False))
    assert (squeezed[5, 0, 0], squeezed[5, 9, 2]) == (255, 255)


def test_an_image_that_cannot_be_decoded_is_told_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "nsd-00001.png"
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(ImageError, match=r"nsd-00001.png: cannot be decoded .*replace it"):
        read_image(path)


@pytest.mark.parametrize("kind", ["projection", "mlp"])
def test_the_served_model_answers_with_the_matrix_of_its_images(clip: Path, tmp_path: Path, kind: str) -> None:
    encoder = open_encoder(str(clip), PROJECTED, seed=0)
    config = PairHeadConfig(kind, 4, 1, 0.0, "euclidean", "linear")  # type: ignore[arg-type]
    torch.manual_seed(1)
    head = make_head(8, config)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    spec = ImageRdmConfig(encoder.config, config, 8, "pearson", "V1")
    folder = bundle.save(tmp_path / "b", Bundle("image_rdm", spec, ImageRdm(encoder, head), {}, {}))
    served = ServedModel()
    served.bundle = bundle.load(folder)
    paths = [str(picture(tmp_path / f"{number}.png", seed=number)) for number in range(4)]
    answers = served.predict(None, pd.DataFrame({"image": paths}))
    found = answers[[f"dissimilarity_{number}" for number in range(4)]].to_numpy()
    images = [torch.from_numpy(prepared(read_image(path), encoder.config.input).copy()) for path in paths]
    expected = ImageRdm(encoder, head).eval()(torch.stack(images))
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    np.testing.assert_array_equal(found, found.T)
    assert found[np.triu_indices(4, 1)].std() > 1e-3
    with pytest.raises(ImageError, match="row 0: no image; give the path"):
        served.predict(None, pd.DataFrame({"bold": ["a.nii"]}))
