"""One scan -> its tar members: the only code that decides what bytes a scan becomes.

Reading order: `write_segment`, then one function per kind of scan, then what the kinds share.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from PIL import Image, UnidentifiedImageError

from brain_models.atlas import Atlas
from brain_models.cleaning import CleanedRun, clean_bold
from brain_models.errors import ScanError
from brain_models.preprocess import (
    PackedScan,
    StandardisedRun,
    dvars,
    pack_bold,
    pack_t1,
    standardise_bold,
    standardise_t1,
)
from brain_models.recipe import BoldType, CleaningConfig
from brain_models.space import BrainSpace
from brain_models.surface_scans import pack_cifti, pack_gifti
from brain_models.transform import Transform
from data_sharding import schema
from data_sharding.config import AcceptanceConfig
from data_sharding.scans import NEVER_IN_A_KEY, Scan
from data_sharding.write.quality import ScanQuality, region_coverage, run_quality, scan_quality, why_refused

WRITE_BYTES = 1 << 20
MAX_PIXELS = 1 << 26  # a header that states more is not that of a stimulus
SIDES = ("left", "right")
STANDARDISED = (0.05, 20.0)  # deviations over vertices of responses that were z-scored


@dataclass
class PackSettings:
    """What packing does to every scan of a set."""

    chunk_frames: int
    bold_type: BoldType
    cleaning: CleaningConfig
    acceptance: AcceptanceConfig
    series_atlas: str | None  # of the regions whose series are stored: the first of the set's


@dataclass(frozen=True)
class PackContext:
    """What all scans of a set have in common."""

    space: BrainSpace
    atlases: dict[str, Atlas]
    settings: PackSettings


Entry = tuple[dict[str, Any], int, int]  # what TarWriter writes, first frame, number of frames


@dataclass
class AcceptedScan:
    """A scan that meets the acceptance rules: the tar entries to write, and its quality."""

    entries: Iterator[Entry]
    quality: ScanQuality
    regions: dict[str, float]  # measured share by <atlas>/<label>


def write_segment(scan: Scan, context: PackContext, path: Path) -> dict[str, Any]:
    """The scan's segment of a tar, written to `path`: what its receipt holds of it, as JSON values.

    `members` are rows of the index, their offsets from the segment's start; `num_bytes` are without the end mark that
    follows them in a file of their own. Raises ScanError where the scan cannot be packed or accepted.
    """
    from webdataset.writer import TarWriter  # imports torch where there is one: a second that no planning needs

    accepted = PACK[scan.kind](scan, context)
    members: list[dict[str, Any]] = []
    position = 0
    owner = {"user": schema.TAR_OWNER, "group": schema.TAR_OWNER}
    # tarfile writes 10 KiB at a time, which takes the system three times as long.
    with path.open("wb", buffering=WRITE_BYTES) as file, TarWriter(file, mtime=0, encoder=False, **owner) as writer:
        for entry, first_frame, num_frames in accepted.entries:
            key = entry["__key__"]
            assert not NEVER_IN_A_KEY.search(key), key
            checksums = entry[schema.CRC][schema.NPY_HEADER_BYTES :].hex() if schema.CRC in entry else ""
            for kind in sorted(kind for kind in entry if kind != "__key__"):
                name, data = f"{key}.{kind}", entry[kind]
                assert len(name) <= schema.MAX_NAME_LENGTH, name
                members.append(
                    {"member": name, "key": key, "kind": kind}
                    | {"offset": position + schema.TAR_BLOCK_BYTES, "size": len(data), "crc32": schema.crc32(data)}
                    | {"first_frame": first_frame, "num_frames": num_frames}
                    | {"frame_crc32": checksums if kind in schema.CHECKED_BY_FRAME else ""}
                    | {"censored": accepted.quality.censored if kind in (schema.MEAN, schema.PARCELS) else ""}
                )
                position += schema.tar_bytes(len(data))
            writer.write(entry)
            assert writer.tarstream.offset == position, "a tar header took more than one block"
    quality = asdict(accepted.quality)
    return {"members": members, "num_bytes": position, "quality": quality, "regions": accepted.regions}


def _pack_run(scan: Scan, context: PackContext) -> AcceptedScan:
    run, stored, frames = _cleaned_run(scan, context)
    regions = region_coverage(context.atlases, stored.is_measured)
    quality = _accepted(run_quality(run, stored, frames[:, 1], regions), scan, context)
    described = {
        "repetition_time_s": scan.repetition_time_s,
        "num_regressors": len(run.regressors),
        **_quality_fields(quality),
    }
    return AcceptedScan(_run_entries(scan, context, stored, frames, described), quality, regions)


def _run_entries(
    scan: Scan, context: PackContext, run: StandardisedRun, frames: np.ndarray, described: dict[str, Any]
) -> Iterator[Entry]:
    arrays = {schema.MEAN: run.mean, schema.SCALE: run.scale, schema.FRAMES: frames}
    stats = _first_entry(scan, context, described, arrays)
    if scan.events:
        dropped_s = described["num_dropped"] * scan.repetition_time_s
        events = [replace(event, onset_s=event.onset_s - dropped_s) for event in scan.events]
        stats[schema.EVENTS] = schema.padded_json([asdict(event) for event in events])
    yield stats, 0, len(frames)
    for chunk, (first, stop) in enumerate(schema.chunk_bounds(len(frames), context.settings.chunk_frames)):
        values = run.quantised[first:stop]
        entry = {
            "__key__": schema.chunk_key(scan.scan_id, chunk),
            schema.BOLD: npy_bytes(values),
            schema.CRC: npy_bytes(schema.crc32_of_frames(values)),
        }
        yield entry, first, stop - first


def _pack_t1(scan: Scan, context: PackContext) -> AcceptedScan:
    packed = _on_volume(pack_t1, scan, context)
    regions = region_coverage(context.atlases, packed.is_measured)
    quality = scan_quality(packed.is_measured, regions, conflict_mm=packed.header.conflict_mm)
    quality = _accepted(quality, scan, context)
    stored = standardise_t1(packed)
    described = {"mean": stored.mean, "std": stored.std, **_quality_fields(quality)}
    arrays = {schema.T1: stored.values, schema.CRC: schema.crc32_of_frames(stored.values[None])}
    return AcceptedScan(iter([(_first_entry(scan, context, described, arrays), 0, 1)]), quality, regions)


def _pack_parcels(scan: Scan, context: PackContext) -> AcceptedScan:
    """The series of every region of one atlas: means over its measured voxels, cleaned like the run."""
    if context.settings.series_atlas is None:
        raise ScanError(f"{scan.path}: region series need an atlas; set atlas=, or remove parcels from source.kinds")
    atlas = context.atlases[context.settings.series_atlas]
    run, stored, frames = _cleaned_run(scan, context)
    regions = region_coverage({atlas.name: atlas}, run.packed.is_measured)
    quality = _accepted(run_quality(run, stored, frames[:, 1], regions), scan, context)
    if run.is_kept.sum() < 2:
        raise ScanError(f"{scan.path}: {run.is_kept.sum()} of its frames are not censored, too few for region series")
    series, mean, scale = _region_series(run, atlas)
    described = {
        "repetition_time_s": scan.repetition_time_s,
        "atlas": atlas.name,
        "region_ids": atlas.region_ids,
        **_quality_fields(quality),
    }
    arrays = {schema.PARCELS: series, schema.CRC: schema.crc32_of_frames(series), schema.FRAMES: frames}
    arrays |= {schema.REGION_MEAN: mean, schema.REGION_SCALE: scale}
    entry = _first_entry(scan, context, described, arrays)
    return AcceptedScan(iter([(entry, 0, len(series))]), quality, regions)


def _region_series(run: CleanedRun, atlas: Atlas) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Z-scored float16 [time, region] with float32 mean and deviation [region]; NaN where nothing was measured.

    Censored frames are kept, as in voxel data, but do not enter mean and deviation.
    """
    means = atlas.region_means(run.packed.values, run.packed.is_measured).astype(np.float64)
    mean, scale = means[run.is_kept].mean(axis=0), means[run.is_kept].std(axis=0)
    varies = scale > 1e-6 * np.abs(mean)
    series = np.where(varies, (means - mean) / np.where(varies, scale, 1), np.nan)
    return series.astype(np.float16), mean.astype(np.float32), scale.astype(np.float32)


