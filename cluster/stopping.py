"""Whether this process was asked to stop: by a signal, or by the cluster (see cluster.ray.launch).

SIGTERM is what schedulers, spot machines and `ray job stop` send; SIGUSR1 what Slurm's --signal is commonly set to;
SIGINT is Ctrl-C.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """The first reason to stop that was given, if any."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def ask(self, reason: str) -> None:
        self.reason = self.reason or reason

    def clear(self) -> None:
        """To be called once the request was obeyed."""
        self.reason = None


REQUEST = StopRequest()  # of this process


@contextlib.contextmanager
def listening(ask: Callable[[str], None]) -> Iterator[None]:
    """Within the block a signal asks to stop instead of ending the process; a second Ctrl-C ends it. Only the main
    thread receives signals: in any other thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        ask(signal.Signals(number).name)
        if number == signal.SIGINT:
            print("\nstopping after the step under way; Ctrl-C again ends at once", file=sys.stderr, flush=True)
            signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, on_signal) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
