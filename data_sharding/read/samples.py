"""Whole samples of the kinds that are not only drawn as windows: region series, responses to images, events.

Every member is checked against the index's checksum.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from PIL import Image

from data_sharding import schema
from data_sharding.checksums import crc32
from data_sharding.errors import ShardError
from data_sharding.read.shard_set import ShardSet

KEEP = schema.FRAME_COLUMNS.index("keep")


@dataclass(frozen=True)
class RegionSeries:
    """Z-scored series; 0.0 where a region was not measured."""

    values: Float32[np.ndarray, "time region"]
    is_kept: Bool[np.ndarray, "time"]  # False for a censored frame, whose values are there all the same
    is_measured: Bool[np.ndarray, "region"]
    mean: Float32[np.ndarray, "region"]  # of the scan's own units
    scale: Float32[np.ndarray, "region"]


@dataclass(frozen=True)
class Response:
    """An image and the response of every vertex to it; NaN where a vertex was not measured."""

    image: UInt8[np.ndarray, "y x 3"]
    betas: Float32[np.ndarray, "vertex"]


def region_series(shard_set: ShardSet, scan_id: str) -> RegionSeries:
    """The whole region series of a scan."""
    stored = _array(shard_set, scan_id, schema.PARCELS).astype(np.float32)
    is_measured = np.asarray(np.isfinite(stored).all(axis=0))
    return RegionSeries(
        values=np.where(is_measured, stored, np.float32(0)),
        is_kept=_array(shard_set, scan_id, schema.FRAMES)[:, KEEP] == 1,
        is_measured=is_measured,
        mean=_array(shard_set, scan_id, schema.REGION_MEAN),
        scale=_array(shard_set, scan_id, schema.REGION_SCALE),
    )


def response(shard_set: ShardSet, scan_id: str) -> Response:
    """The image and the response of one sample."""
    with Image.open(io.BytesIO(_member(shard_set, scan_id, schema.IMAGE)), formats=["PNG"]) as image:
        pixels = np.asarray(image.convert("RGB"))
    return Response(pixels, _array(shard_set, scan_id, schema.BETAS)[0].astype(np.float32))


def events(shard_set: ShardSet, scan_id: str) -> list[schema.Event]:
    """What happened during a run, times counted from its first stored frame; empty where nothing is known."""
    rows = shard_set.index[(shard_set.index.scan_id == scan_id) & (shard_set.index.kind == schema.EVENTS)]
    if rows.empty:
        return []
    return [schema.Event(**event) for event in json.loads(_member(shard_set, scan_id, schema.EVENTS))]


def about(shard_set: ShardSet, scan_id: str) -> dict[str, object]:
    """The json member of a scan."""
    return json.loads(_member(shard_set, scan_id, schema.META))


def _array(shard_set: ShardSet, scan_id: str, kind: str) -> np.ndarray:
    return np.load(io.BytesIO(_member(shard_set, scan_id, kind)), allow_pickle=False)


def _member(shard_set: ShardSet, scan_id: str, kind: str) -> bytes:
    rows = shard_set.index[(shard_set.index.scan_id == scan_id) & (shard_set.index.kind == kind)]
    if len(rows) != 1:
        raise ShardError(f"{shard_set.location} holds no {kind} of scan {scan_id!r}; see its index for what it holds")
    row = rows.iloc[0]
    data = shard_set.store.read(row.shard, offset=int(row.offset), size=int(row["size"]))
    if crc32(data) != row.crc32:
        raise ShardError(
            f"{shard_set.location}/{row.shard} member {row.member} does not match its checksum; run "
            f"'python -m data_sharding.verify {shard_set.location}' and restore the shard"
        )
    return data
