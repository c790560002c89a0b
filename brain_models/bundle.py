"""Bundles: a folder with model.yaml, weights.safetensors, what its stems read, and a golden output.

Promise: what loads computes what was saved: loading recomputes the golden output and refuses beyond 1e-4. No pickle.
Knows the kinds of models only as rows of brain_models.models.
"""

import dataclasses
import os
import subprocess
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from brain_models.atlas import Atlas
from brain_models.embedding import ScanEmbedding, embed_scan
from brain_models.encoder import BrainEncoder, StemName, kind_of
from brain_models.errors import BundleError
from brain_models.inputs import Column, Row, Stems, StemSpec, read_scan, require_frames
from brain_models.models import MODELS
from brain_models.patches import PatchLayout
from brain_models.recipe import BoldPreprocessing
from brain_models.space import BrainSpace

SCHEMA = 3  # 3: model kinds; layouts and atlases travel with their stems
GOLDEN_TOLERANCE = 1e-4
GOLDEN_SEED = 2009
COMMIT_VARIABLE = "CALLOSUM_GIT_COMMIT"  # set by cluster.submit, for copies without history
STEM_VALUES = ("tubelet_frames", "window_frames", "needs_brain_mask")  # of a stem in model.yaml, as they are


@dataclass
class Bundle:
    """A model and what its stems read. `kind` is a row of MODELS, `config` is of that row's dataclass.

    The stem named as a kind of scan ("bold", "t1") is the first of that kind; others have another token shape.
    """

    kind: str
    config: Any
    model: nn.Module
    stems: dict[StemName, StemSpec]
    made_by: dict[str, str]

    @property
    def encoder(self) -> BrainEncoder:
        """Returns the encoder, which may be the model itself; AttributeError for a kind without one."""
        encoder = self.model if isinstance(self.model, BrainEncoder) else self.model.get_submodule("encoder")
        assert isinstance(encoder, BrainEncoder)
        return encoder

    def in_space(self, kind: str, space: BrainSpace) -> "Bundle":
        """Returns this bundle with the stem of `kind` for `space` under that plain name, if it has one."""
        same = (name for name, stem in self.stems.items() if stem.space.fingerprint == space.fingerprint)
        name = next((name for name in same if kind_of(name) == kind), kind)
        if name != kind:
            stems = self.encoder.stems
            stems[kind], stems[name] = stems[name], stems[kind]
            self.stems[kind], self.stems[name] = self.stems[name], self.stems[kind]
        return self

    def embed(self, row: Row) -> ScanEmbedding:
        """Returns tokens, region embeddings and the embedding of one scan, read as the served model reads it.

        `row` gives paths by column: {"bold": ..., "confounds": ...} or {"t1w": ...}; ScanError as in serving.
        """
        scan = read_scan(row, self.stems)
        with torch.inference_mode():
            return embed_scan(self.encoder, self.stems[scan.stem], require_frames(scan, scan.window_frames))


def save(folder: Path | str, bundle: Bundle) -> Path:
    """Writes `bundle` to `folder` and returns it; the model may be on any device.

    The golden output is computed by a new model with the same weights: an engine may have divided the given one over
    ranks, and its forward pass would wait for them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, stem in bundle.stems.items():
        stem.space.save(folder / f"space_{name}.npz")
        stem.layout.save(folder / f"layout_{name}.npz")
        if stem.atlas is not None:
            stem.atlas.save(folder / f"atlas_{name}.npz")
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in bundle.model.state_dict().items()}
    save_file(weights, folder / "weights.safetensors")
    fresh = dataclasses.replace(bundle, model=_model(bundle.kind, bundle.config, bundle.stems, weights))
    np.save(folder / "golden.npy", _golden_output(fresh).numpy())
    spec = {
        "schema": SCHEMA,
        "kind": bundle.kind,
        "config": dataclasses.asdict(bundle.config),
        "stems": {name: _described(stem) for name, stem in bundle.stems.items()},
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
    kind = spec["kind"]
    stems = {name: _read_stem(folder, name, described) for name, described in spec["stems"].items()}
    config = _from_plain(MODELS[kind].config, spec["config"])
    try:
        model = _model(kind, config, stems, _read_weights(folder))
    except RuntimeError as error:
        raise BundleError(f"{folder}: weights do not fit model.yaml ({error}); fetch the bundle again") from error
    bundle = Bundle(kind, config, model, stems, spec["made_by"])
    _check_golden(bundle, folder)
    return bundle


@dataclass(frozen=True)
class Interface:
    """What the served model of a bundle reads and answers: columns by name, and what must be installed for it."""

    inputs: dict[str, Column]
    outputs: dict[str, np.dtype]
    packages: tuple[str, ...]


def interface(folder: Path | str) -> Interface:
    """Returns the interface of a bundle folder; BundleError when it is none that this code reads."""
    folder = Path(folder)
    spec = _read_spec(folder)
    kind = MODELS[spec["kind"]]
    answer = kind.answer(_from_plain(kind.config, spec["config"]), _read_golden(folder))
    outputs = {name: values.dtype for name, values in answer.items()}
    return Interface(kind.columns(spec["stems"]), outputs, kind.packages)


def code_commit() -> str:
    """Returns the git commit of this code, with '+' when it differs from it.

    A copy on a cluster's node has no history: whoever sent it there sets COMMIT_VARIABLE; 'unknown' without it.
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


