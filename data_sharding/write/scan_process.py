"""Packs each scan in a child process of its own, with a memory limit and a timeout: its death is that scan's refusal.

`ScanProcess` talks JSON lines to a clean helper (`python -m data_sharding.write.scan_process`), which has imported what
packing needs and forks once a scan. A fork of a Ray worker would copy its threads' locks; a new interpreter a scan
would import for seconds. Whoever is killed takes those it started along, so nothing goes on in the background.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_sharding.config import LimitsConfig
from data_sharding.errors import ShardError

if TYPE_CHECKING:
    from brain_models.space import BrainSpace
    from data_sharding.write.packing import PackContext, PackRequest

# One BLAS thread: sums over several depend on how many there are, and the bytes must not.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

Grid = dict[str, list[Any]]  # affine, shape

READY = "ready\n"
SETTINGS = "settings.json"
PR_SET_PDEATHSIG = 1


class ScanProcess:
    """A helper process for one set: `folder` holds its space, atlases and settings. Close it, or use it as a context
    manager; start it from a thread that lives as long as it should."""

    def __init__(self, folder: Path, limits: LimitsConfig) -> None:
        self.limits = limits
        # The same import path as here: a Ray worker runs the uploaded working folder, not an installed package.
        environment = os.environ | ONE_THREAD | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "data_sharding.write.scan_process", str(folder)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def wait_until_ready(self) -> None:
        """Returns once the helper has loaded the folder, which may then go."""
        assert self.process.stdout is not None
        if self.process.stdout.readline() != READY:
            raise ShardError(f"the packing helper did not start (exit code {self.process.wait()}); see its error above")

    def pack(self, request: PackRequest, part: Path) -> dict[str, Any]:
        """The part written, as plain values of packing.Segment, or {"reason": ...} where the scan is refused.

        ShardError when nothing can be said about the scan: its source could not be reached, or the helper died.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        task = {
            "request": dataclasses.asdict(request),
            "part": str(part),
            "memory_bytes": self.limits.memory_mb << 20,
            "timeout_s": self.limits.timeout_s,
            "download_bytes": self.limits.download_mb << 20,
        }
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(task), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise ShardError(
                f"{request.path}: the packing helper ended (exit code {self.process.wait()}); run again, it goes on"
            )
        outcome = json.loads(line)
        if "unreachable" in outcome:
            raise ShardError(f"{request.path} could not be fetched: {outcome['unreachable']}; run again, it goes on")
        return outcome

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def __enter__(self) -> ScanProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(folder: str) -> None:
    """Answers one JSON line for each request line, until stdin ends."""
    die_with_parent()
    # webdataset imports torch only to offer it a base class: without it the helper starts in a third of the time.
    sys.modules["torch"] = None  # type: ignore[assignment]
    import webdataset.writer  # noqa: F401 - imported before the forks, as all of packing, so that no child imports

    import data_sharding.write.packing  # noqa: F401

    context = load_context(Path(folder))
    print(READY, end="", flush=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent closes stdin
    last_grid = None
    for line in sys.stdin:
        task = json.loads(line)
        part = Path(task["part"])
        if "s3://" in line:
            import boto3  # noqa: F401 - half a second, once; the client itself is made in the child
        status = _status_of_child(task, part, context)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            # Somebody's kill, or the system short of memory: only a scan that dies of it twice is to blame.
            status = _status_of_child(task, part, context)
        outcome = _outcome(status, part, task)
        grid = outcome.pop("grid", None)
        print(json.dumps(outcome), flush=True)
        if grid is not None:
            if grid == last_grid:  # two were packed: their weights fit into memory, and will be needed again
                keep_weights(grid, context.space)
            last_grid = grid


def keep_weights(grid: Grid, space: BrainSpace) -> None:
    """The children of the next scans inherit the weights of this grid."""
    from brain_models.resample import grid_resampler

    grid_resampler(np.array(grid["affine"]), tuple(grid["shape"]), space)


def grid_of(request: PackRequest, space: BrainSpace) -> Grid | None:
    """The grid of a run that is resampled by weights; None of anything else."""
    from brain_models.nifti import read_header

    if request.kind not in ("bold", "parcels") or request.transform or space.kind != "volume":
        return None
    header = read_header(request.path, "bold")
    return {"affine": header.affine.tolist(), "shape": list(header.shape)}


def _status_of_child(task: dict[str, Any], part: Path, context: PackContext) -> int:
    from data_sharding.write.packing import PackRequest

    pid = os.fork()
    if pid == 0:
        die_with_parent()
        _become_child(part, memory_bytes=task["memory_bytes"])
        _fetch_pack_and_report(PackRequest(**task["request"]), context, task)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def load_context(folder: Path) -> PackContext:
    """What all scans of a set share, from a folder that holds its space.npz, atlases/ and settings.json."""
    from brain_models.atlas import Atlas
    from brain_models.space import BrainSpace
    from configs.parse import parse
    from data_sharding import schema
    from data_sharding.write.packing import PackContext, PackSettings

    space = BrainSpace.load(folder / schema.SPACE)
    assert space.fingerprint  # computed once here, not in every child
    atlases = [Atlas.load(path) for path in sorted((folder / schema.ATLASES).glob("*.npz"))]
    settings = parse(json.loads((folder / SETTINGS).read_text()), PackSettings)
    return PackContext(space, {atlas.name: atlas for atlas in atlases}, settings)


def die_with_parent() -> None:
    """This process is killed when the one that started it dies, by whatever (Linux; elsewhere it ends a scan later)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _become_child(part: Path, *, memory_bytes: int) -> None:
    errors = os.open(f"{part}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + memory_bytes, in_use + memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _fetch_pack_and_report(request: PackRequest, context: PackContext, task: dict[str, Any]) -> None:
    from brain_models.errors import ScanError
    from data_sharding.sources.remote import UnreachableError, fetched
    from data_sharding.write.packing import write_segment

    part = Path(task["part"])
    files = Path(f"{part}.files")
    try:
        named = {name: getattr(request, name) for name in ("path", "brain_mask", "confounds", "files")}
        local = dataclasses.replace(request, **fetched(named, files, max_bytes=task["download_bytes"]))
        signal.setitimer(signal.ITIMER_REAL, task["timeout_s"])  # nobody handles the alarm: it kills, even in C code
        outcome: dict[str, Any] = dataclasses.asdict(write_segment(local, context, part))
        outcome["grid"] = grid_of(local, context.space)
    except ScanError as error:
        outcome = {"reason": str(error)}
    except UnreachableError as error:
        outcome = {"unreachable": str(error)}
    except MemoryError:
        outcome = {
            "reason": f"{request.path} needs more memory than limits.memory_mb allows; raise it, or check its size"
        }
    if "reason" in outcome:
        outcome["reason"] = outcome["reason"].replace(f"{files}/", "s3://")
    signal.setitimer(signal.ITIMER_REAL, 0)
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
        shutil.rmtree(f"{part}.files", ignore_errors=True)


if __name__ == "__main__":
    serve(sys.argv[1])
