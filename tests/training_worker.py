"""Trains toys as the ranks of gloo groups and writes what came out: `training_worker.py <launches.json>`: launches
{jobs, num_ranks} one after the other, their exit codes in a file beside.

A job: {engine, folder, steps, checkpoint_every, keep_last, opens_at, seed, kill_at, break_at, stop_at, stop_rank,
poisoned_scan, copy_of, task, group_norms, unfreezing, train}. Tasks `pairs` and `layers` are ToyPairs and ToyLayers;
`train` changes parts of the configuration. When the source is asked for step `kill_at` the process ends without any
clean-up; for step `stop_at`, rank `stop_rank` gets SIGTERM. `kill_after_s`: by rank, when SIGKILL comes, counted from
the first step; `slow_s`: how long a step and an upload take at least. A job with `measure` makes one update and
reports the optimiser's bytes, one with `measure_sum` how exactly ranks add up their gradients in bf16. `copy_of`: the
folder that a job on one rank begins with a copy of.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from training_toys import (
    GLOBAL_BATCH,
    ToyLayers,
    ToyPairs,
    ToySource,
    ToyTask,
    pair_batch,
    services,
    toy_batch,
    toy_config,
)

from cluster.storage.stores import LocalStore
from training import loop
from training.collectives import this_process, total
from training.config import DecayConfig, PlateauConfig
from training.errors import TrainingError
from training.loop import fit
from training.task import State, Task
from training.unfreezing import UnfreezingConfig


class BrokenSourceError(Exception):
    """What a job asked for: its run ends in the middle, the process goes on to the next job."""


class DyingSource(ToySource):
    def __init__(self, job: dict) -> None:
        if job.get("task") == "pairs":
            super().__init__(num_micro_batches=1, make_batch=pair_batch)
        else:
            super().__init__()
        self.job = job

    def steps(self, state: State) -> Iterator[tuple[list[Any], State]]:
        if self.job.get("kill_after_s"):
            after_s = self.job["kill_after_s"][this_process().rank]
            timer = threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()
        for batches, after in super().steps(state):
            step = int(str(after["samples_consumed"])) // GLOBAL_BATCH - 1
            if step == self.job.get("kill_at"):
                os._exit(9)
            if step == self.job.get("break_at"):
                raise BrokenSourceError
            if step == self.job.get("stop_at") and this_process().rank == self.job["stop_rank"]:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(self.job.get("slow_s", 0))
            yield batches, after


class SlowStore(LocalStore):
    """Uploads that take a while, so that a kill may well hit one."""

    slow_s = 0.0

    def put(self, name: str, content: bytes | Path) -> None:
        time.sleep(self.slow_s)
        super().put(name, content)


def measure(job: dict) -> dict:
    """Bytes of this rank's optimiser after one update: fp32 weights and moments."""
    from training.engine.deepspeed import DeepSpeedEngine

    config = toy_config(Path(job["folder"]), engine=job["engine"])
    source = ToySource()
    engine = DeepSpeedEngine(ToyTask(width=512), config, num_micro_batches=source.num_micro_batches)
    micro_batches, _ = next(source.steps(source.initial_state()))
    engine.begin(0)
    for batch in micro_batches:
        engine.backward(engine.losses(batch)["loss"])
    engine.step()
    tensors = [tensor for state in engine.optimizer.state.values() for tensor in state.values() if tensor.ndim]
    tensors += [tensor for group in engine.optimizer.param_groups for tensor in group["params"]]
    engine.close()
    return {"optimizer_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors)}


def measure_sum(job: dict) -> dict:
    """The norm of a bf16 step's gradient, and that of the float32 sum of what the ranks would have made alone."""
    from training.engine.deepspeed import DeepSpeedEngine

    config = toy_config(Path(job["folder"]), engine=job["engine"])
    settings = dataclasses.replace(config.engine, precision="bf16")
    unclipped = dataclasses.replace(config.optimizer, clip_norm=1e9)
    config = dataclasses.replace(config, engine=settings, optimizer=unclipped)
    batch, alone = toy_batch(list(range(this_process().rank, 64, this_process().world_size)), 64), ToyTask(width=64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = alone(batch)["loss"]
    loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in alone.parameters() if parameter.grad is not None])
    engine = DeepSpeedEngine(ToyTask(width=64), config, num_micro_batches=1)
    engine.begin(0)
    engine.backward(engine.losses(batch)["loss"])
    norm = engine.step()
    engine.close()
    return {"norm": norm, "norm_of_sum": float(total(gradient).norm())}


