"""Where the time of a run goes: throughput, waiting, saving, the slowest rank. Measuring changes nothing.

docs/pretraining.md says what each number means. Device times come from events, which are read once per interval and
never within a step.
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from training.collectives import gather_numbers, this_process
from training.task import Batch, Cost

GIB = 1024**3
TERA = 1e12
Mark = float | torch.cuda.Event


@dataclass
class Counts:
    """What one rank counted since the last report."""

    step_s: list[float] = field(default_factory=list)
    wait_s: float = 0.0
    forwards: list[tuple[Mark, Mark]] = field(default_factory=list)
    num_samples: int = 0
    tokens: float = 0.0
    flops: float = 0.0


class Meter:
    def __init__(self, device: torch.device, *, peak_tflops: float | None, started: float, repeated_until: int) -> None:
        self.device = device
        self.peak_tflops = peak_tflops
        self.started = started  # by time.monotonic, of this attempt
        self.repeated_until = repeated_until  # updates that an earlier attempt made and lost
        self.useful_s = 0.0
        self.saving_s = 0.0
        self.counts = Counts()
        self.begin_step()

    def begin_step(self) -> None:
        """Evaluation and saving, which lie between steps, do not count as step time."""
        self.step_begun = time.perf_counter()
        self.step_wait_s = 0.0
        self.costs: list[Cost] = []

    @contextlib.contextmanager
    def waiting(self, is_idle: Callable[[], bool]) -> Iterator[None]:
        """Wraps waiting for data, which counts when the device ran out of work meanwhile."""
        begun = time.perf_counter()
        yield
        if is_idle():
            self.step_wait_s += time.perf_counter() - begun

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Wraps a forward pass: what a rank does by itself, before ranks wait for one another."""
        begun = self._mark()
        yield
        self.counts.forwards.append((begun, self._mark()))

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Wraps what the loop itself does for a checkpoint."""
        begun = time.perf_counter()
        yield
        self.saving_s += time.perf_counter() - begun

    def count(self, cost: Cost) -> None:
        """Add the cost of one micro-batch."""
        self.costs.append(cost)

    def end_step(self, done: int, batches: Sequence[Batch]) -> None:
        """After update `done`; `batches` as the source made them, on the host."""
        seconds = time.perf_counter() - self.step_begun
        self.counts.step_s.append(seconds)
        self.counts.wait_s += self.step_wait_s
        if done > self.repeated_until:
            self.useful_s += seconds - self.step_wait_s
        for batch, cost in zip(batches, self.costs, strict=True):
            num_real = int((batch.weight > 0).sum())
            share = num_real / len(batch.weight)  # padding costs time and yields nothing
            self.counts.num_samples += num_real
            self.counts.tokens += share * cost.tokens
            self.counts.flops += share * cost.flops

    def report(self) -> dict[str, float]:
        """The numbers since the last report, of all ranks; every rank calls it. Shares and goodput: of this attempt."""
        mine, self.counts = self.counts, Counts()
        own_s = sum(_seconds(begun, ended) for begun, ended in mine.forwards) + mine.wait_s
        step_s = sum(mine.step_s)
        counted = [own_s, mine.wait_s, mine.num_samples, mine.tokens, mine.flops, self._memory_peak()]
        ranks = gather_numbers(counted, self.device)
        own, waits, samples, tokens, flops, memory = ranks.T
        slowest = int(own.argmax())
        tflops = float(flops.sum()) / this_process().world_size / step_s / TERA
        elapsed_s = time.monotonic() - self.started
        numbers = {
            "samples_per_s": float(samples.sum()) / step_s,
            "tokens_per_s_per_device": float(tokens.sum()) / this_process().world_size / step_s,
            "tflops_per_device": tflops,
            "data_wait_share": float(waits.max()) / step_s,
            "step_p50_s": float(np.percentile(mine.step_s, 50)),
            "step_p95_s": float(np.percentile(mine.step_s, 95)),
            "slowest_rank": float(slowest),
            "slowest_rank_lag": float(own[slowest]) / max(float(np.median(own)), 1e-9) - 1,
            "memory_peak_gib": float(memory.max()) / GIB,
            "checkpoint_stall_share": self.saving_s / elapsed_s,
            "goodput": self.useful_s / elapsed_s,
        }
        return numbers | ({"mfu": tflops / self.peak_tflops} if self.peak_tflops is not None else {})

    def _mark(self) -> Mark:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _memory_peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _seconds(begun: Mark, ended: Mark) -> float:
    if isinstance(begun, float) and isinstance(ended, float):
        return ended - begun
    assert isinstance(begun, torch.cuda.Event)
    assert isinstance(ended, torch.cuda.Event)
    return begun.elapsed_time(ended) / 1000


def peak_tflops_of(device: torch.device, table: Mapping[str, float], *, precision: str) -> float | None:
    """The device's dense bf16 peak; None for a device that is not in the table, and for a run in another precision."""
    if device.type != "cuda" or precision != "bf16":
        return None
    return longest_prefix(torch.cuda.get_device_name(device), table)


def longest_prefix(name: str, table: Mapping[str, float]) -> float | None:
    """The value of the longest key that `name` begins with."""
    keys = [key for key in table if name.startswith(key)]
    return table[max(keys, key=len)] if keys else None
