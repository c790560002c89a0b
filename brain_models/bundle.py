"""Bundles: a folder with model.yaml, weights.safetensors, the spaces and a golden output.

Promise: what loads computes what was saved: loading recomputes the golden output and refuses beyond 1e-4. No pickle.
"""

import dataclasses
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from brain_models.encoder import BrainEncoder, EncoderConfig, StemName, kind_of
from brain_models.errors import BundleError
from brain_models.heads import Classifier, HeadConfig
from brain_models.patches import PatchLayout
from brain_models.recipe import BoldPreprocessing, CleaningConfig
from brain_models.run_classifier import RunClassifier
from brain_models.space import BrainSpace

SCHEMA = 2  # 2: several stems a kind, by layout fingerprint; time_in
GOLDEN_TOLERANCE = 1e-4
GOLDEN_SEED = 2009
COMMIT_VARIABLE = "CALLOSUM_GIT_COMMIT"  # set by cluster.submit, for copies without history


@dataclass
class StemSpec:
    """What a stem sees; `needs_brain_mask`: its shards were packed with the scans' brain masks.

    `preprocessing` is what was done to its runs; None: nothing (a T1).
    """

    patch_voxels: int
    tubelet_frames: int
    window_frames: int
    needs_brain_mask: bool
    preprocessing: BoldPreprocessing | None = None


@dataclass
class HeadSpec:
    """A classifier over segments of `segment_frames`; a run's logit is the mean of its segments'."""

    config: HeadConfig
    segment_frames: int
    positive: str
    negative: str
    threshold: float  # probability of `positive` from which a run is called positive; chosen on validation


@dataclass
class Bundle:
    """A loaded bundle: one encoder, spaces by stem, and a classifier if it has a head.

    The stem named as a kind ("bold", "t1") is the first of that kind; others have another token shape.
    """

    encoder: BrainEncoder
    spaces: dict[StemName, BrainSpace]
    stems: dict[StemName, StemSpec]
    head: HeadSpec | None
    classifier: RunClassifier | None
    made_by: dict[str, str]

    @property
    def model(self) -> BrainEncoder | RunClassifier:
        return self.classifier or self.encoder

    def in_space(self, kind: str, space: BrainSpace) -> "Bundle":
        """Returns this bundle with the stem of `kind` for `space` under that plain name, if it has one."""
        same = (name for name in self.stems if self.spaces[name].fingerprint == space.fingerprint)
        found = next((name for name in same if kind_of(name) == kind), kind)
        if found != kind:
            stems = self.encoder.stems
            stems[kind], stems[found] = stems[found], stems[kind]
            self.spaces[kind], self.spaces[found] = self.spaces[found], self.spaces[kind]
            self.stems[kind], self.stems[found] = self.stems[found], self.stems[kind]
        return self


