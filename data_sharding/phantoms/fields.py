"""The phantoms' known values, and the files that hold them.

Volumes are linear in space at every frame, so that trilinear interpolation inside the field of view is exact.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from brain_models.space import fsl_grid
from data_sharding.hashing import hash_name

MNI_CODE = 4  # NIfTI's xform code for MNI 152 coordinates


def generator(*names: object) -> np.random.Generator:
    """A stream of numbers of its own for every combination of names."""
    return np.random.default_rng(hash_name(*names))


def bold_values(positions_mm: np.ndarray, num_frames: int, seed: tuple[object, ...]) -> np.ndarray:
    """[..., time]: 1000 + x + slopes(time) . position + offset(time), at positions [..., 3] in mm."""
    numbers = generator("bold", *seed)
    slopes = numbers.normal(size=(3, num_frames))
    offsets = numbers.normal(size=num_frames) * 20
    return (1000 + positions_mm[..., 0, None] + positions_mm @ slopes + offsets).astype(np.float32)


def t1_values(positions_mm: np.ndarray, seed: tuple[object, ...]) -> np.ndarray:
    """[...]: bright inside a ball of 70 mm, and there linear in space; air outside."""
    slope = generator("t1", *seed).normal(size=3)
    inside = np.linalg.norm(positions_mm, axis=-1) < 70
    return np.where(inside, 800 + positions_mm @ slope, 5).astype(np.float32)


def vertex_values(num_vertices: int, num_frames: int, seed: tuple[object, ...]) -> np.ndarray:
    """[time, vertex]: a level of its own at every vertex, and noise."""
    numbers = generator("surface", *seed)
    level = numbers.uniform(500, 1500, size=num_vertices)
    return (level + numbers.normal(0, 10, size=(num_frames, num_vertices))).astype(np.float32)


def grid(spacing_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """Affine and positions [x, y, z, 3] in mm of the FSL grid's relative."""
    affine, shape = fsl_grid(spacing_mm)
    indices = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij"), axis=-1)
    return affine, indices @ affine[:3, :3].T + affine[:3, 3]


def write_volume(
    path: Path, values: np.ndarray, affine: np.ndarray, *, repetition_time_s: float | None = None, code: int = MNI_CODE
) -> Path:
    """A NIfTI file whose header has a repetition time only where one is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(values, affine)
    image.set_sform(affine, code)
    image.set_qform(affine, code)
    if values.ndim == 4:
        image.header.set_xyzt_units("mm", "sec")
        image.header["pixdim"][4] = repetition_time_s or 0
    nibabel.save(image, path)
    return path


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object, keys in the order given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_gifti_series(path: Path, series: np.ndarray, *, repetition_time_s: float) -> Path:
    """One hemisphere's run [time, vertex] as GIFTI, one array a frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = nibabel.gifti.GiftiMetaData({"TimeStep": str(repetition_time_s * 1000)})
    arrays = [
        nibabel.gifti.GiftiDataArray(frame, intent="NIFTI_INTENT_TIME_SERIES", datatype="NIFTI_TYPE_FLOAT32", meta=meta)
        for frame in series
    ]
    nibabel.gifti.GiftiImage(darrays=arrays).to_filename(path)
    return path


def cifti_axis(is_cortex: tuple[np.ndarray, np.ndarray]) -> Any:
    """The brain models of the True vertices of a left and a right mesh, with a few voxels of the thalamus behind."""
    from nibabel.cifti2 import BrainModelAxis

    left, right = (
        BrainModelAxis.from_mask(mask, name=name)
        for mask, name in zip(is_cortex, ("CortexLeft", "CortexRight"), strict=True)
    )
    voxels = np.zeros((4, 4, 4), dtype=bool)
    voxels[1:3, 1:3, 1] = True
    return left + right + BrainModelAxis.from_mask(voxels, name="thalamus_left", affine=np.diag([2.0, 2, 2, 1]))


def write_cifti_series(path: Path, series: np.ndarray, models: Any, *, repetition_time_s: float) -> Path:
    """A run [time, grayordinate] as a CIFTI dtseries."""
    from nibabel.cifti2 import Cifti2Image, SeriesAxis

    path.parent.mkdir(parents=True, exist_ok=True)
    Cifti2Image(series, (SeriesAxis(0, repetition_time_s, len(series)), models)).to_filename(path)
    return path
