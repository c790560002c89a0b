"""One plain line an interval; on a terminal with a progress bar below, also when the terminal is the driver's."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

BAR_WIDTH = 40


class Progress:
    def __init__(self, num_steps: int, *, start: int, is_shown: bool) -> None:
        self.num_steps = num_steps
        self.is_shown = is_shown
        self.is_terminal = is_shown and sys.stdout.isatty()
        self.last_step = start
        self.last_time = time.monotonic()

    def steps_per_second(self, done: int) -> float:
        """Steps a second since the last call, or since the start."""
        now = time.monotonic()
        rate = (done - self.last_step) / max(now - self.last_time, 1e-9)
        self.last_step, self.last_time = done, now
        return rate

    def show(self, done: int, values: Mapping[str, float]) -> None:
        """Print `values` after `done` steps; details (split/metric/part/name) are only tracked."""
        if not self.is_shown:
            return
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if name.count("/") < 3)
        line = f"step {done}/{self.num_steps}  {numbers}"
        if not self.is_terminal:
            print(line, flush=True)
            return
        filled = BAR_WIDTH * done // self.num_steps
        bar = "█" * filled + "░" * (BAR_WIDTH - filled)
        print(
            f"\r\x1b[K{line}\n{bar} {100 * done // self.num_steps} %",
            end="\n" if done == self.num_steps else "",
            flush=True,
        )
