"""Trains toys as one rank of a gloo group and writes what came out: `training_worker.py <jobs.json> <rank> <size>`.

A job: {engine, folder, steps, checkpoint_every, keep_last, opens_at, seed, kill_at, stop_at, stop_rank,
poisoned_scan}. When the source is asked for step `kill_at` the process ends without any clean-up; for step `stop_at`,
rank `stop_rank` gets SIGTERM.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed
from training_toys import GLOBAL_BATCH, ToyBatch, ToySource, ToyTask, toy_config

from training.collectives import place
from training.errors import TrainingError
from training.loop import Services, fit
from training.task import State, Task


class DyingSource(ToySource):
    def __init__(self, job: dict) -> None:
        super().__init__()
        self.job = job

    def steps(self, state: State) -> Iterator[tuple[list[ToyBatch], State]]:
        for batches, after in super().steps(state):
            step = int(str(after["samples_consumed"])) // GLOBAL_BATCH - 1
            if step == self.job.get("kill_at"):
                os._exit(9)
            if step == self.job.get("stop_at") and place().rank == self.job["stop_rank"]:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batches, after


def run_job(job: dict) -> None:
    folder = Path(job["folder"])
    config = toy_config(
        folder,
        engine=job["engine"],
        steps=job.get("steps", 6),
        checkpoint_every=job.get("checkpoint_every", 100),
        keep_last=job.get("keep_last", 2),
    )
    task = ToyTask(encoder_opens_at=job.get("opens_at", 0), seed=job.get("seed", 7))
    task.poisoned_scan = job.get("poisoned_scan")
    exported = folder / "exported.pt"

    def export(trained: Task) -> None:
        torch.save({name: value.detach().clone() for name, value in trained.state_dict().items()}, exported)

    identity = dataclasses.asdict(config)
    try:
        result = fit(task, DyingSource(job), config, Services({"train": identity}, export))
        report = {"metrics": result.metrics, "start": result.start, "checkpoint": result.checkpoint}
    except TrainingError as error:
        report = {"error": str(error)}
    (folder / f"{job.get('report', 'report')}-{place().rank}.json").write_text(json.dumps(report))


def main() -> None:
    jobs, rank, size = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]), int(sys.argv[3])
    if size > 1:
        os.environ["LOCAL_RANK"] = str(rank)
        store = torch.distributed.FileStore(f"{sys.argv[1]}.store", size)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    for job in jobs:
        run_job(job)


if __name__ == "__main__":
    main()
