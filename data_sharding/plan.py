"""What a set will hold, before any scan is read: scans x config -> shard contents. Same input, same plan."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from brain_models.space import BrainSpace
from data_sharding import schema
from data_sharding.config import ShardingConfig
from data_sharding.hashing import hash_name
from data_sharding.packing import PackRequest
from data_sharding.scans import Found, Scan


@dataclass
class ShardPlan:
    """One shard to write; `digest` changes with anything that changes its bytes."""

    number: int
    requests: list[PackRequest]
    num_bytes: int
    digest: str

    @property
    def name(self) -> str:
        return schema.shard_name(self.number)


@dataclass
class SetPlan:
    """All shards of a set; `digest` tells whether a folder holds this very set."""

    shards: list[ShardPlan]
    digest: str

    @property
    def num_scans(self) -> int:
        return sum(len(shard.requests) for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)


def make_plan(found: Found, space: BrainSpace, config: ShardingConfig, split_of_subject: dict[str, str]) -> SetPlan:
    """The plan: scans in hashed order fill one shard after the other; inside a shard they are sorted."""
    mixed = sorted(found.scans, key=lambda scan: hash_name("mix", config.seed, scan.scan_id))
    groups: list[list[Scan]] = []
    filled = 0
    for scan in mixed:
        size = _scan_bytes(scan, space, config)
        if not groups or filled + size > config.storage.target_bytes - schema.TAR_END_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(scan)
        filled += size
    shards = [_shard_plan(number, group, space, config) for number, group in enumerate(groups)]
    content = {
        "shards": [shard.digest for shard in shards],
        "splits": sorted(split_of_subject.items()),
        "atlas": config.atlas,
        "name": config.name,
    }
    return SetPlan(shards, _digest(content))


def _shard_plan(number: int, scans: list[Scan], space: BrainSpace, config: ShardingConfig) -> ShardPlan:
    scans = sorted(scans, key=lambda scan: scan.scan_id)
    content = [
        schema.SCHEMA_VERSION,
        space.fingerprint,
        asdict(config.storage),
        asdict(config.acceptance) | {"max_refused_fraction": None},
        [[_request_identity(scan), scan.path.stat().st_size] for scan in scans],
    ]
    num_bytes = sum(_scan_bytes(scan, space, config) for scan in scans) + schema.TAR_END_BYTES
    return ShardPlan(number, [_request(scan, config) for scan in scans], num_bytes, _digest(content))


def _request_identity(scan: Scan) -> list[object]:
    """What a scan is, apart from where its folder lies: a moved source is the same source."""
    mask = None if scan.brain_mask is None else scan.brain_mask.name
    return [scan.scan_id, scan.kind, scan.path.name, mask, scan.repetition_time_s, scan.num_frames, scan.entities]


def _request(scan: Scan, config: ShardingConfig) -> PackRequest:
    return PackRequest(
        scan_id=scan.scan_id,
        kind=scan.kind,
        path=str(Path(scan.path).absolute()),
        brain_mask=None if scan.brain_mask is None else str(scan.brain_mask.absolute()),
        repetition_time_s=scan.repetition_time_s,
        num_frames=scan.num_frames,
        entities=scan.entities,
        chunk_frames=config.storage.chunk_frames,
        min_frames=config.acceptance.min_frames,
        min_coverage=config.acceptance.min_coverage,
    )


def _scan_bytes(scan: Scan, space: BrainSpace, config: ShardingConfig) -> int:
    return schema.scan_bytes(
        scan.kind,
        num_frames=scan.num_frames,
        num_voxels=space.num_voxels,
        chunk_frames=config.storage.chunk_frames,
    )


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