def _described(stem: StemSpec) -> dict[str, Any]:
    """Returns what model.yaml says of a stem; its arrays lie in files of their own."""
    return {name: getattr(stem, name) for name in STEM_VALUES} | {
        "preprocessing": stem.preprocessing and dataclasses.asdict(stem.preprocessing),
        "space_fingerprint": stem.space.fingerprint,
        "layout_fingerprint": stem.layout.fingerprint,
        "atlas": stem.atlas and stem.atlas.name,
    }


def _read_stem(folder: Path, name: StemName, described: Mapping[str, Any]) -> StemSpec:
    space = BrainSpace.load(folder / f"space_{name}.npz")
    layout = PatchLayout.load(folder / f"layout_{name}.npz")
    for file, fingerprint in (("space", space.fingerprint), ("layout", layout.fingerprint)):
        if fingerprint != described[f"{file}_fingerprint"]:
            raise BundleError(f"{folder}/{file}_{name}.npz is not the {file} this model was trained on; fetch it again")
    recipe = described["preprocessing"]
    return StemSpec(
        space,
        layout,
        **{value: described[value] for value in STEM_VALUES},
        preprocessing=recipe and _from_plain(BoldPreprocessing, recipe),
        atlas=Atlas.load(folder / f"atlas_{name}.npz") if described["atlas"] else None,
    )


def _from_plain(dataclass_type: Any, plain: Mapping[str, Any]) -> Any:
    """Returns the dataclass whose `dataclasses.asdict` is `plain`; of a field's options, at most one is a dataclass."""
    types = typing.get_type_hints(dataclass_type)
    values = dict(plain)
    for name in plain:
        options = typing.get_args(types[name]) or (types[name],)
        nested = [option for option in options if dataclasses.is_dataclass(option)]
        if nested and plain[name] is not None:
            values[name] = _from_plain(nested[0], plain[name])
    return dataclass_type(**values)


def _read_spec(folder: Path) -> dict[str, Any]:
    try:
        spec = yaml.safe_load((folder / "model.yaml").read_text())
    except (OSError, yaml.YAMLError) as error:
        raise BundleError(f"{folder}/model.yaml cannot be read ({error}); is this a bundle folder?") from error
    if spec.get("schema") != SCHEMA:
        raise BundleError(
            f"{folder}/model.yaml has schema {spec.get('schema')}, this code reads {SCHEMA}; run the command that made "
            "it again, with this code"
        )
    if spec["kind"] not in MODELS:
        raise BundleError(
            f"{folder}/model.yaml holds a {spec['kind']!r}, this code knows {', '.join(MODELS)}; use the code of "
            f"commit {spec['made_by'].get('commit')}"
        )
    return spec


def _read_weights(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / "weights.safetensors")
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{folder}/weights.safetensors cannot be read ({error}); fetch the bundle again") from error


def _model(kind: str, config: Any, stems: Stems, weights: dict[str, Tensor]) -> nn.Module:
    """Returns a new model with these weights, in eval mode."""
    model = MODELS[kind].build(config, stems)
    model.load_state_dict(weights, strict=True)
    return model.eval()


def _golden_output(bundle: Bundle) -> Float[Tensor, "example output"]:
    """Returns the outputs of inputs that are the same in every run."""
    kind = MODELS[bundle.kind]
    with torch.inference_mode():
        examples = kind.examples(bundle.config, bundle.stems, GOLDEN_SEED)
        outputs = [kind.compute(bundle.model, bundle.config, example) for example in examples]
        return kind.together(bundle.model, torch.cat(outputs))


def _read_golden(folder: Path) -> Float[Tensor, "example output"]:
    try:
        return torch.from_numpy(np.load(folder / "golden.npy", allow_pickle=False))
    except (OSError, ValueError) as error:
        raise BundleError(f"{folder}/golden.npy cannot be read ({error}); fetch the bundle again") from error


def _check_golden(bundle: Bundle, folder: Path) -> None:
    expected, computed = _read_golden(folder), _golden_output(bundle)
    off = float((computed - expected).abs().max()) if computed.shape == expected.shape else float("inf")
    if not off <= GOLDEN_TOLERANCE:
        raise BundleError(
            f"{folder}: the golden output is off by {off:.2g} (limit {GOLDEN_TOLERANCE}): this code computes something "
            f"else than commit {bundle.made_by.get('commit')} that made the bundle; use that commit or export again"
        )