def save(folder: Path | str, bundle: Bundle) -> Path:
    """Writes `bundle` to `folder` and returns it; the model may be on any device.

    The golden output is that of a model made anew from the weights: an engine may have divided the given one over
    ranks, and its forward pass would wait for them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, space in bundle.spaces.items():
        space.save(folder / f"space_{name}.npz")
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in bundle.model.state_dict().items()}
    save_file(weights, folder / "weights.safetensors")
    fresh = make_encoder(bundle.encoder.config, bundle.spaces, bundle.stems)
    np.save(folder / "golden.npy", _golden_output(_filled(dataclasses.replace(bundle, encoder=fresh), weights)).numpy())
    spec = {
        "schema": SCHEMA,
        "encoder": dataclasses.asdict(bundle.encoder.config),
        "stems": {
            name: dataclasses.asdict(stem)
            | {
                "space_fingerprint": bundle.spaces[name].fingerprint,
                "layout_fingerprint": bundle.encoder.stem(name).layout_fingerprint,
            }
            for name, stem in bundle.stems.items()
        },
        "head": dataclasses.asdict(bundle.head) if bundle.head else None,
        "made_by": bundle.made_by | {"commit": code_commit(), "torch": str(torch.__version__)},
    }
    (folder / "model.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    return folder


def load(folder: Path | str) -> Bundle:
    """Returns the bundle in `folder`, on the CPU, in eval mode.

    BundleError: a file missing or damaged, another schema, or a golden output that does not come out.
    """
    folder = Path(folder)
    spec = _read_spec(folder)
    spaces = {name: BrainSpace.load(folder / f"space_{name}.npz") for name in spec["stems"]}
    for name, stem in spec["stems"].items():
        if stem.pop("space_fingerprint") != spaces[name].fingerprint:
            raise BundleError(f"{folder}/space_{name}.npz is not the space this model was trained on; fetch it again")
    layouts = {name: stem.pop("layout_fingerprint") for name, stem in spec["stems"].items()}
    stems = {name: _stem_spec(stem) for name, stem in spec["stems"].items()}
    weights = _read_weights(folder)
    encoder = make_encoder(EncoderConfig(**spec["encoder"]), spaces, stems)
    if changed := [name for name, layout in layouts.items() if encoder.stem(name).layout_fingerprint != layout]:
        raise BundleError(f"{folder}: this code cuts the tokens of {changed} otherwise than the code that wrote it did")
    head = spec["head"] and HeadSpec(**(spec["head"] | {"config": HeadConfig(**spec["head"]["config"])}))
    try:
        bundle = _filled(Bundle(encoder, spaces, stems, head, None, spec["made_by"]), weights)
    except RuntimeError as error:
        raise BundleError(f"{folder}: weights do not fit model.yaml ({error}); fetch the bundle again") from error
    _check_golden(bundle, folder)
    return bundle


def make_encoder(
    config: EncoderConfig, spaces: dict[StemName, BrainSpace], stems: dict[StemName, StemSpec]
) -> BrainEncoder:
    """Returns a fresh encoder with these stems."""
    layouts = {
        name: (PatchLayout.from_grid(spaces[name], stem.patch_voxels), stem.tubelet_frames)
        for name, stem in stems.items()
    }
    return BrainEncoder(config, layouts)


def code_commit() -> str:
    """Returns the git commit of this code, with '+' when it differs from it.

    A copy on a cluster's node has no history: whoever sent it there says the commit by COMMIT_VARIABLE, else 'unknown'.
    """
    here = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get(COMMIT_VARIABLE, "unknown")
    return described.stdout.strip()


def _stem_spec(raw: dict[str, Any]) -> StemSpec:
    made = raw.get("preprocessing")
    if made is not None:
        made = BoldPreprocessing(**(made | {"cleaning": CleaningConfig(**made["cleaning"])}))
    return StemSpec(**(raw | {"preprocessing": made}))


def _read_spec(folder: Path) -> dict[str, Any]:
    try:
        spec = yaml.safe_load((folder / "model.yaml").read_text())
    except (OSError, yaml.YAMLError) as error:
        raise BundleError(f"{folder}/model.yaml cannot be read ({error}); is this a bundle folder?") from error
    if spec.get("schema") != SCHEMA:
        raise BundleError(
            f"{folder}/model.yaml has schema {spec.get('schema')}, this code reads {SCHEMA}; export again"
        )
    return spec


def _read_weights(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / "weights.safetensors")
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{folder}/weights.safetensors cannot be read ({error}); fetch the bundle again") from error


def _filled(bundle: Bundle, weights: dict[str, Tensor]) -> Bundle:
    """Returns the bundle with these weights in its fresh encoder, and in a fresh classifier if it has a head."""
    classifier = _classifier(bundle.encoder, bundle.head, bundle.stems, weights) if bundle.head else None
    filled = dataclasses.replace(bundle, classifier=classifier)
    filled.model.load_state_dict(weights, strict=True)
    filled.model.eval()
    return filled


def _classifier(
    encoder: BrainEncoder, head: HeadSpec, stems: dict[StemName, StemSpec], weights: dict[str, Tensor]
) -> RunClassifier:
    membership = weights.get("head.pool.shares")
    module = Classifier(head.config, encoder.config.width, membership=membership)
    return RunClassifier(encoder, module, window_frames=stems["bold"].window_frames)


def _golden_output(bundle: Bundle) -> Float[Tensor, "stem output"]:
    """Returns embeddings of one seeded random window for each stem, or the logit, which is of the stem bold."""
    outputs = []
    with torch.inference_mode():
        for name in ["bold"] if bundle.classifier else sorted(bundle.stems):
            window_frames = bundle.stems[name].window_frames
            generator = np.random.Generator(np.random.PCG64(GOLDEN_SEED))
            num_frames = bundle.head.segment_frames if bundle.head else window_frames
            shape = (1, num_frames, bundle.spaces[name].num_voxels)
            values = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
            is_measured = torch.ones(1, shape[2], dtype=torch.bool)
            repetition_time_s = torch.full((1,), 2.0)
            if bundle.classifier:
                outputs.append(bundle.classifier(values, is_measured, repetition_time_s)[:, None])
            else:
                embedding = bundle.encoder.embed(
                    values, is_measured, repetition_time_s, name=name, window_frames=window_frames
                )
                outputs.append(embedding)
    return torch.cat(outputs)


def _check_golden(bundle: Bundle, folder: Path) -> None:
    try:
        expected = torch.from_numpy(np.load(folder / "golden.npy", allow_pickle=False))
    except (OSError, ValueError) as error:
        raise BundleError(f"{folder}/golden.npy cannot be read ({error}); fetch the bundle again") from error
    found = _golden_output(bundle)
    if bundle.classifier:
        expected = expected[:1]  # earlier code wrote the same logit once a stem
    off = float((found - expected).abs().max()) if found.shape == expected.shape else float("inf")
    if not off <= GOLDEN_TOLERANCE:
        raise BundleError(
            f"{folder}: the golden output is off by {off:.2g} (limit {GOLDEN_TOLERANCE}): this code computes something "
            f"else than commit {bundle.made_by.get('commit')} that made the bundle; use that commit or export again"
        )
