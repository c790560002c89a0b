"""What a set will hold, before any voxel is read: scans x config -> shards. Same input, same plan."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from brain_models.atlas import Atlas
from brain_models.confounds import num_non_steady, read_columns
from brain_models.errors import ScanError
from brain_models.space import BrainSpace
from data_sharding import schema
from data_sharding.config import ShardingConfig
from data_sharding.hashing import hash_name
from data_sharding.scans import Scan, SourceContents
from data_sharding.write.packing import PackSettings


@dataclass
class ShardPlan:
    """One shard to write; `digest` changes with everything that changes its bytes."""

    number: int
    scans: list[Scan]  # with the locations from which their files are read
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
    """All shards of a set; `digest` identifies the set that a folder holds or will hold."""

    shards: list[ShardPlan]
    digest: str

    @property
    def num_scans(self) -> int:
        return sum(len(shard.scans) for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)


def absolute(path: str) -> str:
    """The path in a form that is valid in a process with another working folder."""
    return str(Path(path).absolute())


def make_plan(
    contents: SourceContents,
    space: BrainSpace,
    config: ShardingConfig,
    split_of_unit: dict[str, str],
    *,
    atlases: list[Atlas],
    original: Callable[[str], str] = absolute,
) -> SetPlan:
    """The plan: scans in hashed order fill one shard after the other; inside a shard they are sorted.

    `original` returns the location from which to read the file at a path.
    """
    settings = pack_settings(config, atlases)
    mixed = sorted(contents.scans, key=lambda scan: hash_name("mix", config.seed, scan.scan_id))
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
    shards = []
    for number, group in enumerate(groups):
        group.sort(key=lambda scan: scan.scan_id)
        num_bytes = sum(sizes[scan.scan_id] for scan in group) + schema.TAR_END_BYTES
        digest = _shard_digest(group, settings, space, config)
        shards.append(ShardPlan(number, [_located(scan, original) for scan in group], settings, num_bytes, digest))
    content = {
        "shards": [shard.digest for shard in shards],
        "splits": sorted(split_of_unit.items()),
        "atlas": config.atlas,
        "max_censored_fraction": config.preprocessing.max_censored_fraction,
        "name": config.name,
    }
    return SetPlan(shards, _digest(content))


def pack_settings(config: ShardingConfig, atlases: list[Atlas]) -> PackSettings:
    """What packing needs of a configuration and the set's atlases."""
    return PackSettings(
        chunk_frames=config.storage.chunk_frames,
        bold_type=config.storage.bold_type,
        cleaning=config.preprocessing.cleaning,
        acceptance=config.acceptance,
        series_atlas=atlases[0].name if atlases else None,
    )


def _shard_digest(scans: list[Scan], settings: PackSettings, space: BrainSpace, config: ShardingConfig) -> str:
    recorded = asdict(settings) | {"acceptance": asdict(config.acceptance) | {"max_refused_fraction": None}}
    del recorded["series_atlas"]  # the set's digest knows the atlases
    content = [
        schema.SCHEMA_VERSION,
        space.fingerprint,
        asdict(config.storage),
        recorded,
        [[_identity(scan), [Path(path).stat().st_size for path in _files(scan)]] for scan in scans],
        None if config.registration is None else asdict(config.registration),
    ]
    return _digest(content)


def _files(scan: Scan) -> list[str]:
    return [path for path in (scan.path, scan.brain_mask, scan.confounds, *scan.files.values()) if path is not None]


def _identity(scan: Scan) -> list[object]:
    """What identifies a scan; its folder does not, so a source may be moved."""
    return [
        scan.scan_id,
        scan.kind,
        *(None if path is None else Path(path).name for path in (scan.path, scan.brain_mask, scan.confounds)),
        scan.repetition_time_s,
        scan.num_frames,
        scan.entities,
        {role: Path(path).name for role, path in scan.files.items()},
        [asdict(event) for event in scan.events],
        scan.sidecar,
        scan.stimulus,
        scan.row,
        scan.is_raw,
    ]


def _located(scan: Scan, original: Callable[[str], str]) -> Scan:
    """The scan with the locations from which its files are read."""
    return replace(
        scan,
        path=original(scan.path),
        brain_mask=None if scan.brain_mask is None else original(scan.brain_mask),
        confounds=None if scan.confounds is None else original(scan.confounds),
        files={role: original(path) for role, path in scan.files.items()},
    )


def _scan_bytes(scan: Scan, space: BrainSpace, config: ShardingConfig, atlases: list[Atlas]) -> int:
    events = [asdict(event) for event in scan.events]
    num_file_bytes = len(schema.padded_json(events)) if events else 0
    if scan.kind == "response":
        num_file_bytes = Path(scan.path).stat().st_size
    return schema.scan_bytes(
        scan.kind,
        num_frames=scan.num_frames - num_dropped(scan, config),
        num_voxels=space.num_voxels,
        chunk_frames=config.storage.chunk_frames,
        voxel_bytes=2 if config.storage.bold_type == "float16" else 1,
        num_regions=len(atlases[0].region_ids) if atlases else 0,
        num_file_bytes=num_file_bytes,
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
        return 0  # packing refuses the scan and gives the reason


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
