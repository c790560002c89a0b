"""Trilinear resampling of a scan grid onto a brain space: sparse matrices for all frames, or frame by frame.

Promise: W = T G, trilinear sampling T after a Gaussian G of FWHM sqrt(target^2 - source^2) along every axis where the
target is coarser (nothing aliases); a plain index when the grids coincide. Follows scipy.ndimage conventions. Both ways
compute the same W: matrices pay off over many frames; for one 0.7 mm image they would need gigabytes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float32
from scipy import ndimage, sparse

from brain_models.errors import ScanError
from brain_models.nifti import ScanHeader, in_scan_units
from brain_models.space import BrainSpace, require_grid
from brain_models.transform import Transform, apply_matrix

FWHM_PER_SIGMA = 2.354820045
VOXELS_A_BLOCK = 1 << 16  # bounds the memory of building the matrices
VOXELS_A_PIECE = 1 << 9  # resampled at a time: a few hundred frames of them stay in the cache
VALUES_A_PIECE = 1 << 17  # computed at a time where nothing is resampled
HELD_AS_STORED_BYTES = 2  # wider types are held as float32, which is what they become


@dataclass(frozen=True)
class VoxelBlock:
    """Consecutive voxels of a space, and the rows of a held scan that they are the weighted sums of."""

    voxels: slice
    rows: slice | np.ndarray
    weights: sparse.csr_matrix | None  # [voxel, row]; None: the rows themselves


@dataclass(frozen=True)
class HeldScan:
    """What is held of a scan, as its file stores it: far less than its values on a finer space."""

    rows: np.ndarray  # [row, time]
    pieces: Sequence[VoxelBlock]
    slope: float = 1.0
    intercept: float = 0.0

    def block(self, piece: VoxelBlock) -> Float32[np.ndarray, "voxel time"]:
        """Returns the frames of a piece's voxels in scan units, a new array each time."""
        rows = self.rows[piece.rows].astype(np.float32, order="C")
        voxels = rows if piece.weights is None else piece.weights @ rows
        return in_scan_units(voxels, self.slope, self.intercept)


