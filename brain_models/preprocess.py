"""Scan -> packed array -> stored array: the one code path used by the sharder and by the served model.

Promise: training and serving see the same numbers, because both call the functions of this file (and of cleaning.py in
between). What the field of view did not cover, what never varies and what is not finite is marked not measured, never
filled in.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float16, Float32, Int8, UInt8

from brain_models.errors import ScanError
from brain_models.nifti import ScanHeader, read_header, stream_frames, stream_stored
from brain_models.recipe import NOT_MEASURED, UNITS_PER_SCALE, BoldType, UnknownOrientation
from brain_models.resample import HeldScan, VoxelBlock, direct_pieces, resampler_for
from brain_models.space import NO_TEMPLATE, BrainSpace
from brain_models.transform import Transform

CLIP_AT = 6.0
MAD_TO_SIGMA = 1.4826  # of a Gaussian
BRIGHTEST_PERCENT = 99.0  # of a head: fat and vessels beyond it must not pull its centre

Cleaner = Callable[[np.ndarray], np.ndarray]  # [voxel, time] float32 -> the same shape; may overwrite what it is given


@dataclass(frozen=True)
class PackedScan:
    """A scan on a space, in scan units; True in `is_measured` where covered.

    Its values are computed a piece of the space at a time, from what is held of its file: all of them at once would be
    several times as much memory, and touching that is slower than computing.
    """

    held: HeldScan
    is_measured: Bool[np.ndarray, "voxel"]
    header: ScanHeader
    cleaner: Cleaner | None = None  # what becomes of a block's measured voxels

    @classmethod
    def of_values(
        cls, values: Float32[np.ndarray, "time voxel"], is_measured: Bool[np.ndarray, "voxel"], header: ScanHeader
    ) -> "PackedScan":
        """Returns the scan that has these values."""
        return cls(HeldScan(values.T, direct_pieces(*values.T.shape)), is_measured, header)

    @property
    def num_frames(self) -> int:
        """Returns 1 for a T1."""
        return self.held.rows.shape[1]

    @property
    def values(self) -> Float32[np.ndarray, "time voxel"]:
        """Returns all values, computed anew each time; 0.0 where not measured."""
        by_voxel = np.empty((len(self.is_measured), self.num_frames), dtype=np.float32)
        for piece in self.held.pieces:
            by_voxel[piece.voxels] = self.block(piece)
        return by_voxel.T

    def block(self, piece: VoxelBlock) -> Float32[np.ndarray, "voxel time"]:
        """Returns the values of a piece's voxels, a new array each time; 0.0 where not measured."""
        voxels = self.held.block(piece)
        voxels[~self.is_measured[piece.voxels]] = 0.0
        return voxels if self.cleaner is None else self.cleaner(voxels)


@dataclass(frozen=True)
class StandardisedRun:
    """A BOLD run as it is stored: x = mean + scale * quantised / 21, -128 where not measured; or, as float16,
    x = mean + scale * quantised, NaN where not measured."""

    mean: Float32[np.ndarray, "voxel"]
    scale: Float32[np.ndarray, "voxel"]
    quantised: Int8[np.ndarray, "time voxel"] | Float16[np.ndarray, "time voxel"]
    clipped_fraction: Float32[np.ndarray, "time"]

    @property
    def is_measured(self) -> Bool[np.ndarray, "voxel"]:
        return measured(self.quantised)


@dataclass(frozen=True)
class StandardisedT1:
    """A T1 as it is stored: x = mean + std * values; NaN where not measured."""

    values: Float16[np.ndarray, "voxel"]
    mean: float
    std: float


def pack_bold(
    path: Path | str,
    space: BrainSpace,
    *,
    brain_mask: Path | None,
    transform: Transform | None = None,
    unknown_orientation: UnknownOrientation = "refuse",
) -> PackedScan:
    """Returns a run on `space`; voxels outside `brain_mask` (a NIfTI file) count as not measured.

    A raw run needs its `transform`: each frame is then sampled once, at the points its head had moved to.
    """
    header = read_header(path, "bold")
    _require_orientation(header, unknown_orientation)
    return _pack(header, space, brain_mask, transform)


def pack_t1(
    path: Path | str,
    space: BrainSpace,
    *,
    brain_mask: Path | None,
    transform: Transform | None = None,
    unknown_orientation: UnknownOrientation = "refuse",
) -> PackedScan:
    """Returns a T1 on `space` as one frame; voxels outside `brain_mask` (a NIfTI file) count as not measured.

    A raw T1 needs its `transform`; the mask lies in the scan's own space. On a space without a template (t1_cube128)
    the scan is moved so that the head's centre of mass is the space's middle.
    """
    header = read_header(path, "t1w")
    _require_orientation(header, unknown_orientation)
    if space.template == NO_TEMPLATE:
        if brain_mask is not None or transform is not None:
            raise ScanError(
                f"{header.path}: space {space.name} is a cube around each head as it lies in its scan; give neither a "
                "brain mask nor a transform with it"
            )
        header = centred(header)
    return _pack(header, space, brain_mask, transform)


