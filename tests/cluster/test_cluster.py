"""Runs on Ray nodes in network namespaces, with S3 and MLflow servers in others, and what they survive."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster_network import MLFLOW_PASSWORD, network, small_disk, why_not
from cluster_runs import (
    SAVES,
    STEPS,
    TRACKING,
    Cluster,
    assert_as_undisturbed,
    assert_resumed_from,
    newest_commit,
    num_repeated,
    steps_of,
    wait_for_commit,
)
from s3_servers import BUCKET, SECRET_KEY

from configs.entry import compose
from configs.parse import parse
from data_sharding.phantoms.study.config import PhantomConfig
from data_sharding.phantoms.study.write import write_phantom

FAULT_SECTION = "A cluster of several nodes"
REASON = why_not()
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.timeout(1500),
]

SMALL_DISK_MB = 64


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes of one CPU each, both servers, and a phantom study."""
    folder = Path(tempfile.mkdtemp(prefix="cluster-"))
    try:
        # Before the nodes: each sees the mounts there were at its start.
        with small_disk(folder / "small", SMALL_DISK_MB), network(folder) as net:
            net.start_s3()
            net.start_mlflow()
            net.start_node("head")
            net.start_node("b")
            phantom = [f"out={folder / 'bids'}", "num_subjects=24", "num_frames=48", "num_processes=1"]
            phantom += ["spacing_mm=12.0", "t1_spacing_mm=12.0"]
            write_phantom(parse(compose("data_sharding.phantom", phantom), PhantomConfig))
            net.wait_for_servers()
            net.wait_for_nodes()
            found = Cluster(net)
            found.shard().succeeded()
            yield found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> list[float]:
    """The losses of the run 'undisturbed', to which nothing happened."""
    log = cluster.pretrain("undisturbed").succeeded()
    assert_as_undisturbed(cluster, "undisturbed", log)
    assert steps_of(log) == list(range(1, STEPS + 1))
    return cluster.losses("undisturbed")


Record = Callable[[str, object], None]


def kill_worker(cluster: Cluster) -> None:
    (worker,) = cluster.net.hosts["b"].processes("ray::RayTrainWorker")
    worker.kill()


def pull_cable_for_20_s(cluster: Cluster) -> None:
    cluster.net.hosts["b"].pull_cable()
    time.sleep(20)
    cluster.net.hosts["b"].plug_cable()


def stop_store_for_30_s(cluster: Cluster) -> None:
    cluster.net.stop("s3")
    time.sleep(30)
    cluster.net.start_s3()


def replace_node(cluster: Cluster) -> None:
    cluster.net.lose_node("b")
    time.sleep(5)
    cluster.net.start_node("b")


def end_driver(cluster: Cluster) -> None:
    drivers = cluster.net.hosts["head"].processes("-m pretrain experiment")
    (driver,) = [each for each in drivers if each.name().startswith("python")]
    driver.terminate()


@pytest.mark.faults
def test_a_run_that_meets_one_fault_after_another_ends_as_an_undisturbed_one(
    cluster: Cluster, undisturbed: list[float], record_property: Record
) -> None:
    """One of each kind: a process, the network, both servers, the driver; each after a commit more."""
    record_property("fault", "a worker killed, a cable pulled for 20 s, both servers killed, SIGTERM of the driver")
    settings = ("train.tracking.drain_s=5", "cluster.collective_timeout_s=60")
    job = cluster.pretrain("unlucky", *settings)
    committed = wait_for_commit(cluster, job, 1)
    began_at = time.monotonic()
    kill_worker(cluster)
    wait_for_commit(cluster, job, 2)
    pull_cable_for_20_s(cluster)
    wait_for_commit(cluster, job, 3)
    cluster.net.stop("s3")
    cluster.net.stop("mlflow")
    time.sleep(10)
    cluster.net.start_s3()
    wait_for_commit(cluster, job, 4)
    end_driver(cluster)
    assert job.wait() != 0
    saved = newest_commit(cluster, "unlucky")
    cluster.net.start_mlflow()
    cluster.net.wait_for_servers()
    again = cluster.pretrain("unlucky", *settings, attempt=2).succeeded()
    record_property("recovery_s", time.monotonic() - began_at)
    assert_resumed_from(committed, job.text)
    assert steps_of(again) == list(range(saved + 1, STEPS + 1))
    assert_as_undisturbed(cluster, "unlucky", job.text, again)


