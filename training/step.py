"""The parts of one step that are neither engine nor bookkeeping: batches on their way, numbers all ranks share, errors.

Promise: a rank waits for its device once a step, inside `Engine.step`; everything here is queued before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from training.collectives import gather, total
from training.errors import TrainingError
from training.task import Batch, State
from training.watch.meter import Meter

MAX_NAMED_SCANS = 20
Step = tuple[Sequence[Batch], State]


class Ahead:
    """A source's steps; on a GPU the next batch is copied, from pinned memory, while the device works on this one."""

    def __init__(self, steps: Iterator[Step], device: torch.device, meter: Meter, *, is_ahead: bool) -> None:
        self.steps = steps
        self.device = device
        self.meter = meter
        self.is_ahead = is_ahead
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.next_step: Step | None = None
        self.moved: Batch | None = None  # the first batch nobody has taken yet

    def take(self) -> Step:
        """The next step's batches as the source made them, and the state to go on from after it."""
        taken, self.next_step = self.next_step or self._wait(), None
        return taken

    def on_device(self, batches: Sequence[Batch], *, is_last_step: bool) -> Iterator[Batch]:
        """The step's batches on the device; the one after each is sent off when the caller comes back for more."""
        for index, batch in enumerate(batches):
            current = self.moved if self.moved is not None else self._move(batch)
            self.moved = None
            if self.stream is not None:
                torch.cuda.current_stream(self.device).wait_stream(self.stream)
                for value in _tensors(current).values():  # else the copying stream might reuse its memory too early
                    value.record_stream(torch.cuda.current_stream(self.device))
            yield current
            if not self.is_ahead:
                continue
            if index + 1 < len(batches):
                self.moved = self._move(batches[index + 1])
            elif not is_last_step:
                self.next_step = self._wait()
                self.moved = self._move(self.next_step[0][0])

    def _wait(self) -> Step:
        queued = None
        if self.stream is not None:
            queued = torch.cuda.Event()
            queued.record()
        with self.meter.waiting(lambda: queued is None or queued.query()):  # hidden while the device has work
            return next(self.steps)

    def _move(self, batch: Batch) -> Batch:
        if self.stream is not None:
            for name, value in _tensors(batch).items():
                setattr(batch, name, value.pin_memory())
        with torch.cuda.stream(self.stream):  # None: the current one
            return batch.to(self.device)


def _tensors(batch: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}


@dataclass
class Shared:
    """What all ranks know of a step, on its way from the device; read it after `Engine.step`, which waits anyway."""

    names: list[str]
    numbers: Tensor
    copied: torch.cuda.Event | None

    def read(self) -> tuple[dict[str, float], bool]:
        """The step's losses, summed over micro-batches and ranks; True when any rank was asked to stop."""
        if self.copied is not None:
            self.copied.synchronize()
        *losses, num_asked = self.numbers.tolist()
        return dict(zip(self.names, losses, strict=True)), num_asked > 0


def share(losses: list[dict[str, Tensor]], *, is_asked_to_stop: bool, device: torch.device) -> Shared:
    """Queue the one small reduction of a step. Losses are summed because each is in sum form."""
    names = sorted(losses[0])
    sums = [torch.stack([part[name].detach().float() for part in losses]).sum() for name in names]
    asked = torch.full((), float(is_asked_to_stop), device=device)
    numbers = total(torch.stack([*(value.to(device) for value in sums), asked]))
    if device.type != "cuda":
        return Shared(names, numbers, None)
    numbers = numbers.to("cpu", non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return Shared(names, numbers, copied)


def seed_of(seed: int, step: int, rank: int) -> int:
    """A seed for torch's global generator, different for every (seed, step, rank)."""
    return hash((seed, step, rank)) & 0x7FFFFFFFFFFFFFFF  # hashes of ints do not depend on PYTHONHASHSEED


def real_scans(batch: Batch) -> list[str]:
    """The scans of a batch, padding left out."""
    return [scan_id for scan_id, weight in zip(batch.scan_ids, batch.weight.tolist(), strict=True) if weight > 0]


def scans_of_all_ranks(batches: Sequence[Batch]) -> list[str]:
    """The scans of a step, sorted; every rank calls it."""
    mine = [scan_id for batch in batches for scan_id in real_scans(batch)]
    return sorted({scan_id for scans in cast("list[list[str]]", gather(mine)) for scan_id in scans})


def not_finite(step: int, losses: list[dict[str, Tensor]], batches: Sequence[Batch]) -> TrainingError:
    """The error every rank raises, naming the scans of the micro-batches whose loss is not finite, on any rank."""
    mine = [
        scan_id
        for part, batch in zip(losses, batches, strict=True)
        if not bool(torch.isfinite(part["loss"]))
        for scan_id in real_scans(batch)
    ]
    guilty = sorted({scan_id for scans in cast("list[list[str]]", gather(mine)) for scan_id in scans})
    what = "loss" if guilty else "gradient (every loss is finite)"
    scans = guilty or scans_of_all_ranks(batches)
    named = ", ".join(scans[:MAX_NAMED_SCANS]) + (
        f" and {len(scans) - MAX_NAMED_SCANS} more" if scans[MAX_NAMED_SCANS:] else ""
    )
    return TrainingError(
        f"step {step}: {what} is not finite; nothing was updated. Scans: {named}. Look at them with "
        "'python -m data_sharding.verify <set>', then run again to go on from the last commit; or go on from it in "
        "another run.folder, with train.start.checkpoint=<commit> and a lower train.optimizer.learning_rate"
    )
