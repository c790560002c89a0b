"""Images as registration sees them: on upright grids of equal edges in RAS+ millimetres, read without aliasing.

Promise: an index step along an axis is a step right, front or up. Knows no registration software.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Float64
from scipy import ndimage

from brain_models.errors import ScanError
from brain_models.nifti import ScanHeader, read_header, stream_frames
from brain_models.resample import FWHM_PER_SIGMA
from brain_models.transform import apply_matrix


@dataclass(frozen=True, eq=False)
class Volume:
    """An image on an upright grid: index i lies at origin_mm + spacing_mm * i."""

    values: Float32[np.ndarray, "x y z"]
    origin_mm: Float64[np.ndarray, "3"]
    spacing_mm: float

    @property
    def affine(self) -> Float64[np.ndarray, "4 4"]:
        affine = np.diag([self.spacing_mm] * 3 + [1.0])
        affine[:3, 3] = self.origin_mm
        return affine

    def with_values(self, values: np.ndarray) -> Volume:
        """Returns another image on the same grid."""
        return Volume(np.ascontiguousarray(values, dtype=np.float32), self.origin_mm, self.spacing_mm)

    def coarser(self, spacing_mm: float) -> Volume:
        """Returns the image at a larger spacing."""
        return on_upright_grid(self.values, self.affine, spacing_mm=spacing_mm)

    def points_mm(self, selected: Bool[np.ndarray, "x y z"]) -> Float64[np.ndarray, "point 3"]:
        """Returns where the selected voxels lie."""
        return np.argwhere(selected) * self.spacing_mm + self.origin_mm

    def sample(self, points_mm: Float64[np.ndarray, "point 3"]) -> Float32[np.ndarray, "point"]:
        """Returns the values at points, linear between voxels; 0 outside."""
        return ndimage.map_coordinates(self.values, ((points_mm - self.origin_mm) / self.spacing_mm).T, order=1)

    def through(self, matrix: Float64[np.ndarray, "4 4"], grid: Volume) -> Volume:
        """Returns the image seen on `grid`, where `matrix` maps mm of the grid to mm of this image."""
        by_index = np.linalg.inv(self.affine) @ matrix @ grid.affine
        values = ndimage.affine_transform(
            self.values, by_index[:3, :3], by_index[:3, 3], output_shape=grid.values.shape, order=1
        )
        return grid.with_values(values)


def read_volume(path: Path | str, *, spacing_mm: float) -> Volume:
    """Returns a 3D scan on an upright grid. ScanError where the file is no such image or left and right are unknown."""
    header = read_header(path, "t1w")
    require_orientation(header)
    values = next(stream_frames(header))[0].reshape(header.shape, order="F")
    return on_upright_grid(np.nan_to_num(values, posinf=0.0, neginf=0.0), header.affine, spacing_mm=spacing_mm)


def require_orientation(header: ScanHeader) -> None:
    """ScanError where the header does not say which side is left."""
    if not header.has_orientation:
        raise ScanError(f"{header.path}: sform and qform codes are 0: left and right are unknown; restore the geometry")


def on_upright_grid(values: np.ndarray, affine: np.ndarray, *, spacing_mm: float) -> Volume:
    """Returns an image on the smallest upright grid that holds it, smoothed as far as that grid is coarser."""
    voxel_mm = np.linalg.norm(affine[:3, :3], axis=0)
    sigmas = np.sqrt(np.clip(spacing_mm**2 - voxel_mm**2, 0, None)) / FWHM_PER_SIGMA / voxel_mm
    smooth = ndimage.gaussian_filter(values.astype(np.float32, copy=False), sigmas, mode="nearest")
    corners = np.stack(np.meshgrid(*([0, size - 1] for size in values.shape), indexing="ij"), axis=-1).reshape(-1, 3)
    corners_mm = apply_matrix(affine, corners.astype(np.float64))
    origin_mm = corners_mm.min(axis=0)
    shape = tuple(np.ceil((np.ptp(corners_mm, axis=0)) / spacing_mm - 1e-6).astype(int) + 1)
    grid = Volume(np.empty(shape, dtype=np.float32), origin_mm, spacing_mm)
    by_index = np.linalg.inv(affine) @ grid.affine
    values = ndimage.affine_transform(smooth, by_index[:3, :3], by_index[:3, 3], output_shape=shape, order=1)
    return grid.with_values(values)
