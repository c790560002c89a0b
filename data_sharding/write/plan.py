"""What a set will hold, before any scan is read: scans x config -> shard contents. Same input, same plan."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from brain_models.atlas import Atlas
from brain_models.confounds import num_non_steady, read_columns
from brain_models.errors import ScanError
from brain_models.space import BrainSpace
from data_sharding import schema
from data_sharding.config import ShardingConfig
from data_sharding.hashing import hash_name
from data_sharding.scans import Found, Scan
from data_sharding.write.packing import PackRequest, PackSettings


@dataclass
class ShardPlan:
    """One shard to write; `digest` changes with anything that changes its bytes."""

    number: int
    requests: list[PackRequest]
    settings: PackSettings
    num_bytes: int
    digest: str

    @property
    def name(self) -> str:
        return schema.shard_name(self.number)

    @property
    def receipt_name(self) -> str:
        return f"{schema.RECEIPTS}{self.number:06d}.json"


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


def absolute(path: Path) -> str:
    """Where a file lies, for a process in another folder."""
    return str(path.absolute())


def make_plan(
    found: Found,
    space: BrainSpace,
    config: ShardingConfig,
    split_of_unit: dict[str, str],
    *,
    atlases: list[Atlas],
    original: Callable[[Path], str] = absolute,
) -> SetPlan:
    """The plan: scans in hashed order fill one shard after the other; inside a shard they are sorted.

    `original` tells where the file that stands at a path is to be read from.
    """
    settings = pack_settings(config)
    mixed = sorted(found.scans, key=lambda scan: hash_name("mix", config.seed, scan.scan_id))
    sizes = {scan.scan_id: _scan_bytes(scan, space, config, atlases) for scan in mixed}
    groups: list[list[Scan]] = []
    filled = 0
    for scan in mixed:
        size = sizes[scan.scan_id]
        if not groups or filled + size > config.storage.target_bytes - schema.TAR_END_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(scan)
        filled += size
    requests = {scan.scan_id: _request(scan, original) for scan in mixed}
    shards = []
    for number, group in enumerate(groups):
        group.sort(key=lambda scan: scan.scan_id)
        num_bytes = sum(sizes[scan.scan_id] for scan in group) + schema.TAR_END_BYTES
        own = [requests[scan.scan_id] for scan in group]
        shards.append(ShardPlan(number, own, settings, num_bytes, _shard_digest(group, space, config)))
    content = {
        "shards": [shard.digest for shard in shards],
        "splits": sorted(split_of_unit.items()),
        "atlas": config.atlas,
        "max_censored_fraction": config.preprocessing.max_censored_fraction,
        "name": config.name,
    }
    return SetPlan(shards, _digest(content))


def pack_settings(config: ShardingConfig) -> PackSettings:
    """What packing needs of a configuration."""
    return PackSettings(
        chunk_frames=config.storage.chunk_frames,
        bold_type=config.storage.bold_type,
        cleaning=config.preprocessing.cleaning,
        acceptance=config.acceptance,
    )


def _shard_digest(scans: list[Scan], space: BrainSpace, config: ShardingConfig) -> str:
    content = [
        schema.SCHEMA_VERSION,
        space.fingerprint,
        asdict(config.storage),
        asdict(pack_settings(config)) | {"acceptance": asdict(config.acceptance) | {"max_refused_fraction": None}},
        [[_request_identity(scan), _sizes(scan)] for scan in scans],
        None if config.registration is None else asdict(config.registration),
    ]
    return _digest(content)


def _sizes(scan: Scan) -> list[int]:
    paths = [scan.path, scan.brain_mask, scan.confounds, *scan.files.values()]
    return [path.stat().st_size for path in paths if path is not None]


def _request_identity(scan: Scan) -> list[object]:
    """What a scan is, apart from where its folder lies: a moved source is the same source."""
    beside = [None if path is None else path.name for path in (scan.brain_mask, scan.confounds)]
    plain = [scan.scan_id, scan.kind, scan.path.name, *beside, scan.repetition_time_s, scan.num_frames, scan.entities]
    return [
        *plain,
        {role: path.name for role, path in scan.files.items()},
        [asdict(event) for event in scan.events],
        scan.sidecar,
        scan.stimulus,
        scan.row,
        scan.is_raw,
    ]


def _request(scan: Scan, original: Callable[[Path], str]) -> PackRequest:
    return PackRequest(
        scan_id=scan.scan_id,
        kind=scan.kind,
        path=original(scan.path),
        brain_mask=None if scan.brain_mask is None else original(scan.brain_mask),
        confounds=None if scan.confounds is None else original(scan.confounds),
        repetition_time_s=scan.repetition_time_s,
        num_frames=scan.num_frames,
        entities=scan.entities,
        files={role: original(path) for role, path in scan.files.items()},
        events=[asdict(event) for event in scan.events],
        sidecar=scan.sidecar,
        stimulus=scan.stimulus,
        row=scan.row,
        is_raw=scan.is_raw,
        private=[list(pair) for pair in scan.private],
    )


def _scan_bytes(scan: Scan, space: BrainSpace, config: ShardingConfig, atlases: list[Atlas]) -> int:
    events = [asdict(event) for event in scan.events]
    as_it_is = len(schema.padded_json(events)) if events else 0
    if scan.kind == "response":
        as_it_is = scan.path.stat().st_size
    return schema.scan_bytes(
        scan.kind,
        num_frames=scan.num_frames - num_dropped(scan, config),
        num_voxels=space.num_voxels,
        chunk_frames=config.storage.chunk_frames,
        voxel_bytes=2 if config.storage.bold_type == "float16" else 1,
        num_regions=len(atlases[0].region_ids) if atlases else 0,
        num_file_bytes=as_it_is,
    )


def num_dropped(scan: Scan, config: ShardingConfig) -> int:
    """How many first frames of a run will not be stored."""
    if (
        scan.kind not in ("bold", "parcels")
        or scan.confounds is None
        or config.preprocessing.cleaning.non_steady_state == "keep"
    ):
        return 0
    try:
        return num_non_steady(read_columns(scan.confounds))
    except ScanError:
        return 0  # packing refuses the scan, with the reason


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
