"""Plain PyTorch in one process, behind the calls of training.engine.base.Engine."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from training.config import TrainConfig
from training.engine.base import autocast, norms_of_groups, own_device, poisoned
from training.engine.optimizer import begin_update, learning_rate_at, make_optimizer
from training.errors import CheckpointError
from training.plateau import NOTHING_WATCHED, Watched
from training.task import Batch, Task
from training.unfreezing import checked_groups


class PlainEngine:
    runs_in_lockstep = False

    def __init__(self, task: Task, config: TrainConfig) -> None:
        self.device = own_device()
        self.config = config
        self.task = task.to(self.device)
        self.groups = checked_groups(task)
        self.optimizer = make_optimizer(self.groups, config, self.device)

    def begin(self, step: int, watched: Watched = NOTHING_WATCHED) -> float:
        rate = learning_rate_at(self.config, step, watched)
        begin_update(self.task, self.optimizer, self.groups, rate=rate, step=step, watched=watched)
        return rate

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        with autocast(self.config.engine, self.device):
            return self.task(batch)

    def backward(self, loss: Tensor) -> None:
        poisoned(loss).backward()

    def group_norms(self) -> dict[str, float]:
        return norms_of_groups(self.groups, lambda parameter: parameter.grad)

    def step(self) -> float:
        norm = float(nn.utils.clip_grad_norm_(self.task.parameters(), self.config.optimizer.clip_norm))
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        with autocast(self.config.engine, self.device):
            return self.task.predict(batch)

    @contextlib.contextmanager
    def whole_parameters(self) -> Iterator[None]:
        yield

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"task": self.task.state_dict(), "optimizer": self.optimizer.state_dict()}, folder / "plain.pt")

    def load(self, folder: Path) -> None:
        path = folder / "plain.pt"
        if not path.exists():
            raise CheckpointError(f"{folder} was not written by engine=plain; resume with the engine that wrote it")
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.task.load_state_dict(state["task"])
        self.optimizer.load_state_dict(state["optimizer"])

    def close(self) -> None:
        return
