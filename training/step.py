"""What a step needs beside the engine: batches moved ahead of time, numbers that all ranks share, error messages.

Promise: a rank waits for its device once per step, inside `Engine.step`; everything here is queued before it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
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


class BatchFeed:
    """A source's steps; on a GPU the next batch is copied, from pinned memory, while the device works on this one."""

    def __init__(self, steps: Iterator[Step], device: torch.device, meter: Meter, *, is_ahead: bool) -> None:
        self.steps = steps
        self.device = device
        self.meter = meter
        self.is_ahead = is_ahead
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.next_step: Step | None = None
        self.moved: Batch | None = None  # the first batch that was moved ahead of its turn

    def next_batches(self) -> Step:
        """The next step's batches as the source made them, and the state to resume from after it."""
        following, self.next_step = self.next_step or self._wait(), None
        return following

    def on_device(self, batches: Sequence[Batch], *, is_last_step: bool) -> Iterator[Batch]:
        """The step's batches on the device; each next one is sent when the caller asks for it."""
        for index, batch in enumerate(batches):
            current = self.moved if self.moved is not None else self._move(batch)
            self.moved = None
            if self.stream is not None:
                torch.cuda.current_stream(self.device).wait_stream(self.stream)
                for tensor in tensors_in(current):  # else the copying stream might reuse its memory too early
                    tensor.record_stream(torch.cuda.current_stream(self.device))
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
        with self.meter.waiting(lambda: queued is None or queued.query()):  # not idle while the device has work
            return next(self.steps)

    def _move(self, batch: Batch) -> Batch:
        if self.stream is not None:
            batch = cast("Batch", with_tensors(batch, Tensor.pin_memory))
        with torch.cuda.stream(self.stream):  # None: the current one
            return batch.to(self.device)


def with_tensors(value: object, change: Callable[[Tensor], Tensor]) -> object:
    """A copy of a batch in which every tensor is changed, also inside dataclasses, dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return change(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        copied = copy.copy(value)
        for name, each in vars(value).items():  # not its fields: some are computed only when they are asked for
            object.__setattr__(copied, name, with_tensors(each, change))  # also where the dataclass is frozen
        return copied
    if isinstance(value, dict):
        return {key: with_tensors(each, change) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        changed = [with_tensors(each, change) for each in value]
        return type(value)._make(changed) if hasattr(value, "_make") else type(value)(changed)  # a NamedTuple
    return value


def tensors_in(value: object) -> list[Tensor]:
    """Every tensor of a batch, also inside dataclasses, dicts, lists and tuples."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    with_tensors(value, keep)
    return found


@dataclass
class StepTotals:
    """A step's numbers that all ranks share, on their way from the device: read after `Engine.step`, which waits."""

    names: list[str]
    numbers: Tensor
    copied: torch.cuda.Event | None

    def read(self) -> tuple[dict[str, float], bool]:
        """The step's losses, summed over micro-batches and ranks; True when any rank was asked to stop."""
        if self.copied is not None:
            self.copied.synchronize()
        *losses, num_asked = self.numbers.tolist()
        return dict(zip(self.names, losses, strict=True)), num_asked > 0


def reduce_over_ranks(losses: list[dict[str, Tensor]], *, is_asked_to_stop: bool, device: torch.device) -> StepTotals:
    """The losses, summed over micro-batches and ranks because they are in sum form, and whether any rank was asked to
    stop: the one small reduction of a step, queued."""
    names = sorted(losses[0])
    sums = [torch.stack([part[name].detach().float() for part in losses]).sum() for name in names]
    asked = torch.full((), float(is_asked_to_stop), device=device)
    numbers = total(torch.stack([*(value.to(device) for value in sums), asked]))
    if device.type != "cuda":
        return StepTotals(names, numbers, None)
    numbers = numbers.to("cpu", non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return StepTotals(names, numbers, copied)


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
        "'python -m data_sharding.verify <set>', then run again to resume from the last commit; or resume from it in "
        "another run.folder, with train.start.checkpoint=<commit> and a lower train.optimizer.learning_rate"
    )
