"""What a shard set holds: the contract between writer and readers, and nothing else. See docs/shard_format.md."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from isal import isal_zlib

from cluster.errors import StorageError
from cluster.storage.files import checked_name
from data_sharding.errors import ShardError

SHA256 = re.compile("[0-9a-f]{64}")
SCHEMA_VERSION = 2

Alignment = Literal["fmriprep", "given", "nonlinear", "affine"]  # of a set; affine is a preview

MANIFEST = "manifest.json"
PLAN = "plan.json"
INDEX = "index.parquet"
SPACE = "space.npz"
SUBJECTS = "subjects.parquet"
STIMULI = "stimuli.parquet"  # of a set of responses
QUALITY = "quality.parquet"  # one row per scan
INDEX_GROUP_ROWS = 8192  # of index.parquet: the checksums of one group are read at once
REGION_COVERAGE = "region_coverage.parquet"  # one row per scan, one column per region: its measured share
ATLASES = "atlases/"
TRANSFORMS = "transforms/"  # of raw scans: <scan_id>.npz, or <scan_id>.json with the reason why there is none
RECEIPTS = "receipts/"
SHARDS = "shards/"

# Member kinds: the extension of a tar member's name.
MEAN, SCALE, FRAMES, META = "mean.npy", "scale.npy", "frames.npy", "json"  # the stats entry of a run, before its chunks
BOLD, CRC = "bold.npy", "crc.npy"  # a chunk: int8 [time, voxel] and uint32 [time]
T1 = "t1.npy"  # float16 [voxel], beside a json and the crc.npy of its one frame
EVENTS = "events.json"  # beside the stats of a run that has events: [{"onset_s", "duration_s", "name"}]
PARCELS = "parcels.npy"  # region series: float16 [time, region], with crc.npy, frames.npy, and in units of the scan
REGION_MEAN, REGION_SCALE = "region_mean.npy", "region_scale.npy"  # float32 [region]
IMAGE, BETAS = "image.png", "betas.npy"  # a stimulus, and the response to it: float16 [1, vertex], with crc.npy
KIND_OF_SCAN = {  # the member each scan of this kind has exactly once
    "bold": MEAN,
    "t1": T1,
    "parcels": PARCELS,
    "response": BETAS,
}

CHECKED_BY_FRAME = (BOLD, T1, PARCELS, BETAS)  # arrays with a crc.npy beside them, whose first axis is time

FRAME_COLUMNS = ("framewise_displacement_mm", "dvars", "clipped_fraction", "keep")  # axis 1 of frames.npy, float32

NPY_HEADER_BYTES = 128  # of every array here: numpy pads its header to 64, and these shapes and types need two of them
JSON_BYTES = 2048  # json members are padded with blanks to a multiple, so that a plan knows their size
TAR_BLOCK_BYTES = 512
TAR_END_BYTES = 10240
MAX_NAME_LENGTH = 100  # of a USTAR member; a longer one would need a second header
TAR_OWNER = "callosum"

INDEX_COLUMNS = {
    "shard": "string",
    "member": "string",
    "offset": "int64",  # of the member's first byte in the tar
    "size": "int64",
    "crc32": "int64",  # of the member's bytes
    "key": "string",
    "kind": "string",
    "subject": "string",
    "session": "string",
    "task": "string",
    "run": "string",
    "site": "string",
    "stimulus": "string",  # of a response, else ""
    "split": "string",
    "scan_id": "string",
    "first_frame": "int64",
    "num_frames": "int64",
    "frame_crc32": "string",  # of an array with checksums beside it: 8 hexadecimal digits a frame, else ""
    "censored": "string",  # of a mean.npy or parcels.npy: its censored frames as ranges, "3-5,9", else ""
    "repetition_time_s": "float64",  # 0 for a T1
}

QUALITY_COLUMNS = {  # a missing value: not known, or nothing a scan of this kind has
    "scan_id": "string",
    "kind": "string",
    "subject": "string",
    "session": "string",
    "site": "string",
    "split": "string",
    "repetition_time_s": "float64",
    "num_frames": "int64",
    "num_dropped": "int64",
    "num_censored": "int64",
    "mean_framewise_displacement_mm": "float64",
    "max_framewise_displacement_mm": "float64",
    "median_dvars": "float64",
    "tsnr": "float64",
    "coverage": "float64",
    "lowest_region_coverage": "float64",
    "lowest_region": "string",
    "clipped_fraction": "float64",
    "conflict_mm": "float64",
}


@dataclass
class Event:
    """Something that happened during a run; times count from its first stored frame."""

    onset_s: float
    duration_s: float
    name: str


@dataclass
class ShardEntry:
    """One shard as the manifest lists it; `num_samples` counts its scans."""

    name: str
    bytes: int
    sha256: str
    num_samples: int


@dataclass
class Refusal:
    """A scan that is not in the set, and the reason."""

    scan_id: str
    path: str
    reason: str


@dataclass
class Manifest:
    """Everything about a set except its arrays; written last, so a set without it does not exist."""

    schema: int
    fingerprint: str
    name: str
    space: dict[str, Any]  # name, kind, template, num_voxels, fingerprint
    atlases: list[str]
    tables: dict[str, str]  # SHA-256 of every other object of the set, by name
    shards: list[ShardEntry]
    counts: dict[str, int]
    refused: list[Refusal]
    splits: dict[str, Any]
    preprocessing: dict[str, Any]
    notes: list[str]
    versions: dict[str, str]

    def to_json(self) -> bytes:
        return (json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, location: str) -> Manifest:
        """The manifest in `data`; ShardError when it is damaged or of another schema."""
        try:
            raw = json.loads(data)
            version = raw["schema"]
        except (ValueError, KeyError, TypeError) as error:
            raise ShardError(f"{location}/{MANIFEST} is damaged ({error}); write the set again") from error
        if version != SCHEMA_VERSION:
            raise ShardError(
                f"{location} has schema {version}, this code reads {SCHEMA_VERSION}; "
                f"write it again with 'python -m data_sharding', or use the code that wrote it"
            )
        try:
            raw["shards"] = [ShardEntry(**entry) for entry in raw["shards"]]
            raw["refused"] = [Refusal(**refusal) for refusal in raw["refused"]]
            manifest = cls(**raw)
            hash_of = {**manifest.tables, **{shard.name: shard.sha256 for shard in manifest.shards}}
            for name, sha256 in hash_of.items():  # files are opened, kept and deleted under both
                checked_name(name, location)
                if SHA256.fullmatch(sha256) is None:
                    raise ShardError(f"{location}/{MANIFEST}: {sha256!r} of {name} is no SHA-256; write the set again")
        except (KeyError, TypeError, AttributeError, StorageError) as error:
            raise ShardError(f"{location}/{MANIFEST} is damaged ({error}); write the set again") from error
        return manifest


def set_fingerprint(space_fingerprint: str, shards: list[ShardEntry], split_of_unit: dict[str, str]) -> str:
    """SHA-256 over the space, the shards' contents and the split of every unit (subject, or stimulus)."""
    content = {
        "schema": SCHEMA_VERSION,
        "space": space_fingerprint,
        "shards": [[shard.name, shard.sha256] for shard in shards],
        "splits": sorted(split_of_unit.items()),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def shard_name(number: int) -> str:
    """The name of a shard inside its set."""
    return f"{SHARDS}{number:06d}.tar"


def transform_name(scan_id: str) -> str:
    """The name of a raw scan's transform inside its set."""
    return f"{TRANSFORMS}{scan_id}.npz"


def no_transform_name(scan_id: str) -> str:
    """The name of the reason why a raw scan has no transform."""
    return f"{TRANSFORMS}{scan_id}.json"


def frame_ranges(frames: Sequence[int]) -> str:
    """Ascending frame numbers as text: "3-5,9"."""
    ranges: list[list[int]] = []
    for frame in frames:
        if ranges and frame == ranges[-1][1] + 1:
            ranges[-1][1] = int(frame)
        else:
            ranges.append([int(frame), int(frame)])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def frames_of(ranges: str) -> list[int]:
    """The frame numbers of `frame_ranges`."""
    frames: list[int] = []
    for part in filter(None, ranges.split(",")):
        first, _, last = part.partition("-")
        frames += range(int(first), int(last or first) + 1)
    return frames


def stats_key(scan_id: str) -> str:
    """The key of a scan's first entry."""
    return f"{scan_id}_0000"


def chunk_key(scan_id: str, chunk: int) -> str:
    """The key of a run's chunk, counted from 0: it sorts behind the stats entry."""
    return f"{scan_id}_{chunk + 1:04d}"


def chunk_bounds(num_frames: int, chunk_frames: int) -> list[tuple[int, int]]:
    """(first, stop) frames of each chunk: all of `chunk_frames`, but the last also takes the remainder."""
    num_chunks = max(1, num_frames // chunk_frames)
    starts = [chunk * chunk_frames for chunk in range(num_chunks)]
    return list(zip(starts, [*starts[1:], num_frames], strict=True))


def tar_bytes(payload: int) -> int:
    """What a member of `payload` bytes takes in a tar."""
    return TAR_BLOCK_BYTES + -(-payload // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES


def padded_json(document: object) -> bytes:
    """The document as JSON text, padded with blanks to a multiple of JSON_BYTES."""
    text = json.dumps(document, sort_keys=True).encode()
    return text.ljust(-(-len(text) // JSON_BYTES) * JSON_BYTES)


def scan_bytes(
    kind: str,
    *,
    num_frames: int,
    num_voxels: int,
    chunk_frames: int,
    num_regions: int = 0,
    num_file_bytes: int = 0,
    voxel_bytes: int = 1,
) -> int:
    """What a scan takes in a shard: exact unless its json needs more than its padding.

    `voxel_bytes` is what a voxel of a BOLD frame takes; `num_file_bytes` is the length of a member that is stored as it
    is: an image, or a run's events (0: it has none).
    """
    total = tar_bytes(JSON_BYTES) + (tar_bytes(num_file_bytes) if num_file_bytes else 0)
    if kind == "t1" or kind == "response":
        return total + tar_bytes(NPY_HEADER_BYTES + 2 * num_voxels) + tar_bytes(NPY_HEADER_BYTES + 4)
    if kind == "parcels":
        total += 2 * tar_bytes(NPY_HEADER_BYTES + 4 * num_regions) + tar_bytes(NPY_HEADER_BYTES + 4 * num_frames)
        total += tar_bytes(NPY_HEADER_BYTES + 4 * len(FRAME_COLUMNS) * num_frames)
        return total + tar_bytes(NPY_HEADER_BYTES + 2 * num_regions * num_frames)
    total += 2 * tar_bytes(NPY_HEADER_BYTES + 4 * num_voxels)
    total += tar_bytes(NPY_HEADER_BYTES + 4 * len(FRAME_COLUMNS) * num_frames)
    for first, stop in chunk_bounds(num_frames, chunk_frames):
        total += tar_bytes(NPY_HEADER_BYTES + (stop - first) * num_voxels * voxel_bytes)
        total += tar_bytes(NPY_HEADER_BYTES + 4 * (stop - first))
    return total


def crc32_of_frames(frames: np.ndarray) -> np.ndarray:
    """uint32 [time]: crc32 of each frame's bytes; `frames` is C-contiguous [time, voxel]."""
    return np.array([isal_zlib.crc32(frame) for frame in np.ascontiguousarray(frames)], dtype=np.uint32)


def crc32(data: bytes) -> int:
    """crc32 of the bytes."""
    return isal_zlib.crc32(data)
