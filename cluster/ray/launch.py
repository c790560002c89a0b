"""Run a function on the workers of a cluster: in this process, on an embedded Ray, or on a running one.

Does not know what the function does. The only module that reads where Ray is (RAY_ADDRESS).
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import psutil
from rich.console import Console

from brain_models.errors import UserError
from cluster.config import ClusterConfig
from cluster.errors import ClusterError, is_final
from cluster.hanging import HEARTBEAT, READ_TIMEOUT_S, REPORT_AT_SHARE, RankProcess, stacks_of
from cluster.ray.outcome import Outcome, StartStamps, relayed
from cluster.stopping import REQUEST, listening
from configs.words import counted

Config = TypeVar("Config")
Result = TypeVar("Result")

log = logging.getLogger(__name__)

RELAY_INTERVAL_S = 0.2
WATCH_INTERVAL_S = 2.0
ELASTIC_START_TIMEOUT_S = 60.0
LEAVING = "the announced end of node"
START_ATTEMPTS = 3
START_TIMEOUT = "timed out during startup"  # Ray waits 30 s for its own processes, which a busy machine exceeds

# Ray Train polls its workers every 2 s by default: a run would end up to 2 s late.
RAY_TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


@contextmanager
def ray_session(cluster: ClusterConfig) -> Iterator[None]:
    """Within the block Ray is connected: embedded for kind=local, attached for kind=ray or when RAY_ADDRESS is set (as
    it is inside a Ray job), none for kind=inline. A Ray that is connected already is used and left running."""
    if cluster.kind == "inline":
        yield
        return
    import ray

    if ray.is_initialized():
        yield
        return
    attach = cluster.kind == "ray" or "RAY_ADDRESS" in os.environ
    if attach:
        try:
            ray.init(address="auto", logging_level=logging.ERROR)
        except ConnectionError as error:
            raise ClusterError(
                f"no Ray cluster answers here ({error}); start one (ray start --head), send the command to one (python "
                "-m cluster.submit), or use cluster=local"
            ) from error
    else:
        _start_embedded_ray(cluster)
    _protect_token()
    try:
        yield
    finally:
        ray.shutdown()


def _protect_token() -> None:
    """Ray authenticates by a token it writes readable for everyone on the machine."""
    token = Path.home() / ".ray" / "auth_token"
    if token.exists() and token.stat().st_uid == os.getuid():
        token.chmod(0o600)


def _start_embedded_ray(cluster: ClusterConfig) -> None:
    import ray

    num_cpus = max(os.cpu_count() or 1, cluster.num_workers * cluster.cpus_per_worker)
    # No dashboard and no usage report: they cost seconds at start, and an embedded Ray lives as long as one command.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's workers run at niceness 15: beside any other work on this machine a training would nearly stand still.
    os.environ.setdefault("RAY_worker_niceness", "0")
    for attempt in range(START_ATTEMPTS):
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,  # what rank 0 prints is relayed below, without a prefix on every line
            )
        except Exception as error:  # noqa: BLE001 - Ray raises nothing narrower
            if START_TIMEOUT not in str(error):
                raise
            if attempt + 1 == START_ATTEMPTS:
                raise ClusterError(
                    f"Ray did not start on this machine in {START_ATTEMPTS} attempts of 30 s ({os.getloadavg()[0]:.0f} "
                    f"processes are running on {os.cpu_count()} CPUs); try again when it is less busy"
                ) from error
        else:
            return


def run_on_workers(
    function: Callable[[Config], Result], config: Config, *, cluster: ClusterConfig, name: str
) -> Result:
    """What `function(config)` returned on rank 0, after every worker finished.

    Inside `function` a worker learns its rank from torch.distributed (initialised when there are workers). A user error
    ends the run and is raised here as itself. Any other failure (a worker or a node died, a collective timed out, a
    store was away for too long) restarts all workers, up to `max_failures` times without work saved in between, and
    `function` is expected to resume from its own last commit. Workers that stopped because the end of one of their
    nodes was announced are restarted on other nodes, however often. A restart waits `start_timeout_s` for a lost node's
    successor, or runs with fewer workers where `min_workers` is given. The death of this process ends the run.
    """
    if cluster.kind == "inline":
        return function(config)
    print(f"starting {counted(cluster.num_workers, 'worker')} ...", flush=True)
    with ray_session(cluster):
        while True:
            try:
                return _run_on_ray(function, config, cluster, name)
            except _NodeLeavesError as leaves:
                print(f"{leaves.error}; resuming on other nodes", file=sys.stderr, flush=True)


class _NodeLeavesError(Exception):
    """Workers have stopped because one of their nodes is about to leave, and for no other reason."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


