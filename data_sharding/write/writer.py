"""Writes one planned shard: scan by scan into a local file, then fsync, upload and a receipt. Runs as a Ray task."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from cluster.storage.stores import Store, store_for
from data_sharding import schema
from data_sharding.config import LimitsConfig
from data_sharding.scans import Scan
from data_sharding.sources.privacy import redacted
from data_sharding.write.isolation import Helper, Outcome, helper_for
from data_sharding.write.plan import ShardPlan

SCRATCH_PREFIX = "callosum-shard-"


@dataclass
class Receipt:
    """What one planned shard holds, in JSON values; 0 bytes and no file where every scan was refused."""

    name: str
    digest: str
    bytes: int = 0
    sha256: str = ""
    members: list[dict[str, Any]] = field(default_factory=list)
    refused: list[dict[str, str]] = field(default_factory=list)
    quality: list[dict[str, Any]] = field(default_factory=list)  # one row per scan
    regions: list[dict[str, Any]] = field(default_factory=list)  # scan_id and the measured share of every region


def finished_receipt(store: Store, plan: ShardPlan) -> Receipt | None:
    """The stored receipt of a shard, or None where the shard is not there as planned."""
    receipt = Receipt(**json.loads(store.read(plan.receipt_name)))
    is_complete = receipt.bytes == 0 or (store.exists(plan.name) and store.size(plan.name) == receipt.bytes)
    return receipt if receipt.digest == plan.digest and is_complete else None


def write_shard(plan: ShardPlan, out: str, limits: LimitsConfig) -> Receipt:
    """The receipt of the shard, which is then in the set; a scan that cannot be packed leaves a gap and its reason."""
    store = store_for(out)
    receipt = Receipt(plan.name, plan.digest)
    helper = helper_for(store, plan.settings, limits)
    with scratch_folder() as scratch:
        shard = scratch / "shard.tar"
        with shard.open("wb+") as file:
            for scan in plan.scans:
                _append_scan(scan, helper, store, receipt, file, scratch / "segment.tar")
            if receipt.members:
                file.write(bytes(schema.TAR_END_BYTES))
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            receipt.bytes, receipt.sha256 = shard.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
        if receipt.bytes:
            store.put(plan.name, shard)
    store.put(plan.receipt_name, (json.dumps(asdict(receipt), sort_keys=True) + "\n").encode())
    return receipt


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder of this process on local disk, gone at the end; what killed writers of this host left goes first."""
    ours = f"{SCRATCH_PREFIX}{socket.gethostname()}-"
    for left in Path(tempfile.gettempdir()).glob(f"{ours}*"):
        writer = left.name.removeprefix(ours).partition("-")[0]
        if writer.isdigit() and not psutil.pid_exists(int(writer)):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{ours}{os.getpid()}-") as folder:
        yield Path(folder)


def _append_scan(scan: Scan, helper: Helper, store: Store, receipt: Receipt, shard: BinaryIO, segment: Path) -> None:
    """Adds the scan's segment to the shard and its rows to the receipt, or its refusal."""
    outcome = _packed(scan, helper, store, segment)
    scan_id = {"scan_id": scan.scan_id}
    if "reason" in outcome:
        path, reason = (redacted(text, scan.pseudonyms) for text in (scan.path, outcome["reason"]))
        receipt.refused.append(asdict(schema.Refusal(scan.scan_id, path, reason)))
        return
    start = shard.tell()
    receipt.members += [member | scan_id | {"offset": start + member["offset"]} for member in outcome["members"]]
    receipt.quality.append(scan_id | outcome["quality"])
    receipt.regions.append(scan_id | {name: round(share, 4) for name, share in outcome["regions"].items()})
    os.truncate(segment, outcome["num_bytes"])  # the end mark behind them would end the shard early
    with segment.open("rb") as file:
        shutil.copyfileobj(file, shard)


def _packed(scan: Scan, helper: Helper, store: Store, segment: Path) -> Outcome:
    """The outcome of packing; a raw scan is packed through its stored transform, or refused for the stored reason."""
    if not scan.is_raw:
        return helper.pack(scan, segment)
    transform = schema.transform_name(scan.scan_id)
    if not store.exists(transform):
        return json.loads(store.read(schema.no_transform_name(scan.scan_id)))
    local = segment.with_name("transform.npz")
    store.get_file(transform, local)
    return helper.pack(replace(scan, transform=str(local)), segment)
