"""What a model reads: how the scans of each stem are packed and cut into tokens, and one scan read that way.

Promise: a file is read as the shards were written that the stem learned from, or refused. A NIfTI library is imported
only where a file is read.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from brain_models.atlas import Atlas
from brain_models.encoder import StemName, TokenKind, kind_of
from brain_models.errors import ScanError
from brain_models.patches import PatchLayout
from brain_models.recipe import BoldPreprocessing
from brain_models.space import BrainSpace

COLUMN_OF_KIND: dict[TokenKind, str] = {"bold": "bold", "t1": "t1w"}
EXAMPLES: dict[str, str | float] = {  # of every column: a scan may be a packed array instead of a path
    "bold": "sub-01/func/sub-01_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz",
    "t1w": "sub-01/anat/sub-01_space-MNI152NLin6Asym_desc-preproc_T1w.nii.gz",
    "brain_mask": "sub-01/func/sub-01_task-rest_space-MNI152NLin6Asym_desc-brain_mask.nii.gz",
    "confounds": "sub-01/func/sub-01_task-rest_desc-confounds_timeseries.tsv",
    "transform": "transforms/sub-01.json",
    "repetition_time_s": 2.0,
}
Row = Mapping[str, Any]  # what is given of a row of the served table, by column


@dataclass
class StemSpec:
    """How scans become the tokens of a stem.

    `needs_brain_mask`: the stem learned from scans packed through their brain masks. `preprocessing` is what was done
    to its runs; None: nothing (a T1). `atlas` names the regions of its space; None: nobody named any.
    """

    space: BrainSpace
    layout: PatchLayout
    tubelet_frames: int
    window_frames: int
    needs_brain_mask: bool
    preprocessing: BoldPreprocessing | None = None
    atlas: Atlas | None = None


Stems = Mapping[StemName, StemSpec]


@dataclass(frozen=True)
class ScanInput:
    """One scan as a stem reads it, `window_frames` at a time: values in robust units, 0 where not measured."""

    stem: StemName
    window_frames: int
    values: Float[Tensor, "1 time voxel"]
    is_measured: Bool[Tensor, "1 voxel"]
    repetition_time_s: Float[Tensor, "1"]


def example_scan(stem: StemName, spec: StemSpec, *, num_frames: int, seed: int) -> ScanInput:
    """Returns seeded noise in the shape of a scan of that stem, all of it measured, at 2 s per frame."""
    generator = np.random.Generator(np.random.PCG64(seed))
    values = generator.standard_normal((1, num_frames, spec.space.num_voxels), dtype=np.float32)
    is_measured = torch.ones(1, spec.space.num_voxels, dtype=torch.bool)
    return ScanInput(stem, spec.window_frames, torch.from_numpy(values), is_measured, torch.full((1,), 2.0))


@dataclass(frozen=True)
class Column:
    """A column of the served table: an example of what it holds, and whether every row must have it."""

    example: str | float
    is_required: bool


def columns_of(stems: Collection[StemName]) -> dict[str, Column]:
    """Returns the columns that a model with these stems reads. Its scan is required where it reads one kind only."""
    scans = [column for kind, column in COLUMN_OF_KIND.items() if kind in stems]
    unread = {*COLUMN_OF_KIND.values()} - {*scans}
    return {
        name: Column(example, is_required=scans == [name]) for name, example in EXAMPLES.items() if name not in unread
    }


def read_scan(row: Row, stems: Stems) -> ScanInput:
    """Returns the scan of a row: a file, read as the stem's shards were written, or a packed array as shards hold it.

    ScanError: no column of a scan that the stems read, or one lacks what its preprocessing needs.
    """
    kinds = [kind for kind in COLUMN_OF_KIND if kind in stems]
    given = next((kind for kind in kinds if COLUMN_OF_KIND[kind] in row), None)
    if given is None:
        wanted = " or ".join(COLUMN_OF_KIND[kind] for kind in kinds)
        raise ScanError(f"columns {list(row)}; this model needs a column {wanted}")
    values, is_measured, seconds = (_read_bold if given == "bold" else _read_t1)(row, stems[given])
    name = _stem_for(stems, given, values.shape[1])
    return ScanInput(
        name,
        stems[name].window_frames,
        torch.from_numpy(values)[None],
        torch.from_numpy(is_measured)[None],
        torch.tensor([seconds], dtype=torch.float32),
    )


def require_frames(scan: ScanInput, num_frames: int) -> ScanInput:
    """Returns the scan; ScanError when it has fewer frames than the model needs."""
    if scan.values.shape[1] < num_frames:
        raise ScanError(f"{scan.values.shape[1]} frames; this model needs at least {num_frames}")
    return scan


def _stem_for(stems: Stems, kind: TokenKind, num_voxels: int) -> StemName:
    """Returns the stem that reads this many voxels: files are packed into the space of the kind's first stem, arrays
    come as they are."""
    sizes = {name: spec.space.num_voxels for name, spec in stems.items() if kind_of(name) == kind}
    fitting = [name for name, size in sizes.items() if size == num_voxels]
    if not fitting:
        raise ScanError(f"{num_voxels} voxels in {COLUMN_OF_KIND[kind]}; this model reads {sizes}")
    return kind if kind in fitting else fitting[0]


def _read_bold(row: Row, stem: StemSpec) -> tuple[np.ndarray, np.ndarray, float]:
    """Returns values [time, voxel], is_measured [voxel] and the repetition time in seconds."""
    from brain_models import preprocess

    seconds = float(row["repetition_time_s"]) if "repetition_time_s" in row else None
    stored = row["bold"]
    if isinstance(stored, list | np.ndarray):
        stored = _stored_bold(stored)
    else:
        stored, seconds = _preprocessed(row, stem, seconds)
    return preprocess.dequantise(stored), preprocess.measured(stored), _known(seconds)


def _packed_array(values: Any, column: str, num_axes: int) -> np.ndarray:
    """Returns a packed array, float32 where it came as the lists of JSON with null for not measured."""
    try:
        array = np.asarray(values)
        array = array.astype(np.float32) if array.dtype == object else array
    except (TypeError, ValueError) as error:
        raise ScanError(f"{column}: its lists are no array of numbers ({error}); give all frames alike") from error
    if array.ndim != num_axes or array.dtype.kind not in "iuf":
        raise ScanError(
            f"{column}: {array.ndim} axes of {array.dtype}; give a packed array of {num_axes} axes of numbers or a "
            "path (a request to a server brings arrays as dataframe_records or dataframe_split)"
        )
    return array


def _stored_bold(values: Any) -> np.ndarray:
    """Returns a packed run as shards hold it: whole numbers as int8, others as float16."""
    array = _packed_array(values, "bold", 2)
    if array.dtype.kind == "f":
        return array.astype(np.float16)
    if array.size and (array.min() < -128 or array.max() > 127):
        raise ScanError(f"bold: whole numbers from {array.min()} to {array.max()}; packed runs are int8, -128 to 127")
    return array.astype(np.int8)


def _preprocessed(row: Row, stem: StemSpec, seconds: float | None) -> tuple[np.ndarray, float]:
    """Returns the run [time, voxel] as shards would hold it, and its repetition time."""
    from brain_models.cleaning import clean_bold
    from brain_models.preprocess import standardise_bold

    packed = _pack_bold(row, stem)
    seconds = _known(seconds or packed.header.repetition_time_s)
    recipe = stem.preprocessing
    if recipe is None:
        return standardise_bold(packed).quantised, seconds
    if "confounds" not in row and recipe.needs_confounds:
        raise ScanError(
            f"this model saw runs cleaned by their confound tables "
            f"({', '.join(recipe.cleaning.confounds) or 'first frames dropped'}); add a column confounds with "
            "the path of fMRIPrep's desc-confounds_timeseries.tsv"
        )
    run = clean_bold(packed, recipe.cleaning, repetition_time_s=seconds, confounds=row.get("confounds"))
    return standardise_bold(run.packed, stored_as=recipe.stored_as).quantised, seconds


def _pack_bold(row: Row, stem: StemSpec) -> Any:
    """Returns the PackedScan of a NIfTI or CIFTI file, or of the GIFTI file of the left hemisphere and its sibling."""
    path = Path(row["bold"])
    if stem.space.kind == "surface":
        from brain_models.surface_scans import pack_cifti, pack_gifti

        if path.name.endswith(".dtseries.nii"):
            return pack_cifti(path, stem.space)
        return pack_gifti(path, path.with_name(path.name.replace("hemi-L", "hemi-R")), stem.space)
    from brain_models.preprocess import pack_bold

    return pack_bold(
        path,
        stem.space,
        brain_mask=_brain_mask(row, stem),
        transform=_transform(row),
        unknown_orientation="refuse" if stem.preprocessing is None else stem.preprocessing.unknown_orientation,
    )


def _read_t1(row: Row, stem: StemSpec) -> tuple[np.ndarray, np.ndarray, float]:
    """Returns values [1, voxel], is_measured [voxel] and 0 s."""
    from brain_models.preprocess import pack_t1, standardise_t1

    stored = row["t1w"]
    if isinstance(stored, list | np.ndarray):
        stored = _packed_array(stored, "t1w", 1)
    else:
        packed = pack_t1(stored, stem.space, brain_mask=_brain_mask(row, stem), transform=_transform(row))
        stored = standardise_t1(packed).values
    return np.nan_to_num(stored.astype(np.float32))[None], np.isfinite(stored), 0.0


def _brain_mask(row: Row, stem: StemSpec) -> Path | None:
    if "brain_mask" in row:
        return Path(row["brain_mask"])
    if stem.needs_brain_mask:
        raise ScanError("this model saw scans through brain masks; add a column brain_mask")
    return None


def _known(seconds: float | None) -> float:
    if seconds is None:
        raise ScanError("no repetition time in the header; add a column repetition_time_s")
    return seconds


def _transform(row: Row) -> Any:
    from brain_models.transform import Transform

    return Transform.load(row["transform"]) if "transform" in row else None
