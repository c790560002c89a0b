"""What ranks exchange; nothing with one process. Uses torch.distributed as it was initialised."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed
from numpy.typing import NDArray
from torch import Tensor

MAX_EXCHANGED = 1 << 24  # numbers at a time


@dataclass(frozen=True)
class Process:
    rank: int
    world_size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def this_process() -> Process:
    """This process, among all processes of the run."""
    if not torch.distributed.is_initialized():
        return Process(rank=0, world_size=1)
    return Process(rank=torch.distributed.get_rank(), world_size=torch.distributed.get_world_size())


def total(values: Tensor) -> Tensor:
    """The sum of `values` over all ranks, on every rank."""
    values = values.clone()
    if this_process().world_size > 1:
        torch.distributed.all_reduce(values)
    return values


def sum_in_place(values: Tensor, device: torch.device) -> None:
    """Replace `values`, contiguous on any device, by their sum over all ranks, which exchange tensors on `device`."""
    if this_process().world_size == 1:
        return
    for piece in values.view(-1).split(MAX_EXCHANGED):  # so that no second copy of a large sum is held
        moved = piece.to(device)
        torch.distributed.all_reduce(moved)
        piece.copy_(moved)


def gather(value: object) -> list[object]:
    """Every rank's picklable `value`, in rank order, on every rank."""
    if this_process().world_size == 1:
        return [value]
    values: list[object] = [None] * this_process().world_size
    torch.distributed.all_gather_object(values, value)
    return values


def gather_numbers(mine: list[float], device: torch.device) -> NDArray[np.float64]:
    """Every rank's numbers, as rows in rank order, on every rank."""
    own = torch.tensor(mine, dtype=torch.float64, device=device)
    rows = [torch.empty_like(own) for _ in range(this_process().world_size)]
    if this_process().world_size > 1:
        torch.distributed.all_gather(rows, own)
    else:
        rows = [own]
    return torch.stack(rows).cpu().numpy()


def from_main(value: object) -> object:
    """Rank 0's picklable `value`, on every rank."""
    return gather(value if this_process().is_main else None)[0]


def any_true(flag: bool) -> bool:
    """True on every rank when the flag is True on any."""
    return any(gather(flag))


def barrier() -> None:
    """Returns when every rank has called it."""
    if this_process().world_size > 1:
        torch.distributed.barrier()