def centred(header: ScanHeader) -> ScanHeader:
    """Returns the header of a T1 with its millimetres moved so that the head's centre of mass is 0, 0, 0.

    That is the mean position of the voxels brighter than the volume's mean, weighted by intensities that are clipped at
    their 99th percentile. Air lies below that mean in any head scan.
    """
    volume = next(stream_frames(header))[0].astype(np.float64).reshape(header.shape, order="F")
    volume = np.where(np.isfinite(volume), volume, 0.0)
    is_head = volume > volume.mean()
    if not is_head.any():
        raise ScanError(f"{header.path}: all voxels have the same value; this is not a T1 image")
    weights = np.where(is_head, np.minimum(volume, np.percentile(volume[is_head], BRIGHTEST_PERCENT)), 0.0)
    sums = [weights.sum(axis=tuple({0, 1, 2} - {axis})) for axis in range(3)]
    index = np.array([(np.arange(len(along)) * along).sum() / along.sum() for along in sums])
    affine = header.affine.copy()
    affine[:3, 3] -= header.affine[:3, :3] @ index + header.affine[:3, 3]
    return replace(header, affine=affine)


def _require_orientation(header: ScanHeader, policy: UnknownOrientation) -> None:
    if not header.has_orientation and policy == "refuse":
        raise ScanError(
            f"{header.path}: sform and qform codes are 0: left and right are unknown; restore the geometry, or take "
            "the axes as they are stored (right to left, back to front, up) by unknown_orientation=accept_as_stored"
        )


def _pack(header: ScanHeader, space: BrainSpace, brain_mask: Path | None, transform: Transform | None) -> PackedScan:
    resampler = resampler_for(header, space, transform)
    is_measured = resampler.is_covered.copy()
    if brain_mask is not None:
        mask_header = read_header(brain_mask, "t1w")
        mask = next(stream_frames(mask_header))
        at_rest = transform and replace(transform, motion=None)
        mask_resampler = resampler_for(mask_header, space, at_rest)
        inside = mask_resampler.hold([mask > 0], 1).rows[:, 0] > 0.5
        is_measured &= mask_resampler.is_covered & inside
    if not is_measured.any():
        raise ScanError(
            f"{header.path}: covers no voxel of space {space.name}; check its space entity and the mask {brain_mask}"
        )
    held = resampler.hold(stream_stored(header), header.num_frames)
    held = replace(held, slope=header.slope, intercept=header.intercept)
    is_measured &= resampler.is_covered
    if header.dtype.kind == "f":  # integers are finite
        for piece in held.pieces:
            is_measured[piece.voxels] &= np.isfinite(held.block(piece)).all(axis=1)
    return PackedScan(held, is_measured, header)


def standardise_bold(packed: PackedScan, *, stored_as: BoldType = "int8") -> StandardisedRun:
    """Returns the run in robust units: (x - mean) / (1.4826 * median absolute deviation), clipped at 6; int8 in 1/21.

    A voxel that never varies is not measured. ScanError when no voxel varies.
    """
    num_frames, num_voxels = packed.num_frames, len(packed.is_measured)
    mean = np.zeros(num_voxels, dtype=np.float32)
    scale = np.zeros(num_voxels, dtype=np.float32)
    quantised = np.empty((num_frames, num_voxels), dtype=stored_as)
    num_clipped = np.zeros(num_frames, dtype=np.int64)
    for piece in packed.held.pieces:
        block = packed.block(piece)
        means, scales, furthest = _centre(block)
        varies = packed.is_measured[piece.voxels] & (scales > 1e-6 * np.abs(means)) & (scales > 0)
        scales[~varies] = 1
        if (is_far := varies & (furthest > CLIP_AT * scales)).any():
            num_clipped += (np.abs(block[is_far]) > CLIP_AT * scales[is_far, None]).sum(axis=0)
        quantised[:, piece.voxels] = _coded(block, scales, varies, stored_as).T
        mean[piece.voxels], scale[piece.voxels] = np.where(varies, means, 0), np.where(varies, scales, 0)
    num_measured = int((scale > 0).sum())
    if num_measured == 0:
        raise ScanError(f"{packed.header.path}: no voxel varies over time; this is not a BOLD run")
    return StandardisedRun(mean, scale, quantised, (num_clipped / num_measured).astype(np.float32))


