"""Where a run executes: the schema of configs/cluster/*.yaml, what a command needs of it. Knows no command."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class ClusterConfig:
    """`inline` runs in this process, `local` in an embedded Ray, `ray` on the Ray that RAY_ADDRESS or the job names."""

    kind: Literal["inline", "local", "ray"]
    num_workers: int
    cpus_per_worker: int
    use_gpu: bool
    max_failures: int  # restarts from one and the same commit; -1 means without limit
    start_timeout_s: float  # how long to wait for all workers before giving up
    collective_timeout_s: float  # how long a rank waits for the others inside one collective
    min_workers: int | None  # resume with fewer when nodes are lost, at least this many; null: wait for all of them
    scratch: str  # Ray Train's own bookkeeping; a folder every node can write; our checkpoints do not live there


@dataclass(frozen=True)
class Needs:
    """What a command needs of the machines that run it; every location is a folder or a URL that all nodes reach."""

    results: str  # where they go; commands with the same location are the same run
    cluster: ClusterConfig | None = None  # null: one process
    inputs: Mapping[str, str | None] = field(default_factory=dict)  # locations, each with an object that it holds
    scratch: str | None = None  # a folder of every node's own
    scratch_bytes: Callable[[], int] = lambda: 0  # worked out when asked: it may have to build a model
    cache: tuple[str, int] | None = None  # of every node: folder and bytes
    tracking: str | None = None
    contents: Callable[[], Mapping[str, str]] = dict  # hashes of the inputs now, by their names in a result's lineage


def validate_cluster(config: ClusterConfig, key: str) -> list[str]:
    """All problems of a cluster configuration; `key` is its full name in the composed configuration."""
    problems = []
    if config.num_workers < 1:
        problems.append(f"{key}.num_workers: {config.num_workers}; give at least 1")
    if config.kind == "inline" and config.num_workers != 1:
        problems.append(f"{key}.num_workers: {config.num_workers} with kind=inline; use 1, or cluster=local")
    if config.min_workers is not None and not 1 <= config.min_workers <= config.num_workers:
        problems.append(f"{key}.min_workers: {config.min_workers}; must lie in 1..{key}.num_workers, or be null")
    if config.use_gpu and config.kind != "ray" and (num_gpus := gpus_here()) < config.num_workers:
        problems.append(
            f"{key}.use_gpu: {config.num_workers} workers need a GPU each, this machine shows {num_gpus}; lower "
            f"{key}.num_workers, or use {key}.use_gpu=false or cluster=ray"
        )
    if config.cpus_per_worker < 1:
        problems.append(f"{key}.cpus_per_worker: {config.cpus_per_worker}; give at least 1")
    if config.max_failures < -1:
        problems.append(f"{key}.max_failures: {config.max_failures}; use -1 (without limit), 0 or more")
    if config.start_timeout_s <= 0 or config.collective_timeout_s <= 0:
        problems.append(f"{key}: start_timeout_s and collective_timeout_s must be above 0")
    return problems


def gpus_here() -> int:
    """The GPUs that torch finds on this machine."""
    import torch

    return torch.cuda.device_count()
