"""Finds the transforms of raw scans before shards are written: once each, stored in the set, reused ever after.

Promise: registration is not reproducible bit by bit, so the first transform that is stored counts, whoever found it;
what cannot be registered is stored too, as its reason. Each subject has a process of its own, within limits.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from brain_models.errors import ScanError
from brain_models.transform import Transform
from cluster.storage.stores import Store, store_for
from data_sharding import schema
from data_sharding.config import LimitsConfig, ShardingConfig
from data_sharding.errors import ShardError
from data_sharding.registration import RegistrationConfig, register_bold, register_t1
from data_sharding.sources.remote import UnreachableError, fetched
from data_sharding.write.dispatch import anywhere, each_result
from data_sharding.write.packing import PackRequest
from data_sharding.write.plan import SetPlan
from data_sharding.write.scan_process import ONE_THREAD, die_with_parent
from data_sharding.write.writer import scratch_folder


@dataclass
class Group:
    """A T1 and the runs that are registered through it."""

    t1_path: str
    t1_name: str  # of its transform; its scan_id where it is in the set itself
    runs: dict[str, str]  # scan_id -> path

    @property
    def names(self) -> list[str]:
        return [self.t1_name, *self.runs]


def transform_name(name: str) -> str:
    """Where a transform lies in its set."""
    return f"{schema.TRANSFORMS}{name}.npz"


def refusal_name(name: str) -> str:
    """Where the reason lies why there is no transform."""
    return f"{schema.TRANSFORMS}{name}.json"


def find_transforms(store: Store, plan: SetPlan, config: ShardingConfig) -> None:
    """Every raw scan of the plan then has its transform in the set, or the reason why not."""
    if config.registration is None:  # then no raw scan came as far as the plan
        return
    groups = _groups([request for shard in plan.shards for request in shard.requests if request.is_raw])
    there = {Path(name).stem for name in store.list(schema.TRANSFORMS)}
    missing = [group for group in groups if not set(group.names) <= there]
    register = partial(register_group, out=anywhere(config.out), registration=config.registration, limits=config.limits)
    done = len(groups) - len(missing)
    for _ in each_result(register, missing, config.cluster, label=lambda group: group.t1_name):
        done += 1
        print(f"registered {done}/{len(groups)} T1 images and the runs that go with them", flush=True)


def _groups(requests: list[PackRequest]) -> list[Group]:
    by_t1: dict[str, list[PackRequest]] = {}
    for request in requests:
        by_t1.setdefault(request.path if request.kind == "t1" else request.files["t1w"], []).append(request)
    groups = []
    for path, members in sorted(by_t1.items()):
        runs = {request.scan_id: request.path for request in members if request.kind != "t1"}
        own = [request.scan_id for request in members if request.kind == "t1"]
        groups.append(Group(path, own[0] if own else f"{min(runs)}_t1w", runs))
    return groups


def register_group(group: Group, out: str, registration: RegistrationConfig, limits: LimitsConfig) -> None:
    """Registers what is missing of a group, in a process of its own, and stores what came of it."""
    store = store_for(out)
    with scratch_folder() as scratch:
        for name in group.names:
            if store.exists(transform_name(name)):
                store.get_file(transform_name(name), scratch / f"{name}.npz")
        task = {"group": dataclasses.asdict(group), "registration": dataclasses.asdict(registration)}
        task["limits"] = dataclasses.asdict(limits)
        (scratch / "task.json").write_text(json.dumps(task))
        problem = _run(scratch, timeout_s=limits.timeout_s * len(group.names))
        for name in group.names:
            _store(store, scratch, name, otherwise=f"{group.t1_path}: registration {problem}")


def _run(scratch: Path, *, timeout_s: float) -> str:
    """What to say of scans that then have neither transform nor reason."""
    environment = os.environ | ONE_THREAD | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"
    command = [sys.executable, "-m", "data_sharding.write.alignment", str(scratch), str(os.getpid())]
    run = partial(subprocess.run, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    try:
        done = run(command)
        if done.returncode == -signal.SIGKILL:  # as in scan_process: only scans that die of it twice are to blame
            done = run(command)
    except subprocess.TimeoutExpired:
        return f"took longer than {timeout_s:.0f} s (limits.timeout_s a scan); raise it"
    if (scratch / "unreachable").exists():
        raise ShardError(f"a raw scan could not be fetched: {(scratch / 'unreachable').read_text()}; run again")
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return f"failed: {lines[-1]}"


def _store(store: Store, scratch: Path, name: str, *, otherwise: str) -> None:
    found, reason = scratch / f"{name}.npz", scratch / f"{name}.json"
    if found.exists():
        store.put_if_absent(transform_name(name), found.read_bytes())
        return
    text = reason.read_text() if reason.exists() else json.dumps({"reason": otherwise})
    if not store.exists(transform_name(name)):
        store.put_if_absent(refusal_name(name), text.encode())


def serve(scratch: Path) -> None:
    """Does the task in the folder: leaves <name>.npz or <name>.json of every scan of the group there."""
    task = json.loads((scratch / "task.json").read_text())
    group, limits = Group(**task["group"]), LimitsConfig(**task["limits"])
    registration = RegistrationConfig(**task["registration"])
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    bytes_allowed = in_use + (limits.memory_mb << 20)
    resource.setrlimit(resource.RLIMIT_AS, (bytes_allowed, bytes_allowed))
    paths = {"t1": group.t1_path, **group.runs}
    try:
        local = fetched(paths, scratch / "files", max_bytes=limits.download_mb << 20)
    except UnreachableError as error:
        (scratch / "unreachable").write_text(str(error))
        return
    t1_file = scratch / f"{group.t1_name}.npz"
    try:
        t1_transform = Transform.load(t1_file) if t1_file.exists() else register_t1(local["t1"], registration)
    except ScanError as error:
        for name in group.names:
            (scratch / f"{name}.json").write_text(json.dumps({"reason": str(error)}))
        return
    t1_transform.save(t1_file)
    for name in group.runs:
        if (scratch / f"{name}.npz").exists():
            continue
        try:
            found = register_bold(local[name], t1=local["t1"], t1_transform=t1_transform, config=registration)
            found.save(scratch / f"{name}.npz")
        except ScanError as error:
            (scratch / f"{name}.json").write_text(json.dumps({"reason": str(error)}))


if __name__ == "__main__":
    die_with_parent()
    if os.getppid() == int(sys.argv[2]):  # else it died while this process still imported
        serve(Path(sys.argv[1]))