@pytest.mark.injected
def test_the_fine_tuning_script_submits_from_the_registered_backbone_to_a_registered_classifier(
    cluster: Cluster, undisturbed: list[float]
) -> None:
    places = ["SUBMIT=1", f"SHARDS=s3://{BUCKET}/shards", f"OUT=s3://{BUCKET}/runs/adhd", f"TRACKING={TRACKING}"]
    places += ["ENCODER=models:/quick-bold@candidate", "NAME=quick-adhd"]
    overrides = ["experiment=quick_adhd", f"run.scratch={cluster.net.folder}/scratch", *cluster.on_workers(2)]
    script = Path(__file__).parents[2] / "finetune/launch/adhd.sh"
    done = cluster.net.hosts["head"].run("env", *places, "bash", str(script), *overrides, timeout_s=500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "submitted finetune-adhd-" in done.stdout
    with sqlite3.connect(cluster.net.folder / "mlflow.db") as database:
        names = {name for (name,) in database.execute("select name from registered_models")}
    assert {"quick-bold", "quick-adhd"} <= names


@pytest.mark.injected
def test_no_secret_is_written_anywhere(cluster: Cluster, undisturbed: list[float]) -> None:
    """Logs of Ray and of jobs, metadata of jobs, shards, checkpoints, bundles, MLflow's database and artifacts."""
    token = cluster.net.folder / "ray_token"
    assert token.stat().st_mode & 0o777 == 0o600
    listed = cluster.net.hosts["head"].run("ray", "job", "list").stdout  # with runtime environments
    assert "undisturbed-1" in listed
    secrets = [SECRET_KEY.encode(), MLFLOW_PASSWORD.encode(), token.read_bytes()]
    assert not any(secret in listed.encode() for secret in secrets)
    places = [cluster.net.folder, cluster.net.ray_folder]
    files = [path for place in places for path in place.rglob("*") if path.is_file() and path != token]
    found = [path for path in files if any(secret in path.read_bytes() for secret in secrets)]
    assert len(files) > 100
    assert found == []


@pytest.mark.faults
@pytest.mark.parametrize(
    ("run", "fault", "happen"),
    [
        ("killed", "kill -9 of a worker", kill_worker),
        ("replaced", "kill -9 of a node, another added 5 s later", replace_node),
        ("cut", "a node's cable pulled for 20 s", pull_cable_for_20_s),
        ("store", "kill -9 of the S3 server, back after 30 s", stop_store_for_30_s),
    ],
)
def test_what_a_run_waits_for_or_starts_again_after_changes_no_bit_of_it(
    cluster: Cluster,
    undisturbed: list[float],
    record_property: Record,
    run: str,
    fault: str,
    happen: Callable[[Cluster], None],
) -> None:
    record_property("fault", fault)
    job = cluster.pretrain(run)
    committed = wait_for_commit(cluster, job, 2)
    began_at = time.monotonic()
    happen(cluster)
    text = job.succeeded()
    record_property("recovery_s", time.monotonic() - began_at)
    assert_resumed_from(committed, text)
    assert_as_undisturbed(cluster, run, text)


@pytest.mark.faults
@pytest.mark.parametrize("loss", ["killed", "cut off"])
def test_where_fewer_workers_are_allowed_a_run_continues_without_a_lost_node(
    cluster: Cluster, undisturbed: list[float], record_property: Record, loss: str
) -> None:
    record_property("fault", f"a node {loss} for good, min_workers=1")
    run = f"fewer-{loss[:3]}"
    job = cluster.pretrain(run, "cluster.min_workers=1")
    committed = wait_for_commit(cluster, job, 2)
    lost_at = time.monotonic()
    if loss == "killed":
        cluster.net.lose_node("b")
    else:
        cluster.net.hosts["b"].pull_cable()
    try:
        text = job.succeeded(400)
        record_property("recovery_s", time.monotonic() - lost_at)
    finally:
        if loss != "killed":
            cluster.net.lose_node("b")
        cluster.net.start_node("b")
        cluster.net.wait_for_nodes()
    assert_resumed_from(committed, text)
    # The same samples and hidden tokens, so the same losses up to rounding: neighbouring steps differ by far more.
    assert_as_undisturbed(cluster, run, text, rel=1e-4)
    assert cluster.losses(run)[1:] != pytest.approx(undisturbed[:-1], rel=1e-2)


@pytest.mark.faults
def test_a_node_added_to_a_run_changes_no_bit_of_it_and_the_next_run_is_on_all_three(
    cluster: Cluster, undisturbed: list[float], record_property: Record
) -> None:
    record_property("fault", "a third node added to a run of two workers; the same on three")
    job = cluster.pretrain("joined")
    wait_for_commit(cluster, job, 2)
    cluster.net.start_node("c")
    try:
        assert_as_undisturbed(cluster, "joined", job.succeeded())
        cluster.net.wait_for_nodes()
        three = cluster.pretrain("three", num_workers="3").succeeded()
    finally:
        cluster.net.lose_node("c")
    assert_as_undisturbed(cluster, "three", three, rel=1e-4)
    commits = cluster.run_folder("three").glob("checkpoints/*/COMMIT.json")
    assert {json.loads(path.read_text())["world_size"] for path in commits} == {3}


@pytest.mark.faults
def test_a_run_leaves_a_node_that_announces_its_end_without_repeating_a_step(
    cluster: Cluster, undisturbed: list[float], record_property: Record
) -> None:
    record_property("fault", "a node announces its end in 60 s, another is added, max_failures=0")
    job = cluster.pretrain("drained", "cluster.max_failures=0")
    wait_for_commit(cluster, job, 2)
    (worker,) = cluster.net.hosts["b"].processes("ray::RayTrainWorker")
    worker.suspend()  # else a run of seconds is over before the command that announces has started
    cluster.net.start_node("c")
    cluster.net.announce_end("b", in_s=60)
    announced_at = time.monotonic()
    worker.resume()
    try:
        text = job.succeeded()
        record_property("recovery_s", time.monotonic() - announced_at)
    finally:
        cluster.net.lose_node("c")
        cluster.net.lose_node("b")
        cluster.net.start_node("b")
        cluster.net.wait_for_nodes()
    assert re.search(r"stopped .* the announced end of node \w+.*resuming on other nodes", text), text
    assert num_repeated(text) == 0
    assert_as_undisturbed(cluster, "drained", text)


@pytest.mark.faults
def test_a_run_that_began_on_fewer_workers_grows_when_a_node_comes(
    cluster: Cluster, undisturbed: list[float], record_property: Record
) -> None:
    record_property("fault", "a run of one worker with num_workers=2, min_workers=1; a second node comes")
    cluster.net.lose_node("b")
    try:
        job = cluster.pretrain("grown", "cluster.min_workers=1")
        wait_for_commit(cluster, job, 2)
        (worker,) = cluster.net.hosts["head"].processes("ray::RayTrainWorker")
        worker.suspend()  # else a run of seconds is over before Ray Train looks for nodes, once a minute
    finally:
        cluster.net.start_node("b")
        cluster.net.wait_for_nodes()
    text = job.succeeded()
    assert "Deciding to resize the worker group from 1 -> 2 workers" in text  # which counts as no failure
    assert_as_undisturbed(cluster, "grown", text, rel=1e-4)
    commits = [json.loads(path.read_text()) for path in sorted(cluster.run_folder("grown").glob("*/*/COMMIT.json"))]
    assert [commits[number]["world_size"] for number in (0, 1, -1)] == [1, 1, 2]


@pytest.mark.faults
def test_a_tracking_server_that_is_away_stops_no_step_and_gets_every_row_once_later(
    cluster: Cluster, undisturbed: list[float], record_property: Record
) -> None:
    record_property("fault", "kill -9 of the MLflow server, back after the run, the same command again")
    job = cluster.pretrain("tracking", "train.tracking.drain_s=5", "cluster.max_failures=0")
    wait_for_commit(cluster, job, 2)
    cluster.net.stop("mlflow")
    job.wait()  # the model cannot be registered now
    assert num_repeated(job.text) == 0
    assert max(cluster.samples("tracking")) == STEPS
    back_at = time.monotonic()
    cluster.net.start_mlflow()
    cluster.net.wait_for_servers()
    text = cluster.pretrain("tracking", attempt=2).succeeded()
    record_property("recovery_s", time.monotonic() - back_at)
    assert f"loss {undisturbed[0]:.4g}" not in text
    assert_as_undisturbed(cluster, "tracking")


@pytest.mark.faults
def test_a_full_checkpoint_disk_is_named_and_the_run_resumes_once_there_is_room(
    cluster: Cluster, undisturbed: list[float], record_property: Record
) -> None:
    record_property("fault", "the disk of run.scratch fills up, is emptied, the same command again")
    scratch = cluster.net.folder / "small"
    job = cluster.pretrain("full", f"run.scratch={scratch}", "cluster.max_failures=1")
    wait_for_commit(cluster, job, 2)
    fill(scratch / "filler")
    assert job.wait() != 0
    assert re.search(rf"CheckpointError: .*{scratch}\S* cannot be written: its disk is full", job.text), job.text[
        -4000:
    ]
    (scratch / "filler").unlink()
    freed_at = time.monotonic()
    cluster.pretrain("full", f"run.scratch={scratch}", attempt=2).succeeded()
    record_property("recovery_s", time.monotonic() - freed_at)
    assert_as_undisturbed(cluster, "full")


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with path.open("wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))


@pytest.mark.faults
def test_a_driver_that_gets_sigterm_has_saved_and_the_same_command_resumes(
    cluster: Cluster, undisturbed: list[float], record_property: Record
) -> None:
    record_property("fault", "SIGTERM of the driver, the same command again")
    job = cluster.pretrain("terminated")
    wait_for_commit(cluster, job, 2)
    end_driver(cluster)
    assert job.wait() != 0
    again_at = time.monotonic()
    again = cluster.pretrain("terminated", attempt=2).succeeded()
    record_property("recovery_s", time.monotonic() - again_at)
    assert_as_undisturbed(cluster, "terminated")
    assert num_repeated(job.text + again) == 0  # it saved where it stopped


@pytest.mark.faults
def test_a_lost_head_loses_the_job_and_the_same_command_on_a_new_one_resumes(
    cluster: Cluster, undisturbed: list[float], record_property: Record
) -> None:
    record_property("fault", "kill -9 of the head, a new cluster, the same command again")
    job = cluster.pretrain("headless")
    wait_for_commit(cluster, job, 2)
    for name in ("head", "b"):
        cluster.net.lose_node(name)
    assert max(cluster.samples("headless")) < STEPS
    again_at = time.monotonic()
    cluster.net.start_node("head")
    cluster.net.start_node("b")
    cluster.net.wait_for_nodes()
    again = cluster.pretrain("headless", attempt=2).succeeded()
    record_property("recovery_s", time.monotonic() - again_at)
    assert_as_undisturbed(cluster, "headless", job.text, again)


@pytest.mark.faults
def test_two_jobs_at_once_do_not_touch_each_others_files(cluster: Cluster, record_property: Record) -> None:
    record_property("fault", "two runs at once, a third in the folder of the first with another seed")
    both = [cluster.pretrain(run, f"train.seed={seed}", num_workers="1") for seed, run in enumerate(("one", "two"))]
    for job in both:
        job.succeeded(400)
    first = cluster.losses("one")
    assert first != cluster.losses("two")
    before = {path: path.read_bytes() for path in cluster.run_folder("one").rglob("*") if path.is_file()}
    third = cluster.pretrain("one", "train.seed=5", attempt=2, num_workers="1")
    assert third.wait() != 0
    assert "run.json belongs to another configuration" in third.text
    assert "train.seed: 0 there, 5 here" in third.text
    assert {path: path.read_bytes() for path in cluster.run_folder("one").rglob("*") if path.is_file()} == before
    for run in ("one", "two"):
        assert list(cluster.samples(run)) == list(SAVES)
        assert set(cluster.tracked(run).values()) == {1}


@pytest.mark.faults
def test_a_stopped_rank_fails_the_job_in_time_and_the_log_shows_where_every_rank_was(
    cluster: Cluster, record_property: Record
) -> None:
    record_property("fault", "SIGSTOP of a worker, collective_timeout_s=30, max_failures=0")
    job = cluster.pretrain("stopped", "cluster.collective_timeout_s=30", "cluster.max_failures=0")
    wait_for_commit(cluster, job, 2)
    stopped_at = time.monotonic()
    (worker,) = cluster.net.hosts["b"].processes("ray::RayTrainWorker")
    worker.suspend()
    assert job.wait(120) != 0
    took_s = time.monotonic() - stopped_at
    record_property("recovery_s", took_s)
    assert took_s < 30 + 10
    shown = re.findall(r"^--- rank (\d) of 2 \(\S+, process (\d+)\): (\w+)\n(.*?)(?=^---|\Z)", job.text, re.M | re.S)
    assert sorted(rank for rank, *_ in shown) == ["0", "1"]
    assert [state for _, pid, state, _ in shown if int(pid) == worker.pid] == ["stopped"]
    assert all("fit (" in stacks for *_, stacks in shown)  # the loop is on every rank's stack