def _pack_response(scan: Scan, context: PackContext) -> AcceptedScan:
    """An unchanged image and the released response to it at every vertex of the space; NaN where there is none.

    Responses must be standardised already: nothing is fitted to them here, so no split can leak.
    """
    image = Path(scan.path).read_bytes()
    _require_png(image, scan.path)
    betas = np.concatenate([_row(Path(scan.files[side]), scan.row) for side in SIDES])
    if len(betas) != context.space.num_voxels:
        raise ScanError(
            f"{scan.files['left']}: {len(betas)} vertices in both hemispheres, space {context.space.name} has "
            f"{context.space.num_voxels}; choose the space of this subject"
        )
    is_measured = np.isfinite(betas)
    deviation = float(betas[is_measured].std()) if is_measured.any() else 0.0
    if not STANDARDISED[0] <= deviation <= STANDARDISED[1]:
        raise ScanError(
            f"{scan.files['left']}: row {scan.row} has a deviation of {deviation:.3g} over vertices; responses "
            "are stored as float16 and must be standardised: z-score every vertex within its session first"
        )
    regions = region_coverage(context.atlases, is_measured)
    quality = _accepted(scan_quality(is_measured, regions), scan, context)
    stored = betas.astype(np.float16)[None]
    described = {"stimulus": scan.stimulus, **_quality_fields(quality)}
    arrays = {schema.BETAS: stored, schema.CRC: schema.crc32_of_frames(stored)}
    entry = _first_entry(scan, context, described, arrays) | {schema.IMAGE: image}
    return AcceptedScan(iter([(entry, 0, 1)]), quality, regions)


