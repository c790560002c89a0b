"""What workers report to the driver: results, errors, what rank 0 prints, where ranks are and whether they hang.

Does not know how workers are started.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

from cluster.hanging import RankProcess
from cluster.stopping import StopRequest


@dataclass
class Outcome:
    """An actor's state: what rank 0 returned, the first user error of any worker, and what the driver asks for."""

    results: list[object] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)
    texts: list[tuple[bool, str]] = field(default_factory=list)  # is it stderr?, what rank 0 printed
    stop: StopRequest = field(default_factory=StopRequest)
    processes: dict[int, RankProcess] = field(default_factory=dict)  # of the ranks that run now, or ran last
    hang: str | None = None  # the first one of this attempt, until the driver takes it
    has_hang: bool = False
    saved: str | None = None  # the last work that a failure does not lose

    def add_result(self, result: object) -> None:
        self.results.append(result)

    def add_error(self, error: BaseException) -> None:
        self.errors.append(error)

    def first_error(self) -> BaseException | None:
        return self.errors[0] if self.errors else None

    def last_result(self) -> object:
        return self.results[-1]

    def ask_to_stop(self, reason: str) -> None:
        self.stop.ask(reason)

    def stop_reason(self) -> str | None:
        return self.stop.reason

    def add_process(self, process: RankProcess) -> None:
        """A rank that starts; ranks of an attempt of another size are forgotten."""
        same_attempt = {rank: each for rank, each in self.processes.items() if each.world_size == process.world_size}
        self.processes = same_attempt | {process.rank: process}
        self.hang, self.has_hang = None, False

    def rank_processes(self) -> list[RankProcess]:
        return [self.processes[rank] for rank in sorted(self.processes)]

    def add_hang(self, hang: str) -> None:
        if not self.has_hang:
            self.hang, self.has_hang = hang, True

    def take_hang(self) -> str | None:
        taken, self.hang = self.hang, None
        return taken

    def add_saved(self, name: str) -> None:
        self.saved = name

    def last_saved(self) -> str | None:
        return self.saved

    def add_text(self, is_error: bool, text: str) -> None:
        self.texts.append((is_error, text))

    def take_texts(self) -> list[tuple[bool, str]]:
        taken, self.texts = self.texts, []
        return taken


class Relay(io.TextIOBase):
    """A text stream of rank 0 whose lines are printed by the driver, which may be another machine."""

    def __init__(self, outcome: Any, *, is_error: bool, is_terminal: bool) -> None:
        self.outcome = outcome
        self.is_error = is_error
        self.is_terminal = is_terminal
        self.parts: list[str] = []

    def write(self, text: str) -> int:
        self.parts.append(text)
        if "\n" in text:
            self.flush()
        return len(text)

    def flush(self) -> None:
        if self.parts:
            self.outcome.add_text.remote(self.is_error, "".join(self.parts))
            self.parts = []

    def isatty(self) -> bool:
        return self.is_terminal


@dataclass
class StartStamps:
    """How the time from a command to its first step is spent; seconds since 1970, by the clocks of two nodes."""

    started_at: float  # the command
    launched_at: float  # composed and checked
    entered_at: float  # a worker runs our code
    is_printed: bool = False

    def print_once(self, first_step_at: float) -> None:
        """Print the line, unless it was printed before."""
        if self.is_printed:
            return
        self.is_printed = True
        print(
            f"first step {first_step_at - self.started_at:.1f} s after the command: checking "
            f"{self.launched_at - self.started_at:.1f}, workers {self.entered_at - self.launched_at:.1f}, "
            f"data, model and first evaluation {first_step_at - self.entered_at:.1f}",
            flush=True,
        )


@contextmanager
def relayed(outcome: Any, *, is_terminal: bool) -> Iterator[None]:
    """Within the block, what this process prints goes to the driver."""
    output = Relay(outcome, is_error=False, is_terminal=is_terminal)
    errors = Relay(outcome, is_error=True, is_terminal=False)
    with redirect_stdout(output), redirect_stderr(errors):
        try:
            yield
        finally:
            output.flush()
            errors.flush()
