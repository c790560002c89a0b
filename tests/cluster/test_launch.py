"""Functions run on workers of an embedded Ray: they find one another, their errors come back, deaths are retried."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from grid_toy import grid_run
from launch_functions import die_or_lose_the_store, refuse, stop_when_asked, sum_of_ranks, wait_to_be_asked
from ray.exceptions import RayError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import WorkerGroupError

from cluster.config import ClusterConfig, validate_cluster
from cluster.errors import ClusterError, StoreUnavailableError
from cluster.ray.backend import PatientFailurePolicy
from cluster.ray.launch import _repeating, ray_session, run_on_workers
from cluster.stopping import REQUEST
from configs.entry import compose
from training.errors import TrainingError
from training.grid import is_finished, run_all

FAULT_SECTION = "Workers on Ray"


def local_cluster(folder: Path, *, max_failures: int = 1) -> ClusterConfig:
    return ClusterConfig("local", 2, 1, False, max_failures, 120, 60, None, str(folder / "ray"))


def test_a_ray_that_a_busy_machine_starts_too_slowly_is_started_again_at_most_three_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    attempts: list[str] = []

    def too_slow(**_: object) -> None:
        attempts.append("x")
        if len(attempts) != 2:
            raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(ray, "init", too_slow)
    with ray_session(local_cluster(tmp_path)):
        assert len(attempts) == 2
    with (
        pytest.raises(ClusterError, match=r"Ray did not start on this machine in 3 attempts .* less busy"),
        ray_session(local_cluster(tmp_path)),
    ):
        pass
    assert len(attempts) == 5


def test_a_cluster_that_does_not_answer_and_gpus_that_are_not_there_are_told_before_anything_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(**_: object) -> None:
        raise ConnectionError("Could not find any running Ray instance")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    local = local_cluster(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(ray, "init", unreachable)
        with (
            pytest.raises(ClusterError, match=r"no Ray cluster answers here \(Could not.*\); start one \(ray start"),
            ray_session(dataclasses.replace(local, kind="ray")),
        ):
            pass
    assert validate_cluster(dataclasses.replace(local, use_gpu=True), "cluster") == [
        "cluster.use_gpu: 2 workers need a GPU each, this machine shows 0; lower cluster.num_workers, or use "
        "cluster.use_gpu=false or cluster=ray"
    ]
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterConfig]:
    """An embedded Ray of two workers, which import modules beside this folder."""
    cluster = local_cluster(tmp_path_factory.mktemp("ray"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        with ray_session(cluster):
            yield cluster


@pytest.mark.timeout(900)  # five runs: 265 s on a machine at load 18
def test_workers_meet_deaths_are_retried_our_errors_are_not_and_a_signal_to_the_driver_reaches_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], local_ray: ClusterConfig
) -> None:
    cluster = local_ray
    found = run_on_workers(sum_of_ranks, {"marker": str(tmp_path / "died")}, cluster=cluster, name="sum")
    assert (tmp_path / "died").exists()
    assert found["sum"] == 3.0
    assert found["num_threads"] == 1
    assert found["interface"] in ("lo", "lo0")
    assert found["folder"] == os.getcwd()
    assert "\na line of rank 0\n" in "\n" + capsys.readouterr().out

    attempts, before = tmp_path / "attempts", num_workers_started()
    with pytest.raises(TrainingError, match=r"^a message for the user$"):
        run_on_workers(refuse, {"attempts": str(attempts)}, cluster=cluster, name="refuse")
    assert attempts.read_text() == "x"
    assert num_workers_started() == before + 2

    asked = run_on_workers(wait_to_be_asked, {"driver": os.getpid()}, cluster=cluster, name="asked")
    assert asked == "SIGTERM to the driver"
    assert REQUEST.reason is None


@pytest.mark.timeout(300)
def test_runs_of_a_grid_start_together_on_ray_and_one_that_fails_is_named_with_what_it_printed(
    tmp_path: Path, local_ray: ClusterConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = dataclasses.replace(local_ray, num_workers=1)
    runs = [grid_run(tmp_path, value, cluster=cluster, num_together=2) for value in (1, -1)]
    with pytest.raises(TrainingError, match=r"^1 of 2 runs failed(.|\n)*/-1/failure\.txt: ValueError: -1 is negative$"):
        run_all(runs)
    assert [is_finished(one) for one in runs] == [True, False]
    assert (tmp_path / "-1/failure.txt").read_text().startswith("running -1\nTraceback ")
    assert "2 runs, 0 finished\nrun 1/2 " in capsys.readouterr().out


def num_workers_started() -> int:
    actors = ray._private.state.actors().values()
    return sum(actor["ActorClassName"] == "RayTrainWorker" for actor in actors)


def test_an_error_of_ours_is_final_unless_a_store_was_away_and_failures_count_from_the_last_saved_work() -> None:
    saved: list[str | None] = [None]
    policy = PatientFailurePolicy(FailureConfig(max_failures=1), lambda: saved[0])

    def decided(error: Exception) -> FailureDecision:
        return policy.make_decision(WorkerGroupError("failed", {1: error}))

    assert decided(TrainingError("a message")) is FailureDecision.RAISE
    assert decided(StoreUnavailableError("away")) is FailureDecision.RETRY
    assert decided(RuntimeError("a peer died")) is FailureDecision.RAISE
    for step in range(3):
        saved[0] = f"step-{step}"
        assert decided(RuntimeError("a peer died")) is FailureDecision.RETRY
    assert decided(RuntimeError("a peer died")) is FailureDecision.RAISE


@pytest.mark.faults
def test_a_run_outlives_more_failures_than_are_allowed_when_it_saves_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    cluster = local_cluster(tmp_path, max_failures=1)
    with ray_session(cluster):
        saving = {"attempts": str(tmp_path / "saving"), "saves": True, "ends_after": 3}
        assert run_on_workers(die_or_lose_the_store, saving, cluster=cluster, name="saving") == "xxx"
        losing = {"attempts": str(tmp_path / "losing"), "saves": False, "ends_after": 3}
        with pytest.raises(StoreUnavailableError, match=r"^the store is away$"):
            run_on_workers(die_or_lose_the_store, losing, cluster=cluster, name="losing")
    assert (tmp_path / "losing").read_text() == "xx"


@pytest.mark.faults
def test_workers_whose_node_announces_its_end_start_again_however_few_failures_are_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    attempts, cluster = tmp_path / "attempts", local_cluster(tmp_path, max_failures=0)
    with ray_session(cluster):
        node = ray.get_runtime_context().get_node_id()
        monkeypatch.setattr(
            ray._private.state.state, "get_draining_nodes", lambda: {} if attempts.exists() else {node: 0}
        )
        found = run_on_workers(stop_when_asked, {"attempts": str(attempts)}, cluster=cluster, name="leaving")
    assert found == f"the announced end of node {node[:12]}"
    assert "run the same command again; resuming on other nodes" in capsys.readouterr().err


def test_a_call_that_ray_fails_is_followed_by_the_next() -> None:
    calls: list[int] = []

    def fails_first() -> None:
        calls.append(len(calls))
        if len(calls) == 1:
            raise RayError("no network for a moment")

    with _repeating(fails_first, "test", every_s=0.01):
        time.sleep(0.5)
    assert len(calls) > 2


def test_inline_calls_the_function_in_this_process(tmp_path: Path) -> None:
    cluster = dataclasses.replace(local_cluster(tmp_path), kind="inline", num_workers=1)
    assert run_on_workers(lambda config: (config, os.getpid()), 5, cluster=cluster, name="x") == (5, os.getpid())


def test_users_of_one_node_do_not_share_ray_trains_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = set()
    for user in ("anna", "ben"):
        monkeypatch.setenv("USER", user)
        folders.add(compose("pretrain", ["cluster=ray"])["cluster"]["scratch"])
    assert len(folders) == 2


def test_every_problem_of_a_cluster_configuration_is_named(tmp_path: Path) -> None:
    cluster = ClusterConfig("inline", 2, 0, False, -2, 0, 60, 3, str(tmp_path))
    problems = "\n".join(validate_cluster(cluster, "cluster"))
    for key in (
        "cluster.num_workers: 2 with kind=inline",
        "cluster.cpus_per_worker: 0",
        "cluster.max_failures: -2",
        "cluster.min_workers: 3",
        "start_timeout_s",
    ):
        assert key in problems
