"""A torch profiler over a few steps of rank 0; its trace lies in the run folder as profile/*.json (chrome://tracing)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from cluster.storage.stores import Store
from training.collectives import this_process
from training.config import ProfileConfig

FOLDER = "profile"


class Tracing:
    def __init__(self, config: ProfileConfig, store: Store, scratch: Path) -> None:
        self.config = config
        self.store = store
        self.scratch = scratch
        self.profiler: profile | None = None
        self.num_begun = 0

    def begin_step(self, step: int) -> None:
        """Called before every step, and once after the last: starts, or writes the trace of the steps before."""
        begun, self.num_begun = self.num_begun, self.num_begun + 1
        if self.config.num_steps == 0 or not this_process().is_main:
            return
        if begun == self.config.start_step:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self.profiler = profile(activities=activities)
            self.profiler.start()
        elif begun == self.config.start_step + self.config.num_steps:
            self.finish(step)

    def finish(self, step: int) -> None:
        """Write what was traced up to `step`, if anything is under way."""
        if self.profiler is None:
            return
        self.profiler.stop()
        name = f"{FOLDER}/before-step-{step:08d}.json"
        local = self.scratch / name
        local.parent.mkdir(parents=True, exist_ok=True)
        self.profiler.export_chrome_trace(str(local))
        self.store.put(name, local)
        self.profiler = None