def _coded(
    centred: Float32[np.ndarray, "voxel time"],
    scales: Float32[np.ndarray, "voxel"],
    varies: Bool[np.ndarray, "voxel"],
    stored_as: BoldType,
) -> np.ndarray:
    """Returns the clipped units as they are stored; `centred` is overwritten."""
    units_per_scale = UNITS_PER_SCALE if stored_as == "int8" else 1
    units = np.multiply(centred, (units_per_scale / scales)[:, None], out=centred)
    np.clip(units, -CLIP_AT * units_per_scale, CLIP_AT * units_per_scale, out=units)
    coded = (np.rint(units, out=units) if stored_as == "int8" else units).astype(stored_as)
    coded[~varies] = NOT_MEASURED if stored_as == "int8" else np.nan
    return coded


def standardise_t1(packed: PackedScan) -> StandardisedT1:
    """Returns (x - mean) / std over the measured voxels, float16; NaN where not measured."""
    image = packed.values[0]
    measured = image[packed.is_measured].astype(np.float64)
    mean, std = float(measured.mean()), float(measured.std())
    if std <= 1e-6 * abs(mean) or std == 0:
        raise ScanError(f"{packed.header.path}: all voxels have the same value {mean}; this is not a T1 image")
    values = np.where(packed.is_measured, (image - mean) / std, np.nan)
    return StandardisedT1(values.astype(np.float16), mean, std)


def dequantise(quantised: Int8[np.ndarray, "*shape"] | Float16[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """Returns values in robust units; 0.0 where not measured."""
    if quantised.dtype == np.float16:
        return np.nan_to_num(quantised.astype(np.float32))
    return _DEQUANTISED[quantised.view(np.uint8)]


def measured(
    quantised: Int8[np.ndarray, "time voxel"] | Float16[np.ndarray, "time voxel"],
) -> Bool[np.ndarray, "voxel"]:
    """Returns which voxels of a stored run were measured."""
    return ~np.isnan(quantised[0]) if quantised.dtype == np.float16 else quantised[0] != NOT_MEASURED


def dvars(run: StandardisedRun) -> Float32[np.ndarray, "time"]:
    """Returns the root mean square change from the frame before, over measured voxels, in robust units; first NaN."""
    squares = np.empty(len(run.quantised))
    units = 1.0 if run.quantised.dtype == np.float16 else UNITS_PER_SCALE
    before = _stored_units(run.quantised[0])
    for number, frame in enumerate(run.quantised):
        values = _stored_units(frame)
        before -= values  # the same code in every frame where nothing was measured: no change
        squares[number], before = before @ before, values
    squares[0] = np.nan
    return (np.sqrt(squares / run.is_measured.sum()) / units).astype(np.float32)


def _stored_units(frame: Int8[np.ndarray, "voxel"] | Float16[np.ndarray, "voxel"]) -> Float32[np.ndarray, "voxel"]:
    values = frame.astype(np.float32)
    return np.nan_to_num(values, copy=False) if frame.dtype == np.float16 else values


def _centre(
    voxels: Float32[np.ndarray, "voxel time"],
) -> tuple[Float32[np.ndarray, "voxel"], Float32[np.ndarray, "voxel"], Float32[np.ndarray, "voxel"]]:
    """Returns mean, scale and largest distance from the mean of every voxel; its mean is taken off `voxels`, in place.

    The scale is 1.4826 * MAD; the standard deviation where more than half the frames share one value. Sorted whole:
    numpy's vectorised sort is ten times as fast as its median, which selects twice.
    """
    num_frames = voxels.shape[1]
    lower, upper = (num_frames - 1) // 2, num_frames // 2
    ascending = np.sort(voxels, axis=1)
    medians = (ascending[:, lower] + ascending[:, upper]) / 2
    ascending -= medians[:, None]  # what is left is small, so that sums in float32 lose nothing
    means = medians + np.einsum("vt->v", ascending) / num_frames  # three times as fast as mean()
    voxels -= means[:, None]
    distances = np.abs(ascending, out=ascending)
    scales = np.float32(MAD_TO_SIGMA) * (_nearest(distances, lower) + _nearest(distances, upper)) / 2
    if (is_flat := scales == 0).any():
        scales[is_flat] = voxels[is_flat].std(axis=1)
    furthest = np.maximum(distances[:, 0], distances[:, -1]) + np.abs(means - medians)
    return means, scales, furthest


def _nearest(distances: Float32[np.ndarray, "voxel time"], number: int) -> Float32[np.ndarray, "voxel"]:
    """Returns the `number`-th smallest distance (from 0) of rows that fall and then rise.

    The smaller ones are its neighbours: it is the outermost of the tightest group of their count. Faster than sorting.
    """
    num_groups = distances.shape[1] - number
    return np.maximum(distances[:, :num_groups], distances[:, number:]).min(axis=1)


def _dequantised_table() -> Float32[np.ndarray, "code"]:
    codes: UInt8[np.ndarray, "code"] = np.arange(256, dtype=np.uint8)
    signed = codes.view(np.int8).astype(np.float32)
    return np.where(signed == NOT_MEASURED, 0, signed / UNITS_PER_SCALE).astype(np.float32)


_DEQUANTISED = _dequantised_table()
