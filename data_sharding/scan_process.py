"""Packs each scan in a child process of its own, with a memory limit and a timeout: its death is that scan's refusal.

`ScanProcess` talks JSON lines to a clean helper (`python -m data_sharding.scan_process`), which has imported what
packing needs and forks once a scan. A fork of a Ray worker would copy its threads' locks; a new interpreter a scan
would import for seconds.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_sharding.config import LimitsConfig
from data_sharding.errors import ShardError

if TYPE_CHECKING:
    from data_sharding.packing import PackRequest

# One BLAS thread: sums over several depend on how many there are, and the bytes must not.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

READY = "ready\n"


class ScanProcess:
    """A helper process for one space; close it, or use it as a context manager."""

    def __init__(self, space_file: Path, limits: LimitsConfig) -> None:
        self.limits = limits
        # The same import path as here: a Ray worker runs the uploaded working folder, not an installed package.
        environment = os.environ | ONE_THREAD | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "data_sharding.scan_process", str(space_file)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def wait_until_ready(self) -> None:
        """Returns once the helper has loaded the space file."""
        assert self.process.stdout is not None
        if self.process.stdout.readline() != READY:
            raise ShardError(f"the packing helper did not start (exit code {self.process.wait()}); see its error above")

    def pack(self, request: PackRequest, part: Path) -> dict[str, Any]:
        """{"members": [...], "payload": bytes} of the part written, or {"reason": ...} where the scan is refused."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        task = {
            "request": dataclasses.asdict(request),
            "part": str(part),
            "memory_bytes": self.limits.memory_mb << 20,
            "timeout_s": self.limits.timeout_s,
        }
        print(json.dumps(task), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise ShardError(
                f"{request.path}: the packing helper ended (exit code {self.process.wait()}); run again, it goes on"
            )
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def __enter__(self) -> ScanProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(space_file: str) -> None:
    """Answers one JSON line for each request line, until stdin ends."""
    # webdataset imports torch only to offer it a base class: without it the helper starts in a third of the time.
    sys.modules["torch"] = None  # type: ignore[assignment]
    from brain_models.space import BrainSpace
    from data_sharding import packing  # imported before the forks, so that no child imports

    space = BrainSpace.load(space_file)
    assert space.fingerprint  # computed once here, not in every child
    print(READY, end="", flush=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent closes stdin
    for line in sys.stdin:
        task = json.loads(line)
        part = Path(task["part"])
        pid = os.fork()
        if pid == 0:
            _become_child(part, memory_bytes=task["memory_bytes"], timeout_s=task["timeout_s"])
            _pack_and_report(packing.PackRequest(**task["request"]), space, part)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        print(json.dumps(_outcome(status, part, task)), flush=True)


def _become_child(part: Path, *, memory_bytes: int, timeout_s: float) -> None:
    errors = os.open(f"{part}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + memory_bytes, in_use + memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_REAL, timeout_s)  # nobody handles the alarm: it kills, even inside C code


def _pack_and_report(request: PackRequest, space: Any, part: Path) -> None:
    from brain_models.errors import ScanError
    from data_sharding.packing import write_part

    try:
        with part.open("wb") as file:
            members, payload = write_part(request, space, file)
        outcome: dict[str, Any] = {"members": [dataclasses.asdict(member) for member in members], "payload": payload}
    except ScanError as error:
        outcome = {"reason": str(error)}
    except MemoryError:
        outcome = {
            "reason": f"{request.path} needs more memory than limits.memory_mb allows; raise it, or check its size"
        }
    Path(f"{part}.json").write_text(json.dumps(outcome))


def _outcome(status: int, part: Path, task: dict[str, Any]) -> dict[str, Any]:
    """What became of the child: its own report, or the reason of its death."""
    path = task["request"]["path"]
    report, errors = Path(f"{part}.json"), Path(f"{part}.err")
    try:
        if os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            if name == "SIGALRM":
                return {
                    "reason": f"{path} took longer than limits.timeout_s={task['timeout_s']}; raise it, or check it"
                }
            return {"reason": f"{path}: packing died of {name}; the file is likely damaged, check it"}
        if os.WEXITSTATUS(status) != 0 or not report.exists():
            lines = errors.read_text().strip().splitlines() or ["no message"]
            return {"reason": f"{path}: packing failed: {lines[-1]}"}
        return json.loads(report.read_text())
    finally:
        report.unlink(missing_ok=True)
        errors.unlink(missing_ok=True)


if __name__ == "__main__":
    serve(sys.argv[1])
