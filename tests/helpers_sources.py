"""Phantoms of data sets, and the sets made of them by the shipped configurations."""

from __future__ import annotations

import importlib
import io
import json
from pathlib import Path

import numpy as np

from brain_models.preprocess import dequantise
from brain_models.space import BrainSpace
from configs.entry import compose
from configs.parse import parse
from data_sharding import schema, sources
from data_sharding.config import ShardingConfig
from data_sharding.read.shard_set import ShardSet, open_set
from data_sharding.scans import SourceContents
from data_sharding.write.build import build
from data_sharding.write.prepare import make_space

AS_IT_IS = [  # cleaning that changes no value
    "preprocessing.cleaning.high_pass_hz=null",
    "preprocessing.cleaning.non_steady_state=keep",
]


def write_phantom(layout: str, out: Path, *, num_subjects: int = 3, seed: int = 0) -> Path:
    """The folder of a data set's phantom."""
    out.mkdir(parents=True, exist_ok=True)
    importlib.import_module(f"data_sharding.phantoms.{layout}").write(out, num_subjects, seed)
    return out


def config_of(*overrides: str) -> ShardingConfig:
    """The configuration of a command line."""
    return parse(compose("data_sharding", ["cluster=inline", *overrides]), ShardingConfig)


def found_by(*overrides: str, accepts_raw: bool = False) -> tuple[SourceContents, BrainSpace]:
    """What a command line would find, and its space."""
    config = config_of("out=unused", *overrides)
    space = make_space(config.space, atlas_images=[])
    return sources.find(config.source, config.privacy, space, accepts_raw=accepts_raw), space


def set_of(out: Path, *overrides: str) -> ShardSet:
    """The set that a command line writes."""
    build(config_of(f"out={out}", *overrides))
    return open_set(str(out))


def member(shard_set: ShardSet, scan_id: str, kind: str, *, first_frame: int = 0) -> bytes:
    """The bytes of one member, through the index."""
    index = shard_set.index
    row = index[(index.scan_id == scan_id) & (index.kind == kind) & (index.first_frame == first_frame)].iloc[0]
    return shard_set.store.read(row.shard, offset=int(row.offset), size=int(row["size"]))


def array(shard_set: ShardSet, scan_id: str, kind: str, *, first_frame: int = 0) -> np.ndarray:
    return np.load(io.BytesIO(member(shard_set, scan_id, kind, first_frame=first_frame)))


def document(shard_set: ShardSet, scan_id: str) -> dict[str, object]:
    return json.loads(member(shard_set, scan_id, schema.META))


def events_of(shard_set: ShardSet, scan_id: str) -> list[schema.Event]:
    """What the set says happened during a run."""
    index = shard_set.index
    has_events = ((index.scan_id == scan_id) & (index.kind == schema.EVENTS)).any()
    return (
        [schema.Event(**event) for event in json.loads(member(shard_set, scan_id, schema.EVENTS))] if has_events else []
    )


def run_values(shard_set: ShardSet, scan_id: str) -> tuple[np.ndarray, np.ndarray]:
    """A run in its own units [time, voxel] (NaN where not measured), and half a stored unit [voxel]."""
    mean, scale = array(shard_set, scan_id, schema.MEAN), array(shard_set, scan_id, schema.SCALE)
    index = shard_set.index
    starts = sorted(index[(index.scan_id == scan_id) & (index.kind == schema.BOLD)].first_frame)
    chunks = [array(shard_set, scan_id, schema.BOLD, first_frame=start) for start in starts]
    values = mean + scale * dequantise(np.concatenate(chunks))
    values[:, scale == 0] = np.nan
    return values, scale / 42
