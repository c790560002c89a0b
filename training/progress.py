"""One plain line an interval; on a terminal a progress bar above it."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping


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
        """Print `values` after `done` steps."""
        if not self.is_shown:
            return
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        print(f"step {done}/{self.num_steps}  {numbers}", flush=True)
