"""Writes the missing shards of a plan: in this process, or as Ray tasks, a bounded number at a time.

Promise: a task that dies is started again, whatever killed it; a shard that keeps killing its tasks ends the run.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from brain_models.errors import UserError
from cluster.config import ClusterConfig
from cluster.ray.launch import ray_session
from cluster.storage.stores import Store
from data_sharding import schema
from data_sharding.config import ShardingConfig
from data_sharding.errors import ShardError
from data_sharding.write.plan import SetPlan, ShardPlan, absolute
from data_sharding.write.writer import Receipt, finished_receipt, write_shard

MAX_DEATHS = 5  # of one shard's tasks, before the shard itself is to blame
RECEIPTS_AT_ONCE = 16

Advance = Callable[[ShardPlan, Receipt], None]
Item = TypeVar("Item")
Result = TypeVar("Result")


def write_shards(store: Store, plan: SetPlan, config: ShardingConfig) -> list[Receipt]:
    """The receipts of all planned shards; those already written are kept."""
    receipts = _finished(store, plan)
    missing = [shard for shard in plan.shards if shard.number not in receipts]
    if receipts:
        print(f"{len(receipts)} of {len(plan.shards)} shards are written already", flush=True)
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


@contextmanager
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
                    f"shards {num_written}/{num_shards}  scans {num_done}/{num_scans}  refused {num_refused}  "
                    f"{rate:.1f} scans/s  {(num_scans - num_done) / rate:.0f} s left",
                    flush=True,
                )

        yield advance
