"""Ray Train's torch process group, bound to an interface that reaches the other workers. Import late: needs Ray Train.

Without a binding Gloo listens on whatever the host name resolves to, often 127.0.0.1, and fails across nodes.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import cast

import psutil
import ray
import ray.util
from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train.backend import BackendConfig
from ray.train.constants import TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError
from ray.train.v2.api.result import Result

from cluster.errors import is_final

ANSWERS_WITHIN_S = 1.0


def interface_of(address: str) -> str | None:
    """The name of this machine's network interface that carries `address`, or None when no interface does."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.family in (socket.AF_INET, socket.AF_INET6) and entry.address == address for entry in entries):
            return name
    return None


def bind_collectives(is_single_node: bool) -> None:
    """Point Gloo and NCCL of this process at the node's own interface; loopback when no other node takes part."""
    address = "127.0.0.1" if is_single_node else ray.util.get_node_ip_address()
    interface = interface_of(address)
    if interface is None:
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    if not is_single_node:  # on one node NCCL finds shared memory and NVLink by itself
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)


def limit_every_group(timeout_s: float) -> None:
    """Give the groups made later in this process the timeout of the first one: DeepSpeed makes its own without a
    timeout, so its reductions would wait 30 minutes for a rank that hangs."""
    import torch.distributed.distributed_c10d as groups

    groups.default_pg_timeout = groups.default_pg_nccl_timeout = timedelta(seconds=timeout_s)


class BoundTorchBackend(_TorchBackend):
    def on_start(self, worker_group: BaseWorkerGroup, backend_config: BackendConfig) -> None:
        addresses = worker_group.execute(ray.util.get_node_ip_address)
        config = cast(TorchConfig, backend_config)
        worker_group.execute(bind_collectives, len(set(addresses)) == 1)
        worker_group.execute(limit_every_group, config.timeout_s)
        super().on_start(worker_group, config)

    def on_shutdown(self, worker_group: BaseWorkerGroup, backend_config: BackendConfig) -> None:
        # A rank that hangs does not answer, and all are killed right after; Ray would wait 35 s.
        os.environ.setdefault(TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S, "1")
        super().on_shutdown(worker_group, backend_config)
        workers = cast(WorkerGroup, worker_group).get_workers()
        answers: list[object] = list(worker_group.execute_async(os.getpid))
        _, missing = ray.wait(answers, num_returns=len(answers), timeout=ANSWERS_WITHIN_S)
        for worker, answer in zip(workers, answers, strict=True):
            if answer in missing:
                ray.kill(worker.actor)


class BoundTorchConfig(TorchConfig):
    """Ray's TorchConfig, except that every worker first binds its collectives."""

    @property
    def backend_cls(self) -> type[BoundTorchBackend]:
        return BoundTorchBackend


class PatientFailurePolicy(DefaultFailurePolicy):
    """Ray's own policy, except that a user error is final, and that the count of failures starts again once work was
    saved after the last one: a run of weeks outlives any number of lost nodes."""

    def __init__(self, failure_config: FailureConfig, last_saved: Callable[[], str | None]) -> None:
        super().__init__(failure_config)
        self.last_saved = last_saved
        self.saved_before: str | None = None

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        failures = training_failed_error.worker_failures if isinstance(training_failed_error, WorkerGroupError) else {}
        if any(is_final(error) for error in failures.values()):
            return FailureDecision.RAISE
        saved = self.last_saved()
        if saved != self.saved_before:
            self.saved_before = saved
            self._worker_group_failures = self._controller_failures = 0
        return super().make_decision(training_failed_error)


class BoundTorchTrainer(TorchTrainer):
    """TorchTrainer with the policy above, and without two helpers that cost seconds at every start: the actor that
    frees the workers of a dead controller (it imports torch again and asks a dashboard that an embedded Ray does not
    have, and the end of the job frees them anyway), and the actor that hands out Ray Data sets, of which there are
    none."""

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]  # TorchTrainer is V1 or V2, by environment
        return [each for each in callbacks if not isinstance(each, PlacementGroupCleanerCallback | DatasetsCallback)]

    def _register_sigint_handler(self, controller: object) -> None:
        """Leave Ctrl-C to cluster.stopping: Ray would abort at once, without saving."""

    def _initialize_and_run_controller(self, **settings: object) -> Result:
        outcome = self.train_loop_config["outcome"]  # type: ignore[attr-defined]
        settings["failure_policy"] = PatientFailurePolicy(
            cast(FailureConfig, self.run_config.failure_config), lambda: ray.get(outcome.last_saved.remote())
        )
        return super()._initialize_and_run_controller(**settings)  # type: ignore[misc]
