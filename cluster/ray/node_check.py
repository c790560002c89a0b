"""What one node says of itself, and what its link to the others carries: functions that run in Ray tasks on every node.

Knows nothing of a run but the folders it will use.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import shutil
import socket
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from cluster.errors import StorageError
from cluster.storage.files import PARTIAL_PREFIX
from cluster.storage.stores import store_for

PACKAGES = ("torch", "deepspeed", "ray", "numpy", "webdataset", "mlflow", "s3fs")
OUR_PACKAGES = (
    "brain_models",
    "callosum",
    "cluster",
    "configs",
    "data_sharding",
    "finetune",
    "pretrain",
    "reports",
    "training",
)
PROBE_BYTES = 32 << 20
CACHED_FILES = "*.whole"  # of data.cache_folder, which makes room there itself
REDUCE_BYTES = 64 << 20
REDUCE_REPEATS = 4


@dataclass
class NodeFacts:
    """Measured on one node, in its own process."""

    host: str
    address: str
    versions: dict[str, str]  # of Python, of packages, and the hash of our own code
    num_gpus: int
    gpu_bytes: int  # memory of its smallest GPU; 0 without one
    free_bytes: dict[str, int]  # by folder: free on the disk that holds it, or held by a cache that is there already
    disks: dict[str, int]  # by folder: which disk holds it
    problems: list[str] = field(default_factory=list)  # with folders and places of the run, as this node sees them
    speeds: dict[str, float] = field(default_factory=dict)  # bytes/s by '<read|write> <location>'


def node_facts(*, folders: list[str], written: list[str], read: list[str], uses_gpu: bool) -> NodeFacts:
    """What this node has and may do: its software, GPUs and clock, its disks, and its rights and speed at the places
    that are to be `written` (folders or prefixes) and `read` (an object that exists, its last part a name)."""
    import ray.util

    num_gpus, gpu_bytes = gpus() if uses_gpu else (0, 0)
    facts = NodeFacts(
        host=socket.gethostname(),
        address=ray.util.get_node_ip_address(),
        versions=versions(),
        num_gpus=num_gpus,
        gpu_bytes=gpu_bytes,
        free_bytes={},
        disks={},
    )
    for folder in folders:
        try:
            facts.free_bytes[folder] = free_bytes(folder)
            facts.disks[folder] = os.stat(folder).st_dev
        except OSError as error:
            facts.problems.append(f"{folder} cannot be written: {error.strerror}; give another scratch folder")
    for location in written:
        try:
            facts.speeds |= {f"{what} {location}": speed for what, speed in write_and_read(location).items()}
        except StorageError as error:
            facts.problems.append(str(error))
        except OSError as error:
            facts.problems.append(f"{location} cannot be written: {error.strerror}; give another location")
    for object_url in read:
        try:
            facts.speeds[f"read {object_url}"] = read_speed(object_url)
        except StorageError as error:
            facts.problems.append(str(error))
    return facts


def clock_s() -> float:
    """This node's time, in seconds since 1970."""
    return time.time()


def versions() -> dict[str, str]:
    """Python, the packages a run depends on ('missing' when not installed), and the hash of our code here."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    digest = hashlib.sha256()
    root = Path(__file__).parents[2]
    for package in OUR_PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return found | {"callosum code": digest.hexdigest()[:12]}


def gpus() -> tuple[int, int]:
    """How many GPUs torch sees on this node, and the memory of the smallest."""
    import torch

    sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
    return len(sizes), min(sizes, default=0)


def free_bytes(folder: str) -> int:
    """Free bytes on the disk of a folder, which is made and must take a file; what is cached there counts as free."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    probe = Path(folder) / f".preflight-{uuid.uuid4().hex}"
    probe.write_bytes(b"x")
    probe.unlink()
    held = 0
    for path in Path(folder).glob(CACHED_FILES):
        with contextlib.suppress(FileNotFoundError):  # it has just made room
            held += path.stat().st_size
    return shutil.disk_usage(folder).free + held


def write_and_read(location: str) -> dict[str, float]:
    """Bytes/s of writing and of reading back one object, deleted again; StorageError when one of the three fails."""
    store, name = (
        store_for(location),
        f"{PARTIAL_PREFIX}preflight-{uuid.uuid4().hex}",
    )  # no list shows what a kill leaves
    data = os.urandom(PROBE_BYTES)
    started = time.perf_counter()
    store.put(name, data)
    written = time.perf_counter()
    if store.read(name) != data:
        raise StorageError(f"{store.join(name)} came back as other bytes than were written; do not trust this store")
    finished = time.perf_counter()
    store.delete(name)
    return {"write": PROBE_BYTES / (written - started), "read": PROBE_BYTES / (finished - written)}


def read_speed(object_url: str) -> float:
    """Bytes/s of reading the first bytes of an object."""
    location, _, name = object_url.rpartition("/")
    store = store_for(location)
    size = min(store.size(name), PROBE_BYTES)
    started = time.perf_counter()
    store.read(name, 0, size)
    return size / (time.perf_counter() - started)


class Link:
    """One process a node, all of them in one process group: an actor."""

    def address(self) -> tuple[str, int]:
        """Where rank 0 may listen: this node's address and a port that is free now."""
        import ray.util

        with socket.socket() as listener:
            listener.bind(("", 0))
            return ray.util.get_node_ip_address(), int(listener.getsockname()[1])

    def all_reduce(self, rank: int, world_size: int, address: tuple[str, int], timeout_s: float) -> float:
        """Bytes/s this rank's link carried in all-reduces (bus bandwidth: 2 (n - 1) / n bytes sent for each one)."""
        from datetime import timedelta

        import torch
        import torch.distributed as dist

        from cluster.ray.backend import bind_collectives

        bind_collectives(False)
        has_gpu = torch.cuda.is_available()
        dist.init_process_group(
            "nccl" if has_gpu else "gloo",
            init_method=f"tcp://{address[0]}:{address[1]}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        values = torch.ones(REDUCE_BYTES // 4, device="cuda" if has_gpu else "cpu")
        dist.all_reduce(values)  # opens the connections
        started = time.perf_counter()
        for _ in range(REDUCE_REPEATS):
            dist.all_reduce(values)
        if has_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        dist.destroy_process_group()
        return REDUCE_REPEATS * REDUCE_BYTES * 2 * (world_size - 1) / world_size / seconds
