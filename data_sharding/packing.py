"""One scan -> its tar members: the only code that decides what bytes a scan becomes. Depends on nothing but both."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from webdataset.writer import TarWriter

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
from brain_models.space import BrainSpace
from data_sharding import schema
from data_sharding.checksums import crc32, crc32_of_frames


@dataclass
class PackRequest:
    """What packing one scan needs, in plain values: it travels to a child process as JSON."""

    scan_id: str
    kind: str
    path: str
    brain_mask: str | None
    repetition_time_s: float
    num_frames: int
    entities: dict[str, str]
    chunk_frames: int
    min_frames: int
    min_coverage: float


@dataclass
class Member:
    """One tar member of a scan; `offset` counts from the start of the scan's part of the shard."""

    member: str
    key: str
    kind: str
    offset: int
    size: int
    crc32: int
    first_frame: int
    num_frames: int


Entry = tuple[dict[str, Any], int, int]  # what TarWriter writes, first frame, number of frames


def write_part(request: PackRequest, space: BrainSpace, file: BinaryIO) -> tuple[list[Member], int]:
    """The members written to `file` and the bytes they take: the scan's part of a tar, still followed by its end mark.

    Raises ScanError where the scan cannot be packed or accepted.
    """
    members: list[Member] = []
    position = 0
    with TarWriter(file, mtime=0, user=schema.TAR_OWNER, group=schema.TAR_OWNER, encoder=False) as writer:
        for entry, first_frame, num_frames in _entries(request, space):
            key = entry["__key__"]
            for kind in sorted(kind for kind in entry if kind != "__key__"):
                name = f"{key}.{kind}"
                assert len(name) <= schema.MAX_NAME_LENGTH, name
                start = position + schema.TAR_BLOCK_BYTES
                data = entry[kind]
                members.append(Member(name, key, kind, start, len(data), crc32(data), first_frame, num_frames))
                position += schema.tar_bytes(len(entry[kind]))
            writer.write(entry)
            assert writer.tarstream.offset == position, "a tar header took more than one block"
    return members, position


def _entries(request: PackRequest, space: BrainSpace) -> Iterator[Entry]:
    mask = None if request.brain_mask is None else Path(request.brain_mask)
    if request.kind == "bold":
        packed = pack_bold(request.path, space, brain_mask=mask)
        _accept(packed, request, space)
        yield from _bold_entries(request, space, standardise_bold(packed))
        return
    packed = pack_t1(request.path, space, brain_mask=mask)
    _accept(packed, request, space)
    standardised = standardise_t1(packed)
    described = {"mean": standardised.mean, "std": standardised.std, "coverage": float(packed.is_measured.mean())}
    values = standardised.values
    entry = {
        "__key__": schema.stats_key(request.scan_id),
        schema.T1: npy_bytes(values),
        schema.CRC: npy_bytes(crc32_of_frames(values[None])),
        schema.META: _json_bytes(request, space, described),
    }
    yield entry, 0, 1


def _accept(packed: PackedScan, request: PackRequest, space: BrainSpace) -> None:
    coverage = float(packed.is_measured.mean())
    if coverage < request.min_coverage:
        raise ScanError(
            f"{request.path} covers {coverage:.1%} of space {space.name}, less than acceptance.min_coverage="
            f"{request.min_coverage}; check its registration and field of view, or lower the limit"
        )
    if request.kind == "bold" and len(packed.values) < request.min_frames:
        raise ScanError(
            f"{request.path} has {len(packed.values)} frames, fewer than acceptance.min_frames={request.min_frames}"
        )


def _bold_entries(request: PackRequest, space: BrainSpace, run: StandardisedRun) -> Iterator[Entry]:
    num_frames = len(run.quantised)
    frames = np.full((num_frames, len(schema.FRAME_COLUMNS)), np.nan, dtype=np.float32)
    frames[:, 1], frames[:, 2], frames[:, 3] = dvars(run), run.clipped_fraction, 1
    described = {
        "num_frames": num_frames,
        "repetition_time_s": request.repetition_time_s,
        "coverage": float(run.is_measured.mean()),
        "mean_framewise_displacement_mm": None,  # needs motion estimates; unknown is never 0
        "median_dvars": float(np.nanmedian(frames[:, 1])),
        "clipped_fraction": float(run.clipped_fraction.mean()),
    }
    stats = {
        "__key__": schema.stats_key(request.scan_id),
        schema.MEAN: npy_bytes(run.mean),
        schema.SCALE: npy_bytes(run.scale),
        schema.FRAMES: npy_bytes(frames),
        schema.META: _json_bytes(request, space, described),
    }
    yield stats, 0, num_frames
    for chunk, (first, stop) in enumerate(schema.chunk_bounds(num_frames, request.chunk_frames)):
        values = run.quantised[first:stop]
        entry = {
            "__key__": schema.chunk_key(request.scan_id, chunk),
            schema.BOLD: npy_bytes(values),
            schema.CRC: npy_bytes(crc32_of_frames(values)),
        }
        yield entry, first, stop - first


def _json_bytes(request: PackRequest, space: BrainSpace, described: dict[str, Any]) -> bytes:
    document = {
        "scan_id": request.scan_id,
        "kind": request.kind,
        "entities": request.entities,
        "space": space.name,
        "space_fingerprint": space.fingerprint,
        **described,
    }
    text = json.dumps(document, sort_keys=True).encode()
    return text.ljust(-(-len(text) // schema.JSON_BYTES) * schema.JSON_BYTES)


def npy_bytes(array: np.ndarray) -> bytes:
    """The array as a .npy file, whose header has the length the schema promises."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    data = buffer.getvalue()
    assert len(data) == schema.NPY_HEADER_BYTES + array.nbytes, "unexpected .npy header length"
    return data
