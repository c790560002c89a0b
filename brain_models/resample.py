"""Trilinear resampling of a scan grid onto a brain space, as one sparse matrix used for all frames.

Promise: W = T G, trilinear sampling T after a Gaussian G of FWHM sqrt(target^2 - source^2) along every axis where the
target is coarser (nothing aliases); a plain index when the grids coincide. Follows scipy.ndimage conventions.
"""

from functools import lru_cache

import numpy as np
from scipy import sparse

from brain_models.nifti import ScanHeader
from brain_models.space import BrainSpace, require_grid

FWHM_PER_SIGMA = 2.354820045
VOXELS_A_BLOCK = 1 << 16  # bounds the memory of building the matrix


class Resampler:
    """Maps [source voxel, frame] arrays of one grid to [voxel, frame] of one space; False in `is_covered`: outside."""

    def __init__(self, affine: np.ndarray, shape: tuple[int, int, int], space: BrainSpace) -> None:
        to_source = np.linalg.inv(affine)
        coordinates = space.positions_mm.astype(np.float64) @ to_source[:3, :3].T + to_source[:3, 3]
        coordinates = np.where(np.abs(coordinates - np.rint(coordinates)) < 1e-3, np.rint(coordinates), coordinates)
        upper = np.array(shape) - 1
        self.is_covered = np.all((coordinates >= -0.5) & (coordinates <= upper + 0.5), axis=1)
        coordinates = np.clip(coordinates, 0, upper)
        sigmas = _sigmas_voxels(affine, space)
        self.index: np.ndarray | None = None
        self.matrix: sparse.csr_matrix | None = None
        if not sigmas.any() and np.array_equal(coordinates, np.rint(coordinates)):
            self.index = np.ravel_multi_index(tuple(coordinates.astype(np.int64).T), shape, order="F")
        else:
            blocks = [
                _matrix(coordinates[start : start + VOXELS_A_BLOCK], sigmas, shape)
                for start in range(0, len(coordinates), VOXELS_A_BLOCK)
            ]
            self.matrix = sparse.vstack(blocks, format="csr")

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Returns [frame, voxel] float32 from [frame, source voxel] (Fortran order of the grid)."""
        if self.index is not None:
            return np.take(frames, self.index, axis=1)
        assert self.matrix is not None
        return np.ascontiguousarray((self.matrix @ np.ascontiguousarray(frames.T)).T)


def resampler_for(header: ScanHeader, space: BrainSpace) -> Resampler:
    """Returns the resampler of a scan's grid; the last few are kept, a data set usually has one or two grids."""
    return _cached(header.affine.tobytes(), header.shape, _Keyed(space))


class _Keyed:
    """A space that hashes by its fingerprint."""

    def __init__(self, space: BrainSpace) -> None:
        self.space = space

    def __hash__(self) -> int:
        return hash(self.space.fingerprint)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Keyed) and other.space.fingerprint == self.space.fingerprint


@lru_cache(maxsize=4)
def _cached(affine: bytes, shape: tuple[int, int, int], keyed: _Keyed) -> Resampler:
    return Resampler(np.frombuffer(affine, dtype=np.float64).reshape(4, 4), shape, keyed.space)


def _sigmas_voxels(affine: np.ndarray, space: BrainSpace) -> np.ndarray:
    source_mm = np.linalg.norm(affine[:3, :3], axis=0)
    target_mm = space.spacing_mm if require_grid(space) else 0.0
    fwhm_mm = np.sqrt(np.clip(target_mm**2 - source_mm**2, 0, None))
    sigmas = fwhm_mm / FWHM_PER_SIGMA / source_mm
    return np.where(sigmas < 0.05, 0.0, sigmas)  # a rounding of the spacing is no coarsening


def _axis_weights(coordinate: np.ndarray, sigma: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns indices and weights [voxel, tap] along one axis: trilinear of the Gaussian-smoothed line."""
    radius = int(np.ceil(3 * sigma))
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2) if sigma > 0 else np.ones(1)
    kernel /= kernel.sum()
    base = np.clip(np.floor(coordinate), 0, max(size - 2, 0)).astype(np.int64)
    fraction = (coordinate - base)[:, None]
    padded = np.pad(kernel, (1, 1))
    weights = (1 - fraction) * padded[1:][None] + fraction * padded[:-1][None]
    indices = base[:, None] + np.arange(-radius, radius + 2)[None]
    is_inside = (indices >= 0) & (indices < size)
    weights = np.where(is_inside, weights, 0.0)
    return np.clip(indices, 0, size - 1), weights / weights.sum(axis=1, keepdims=True)


def _matrix(coordinates: np.ndarray, sigmas: np.ndarray, shape: tuple[int, int, int]) -> sparse.csr_matrix:
    indices, weights = zip(
        *(_axis_weights(coordinates[:, axis], float(sigmas[axis]), shape[axis]) for axis in range(3)), strict=True
    )
    strides = (1, shape[0], shape[0] * shape[1])  # Fortran order
    columns = (
        indices[0][:, :, None, None] * strides[0]
        + indices[1][:, None, :, None] * strides[1]
        + indices[2][:, None, None, :] * strides[2]
    ).reshape(len(coordinates), -1)
    values = np.einsum("vi,vj,vk->vijk", *weights).reshape(len(coordinates), -1).astype(np.float32)
    pointers = np.arange(len(coordinates) + 1) * columns.shape[1]
    matrix = sparse.csr_matrix(
        (values.ravel(), columns.ravel(), pointers), shape=(len(coordinates), int(np.prod(shape)))
    )
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return matrix
