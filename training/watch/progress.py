"""What a terminal shows of a training: one bar that moves with every step. In a pipe: one line per tracking interval.

Promise: a few numbers, the same in both; all others are in metrics.jsonl and MLflow. What is unusual is a sentence.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta

from rich import progress
from rich.console import Console, RenderableType
from rich.text import Text

from training.collectives import this_process

LINE_WIDTH = 120  # of a line in a pipe, at most
SPEED_OVER_S = 600.0  # steps per second and the time left are those of the last ten minutes
DRAWN_PER_S = 5.0  # as often as the driver relays what rank 0 prints
MUCH_WAITING = 0.2  # of the step time
MUCH_LAG = 0.3  # of the median rank's time


def phase(text: str) -> None:
    """Print what the ranks do now, before or after the steps."""
    if this_process().is_main:
        print(f"{text} ...", flush=True)


class Bar(progress.Progress):
    """A bar as wide as the terminal, and a line below it."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield from (Text(task.description, no_wrap=True, overflow="ellipsis") for task in self.tasks)


class Progress:
    """Rank 0's view of the steps of one attempt; `console` is quiet on the others."""

    def __init__(
        self,
        num_steps: int,
        *,
        start: int,
        every_steps: int,
        is_verbose: bool,
        console: Console,
        get_time: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console
        self.is_verbose = is_verbose
        self.losses: deque[float] = deque(maxlen=every_steps)
        self.numbers = ""
        self.score = ""
        self.told: set[str] = set()
        self.bar = Bar(
            progress.TextColumn("step {task.completed}/{task.total}"),
            progress.BarColumn(bar_width=None),
            progress.TextColumn("{task.fields[speed]}"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("elapsed"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("left"),
            console=console,
            expand=True,
            disable=not console.is_terminal,
            refresh_per_second=DRAWN_PER_S,
            speed_estimate_period=SPEED_OVER_S,
            get_time=get_time,
        )
        self.bar.add_task("", total=num_steps, completed=start, speed="")
        self.bar.start()

    def step(self, done: int, *, loss: float, learning_rate: float) -> None:
        """Move the bar to `done` steps."""
        self.losses.append(loss)
        mean = sum(self.losses) / len(self.losses)
        self.numbers = f"loss {mean:.4g}  lr {learning_rate:.2e}"
        self.bar.update(progress.TaskID(0), completed=done, description=self._below())
        speed = self.bar.tasks[0].speed  # None after a single step
        self.bar.update(progress.TaskID(0), speed=f"{'-' if speed is None else format(speed, '.3g')} steps/s")

    def interval(self, done: int, values: Mapping[str, float]) -> None:
        """Print the line of an interval in a pipe, and what is unusual about its `values` when it begins."""
        if not self.console.is_terminal:
            task = self.bar.tasks[0]
            left = "-" if task.time_remaining is None else _clock(task.time_remaining)
            times = f"{task.fields['speed']}  {_clock(task.elapsed or 0)} elapsed  {left} left"
            self.say(f"step {done}/{task.total:.0f}  {times}  {self._below()}"[:LINE_WIDTH])
        found = unusual(values)
        for name in found.keys() - self.told:
            self.say(f"step {done}: {found[name]}")
        self.told = set(found)
        self.all(values)

    def evaluating(self, split: str) -> None:
        """Say that steps wait for an evaluation; `evaluated` ends the line."""
        self.bar.update(progress.TaskID(0), description=f"evaluating on {split} ...")
        if not self.console.is_terminal:
            self.console.out(f"evaluating on {split} ...", end=" ", highlight=False)

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """Show the first of `metrics` that is no loss from now on."""
        name = next((name for name in metrics if not name.endswith("loss")), None)
        self.score = "" if name is None else f"{name.replace('/', ' ')} {metrics[name]:.4g}"
        self.bar.update(progress.TaskID(0), description=self._below())
        if not self.console.is_terminal:
            self.say(self.score)
        self.all(metrics)

    def all(self, values: Mapping[str, float]) -> None:
        """Print every number, where that is asked for."""
        for name, value in values.items() if self.is_verbose else ():
            self.say(f"  {name} {value:.6g}")

    def say(self, sentence: str) -> None:
        """Print a line above the bar."""
        self.console.out(sentence, highlight=False)

    def close(self) -> None:
        """Leave the bar as it is, and the terminal to others."""
        self.bar.stop()

    def _below(self) -> str:
        return "  ".join(filter(None, (self.numbers, self.score)))


def unusual(values: Mapping[str, float]) -> dict[str, str]:
    """A sentence for every number of an interval that asks for something to be done, by the number's name."""
    found = {}
    if (share := values["train/data_wait_share"]) > MUCH_WAITING:
        found["waiting"] = f"{share:.0%} of the step time is spent waiting for data; raise data.num_workers"
    if (lag := values["train/slowest_rank_lag"]) > MUCH_LAG:
        rank = f"rank {values['train/slowest_rank']:.0f}"
        found["lag"] = f"{rank} takes {lag:.0%} longer than the median rank, and all wait for it; look at its node"
    return found


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
