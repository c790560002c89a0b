"""Shows where every rank of a run is when one of them has not started its next step for too long.

Promise: a rank that is suspended, or stuck in a call, is shown as well, because stacks are read from outside. Ends no
process: the collectives of the other ranks time out by themselves. Does not know what ranks do.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

# Of the time after which collectives time out and ranks are killed: enough must be left to read the stacks.
REPORT_AT_SHARE = 0.7
READ_TIMEOUT_S = 10.0


class Heartbeat:
    """When this process last started a step, and the name of the last work it saved for good. Before the first step
    nothing is expected of it."""

    def __init__(self) -> None:
        self.last: float | None = None
        self.first_at: float | None = None  # seconds since 1970
        self.saved: str | None = None

    def beat(self) -> None:
        self.last = time.monotonic()
        self.first_at = self.first_at or time.time()

    def stop(self) -> None:
        """From now on no step is expected."""
        self.last = None

    def silent_s(self) -> float:
        return 0.0 if self.last is None else time.monotonic() - self.last


HEARTBEAT = Heartbeat()  # of this process


@dataclass(frozen=True)
class RankProcess:
    """The process of a rank, and the node it is on."""

    rank: int
    world_size: int
    node: str  # Ray's id
    host: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size} ({self.host}, process {self.pid})"


def stacks_of(pid: int) -> str:
    """The Python stacks of a process on this machine and what state it is in; or why they cannot be read."""
    try:
        state = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return "is gone"
    tool = Path(sys.executable).with_name("py-spy")
    command = str(tool) if tool.exists() else shutil.which("py-spy")
    if command is None:
        return f"{state}; its stacks cannot be read: py-spy is not installed on this node"
    try:
        # Without suspending it: to wait for a process that is suspended already would take for ever.
        read = subprocess.run(
            [command, "dump", "--nonblocking", "--pid", str(pid)],
            capture_output=True,
            text=True,
            check=False,
            timeout=READ_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return f"{state}; its stacks could not be read within {READ_TIMEOUT_S:.0f} s"
    if read.returncode:
        return f"{state}; its stacks cannot be read: {read.stderr.strip()}"
    return f"{state}\n{read.stdout.rstrip()}"
