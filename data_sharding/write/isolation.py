"""Packs and registers scans in child processes with a memory limit and a timeout: one that dies refuses its scan only.

`Helper` talks JSON lines to a clean process (`python -m data_sharding.write.isolation`), which has imported what
packing needs and forks once per task. A fork of a Ray worker would copy its threads' locks; a new interpreter per scan
would import for seconds. A process that is killed takes its children along, so nothing keeps running.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from brain_models.atlas import Atlas
from brain_models.errors import ScanError
from brain_models.nifti import read_header
from brain_models.resample import grid_resampler
from brain_models.space import BrainSpace
from cluster.storage.stores import Store, store_for
from configs.parse import parse
from data_sharding import schema
from data_sharding.config import LimitsConfig
from data_sharding.errors import ShardError
from data_sharding.registration.config import RegistrationConfig
from data_sharding.registration.register import ScanGroup, register_group
from data_sharding.scans import Scan
from data_sharding.sources.remote import UnreachableError, fetched, originals
from data_sharding.write.packing import PackContext, PackSettings, write_segment

# One BLAS thread: sums over several depend on how many there are, and the bytes must not.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

Grid = dict[str, list[Any]]  # affine, shape
Outcome = dict[str, Any]  # what the work returned, or {"reason": ...}, or {"unreachable": ...}

READY = "ready\n"
SETTINGS = "settings.json"
LOCATIONS = ("path", "brain_mask", "confounds", "files", "t1_path", "runs")  # of a request: what may lie elsewhere
PR_SET_PDEATHSIG = 1

_HELPERS: dict[str, Helper] = {}  # a worker process writes many shards of one set with one helper


class Helper:
    """A helper process for one set, started from a thread that lives as long as it should, and to be closed.

    It has loaded `folder`, which holds the set's space, atlases and settings, and may then be deleted.
    """

    def __init__(self, folder: Path, limits: LimitsConfig) -> None:
        self.limits = limits
        # The same import path as here: a Ray worker runs the uploaded working folder, not an installed package.
        environment = os.environ | ONE_THREAD | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "data_sharding.write.isolation", str(folder)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._tasks, self._outcomes = self.process.stdin, self.process.stdout
        if self._outcomes.readline() != READY:
            raise ShardError(
                f"the packing helper did not start (exit code {self.process.wait()}); its own error is above"
            )

    def pack(self, scan: Scan, segment: Path) -> Outcome:
        """What `write_segment` says of the file `segment`, now written; {"reason": ...} where the scan is refused."""
        task = {"work": "packing", "path": scan.path, "output": str(segment)}
        return self._result(task | {"request": dataclasses.asdict(scan)}, timeout_s=self.limits.timeout_s)

    def register(self, group: ScanGroup, config: RegistrationConfig, folder: Path) -> Outcome:
        """The {"reasons": ...} of `register_group`, or one {"reason": ...} for every scan without a transform."""
        task: dict[str, Any] = {"work": "registration", "path": group.t1_path, "output": str(folder / "registration")}
        task |= {"request": dataclasses.asdict(group), "registration": dataclasses.asdict(config)}
        return self._result(task, timeout_s=self.limits.timeout_s * len(group.names))

    def _result(self, task: dict[str, Any], *, timeout_s: float) -> Outcome:
        """ShardError when nothing can be said about the scan: its source could not be reached, or the helper died."""
        task |= {
            "memory_bytes": self.limits.memory_mb << 20,
            "timeout_s": timeout_s,
            "download_bytes": self.limits.download_mb << 20,
        }
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(task), file=self._tasks, flush=True)
        line = self._outcomes.readline()
        if not line:
            raise ShardError(
                f"{task['path']}: the packing helper ended (exit code {self.process.wait()}); "
                "run the same command again, it resumes"
            )
        outcome = json.loads(line)
        if "unreachable" in outcome:
            raise ShardError(
                f"{task['path']} could not be fetched: {outcome['unreachable']}; run the same command again, it resumes"
            )
        return outcome

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._tasks.close()
        self.process.wait()
        self._outcomes.close()


def helper_for(store: Store, settings: PackSettings, limits: LimitsConfig) -> Helper:
    """The helper of this process for a set's space, atlases and settings, started when it is first asked for."""
    saved = {name: store.read(name) for name in (schema.SPACE, *store.list(schema.ATLASES))}
    saved[SETTINGS] = json.dumps(dataclasses.asdict(settings), sort_keys=True).encode()
    key = hashlib.sha256(b"".join(name.encode() + data for name, data in sorted(saved.items()))).hexdigest()
    helper = _HELPERS.get(key)
    if helper is None or helper.limits != limits or helper.process.poll() is not None:
        close_helpers()
        with tempfile.TemporaryDirectory(prefix="callosum-helper-") as folder:
            for name, data in saved.items():
                (Path(folder) / name).parent.mkdir(exist_ok=True)
                (Path(folder) / name).write_bytes(data)
            helper = _HELPERS[key] = Helper(Path(folder), limits)
    return helper


def close_helpers() -> None:
    """Ends the helpers of this process."""
    while _HELPERS:
        _HELPERS.popitem()[1].close()