def direct_pieces(num_voxels: int, num_frames: int) -> list[VoxelBlock]:
    """Returns the pieces of a space whose voxels are the rows."""
    return [VoxelBlock(block, block, None) for block in _blocks(num_voxels, max(VALUES_A_PIECE // num_frames, 1))]


def _blocks(num_voxels: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, num_voxels)) for start in range(0, num_voxels, size)]


class Resampler:
    """Holds runs of one grid so that one space can be computed of them; False in `is_covered`: outside the grid.

    `sources` are the source voxels that are needed at all: about a third of a scan.
    """

    def __init__(self, affine: np.ndarray, shape: tuple[int, int, int], space: BrainSpace) -> None:
        coordinates, self.is_covered = _coordinates(affine, shape, space.positions_mm.astype(np.float64))
        sigmas = _sigmas_voxels(affine, space)
        index = _index(coordinates, sigmas, shape)
        self.sources, self.pieces = (index, []) if index is not None else _weighted(coordinates, sigmas, shape)
        self.num_voxels = space.num_voxels

    def hold(self, blocks: Iterable[np.ndarray], num_frames: int) -> HeldScan:
        """Returns the run of blocks [frame, source voxel] of any type, source voxels in Fortran order of the grid.

        Sources are held, or voxels where they are fewer.
        """
        is_finer = len(self.sources) > self.num_voxels
        pieces = direct_pieces(self.num_voxels, num_frames) if is_finer or not self.pieces else self.pieces
        rows, done = np.empty((0, 0)), 0
        for block in blocks:
            if not rows.size:
                is_narrow = block.itemsize <= HELD_AS_STORED_BYTES and not is_finer
                held_as = block.dtype.newbyteorder("=") if is_narrow else np.dtype(np.float32)
                rows = np.empty((min(len(self.sources), self.num_voxels), num_frames), dtype=held_as)
            needed = block.take(self.sources, axis=1).T
            rows[:, done : done + len(block)] = self._voxels(needed) if is_finer else needed
            done += len(block)
        return HeldScan(rows, pieces)

    def _voxels(self, needed: np.ndarray) -> np.ndarray:
        held = HeldScan(needed, self.pieces)
        return np.concatenate([held.block(piece) for piece in held.pieces])


def _weighted(
    coordinates: np.ndarray, sigmas: np.ndarray, shape: tuple[int, int, int]
) -> tuple[np.ndarray, list[VoxelBlock]]:
    """Returns the source voxels that have a weight, which the rows of a held scan are, and the pieces."""
    blocks = [_matrix(coordinates[block], sigmas, shape) for block in _blocks(len(coordinates), VOXELS_A_BLOCK)]
    matrix, sources = _without_empty_columns(sparse.vstack(blocks, format="csr"))
    pieces = []
    for block in _blocks(len(coordinates), VOXELS_A_PIECE):
        weights, rows = _without_empty_columns(matrix[block])
        pieces.append(VoxelBlock(block, rows, weights))
    return sources, pieces


def _without_empty_columns(matrix: sparse.csr_matrix) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Returns the matrix of the columns that hold something, and which they were."""
    is_used = np.zeros(matrix.shape[1], dtype=bool)
    is_used[matrix.indices] = True
    used = np.flatnonzero(is_used)
    columns = (np.cumsum(is_used, dtype=np.int32) - 1)[matrix.indices]
    return sparse.csr_matrix((matrix.data, columns, matrix.indptr), shape=(matrix.shape[0], len(used))), used


class FrameResampler:
    """The same for single images and runs whose head moved: each frame is smoothed, then sampled at its own points.

    False in `is_covered`: outside the field of view in at least one of the frames seen so far.
    """

    def __init__(self, header: ScanHeader, space: BrainSpace, transform: Transform | None) -> None:
        self.affine, self.shape = header.affine, header.shape
        self.points_mm = space.positions_mm.astype(np.float64)
        self.motion: np.ndarray | None = None
        in_template = header.affine
        if transform is not None:
            self.points_mm = transform.to_scan_mm(self.points_mm)
            self.motion = transform.motion
            in_template = transform.scan_to_template @ header.affine
        self.coordinates, self.is_covered = _coordinates(self.affine, self.shape, self.points_mm)
        self.sigmas = _sigmas_voxels(in_template, space)
        self.index = _index(self.coordinates, self.sigmas, self.shape) if self.motion is None else None

    def hold(self, blocks: Iterable[np.ndarray], num_frames: int) -> HeldScan:
        """Returns the scan of blocks [frame, source voxel], in Fortran order of the grid; its rows are the voxels."""
        rows = np.empty((len(self.points_mm), num_frames), dtype=np.float32)
        for number, frame in enumerate(frame for block in blocks for frame in block):
            if self.index is not None:
                rows[:, number] = frame.take(self.index)
                continue
            image = frame.astype(np.float32, copy=False).reshape(self.shape, order="F")
            rows[:, number] = _sample(image, self._coordinates_in_frame(number), self.sigmas)
        return HeldScan(rows, direct_pieces(*rows.shape))

    def _coordinates_in_frame(self, frame: int) -> np.ndarray:
        if self.motion is None:
            return self.coordinates
        points_mm = apply_matrix(self.motion[frame], self.points_mm)
        coordinates, is_covered = _coordinates(self.affine, self.shape, points_mm)
        self.is_covered &= is_covered
        return coordinates


def resampler_for(
    header: ScanHeader, space: BrainSpace, transform: Transform | None = None
) -> Resampler | FrameResampler:
    """Returns the resampler of a scan. ScanError when `transform` holds motion of another number of frames."""
    if transform is not None and transform.motion is not None and len(transform.motion) != header.num_frames:
        raise ScanError(
            f"{header.path} has {header.num_frames} frames, its stored transform has motion of "
            f"{len(transform.motion)}; delete the transform and register the scan again"
        )
    if transform is None and header.num_frames > 1:
        return grid_resampler(header.affine, header.shape, space)
    return FrameResampler(header, space, transform)


def grid_resampler(affine: np.ndarray, shape: tuple[int, int, int], space: BrainSpace) -> Resampler:
    """Returns the resampler of a grid; those of the last few are kept, a data set usually has one or two."""
    return _cached(affine.tobytes(), shape, space)


@lru_cache(maxsize=4)
def _cached(affine: bytes, shape: tuple[int, int, int], space: BrainSpace) -> Resampler:
    return Resampler(np.frombuffer(affine, dtype=np.float64).reshape(4, 4), shape, space)


def _coordinates(
    affine: np.ndarray, shape: tuple[int, int, int], points_mm: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns voxel coordinates [voxel, 3] of points, clipped to the grid, and which lie in its field of view."""
    coordinates = apply_matrix(np.linalg.inv(affine), points_mm)
    coordinates = np.where(np.abs(coordinates - np.rint(coordinates)) < 1e-3, np.rint(coordinates), coordinates)
    upper = np.array(shape) - 1
    is_covered = np.all((coordinates >= -0.5) & (coordinates <= upper + 0.5), axis=1)
    return np.clip(coordinates, 0, upper), is_covered


def _index(coordinates: np.ndarray, sigmas: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray | None:
    """Returns the source voxel of each voxel where the grids coincide, else None."""
    if sigmas.any() or not np.array_equal(coordinates, np.rint(coordinates)):
        return None
    return np.ravel_multi_index(tuple(coordinates.astype(np.int64).T), shape, order="F")


def _sample(image: np.ndarray, coordinates: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """Returns one image [voxel]: the rows of `_matrix` without building them; weights add up to 1 at the edges too."""
    weights = np.ones(len(coordinates))
    for axis, sigma in enumerate(sigmas):
        if sigma > 0:
            radius = int(np.ceil(3 * sigma))
            smooth = {"sigma": float(sigma), "mode": "constant", "radius": radius}
            image = ndimage.gaussian_filter1d(image, axis=axis, **smooth)
            line = ndimage.gaussian_filter1d(np.ones(image.shape[axis]), **smooth)
            weights *= np.interp(coordinates[:, axis], np.arange(len(line)), line)
    return (ndimage.map_coordinates(image, coordinates.T, order=1, mode="nearest") / weights).astype(np.float32)


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
