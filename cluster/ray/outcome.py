"""What workers tell the driver of a run: results, errors, what rank 0 prints, where ranks are and whether they hang.

Knows nothing of how workers are started.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

from cluster.hanging import Seat
from cluster.stopping import StopRequest


@dataclass
class Outcome:
    """Kept in one small actor: what rank 0 returned, or the first of our errors any worker raised."""

    results: list[object] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)
    texts: list[tuple[bool, str]] = field(default_factory=list)  # is it stderr?, what rank 0 printed
    stop: StopRequest = field(default_factory=StopRequest)
    seats: dict[int, Seat] = field(default_factory=dict)  # of the ranks that run now, or ran last
    silence: str | None = None  # the first rank's of this attempt that came to no step, until it is taken
    has_silence: bool = False
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

    def add_seat(self, seat: Seat) -> None:
        self.seats = {rank: other for rank, other in self.seats.items() if other.world_size == seat.world_size}
        self.seats[seat.rank] = seat
        self.silence, self.has_silence = None, False

    def taken_seats(self) -> list[Seat]:
        return [self.seats[rank] for rank in sorted(self.seats)]

    def add_silence(self, silence: str) -> None:
        if not self.has_silence:
            self.silence, self.has_silence = silence, True

    def take_silence(self) -> str | None:
        taken, self.silence = self.silence, None
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
    """A text stream of rank 0 whose lines come out at the driver, which may be another machine."""

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
    """Where the time from a command to its first step goes; seconds since 1970, of two nodes' clocks."""

    started_at: float  # the command
    launched_at: float  # it was composed and checked
    entered_at: float  # a worker runs our code
    is_told: bool = False

    def tell(self, first_step_at: float) -> None:
        """Print one line, once."""
        if self.is_told:
            return
        self.is_told = True
        print(
            f"first step {first_step_at - self.started_at:.1f} s after the command: checking "
            f"{self.launched_at - self.started_at:.1f}, workers {self.entered_at - self.launched_at:.1f}, "
            f"data, model and first evaluation {first_step_at - self.entered_at:.1f}",
            flush=True,
        )


@contextmanager
def relayed(outcome: Any, *, is_terminal: bool) -> Iterator[None]:
    """What this process prints goes to the driver, for the length of the block."""
    output = Relay(outcome, is_error=False, is_terminal=is_terminal)
    errors = Relay(outcome, is_error=True, is_terminal=False)
    with redirect_stdout(output), redirect_stderr(errors):
        try:
            yield
        finally:
            output.flush()
            errors.flush()
