"""What a scan becomes that is neither volume run nor T1: region series, responses to images; and how surfaces are read.

Called by packing.py for the kinds it does not know itself.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from brain_models.atlas import Atlas
from brain_models.cleaning import CleanedRun
from brain_models.errors import ScanError
from brain_models.preprocess import PackedScan, standardise_bold
from brain_models.space import BrainSpace
from brain_models.surface_scans import pack_cifti, pack_gifti
from data_sharding import schema
from data_sharding.checksums import crc32_of_frames
from data_sharding.write.packing import (
    PackContext,
    Packed,
    PackRequest,
    cleaned_run,
    frame_table,
    json_bytes,
    npy_bytes,
    quality_fields,
    require_accepted,
)
from data_sharding.write.quality import region_coverage, run_quality, scan_quality

MAX_PIXELS = 1 << 26  # an image that claims more is no stimulus
SIDES = ("left", "right")
STANDARDISED = (0.05, 20.0)  # deviations over vertices of responses that were z-scored


def pack_surface_run(request: PackRequest, space: BrainSpace) -> PackedScan:
    """A BOLD run on a surface space, from a CIFTI series or a pair of GIFTI files."""
    if "right" in request.files:
        return pack_gifti(request.path, request.files["right"], space)
    return pack_cifti(request.path, space)


def pack_parcels(request: PackRequest, context: PackContext) -> Packed:
    """The series of every region of the set's first atlas: means over what was measured of it, cleaned like the run."""
    if not context.atlases:
        raise ScanError(f"{request.path}: region series need an atlas; set atlas=, or take parcels out of source.kinds")
    atlas = next(iter(context.atlases.values()))
    run = cleaned_run(request, context)
    stored = standardise_bold(run.packed, stored_as=context.settings.bold_type)
    frames = frame_table(run, stored)
    regions = region_coverage({atlas.name: atlas}, run.packed.is_measured)
    quality = run_quality(run, stored, frames[:, 1], regions)
    require_accepted(quality, request, context)
    if run.is_kept.sum() < 2:
        raise ScanError(
            f"{request.path}: {run.is_kept.sum()} of its frames are not censored, too few for region series"
        )
    series, mean, scale = region_series(run, atlas)
    about = {
        "repetition_time_s": request.repetition_time_s,
        "atlas": atlas.name,
        "region_ids": atlas.region_ids,
        **quality_fields(quality),
    }
    entry = {
        "__key__": schema.stats_key(request.scan_id),
        schema.PARCELS: npy_bytes(series),
        schema.CRC: npy_bytes(crc32_of_frames(series)),
        schema.REGION_MEAN: npy_bytes(mean),
        schema.REGION_SCALE: npy_bytes(scale),
        schema.FRAMES: npy_bytes(frames),
        schema.META: json_bytes(request, context.space, about),
    }
    return Packed(iter([(entry, 0, len(series))]), quality, regions)


def region_series(run: CleanedRun, atlas: Atlas) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Z-scored float16 [time, region] with float32 mean and deviation [region]; NaN where nothing was measured.

    Censored frames are there, as they are among the voxels, but mean and deviation are those of the others.
    """
    means = atlas.region_means(run.packed.values, run.packed.is_measured).astype(np.float64)
    mean, scale = means[run.is_kept].mean(axis=0), means[run.is_kept].std(axis=0)
    varies = scale > 1e-6 * np.abs(mean)
    series = np.where(varies, (means - mean) / np.where(varies, scale, 1), np.nan)
    return series.astype(np.float16), mean.astype(np.float32), scale.astype(np.float32)


def pack_response(request: PackRequest, context: PackContext) -> Packed:
    """An image as it is, and the response to it at every vertex of the space as released; NaN where there is none.

    Nothing is fitted to the responses here, so no split can leak: they have to be standardised already.
    """
    image = Path(request.path).read_bytes()
    require_png(image, request.path)
    betas = np.concatenate([_row(Path(request.files[side]), request.row) for side in SIDES])
    if len(betas) != context.space.num_voxels:
        raise ScanError(
            f"{request.files['left']}: {len(betas)} vertices in both hemispheres, space {context.space.name} has "
            f"{context.space.num_voxels}; take the space of this subject"
        )
    is_measured = np.isfinite(betas)
    deviation = float(betas[is_measured].std()) if is_measured.any() else 0.0
    if not STANDARDISED[0] <= deviation <= STANDARDISED[1]:
        raise ScanError(
            f"{request.files['left']}: row {request.row} has a deviation of {deviation:.3g} over vertices; responses "
            "are stored as float16 and must be standardised: z-score every vertex within its session first"
        )
    regions = region_coverage(context.atlases, is_measured)
    quality = scan_quality(is_measured, regions)
    require_accepted(quality, request, context)
    stored = betas.astype(np.float16)[None]
    entry = {
        "__key__": schema.stats_key(request.scan_id),
        schema.IMAGE: image,
        schema.BETAS: npy_bytes(stored),
        schema.CRC: npy_bytes(crc32_of_frames(stored)),
        schema.META: json_bytes(request, context.space, {"stimulus": request.stimulus, **quality_fields(quality)}),
    }
    return Packed(iter([(entry, 0, 1)]), quality, regions)


def require_png(data: bytes, path: str) -> None:
    """ScanError unless the bytes are a whole PNG image of a plausible size."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ScanError(f"{path}: states {image.width}x{image.height} pixels; give the stimulus itself")
            image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, zlib.error) as error:
        raise ScanError(f"{path}: not a readable PNG image ({error}); fetch or convert it again") from error


def _row(path: Path, row: int) -> np.ndarray:
    """float32 [vertex]: one row of a .npy of responses, without reading the others."""
    try:
        responses = np.load(path, mmap_mode="r", allow_pickle=False)
        return np.asarray(responses[row], dtype=np.float32)
    except (OSError, ValueError, EOFError, IndexError, TypeError) as error:
        raise ScanError(f"{path}: row {row} cannot be read ({error}); fetch the file again") from error


PACK: dict[str, Callable[[PackRequest, PackContext], Packed]] = {"parcels": pack_parcels, "response": pack_response}
