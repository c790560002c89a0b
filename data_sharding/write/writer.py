"""Writes the missing shards of a plan, in this process or as Ray tasks, a bounded number at a time.

A shard is written scan by scan into a local file, then comes fsync, upload and a receipt. Promise: a task that dies is
started again, whatever killed it; a shard that keeps killing its tasks ends the run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import psutil

from brain_models.errors import UserError
from cluster.config import ClusterConfig
from cluster.ray.launch import ray_session
from cluster.storage.stores import Store, store_for
from configs.words import counted
from data_sharding import schema
from data_sharding.config import LimitsConfig, ShardingConfig
from data_sharding.errors import ShardError
from data_sharding.scans import Scan
from data_sharding.sources.privacy import redacted
from data_sharding.write.isolation import Helper, Outcome, helper_for
from data_sharding.write.plan import SetPlan, ShardPlan, absolute

SCRATCH_PREFIX = "callosum-shard-"
MAX_DEATHS = 5  # of one shard's tasks, before the shard itself is to blame
RECEIPTS_AT_ONCE = 16

Item = TypeVar("Item")
Result = TypeVar("Result")


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


Advance = Callable[[ShardPlan, Receipt], None]


def write_shards(store: Store, plan: SetPlan, config: ShardingConfig) -> list[Receipt]:
    """The receipts of all planned shards; those already written are kept."""
    receipts = _finished(store, plan)
    missing = [shard for shard in plan.shards if shard.number not in receipts]
    if receipts:
        print(f"{len(receipts)} of {counted(len(plan.shards), 'shard')} are written already", flush=True)
    write = partial(write_shard, out=anywhere(config.out), limits=config.limits)
    written = each_result(write, missing, config.cluster, label=_label)
    with _progress(missing, num_shards=len(plan.shards), num_written=len(receipts)) as advance:
        for shard, receipt in written:
            receipts[shard.number] = receipt
            advance(shard, receipt)
    return [receipts[shard.number] for shard in plan.shards]


def _finished(store: Store, plan: SetPlan) -> dict[int, Receipt]:
    """The receipts of an earlier run: only those that a listing shows are read, several at once."""
    present = set(store.list(schema.RECEIPTS))
    candidates = [shard for shard in plan.shards if shard.receipt_name in present]
    with ThreadPoolExecutor(RECEIPTS_AT_ONCE) as pool:
        receipts = list(pool.map(lambda shard: finished_receipt(store, shard), candidates))
    return {shard.number: receipt for shard, receipt in zip(candidates, receipts, strict=True) if receipt is not None}


def anywhere(location: str) -> str:
    """The location in a form that is valid in a process with another working folder."""
    return location if "://" in location else absolute(location)


def each_result(
    function: Callable[[Item], Result], items: list[Item], cluster: ClusterConfig, *, label: Callable[[Item], str]
) -> Iterator[tuple[Item, Result]]:
    """(item, function(item)) of every item in order of completion, computed here or as Ray tasks."""
    if cluster.kind == "inline":
        for item in items:
            yield item, function(item)
    elif items:
        with ray_session(cluster):
            yield from _by_ray(function, items, cluster, label=label)


def _by_ray(
    function: Callable[[Item], Result], items: list[Item], cluster: ClusterConfig, *, label: Callable[[Item], str]
) -> Iterator[tuple[Item, Result]]:
    """Tasks on Ray, at most `cluster.num_workers` in flight, so memory and scratch space stay bounded."""
    import ray

    task: Any = ray.remote(num_cpus=cluster.cpus_per_worker, max_retries=0)(_call_quietly)
    deaths = Counter[str]()
    waiting = list(reversed(items))
    running: dict[object, Item] = {}
    while waiting or running:
        while waiting and len(running) < cluster.num_workers:
            item = waiting.pop()
            running[task.remote(function, item)] = item
        (done,), _ = ray.wait(list(running), num_returns=1)
        item = running.pop(done)
        try:
            result = ray.get(done)
        except (
            ray.exceptions.WorkerCrashedError,
            ray.exceptions.OutOfMemoryError,
            ray.exceptions.NodeDiedError,
        ) as error:
            deaths[label(item)] += 1
            if deaths[label(item)] > MAX_DEATHS:
                raise ShardError(
                    f"{label(item)} killed its worker {MAX_DEATHS + 1} times ({type(error).__name__}); lower "
                    "cluster.num_workers, or give the nodes more memory"
                ) from error
            print(f"the worker of {label(item)} died ({type(error).__name__}); it is started again", flush=True)
            waiting.append(item)
            continue
        if isinstance(result, UserError):
            raise result
        yield item, result


def _label(shard: ShardPlan) -> str:
    scans = ", ".join(scan.scan_id for scan in shard.scans[:5])
    return f"{shard.name} ({scans}{', ...' if len(shard.scans) > 5 else ''})"


def _call_quietly(function: Callable[[Item], Result], item: Item) -> Result | UserError:
    """The result, or a user error as a value: Ray would wrap a raised one in its own class and traceback."""
    try:
        return function(item)
    except UserError as error:
        return error


@contextlib.contextmanager
def _progress(missing: list[ShardPlan], *, num_shards: int, num_written: int) -> Iterator[Advance]:
    """The function to call after every shard: it moves a bar on a terminal and prints a line elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    is_terminal = sys.stdout.isatty()
    num_scans = sum(len(shard.scans) for shard in missing)
    num_done, num_refused, started = 0, 0, time.monotonic()
    columns = (TextColumn("scans"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeRemainingColumn(), TextColumn("left"), disable=not is_terminal) as bar:
        task = bar.add_task("scans", total=num_scans, note="")

        def advance(shard: ShardPlan, receipt: Receipt) -> None:
            nonlocal num_written, num_done, num_refused
            num_written += 1
            num_done += len(shard.scans)
            num_refused += len(receipt.refused)
            rate = num_done / (time.monotonic() - started)
            bar.update(task, completed=num_done, note=f"{rate:.1f}/s, {num_refused} refused")
            if not is_terminal:
                print(
                    f"shards {num_written}/{num_shards}  scans {num_done}/{num_scans}  {num_refused} refused  "
                    f"{rate:.1f} scans/s  {timedelta(seconds=round((num_scans - num_done) / rate))} left",
                    flush=True,
                )

        yield advance


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
