"""One plain line per interval; on a terminal with a progress bar below it."""

from __future__ import annotations

import sys
from collections.abc import Mapping

BAR_WIDTH = 40


class Progress:
    def __init__(self, num_steps: int, *, is_shown: bool) -> None:
        self.num_steps = num_steps
        self.is_shown = is_shown
        self.is_terminal = is_shown and sys.stdout.isatty()

    def show(self, done: int, values: Mapping[str, float]) -> None:
        """Print `values` after `done` steps; details (split/metric/part/name) are only tracked."""
        if not self.is_shown:
            return
        shown = {name.removeprefix("train/"): value for name, value in values.items() if name.count("/") < 3}
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
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
