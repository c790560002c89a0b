"""Writes one planned shard: scan by scan into a local file, then fsync, upload and a receipt. Runs as a Ray task."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import socket
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from cluster.storage.stores import Store, store_for
from data_sharding import schema
from data_sharding.config import LimitsConfig
from data_sharding.sources.privacy import redacted
from data_sharding.write.packing import PackRequest
from data_sharding.write.plan import ShardPlan
from data_sharding.write.scan_process import SETTINGS, ScanProcess

SHARD_FILE = "shard.tar"
SCRATCH_PREFIX = "callosum-shard-"

_HELPERS: dict[str, ScanProcess] = {}  # a worker process writes many shards of one space with one helper


@dataclass
class Receipt:
    """What became of one planned shard; `name` is empty-handed (0 bytes, no file) when every scan was refused."""

    name: str
    digest: str
    bytes: int
    sha256: str
    num_samples: int
    members: list[dict[str, Any]]
    refused: list[dict[str, str]]
    quality: list[dict[str, Any]]  # a row a scan
    regions: list[dict[str, Any]]  # scan_id and the measured share of every region

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), sort_keys=True) + "\n").encode()


def finished_receipt(store: Store, plan: ShardPlan) -> Receipt | None:
    """The receipt of a shard that is already written as planned, or None; its receipt is there."""
    raw = json.loads(store.read(plan.receipt_name))
    if raw["digest"] != plan.digest:
        return None
    receipt = Receipt(**raw)
    is_there = receipt.bytes == 0 or (store.exists(plan.name) and store.size(plan.name) == receipt.bytes)
    return receipt if is_there else None


def write_shard(plan: ShardPlan, out: str, limits: LimitsConfig) -> Receipt:
    """The receipt of the shard, which is then in the set; a scan that cannot be packed leaves a hole and its reason."""
    store = store_for(out)
    with scratch_folder() as scratch:
        receipt = make_shard(plan, store, limits, scratch)
        if receipt.bytes:
            store.put(plan.name, scratch / SHARD_FILE)
    store.put(plan.receipt_name, receipt.to_json())
    return receipt


def make_shard(plan: ShardPlan, store: Store, limits: LimitsConfig, scratch: Path) -> Receipt:
    """The receipt of the shard, which is then in the scratch folder; nothing of the set is touched."""
    helper = _helper(plan, store, limits)
    with (scratch / SHARD_FILE).open("wb+") as file:
        made = _append_scans(plan, helper, store, scratch, file)
        if made.members:
            file.write(_end_of_tar())
        file.flush()
        os.fsync(file.fileno())
    return Receipt(
        name=plan.name,
        digest=plan.digest,
        bytes=(scratch / SHARD_FILE).stat().st_size,
        sha256=file_sha256(scratch / SHARD_FILE),
        num_samples=len(made.quality),
        members=made.members,
        refused=made.refused,
        quality=made.quality,
        regions=made.regions,
    )


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder of this process on local disk, gone at the end; what killed writers of this host left goes first."""
    ours = f"{SCRATCH_PREFIX}{socket.gethostname()}-"
    for left in Path(tempfile.gettempdir()).glob(f"{ours}*"):
        writer = left.name.removeprefix(ours).partition("-")[0]
        if writer.isdigit() and not _is_running(int(writer)):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{ours}{os.getpid()}-") as folder:
        yield Path(folder)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@dataclass
class _Made:
    members: list[dict[str, Any]] = field(default_factory=list)
    refused: list[dict[str, str]] = field(default_factory=list)
    quality: list[dict[str, Any]] = field(default_factory=list)
    regions: list[dict[str, Any]] = field(default_factory=list)


def _append_scans(plan: ShardPlan, helper: ScanProcess, store: Store, scratch: Path, file: BinaryIO) -> _Made:
    made = _Made()
    part = scratch / "part.tar"
    for request in plan.requests:
        outcome = _packed(request, helper, store, part)
        whose = {"scan_id": request.scan_id}
        if "reason" in outcome:
            private = [(name, other) for name, other in request.private]
            texts = (redacted(text, private) for text in (request.path, outcome["reason"]))
            made.refused.append(asdict(schema.Refusal(request.scan_id, *texts)))
            continue
        start = file.tell()
        made.members += [member | whose | {"offset": start + member["offset"]} for member in outcome["members"]]
        made.quality.append(whose | outcome["quality"])
        made.regions.append(whose | {name: round(share, 4) for name, share in outcome["regions"].items()})
        with part.open("rb") as packed:
            _copy(packed, file, outcome["num_bytes"])
    return made


def _packed(request: PackRequest, helper: ScanProcess, store: Store, part: Path) -> dict[str, Any]:
    """What became of a scan; a raw one is packed through its stored transform, or refused for the stored reason."""
    if not request.is_raw:
        return helper.pack(request, part)
    name = f"{schema.TRANSFORMS}{request.scan_id}"
    if store.exists(f"{name}.json") and not store.exists(f"{name}.npz"):
        return json.loads(store.read(f"{name}.json"))
    local = Path(f"{part}.transform.npz")
    store.get_file(f"{name}.npz", local)
    return helper.pack(replace(request, transform=str(local)), part)


def _copy(source: BinaryIO, target: BinaryIO, num_bytes: int) -> None:
    """Exactly the first `num_bytes`: a part's own end mark would end the shard early."""
    while num_bytes:
        block = source.read(min(num_bytes, 1 << 20))
        target.write(block)
        num_bytes -= len(block)


def _end_of_tar() -> bytes:
    buffer = io.BytesIO()
    tarfile.open(fileobj=buffer, mode="w").close()
    assert len(buffer.getvalue()) == schema.TAR_END_BYTES
    return buffer.getvalue()


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _helper(plan: ShardPlan, store: Store, limits: LimitsConfig) -> ScanProcess:
    """The helper of this process for the set's space, atlases and settings, started at its first shard."""
    saved = {name: store.read(name) for name in (schema.SPACE, *store.list(schema.ATLASES))}
    saved[SETTINGS] = json.dumps(asdict(plan.settings), sort_keys=True).encode()
    key = hashlib.sha256(b"".join(name.encode() + data for name, data in sorted(saved.items()))).hexdigest()
    helper = _HELPERS.get(key)
    if helper is None or helper.limits != limits or helper.process.poll() is not None:
        close_helpers()
        with tempfile.TemporaryDirectory(prefix="callosum-helper-") as folder:
            for name, data in saved.items():
                (Path(folder) / name).parent.mkdir(exist_ok=True)
                (Path(folder) / name).write_bytes(data)
            helper = _HELPERS[key] = ScanProcess(Path(folder), limits)
            helper.wait_until_ready()
    return helper


def close_helpers() -> None:
    """Ends the helpers of this process."""
    while _HELPERS:
        _HELPERS.popitem()[1].close()