def run_job(job: dict) -> None:
    if job.get("copy_of"):
        shutil.copytree(job["copy_of"], job["folder"], dirs_exist_ok=True)
    report = measure(job) if job.get("measure") else measure_sum(job) if job.get("measure_sum") else train(job)
    path = Path(job["folder"]) / f"{job.get('report', 'report')}-{this_process().rank}.json"
    path.write_text(json.dumps(report))


def make_task(job: dict) -> ToyTask | ToyPairs:
    if job.get("task") == "pairs":
        return ToyPairs(right_opens_at=job.get("opens_at", 0))
    if job.get("task") == "layers":
        unfreezing = UnfreezingConfig(**job["unfreezing"])
        if unfreezing.plateau is not None:
            unfreezing.plateau = PlateauConfig(**job["unfreezing"]["plateau"])
        return ToyLayers(unfreezing)
    task = ToyTask(encoder_opens_at=job.get("opens_at", 0), seed=job.get("seed", 7))
    task.poisoned_scan = job.get("poisoned_scan")
    return task


def train(job: dict) -> dict:
    folder = Path(job["folder"])
    SlowStore.slow_s = job.get("slow_s", 0)
    config = toy_config(
        folder,
        engine=job["engine"],
        steps=job.get("steps", 6),
        checkpoint_every=job.get("checkpoint_every", 100),
        keep_last=job.get("keep_last", 2),
    )
    changed = {"tracking": {"group_norms": job.get("group_norms", False)}, **job.get("train", {})}
    config = dataclasses.replace(
        config, **{part: dataclasses.replace(getattr(config, part), **values) for part, values in changed.items()}
    )
    if config.schedule.plateau is not None:
        config.schedule.plateau = DecayConfig(**job["train"]["schedule"]["plateau"])
    task = make_task(job)
    exported = folder / "exported.pt"

    def export(trained: Task, evaluations: object) -> None:
        torch.save({name: value.detach().clone() for name, value in trained.state_dict().items()}, exported)

    try:
        result = fit(task, DyingSource(job), config, services(config, export))
        return {
            "metrics": result.metrics,
            "start": result.start,
            "checkpoint": result.checkpoint,
            "seconds": result.seconds,
        }
    except (TrainingError, BrokenSourceError) as error:
        return {"error": str(error)}


def run_rank(jobs: list[dict], rank: int, size: int, *, meeting_point: str) -> None:
    """All jobs in turn, as one rank of a group."""
    if size > 1:
        os.environ["LOCAL_RANK"] = str(rank)
        store = torch.distributed.FileStore(meeting_point, size)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    for job in jobs:
        run_job(job)


def fork_ranks(jobs: list[dict], size: int, *, meeting_point: str) -> list[int]:
    """Exit codes of ranks forked from this process, which has paid for the imports; it must have run nothing yet."""
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                run_rank(jobs, rank, size, meeting_point=meeting_point)
                code = 0
            except Exception:  # noqa: BLE001 - a forked child must not continue as its parent
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main() -> None:
    loop.store_for = SlowStore  # type: ignore[attr-defined]
    path = Path(sys.argv[1])
    for late in ("deepspeed.runtime.zero.muon.muon_optimizer", "torch._dynamo"):  # once, for all that are forked
        importlib.import_module(late)
    codes = [
        fork_ranks(launch["jobs"], launch["num_ranks"], meeting_point=f"{path}.store-{number}")
        for number, launch in enumerate(json.loads(path.read_text()))
    ]
    path.with_suffix(".codes").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
