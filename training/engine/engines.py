"""How one update is made: PlainEngine in one process, DeepSpeedEngine over ranks. Same calls, same numbers.

Losses come in sum form (see training.task), so the gradient of a step is the plain sum over micro-batches and ranks.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from training.config import EngineConfig, TrainConfig
from training.engine.schedule import learning_rate_share
from training.errors import CheckpointError
from training.task import Batch, ParameterGroup, Task
from training.unfreezing import checked_groups, is_open


class Engine(Protocol):
    device: torch.device
    runs_in_lockstep: bool  # True when every forward pass is a collective

    def begin(self, step: int) -> float:
        """Open the groups due at `step` and set learning rates; the schedule's learning rate comes back."""
        ...

    def losses(self, batch: Batch) -> dict[str, Tensor]: ...

    def backward(self, loss: Tensor) -> None: ...

    def step(self) -> float:
        """The norm of the step's whole gradient, the same on every rank. Not finite: nothing was updated."""
        ...

    def predict(self, batch: Batch) -> dict[str, Tensor]: ...

    def whole_parameters(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the task's parameters are whole on every rank."""
        ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...

    def close(self) -> None: ...


def make_engine(task: Task, config: TrainConfig, *, num_micro_batches: int) -> Engine:
    """The engine that `config.engine` names, holding `task` and a fresh AdamW."""
    if config.engine.activation_checkpointing:
        task.checkpoint_activations()
    if config.engine.compile:
        task.compile(dynamic=False)
    if config.engine.kind == "plain":
        return PlainEngine(task, config)
    from training.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(task, config, num_micro_batches=num_micro_batches)


def checkpoint_bytes(task: Task, config: EngineConfig, *, num_ranks: int) -> int:
    """Bytes of a commit's tensors: weights, buffers that travel with them, AdamW's two moments.

    ZeRO 1 and 2 store the weights twice, as the model sees them and as AdamW's own; of ZeRO 3 every rank stores the
    buffers.
    """
    stage = config.zero_stage if config.kind == "deepspeed" else 0
    weights = sum(parameter.nbytes for parameter in task.parameters())
    buffers = sum(tensor.nbytes for tensor in task.state_dict().values()) - weights
    return weights * (4 if stage in (1, 2) else 3) + buffers * (num_ranks if stage == 3 else 1)


def own_device() -> torch.device:
    """This rank's GPU, or the CPU when none is visible."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def make_optimizer(groups: list[ParameterGroup], config: TrainConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW with one param_group a ParameterGroup, in order; learning rates are set by `begin`."""
    return torch.optim.AdamW(
        [{"params": group.parameters, "weight_decay": group.weight_decay, "lr": 0.0} for group in groups],
        betas=config.optimizer.betas,
        eps=config.optimizer.epsilon,
        fused=device.type == "cuda",
    )


def open_groups(optimizer: torch.optim.Optimizer, groups: list[ParameterGroup], *, step: int, rate: float) -> None:
    """Set learning rate, weight decay and requires_grad of every group for the update of `step`."""
    for settings, group in zip(optimizer.param_groups, groups, strict=True):
        opened = is_open(group, step)
        settings["lr"] = rate * group.learning_rate_scale if opened else 0.0
        settings["weight_decay"] = group.weight_decay if opened else 0.0
        for parameter in group.parameters:
            parameter.requires_grad_(opened)


def poisoned(loss: Tensor) -> Tensor:
    """The loss itself; when it is not finite, its gradient is not finite either, so the gradient norm, which all ranks
    share anyway, tells every rank, without another collective."""
    return loss * (1 + 0 * loss.detach())


def autocast(config: EngineConfig, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16")


class PlainEngine:
    """Plain PyTorch in one process."""

    runs_in_lockstep = False

    def __init__(self, task: Task, config: TrainConfig) -> None:
        self.device = own_device()
        self.config = config
        self.task = task.to(self.device)
        self.groups = checked_groups(task)
        self.optimizer = make_optimizer(self.groups, config, self.device)

    def begin(self, step: int) -> float:
        share = learning_rate_share(self.config.schedule, step=step, num_steps=self.config.steps)
        rate = share * self.config.optimizer.learning_rate
        open_groups(self.optimizer, self.groups, step=step, rate=rate)
        return rate

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        with autocast(self.config.engine, self.device):
            return self.task(batch)

    def backward(self, loss: Tensor) -> None:
        poisoned(loss).backward()

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
            raise CheckpointError(f"{folder} was not written by engine=plain; go on with the engine that wrote it")
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.task.load_state_dict(state["task"])
        self.optimizer.load_state_dict(state["optimizer"])

    def close(self) -> None:
        return