def _require_png(data: bytes, path: str) -> None:
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


def _cleaned_run(
    scan: Scan, context: PackContext
) -> tuple[CleanedRun, StandardisedRun, Float32[np.ndarray, "time column"]]:
    """The run on the set's space, cleaned as the set asks; the run standardised; its frames by FRAME_COLUMNS."""
    transform, space = _transform(scan), context.space
    run = clean_bold(
        _surface_run(scan, space) if space.kind == "surface" else _on_volume(pack_bold, scan, context),
        context.settings.cleaning,
        repetition_time_s=scan.repetition_time_s,
        confounds=scan.confounds,
        framewise_displacement_mm=None if transform is None else transform.framewise_displacement_mm,
    )
    stored = standardise_bold(run.packed, stored_as=context.settings.bold_type)
    columns = (run.framewise_displacement_mm, dvars(stored), stored.clipped_fraction, run.is_kept)
    return run, stored, np.stack(columns, axis=1).astype(np.float32)


def _surface_run(scan: Scan, space: BrainSpace) -> PackedScan:
    """A BOLD run on a surface space, from a CIFTI series or a pair of GIFTI files."""
    if "right" in scan.files:
        return pack_gifti(scan.path, scan.files["right"], space)
    return pack_cifti(scan.path, space)


def _on_volume(pack: Callable[..., PackedScan], scan: Scan, context: PackContext) -> PackedScan:
    return pack(
        scan.path,
        context.space,
        brain_mask=None if scan.brain_mask is None else Path(scan.brain_mask),
        transform=_transform(scan),
        unknown_orientation=context.settings.acceptance.unknown_orientation,
    )


def _transform(scan: Scan) -> Transform | None:
    return None if scan.transform is None else Transform.load(scan.transform)


def _accepted(quality: ScanQuality, scan: Scan, context: PackContext) -> ScanQuality:
    """The quality itself; ScanError where the scan breaks an acceptance rule."""
    reason = why_refused(quality, context.settings.acceptance, is_run=scan.kind in ("bold", "parcels"))
    if reason is not None:
        raise ScanError(f"{scan.path} {reason}; check the scan and its registration, or change that rule")
    return quality


def _quality_fields(quality: ScanQuality) -> dict[str, Any]:
    """The quality for the json member; censored frames are marked in frames.npy."""
    return {name: value for name, value in asdict(quality).items() if name != "censored"}


def _first_entry(
    scan: Scan, context: PackContext, described: dict[str, Any], arrays: dict[str, np.ndarray]
) -> dict[str, Any]:
    """The first tar entry of a scan: its arrays by kind, and a json member with its identity and `described`."""
    document = {
        "scan_id": scan.scan_id,
        "kind": scan.kind,
        "entities": scan.entities,
        "space": context.space.name,
        "space_fingerprint": context.space.fingerprint,
        **described,
    }
    if scan.sidecar:
        document["sidecar"] = scan.sidecar
    members = {kind: npy_bytes(array) for kind, array in arrays.items()}
    return {"__key__": schema.stats_key(scan.scan_id), schema.META: schema.padded_json(document), **members}


def npy_bytes(array: np.ndarray) -> bytes:
    """The array as a .npy file with a header of schema.NPY_HEADER_BYTES."""
    array = np.ascontiguousarray(array)
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, np.lib.format.header_data_from_array_1_0(array))
    header = buffer.getvalue()
    assert len(header) == schema.NPY_HEADER_BYTES, "unexpected .npy header length"
    return b"".join((header, array.reshape(-1).view(np.uint8).data))


PACK: dict[str, Callable[[Scan, PackContext], AcceptedScan]] = {
    "bold": _pack_run,
    "t1": _pack_t1,
    "parcels": _pack_parcels,
    "response": _pack_response,
}
