"""Writes one planned shard: scan by scan into a local file, then fsync, upload and a receipt. Runs as a Ray task."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cluster.storage import Store, store_for
from data_sharding import schema
from data_sharding.config import LimitsConfig
from data_sharding.plan import ShardPlan
from data_sharding.scan_process import ScanProcess

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


def receipt_name(plan: ShardPlan) -> str:
    """Where the receipt of a shard lies in its set."""
    return f"{schema.RECEIPTS}{plan.number:06d}.json"


def finished_receipt(store: Store, plan: ShardPlan) -> Receipt | None:
    """The receipt of a shard that is already written as planned, or None."""
    if not store.exists(receipt_name(plan)):
        return None
    receipt = Receipt(**json.loads(store.read(receipt_name(plan))))
    if receipt.digest != plan.digest:
        return None
    is_there = receipt.bytes == 0 or (store.exists(plan.name) and store.size(plan.name) == receipt.bytes)
    return receipt if is_there else None


def write_shard(plan: ShardPlan, out: str, limits: LimitsConfig) -> Receipt:
    """The receipt of the shard, which is then in the set; a scan that cannot be packed leaves a hole and its reason."""
    store = store_for(out)
    with tempfile.TemporaryDirectory(prefix="callosum-shard-") as folder:
        scratch = Path(folder)
        helper = _helper(store, limits)
        with (scratch / "shard.tar").open("wb+") as file:
            members, refused = _append_scans(plan, helper, scratch, file)
            if members:
                file.write(_end_of_tar())
            file.flush()
            os.fsync(file.fileno())
        receipt = Receipt(
            name=plan.name,
            digest=plan.digest,
            bytes=(scratch / "shard.tar").stat().st_size,
            sha256=file_sha256(scratch / "shard.tar"),
            num_samples=len({row["scan_id"] for row in members}),
            members=members,
            refused=refused,
        )
        if members:
            store.put(plan.name, scratch / "shard.tar")
    store.put(receipt_name(plan), (json.dumps(asdict(receipt), sort_keys=True) + "\n").encode())
    return receipt


def _append_scans(
    plan: ShardPlan, helper: ScanProcess, scratch: Path, file: BinaryIO
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    members: list[dict[str, Any]] = []
    refused: list[dict[str, str]] = []
    part = scratch / "part.tar"
    for request in plan.requests:
        outcome = helper.pack(request, part)
        if "reason" in outcome:
            refused.append(asdict(schema.Refusal(request.scan_id, request.path, outcome["reason"])))
            continue
        start = file.tell()
        for member in outcome["members"]:
            members.append(member | {"offset": start + member["offset"], "scan_id": request.scan_id})
        with part.open("rb") as packed:
            _copy(packed, file, outcome["payload"])
    return members, refused


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


def _helper(store: Store, limits: LimitsConfig) -> ScanProcess:
    """The helper of this process for the set's space, started at its first shard."""
    space_bytes = store.read(schema.SPACE)
    key = hashlib.sha256(space_bytes).hexdigest()
    helper = _HELPERS.get(key)
    if helper is None or helper.limits != limits or helper.process.poll() is not None:
        close_helpers()
        with tempfile.TemporaryDirectory(prefix="callosum-space-") as folder:
            space_file = Path(folder) / schema.SPACE
            space_file.write_bytes(space_bytes)
            helper = _HELPERS[key] = ScanProcess(space_file, limits)
            helper.wait_until_ready()
    return helper


def close_helpers() -> None:
    """Ends the helpers of this process."""
    while _HELPERS:
        _HELPERS.popitem()[1].close()
