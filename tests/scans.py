"""Tiny NIfTI files for tests: one field of view, stored in every way a scanner or a tool might."""

from pathlib import Path

import nibabel
import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

GRID_AFFINE = np.array([[-12.0, 0, 0, 90], [0, 12, 0, -126], [0, 0, 12, -72], [0, 0, 0, 1]])
GRID_SHAPE = (16, 19, 16)
MARKER_MM = (36.0, -6.0, 24.0)  # right of the midline


def grid_positions_mm(affine: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Returns [x, y, z, 3] positions of a grid."""
    indices = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij"), axis=-1)
    return indices @ affine[:3, :3].T + affine[:3, 3]


def bold_values(positions_mm: np.ndarray, num_frames: int = 12, seed: int = 0) -> np.ndarray:
    """Returns [x, y, z, time]: linear in space at every frame (so trilinear resampling is exact), noise over time,
    brighter and livelier to the right."""
    generator = np.random.default_rng(seed)
    slopes = generator.normal(size=(3, num_frames))
    offsets = generator.normal(size=num_frames) * 20
    return 1000 + positions_mm[..., 0, None] + positions_mm @ slopes + offsets


def save_scan(
    path: Path, values: np.ndarray, affine: np.ndarray, *, dtype: str = "float32", repetition_time_s: float | None = 2.0
) -> Path:
    """Writes a NIfTI file with sform code 4 (MNI) and, for 4D, a repetition time in seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(values.astype(dtype), affine)
    image.set_sform(affine, 4)
    image.set_qform(affine, 4)
    if values.ndim == 4:
        image.header.set_xyzt_units("mm", "sec")
        image.header["pixdim"][4] = repetition_time_s or 0
    nibabel.save(image, path)
    return path


def reoriented(values: np.ndarray, affine: np.ndarray, codes: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the same scan stored with other axes, e.g. 'RAS' or 'PSR'."""
    change = ornt_transform(io_orientation(affine), axcodes2ornt(tuple(codes)))
    image = nibabel.Nifti1Image(values, affine).as_reoriented(change)
    return np.asarray(image.dataobj), image.affine