@contextmanager
def _repeating(action: Callable[[], None], name: str, *, every_s: float) -> Iterator[None]:
    """Call `action` from a thread within the block, and once more at its end. A call that fails in Ray is made up for
    by the next one; otherwise a moment without network would stop the thread for the rest of the run."""
    from ray.exceptions import RayError

    is_over = threading.Event()

    def repeat() -> None:
        is_last = False
        while not is_last:
            is_last = is_over.wait(every_s)
            try:
                action()
            except RayError as error:
                log.debug("%s: %s", name, error)

    thread = threading.Thread(target=repeat, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _relay(outcome: Any) -> None:
    """Print what rank 0 printed; pass on that this process, which receives the signals, was asked to stop."""
    import ray

    for is_error, text in ray.get(outcome.take_texts.remote()):
        print(text, end="", flush=True, file=sys.stderr if is_error else sys.stdout)
    if REQUEST.reason is not None:
        outcome.ask_to_stop.remote(f"{REQUEST.reason} to the driver")


def _watch(outcome: Any) -> None:
    """Ask to stop when the cluster announces that the node of a worker will leave; show where ranks hang."""
    import ray

    processes = ray.get(outcome.rank_processes.remote())
    leaving = ray._private.state.state.get_draining_nodes().keys() & {process.node for process in processes}
    if leaving:
        outcome.ask_to_stop.remote(f"{LEAVING} {min(leaving)[:12]}")
    if (hang := ray.get(outcome.take_hang.remote())) is not None:
        print(f"{hang}; where every rank is:", file=sys.stderr)
        for process, stacks in _read_stacks(processes):
            print(f"--- {process}: {stacks}", file=sys.stderr, flush=True)


def _read_stacks(processes: list[RankProcess]) -> Iterator[tuple[RankProcess, str]]:
    """The stacks of every rank, read on its own node, or that the node does not answer."""
    import ray

    task: Any = ray.remote(num_cpus=0, max_retries=0)(stacks_of)
    pending = [task.options(label_selector=_on_node(each.node)).remote(each.pid) for each in processes]
    deadline = time.monotonic() + 2 * READ_TIMEOUT_S
    for process, stacks in zip(processes, pending, strict=True):
        try:
            yield process, ray.get(stacks, timeout=max(0.0, deadline - time.monotonic()))
        except ray.exceptions.RayError as error:
            yield process, f"its node does not answer ({type(error).__name__})"


def folder_of_workers(cluster: ClusterConfig) -> str | None:
    """The folder that workers change to: this one, on an embedded Ray. On other nodes the job's working_dir is current
    already: None."""
    is_embedded = cluster.kind == "local" and "RAY_ADDRESS" not in os.environ
    return os.getcwd() if is_embedded else None


def _on_node(node: str) -> dict[str, str]:
    """A label selector that matches only this node."""
    return {"ray.io/node-id": node}


def _run_on_ray(function: Callable[[Config], Result], config: Config, cluster: ClusterConfig, name: str) -> Result:
    import ray

    launched_at = time.time()
    for variable, value in RAY_TRAIN_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(_start_timeout_s(cluster)))
    import ray.train

    here = _on_node(ray.get_runtime_context().get_node_id())  # a worker's node may be lost, and this with it
    outcome: Any = ray.remote(num_cpus=0, label_selector=here)(Outcome).remote()
    job = {
        "function": function,
        "config": config,
        "outcome": outcome,
        "folder": folder_of_workers(cluster),
        "num_threads": cluster.cpus_per_worker,
        "num_columns": shutil.get_terminal_size().columns if sys.stdout.isatty() else None,
        "report_after_s": REPORT_AT_SHARE * cluster.collective_timeout_s,
        "started_at": psutil.Process().create_time(),
        "launched_at": launched_at,
    }
    trainer, failed, is_asked = _trainer(job, cluster, name), None, False
    try:
        with (
            listening(REQUEST.ask),
            _repeating(lambda: _relay(outcome), "relay", every_s=RELAY_INTERVAL_S),
            _repeating(lambda: _watch(outcome), "watch", every_s=WATCH_INTERVAL_S),
        ):
            trainer.fit()
    except ray.train.TrainingFailedError as error:
        failed = error
    finally:
        is_asked = REQUEST.reason is not None
        REQUEST.clear()
        Console().show_cursor()  # a rank that was killed cannot bring back what its bar hid
    final: BaseException | None = ray.get(outcome.first_error.remote())
    if final is not None:
        reason = ray.get(outcome.stop_reason.remote()) or ""
        if reason.startswith(LEAVING) and reason in str(final) and not is_asked:
            raise _NodeLeavesError(final)
        raise final
    if failed is not None:
        ours = [error for error in getattr(failed, "worker_failures", {}).values() if isinstance(error, UserError)]
        raise next(iter(ours), failed)
    return ray.get(outcome.last_result.remote())


