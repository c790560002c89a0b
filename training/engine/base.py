"""What an engine offers the loop, and the pieces that all engines share.

Losses come in sum form (see training.task), so the gradient of a step is the plain sum over micro-batches and ranks.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from training.config import EngineConfig
from training.plateau import NOTHING_WATCHED, Watched
from training.task import Batch, ParameterGroup


class Engine(Protocol):
    device: torch.device
    groups: list[ParameterGroup]
    runs_in_lockstep: bool  # True when every forward pass is a collective

    def begin(self, step: int, watched: Watched = NOTHING_WATCHED) -> float:
        """Open the groups due at `step` and set learning rates; the schedule's learning rate comes back."""
        ...

    def losses(self, batch: Batch) -> dict[str, Tensor]: ...

    def backward(self, loss: Tensor) -> None: ...

    def group_norms(self) -> dict[str, float]:
        """The norm of each parameter group's gradient, before clipping; closed groups are left out.

        Called by every rank between the last `backward` and `step`; it waits for the device, and ranks exchange every
        gradient.
        """
        ...

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


def own_device() -> torch.device:
    """This rank's GPU, or the CPU when none is visible."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def poisoned(loss: Tensor) -> Tensor:
    """The loss itself; when it is not finite, its gradient is not finite either, so the gradient norm, which all ranks
    share anyway, tells every rank, without another collective."""
    return loss * (1 + 0 * loss.detach())


def autocast(config: EngineConfig, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16")


def norms_of_groups(
    groups: Sequence[ParameterGroup], gradient_of: Callable[[nn.Parameter], Tensor | None]
) -> dict[str, float]:
    """The norm of each group's gradient by name; groups without a gradient are left out."""
    norms = {}
    for group in groups:
        gradients = [gradient for each in group.parameters if (gradient := gradient_of(each)) is not None]
        if gradients:
            norms[group.name] = float(torch.stack([gradient.float().norm() for gradient in gradients]).norm())
    return norms