def serve(folder: str) -> None:
    """Answers one JSON line for each task line, until stdin ends."""
    die_with_parent()
    # webdataset imports torch only to offer it a base class: without it the helper starts in a third of the time.
    sys.modules["torch"] = None  # type: ignore[assignment]
    import webdataset.writer  # noqa: F401 - before the forks, as everything that packing needs

    context = load_context(Path(folder))
    print(READY, end="", flush=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent closes stdin
    last_grid = None
    for line in sys.stdin:
        for scheme in re.findall(r'"(\w+)://', line):
            store_for(f"{scheme}://bucket")  # imports the driver, for half a second, once; it connects in the child
        answer = answer_to(json.loads(line), context)
        print(answer, flush=True)
        grid = json.loads(answer).get("grid")
        if grid is not None:
            if grid == last_grid:  # two were packed: their weights fit into memory, and will be needed again
                keep_weights(grid, context.space)
            last_grid = grid


def answer_to(task: dict[str, Any], context: PackContext) -> str:
    """The outcome of a task as JSON: the child's own report, or the reason of its death."""
    status = _status_of_child(task, context)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        # Somebody's kill, or the system short of memory: only a scan that dies of it twice is to blame.
        status = _status_of_child(task, context)
    report, errors = Path(f"{task['output']}.json"), Path(f"{task['output']}.err")
    try:
        if status == 0 and report.exists():
            return report.read_text()
        return json.dumps({"reason": f"{task['path']}: {task['work']} {_why_it_died(status, errors, task)}"})
    finally:
        report.unlink(missing_ok=True)
        errors.unlink(missing_ok=True)
        shutil.rmtree(f"{task['output']}.files", ignore_errors=True)


def _why_it_died(status: int, errors: Path, task: dict[str, Any]) -> str:
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        if name == "SIGALRM":
            return f"took longer than limits.timeout_s allows ({task['timeout_s']:g} s); raise it, or check the file"
        return f"died of {name}; the file is likely damaged, check it"
    lines = errors.read_text().strip().splitlines() or ["no message"]
    return f"failed: {lines[-1]}"


def _status_of_child(task: dict[str, Any], context: PackContext) -> int:
    pid = os.fork()
    if pid == 0:
        die_with_parent()
        _limit_child(Path(f"{task['output']}.err"), memory_bytes=task["memory_bytes"])
        Path(f"{task['output']}.json").write_text(_report(task, context))
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def _limit_child(errors: Path, *, memory_bytes: int) -> None:
    file = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + memory_bytes, in_use + memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _report(task: dict[str, Any], context: PackContext) -> str:
    """Fetches what lies elsewhere, does the work, and returns its outcome as JSON."""
    files = Path(f"{task['output']}.files")
    request = task["request"]
    locations = {name: request[name] for name in LOCATIONS if name in request}
    outcome: Outcome
    try:
        request |= fetched(locations, files, max_bytes=task["download_bytes"])
        signal.setitimer(signal.ITIMER_REAL, task["timeout_s"])  # nobody handles the alarm: it kills, even in C code
        outcome = WORK[task["work"]](task, context)
    except ScanError as error:
        outcome = {"reason": str(error)}
    except UnreachableError as error:
        outcome = {"unreachable": str(error)}
    except MemoryError:
        outcome = {
            "reason": f"{task['path']} needs more memory than limits.memory_mb allows; raise it, or check its size"
        }
    signal.setitimer(signal.ITIMER_REAL, 0)
    return originals(json.dumps(outcome), files)


def _pack(task: dict[str, Any], context: PackContext) -> Outcome:
    events = [schema.Event(**event) for event in task["request"]["events"]]
    scan = Scan(**task["request"] | {"events": events})
    return write_segment(scan, context, Path(task["output"])) | {"grid": grid_of(scan, context.space)}


def _register(task: dict[str, Any], _: PackContext) -> Outcome:
    config = RegistrationConfig(**task["registration"])
    return {"reasons": register_group(ScanGroup(**task["request"]), config, Path(task["output"]).parent)}


WORK = {"packing": _pack, "registration": _register}


def keep_weights(grid: Grid, space: BrainSpace) -> None:
    """The children of the next scans inherit the weights of this grid."""
    grid_resampler(np.array(grid["affine"]), tuple(grid["shape"]), space)


def grid_of(scan: Scan, space: BrainSpace) -> Grid | None:
    """The grid of a run that is resampled by weights; None of anything else."""
    if scan.kind not in ("bold", "parcels") or scan.transform or space.kind != "volume":
        return None
    header = read_header(scan.path, "bold")
    return {"affine": header.affine.tolist(), "shape": list(header.shape)}


def load_context(folder: Path) -> PackContext:
    """What all scans of a set share, from a folder that holds its space.npz, atlases/ and settings.json."""
    space = BrainSpace.load(folder / schema.SPACE)
    assert space.fingerprint  # computed once here, not in every child
    atlases = [Atlas.load(path) for path in sorted((folder / schema.ATLASES).glob("*.npz"))]
    settings = parse(json.loads((folder / SETTINGS).read_text()), PackSettings)
    return PackContext(space, {atlas.name: atlas for atlas in atlases}, settings)


def die_with_parent() -> None:
    """This process is killed when the one that started it dies (Linux; elsewhere it ends one scan later)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    serve(sys.argv[1])