def _trainer(job: dict[str, Any], cluster: ClusterConfig, name: str) -> Any:
    """The trainer that starts the workers, and restarts them after failures that a restart may cure."""
    import ray.train
    from ray.train.v2.api.config import FailureConfig, ScalingConfig

    from cluster.ray.backend import BoundTorchConfig, BoundTorchTrainer

    return BoundTorchTrainer(
        _on_worker,
        train_loop_config=job,
        torch_config=BoundTorchConfig(timeout_s=int(cluster.collective_timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=(cluster.min_workers, cluster.num_workers) if cluster.min_workers else cluster.num_workers,
            use_gpu=cluster.use_gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker},
        ),
        run_config=ray.train.RunConfig(
            name=f"{name}-{time.time_ns()}",  # a name that was used before would silently resume that run
            storage_path=str(Path(cluster.scratch).absolute()),
            # By default Ray would wait for missing nodes again and again, for ever.
            failure_config=FailureConfig(
                max_failures=cluster.max_failures, controller_failure_limit=cluster.max_failures
            ),
        ),
    )


def _start_timeout_s(cluster: ClusterConfig) -> float:
    """How long a group of workers may wait for its resources. With `min_workers` Ray Train counts what is free before
    it asks, and again when it did not get it: it may have counted a node that is lost already."""
    if cluster.min_workers is None:
        return cluster.start_timeout_s
    return min(cluster.start_timeout_s, ELASTIC_START_TIMEOUT_S)


def _on_worker(job: dict[str, Any]) -> None:
    import ray
    import ray.train
    import torch

    outcome = job["outcome"]
    if ray.get(outcome.first_error.remote()) is not None:
        return  # Ray Train saw what this error did to another rank before it saw the error
    if job["folder"] is not None:
        os.chdir(job["folder"])
    torch.set_num_threads(job["num_threads"])
    if job["num_columns"] is not None:
        os.environ["COLUMNS"] = str(job["num_columns"])  # of the driver's terminal, where rank 0's bar is drawn
    process = _own_process()
    ray.get(outcome.add_process.remote(process))
    is_main = process.rank == 0
    start = StartStamps(job["started_at"], job["launched_at"], time.time())

    def report() -> None:
        if (reason := ray.get(outcome.stop_reason.remote())) is not None:
            REQUEST.ask(reason)
        if is_main and HEARTBEAT.first_at is not None:
            start.print_once(HEARTBEAT.first_at)
        if HEARTBEAT.saved is not None:
            outcome.add_saved.remote(HEARTBEAT.saved)
        if (silent_s := HEARTBEAT.silent_s()) > job["report_after_s"]:
            outcome.add_hang.remote(f"{process} has started no step for {silent_s:.0f} s")

    try:
        with (
            _repeating(report, "report", every_s=RELAY_INTERVAL_S),
            relayed(outcome, is_terminal=job["num_columns"] is not None) if is_main else nullcontext(),
        ):
            result = job["function"](job["config"])
    except UserError as error:
        if is_final(error):
            ray.get(outcome.add_error.remote(error))
        raise
    finally:
        HEARTBEAT.stop()
    if is_main:
        ray.get(outcome.add_result.remote(result))


def _own_process() -> RankProcess:
    import ray
    import ray.train

    context = ray.train.get_context()
    node = ray.get_runtime_context().get_node_id()
    return RankProcess(context.get_world_rank(), context.get_world_size(), node, socket.gethostname(), os.getpid())
