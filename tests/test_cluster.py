"""Runs on Ray nodes in network namespaces, with S3 and MLflow servers in others, and what they survive."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster_network import MLFLOW_ADDRESS, MLFLOW_PASSWORD, Job, Network, network, small_disk, why_not
from s3_servers import BUCKET, SECRET_KEY

from configs.entry import compose
from configs.parse import parse
from data_sharding.phantom.config import PhantomConfig
from data_sharding.phantom.write import write_phantom

FAULT_SECTION = "A cluster of several nodes"
REASON = why_not()
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.faults,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.timeout(1500),
]

STEPS, INTERVAL = 36, 12
SAVES = range(INTERVAL // 2, STEPS + 1, INTERVAL // 2)
SMALL_DISK_MB = 64
TRACKING = f"http://{MLFLOW_ADDRESS}:5000"
Rows = dict[tuple[str, int], float]


@dataclass
class Cluster:
    """The network and where its results lie on this machine's disk."""

    net: Network

    @property
    def bucket(self) -> Path:
        return self.net.folder / "s3" / BUCKET

    def run_folder(self, run: str) -> Path:
        return self.bucket / "runs" / run

    def shard(self, name: str = "shards") -> Job:
        overrides = [f"source.root={self.net.folder}/bids", f"out=s3://{BUCKET}/{name}", "space=mni12"]
        overrides += ["dataset=phantom_small", "storage.target_bytes=1000000", *self.on_workers(2)]
        return self.net.submit(f"shard-{name}", "python", "-m", "data_sharding", *overrides)

    def pretrain(self, run: str, *overrides: str, attempt: int = 1, num_workers: str = "2") -> Job:
        """A pretraining of 36 steps that repeats at most 12 and tracks every step."""
        short = ["experiment=quick_bold", f"shards=s3://{BUCKET}/shards", f"run.folder=s3://{BUCKET}/runs/{run}"]
        short += [f"run.name={run}", f"run.scratch={self.net.folder}/scratch", "windows.bold.patch_voxels=3"]
        short += ["model.encoder.width=32", "model.decoder.width=32", "model.encoder.depth=1", "model.decoder.depth=1"]
        short += ["data.num_workers=0", f"train.steps={STEPS}", f"train.checkpoint.every_steps={INTERVAL}"]
        short += ["train.checkpoint.keep_last=100", f"train.evaluation.every_steps={STEPS}"]
        short += ["train.tracking.every_steps=1", f"train.tracking.uri={TRACKING}", "train.tracking.timeout_s=30"]
        command = [*short, *self.on_workers(num_workers), *overrides]
        return self.net.submit(f"{run}-{attempt}", "python", "-m", "pretrain", *command)

    def on_workers(self, num_workers: int | str) -> list[str]:
        settings = ["cluster=ray", f"cluster.num_workers={num_workers}", "cluster.cpus_per_worker=1"]
        settings += ["cluster.use_gpu=false", "cluster.max_failures=3", f"cluster.scratch={self.net.folder}/ray-train"]
        return [*settings, "cluster.collective_timeout_s=120", "cluster.start_timeout_s=120"]

    def rows(self, run: str) -> Rows:
        """What the finished run recorded, by (key, step)."""
        lines = (self.run_folder(run) / "metrics.jsonl").read_text().splitlines()
        rows = {(row["key"], row["step"]): row["value"] for row in map(json.loads, lines)}
        assert len(rows) == len(lines), "a (key, step) was recorded twice"
        return rows

    def losses(self, run: str) -> list[float]:
        rows = self.rows(run)
        return [rows["train/loss", step] for step in range(1, STEPS + 1)]

    def tracked(self, run: str) -> Counter[tuple[str, int]]:
        """How many rows the MLflow server holds of every (key, step) of the run."""
        run_key = json.loads((self.run_folder(run) / "run.json").read_text())["run_key"]
        with sqlite3.connect(self.net.folder / "mlflow.db") as database:
            rows = database.execute(
                "select m.key, m.step from metrics m join tags t on t.run_uuid = m.run_uuid"
                " where t.key = 'callosum.run_key' and t.value = ?",
                (run_key,),
            ).fetchall()
        return Counter(rows)

    def committed_steps(self, run: str) -> list[int]:
        """The steps of all commits, after every file was checked against its commit."""
        steps = []
        for path in sorted(self.run_folder(run).glob("checkpoints/*/COMMIT.json")):
            commit = json.loads(path.read_text())
            for file in commit["files"]:
                data = (path.parent / file["name"]).read_bytes()
                assert (len(data), hashlib.sha256(data).hexdigest()) == (file["size"], file["sha256"]), file["name"]
            assert commit["data_state"]["samples_consumed"] == commit["step"] * 16
            steps.append(commit["step"])
        return steps


def num_repeated(text: str) -> int:
    """How many steps of a log were done more than once."""
    done = Counter(int(step) for step in re.findall(rf"^step (\d+)/{STEPS}  loss", text, flags=re.MULTILINE))
    return sum(count - 1 for count in done.values())


def after_a_commit(cluster: Cluster, job: Job) -> float:
    """The time, once the run has its first commit and works on the next interval."""
    run = job.name.rpartition("-")[0]
    pattern = f"checkpoints/step-{SAVES[1]:08d}-*/COMMIT.json"
    job.wait_until(lambda: any(cluster.run_folder(run).glob(pattern)), f"commit of step {SAVES[1]}")
    return time.monotonic()


def assert_whole(cluster: Cluster, run: str) -> None:
    """Every step recorded once, here and on the server; every commit whole."""
    assert {1: 1, STEPS: 1}.items() <= Counter(step for key, step in cluster.rows(run) if key == "train/loss").items()
    tracked = cluster.tracked(run)
    assert set(tracked.values()) == {1}
    assert tracked.keys() == cluster.rows(run).keys()
    steps = cluster.committed_steps(run)
    assert sorted(set(steps)) == list(SAVES)


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
            write_phantom(parse(compose("phantom", phantom), PhantomConfig))
            net.wait_for_servers()
            net.wait_for_nodes()
            found = Cluster(net)
            found.shard().succeeded()
            yield found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> list[float]:
    """The losses of a run to which nothing happened."""
    cluster.pretrain("undisturbed").succeeded()
    assert_whole(cluster, "undisturbed")
    return cluster.losses("undisturbed")


Record = Callable[[str, object], None]


def test_a_run_on_two_nodes_survives_the_loss_of_a_worker_bit_for_bit(
    cluster: Cluster, undisturbed: list[float], record_property: Record
) -> None:
    record_property("fault", "kill -9 of a worker")
    job = cluster.pretrain("killed")
    after_a_commit(cluster, job)
    (worker,) = cluster.net.hosts["b"].processes("ray::RayTrainWorker")
    worker.kill()
    killed_at = time.monotonic()
    text = job.succeeded()
    record_property("recovery_s", time.monotonic() - killed_at)
    assert cluster.losses("killed") == undisturbed
    assert num_repeated(text) <= INTERVAL
    assert_whole(cluster, "killed")


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


def assert_equal(cluster: Cluster, run: str, undisturbed: list[float]) -> None:
    assert cluster.losses(run) == undisturbed
    assert_whole(cluster, run)


def test_a_submitted_fine_tuning_of_the_submitted_backbone_is_registered(
    cluster: Cluster, undisturbed: list[float]
) -> None:
    overrides = ["task=adhd_classification", "experiment=quick_adhd", f"shards=s3://{BUCKET}/shards"]
    overrides += ["encoder=models:/quick-bold@candidate", f"run.folder=s3://{BUCKET}/runs/adhd"]
    overrides += [f"run.scratch={cluster.net.folder}/scratch", f"train.tracking.uri={TRACKING}"]
    command = ("python", "-m", "finetune", *overrides, *cluster.on_workers(2))
    cluster.net.submit("adhd-1", *command).succeeded()
    with sqlite3.connect(cluster.net.folder / "mlflow.db") as database:
        names = {name for (name,) in database.execute("select name from registered_models")}
    assert {"quick-bold", "quick-adhd"} <= names


def test_a_lost_node_is_waited_for_and_its_successor_takes_its_place(
    cluster: Cluster, undisturbed: list[float], record_property: Record
) -> None:
    record_property("fault", "kill -9 of a node, another added 5 s later")
    job = cluster.pretrain("successor")
    lost_at = after_a_commit(cluster, job)
    cluster.net.lose_node("b")
    time.sleep(5)
    cluster.net.start_node("b")
    text = job.succeeded()
    record_property("recovery_s", time.monotonic() - lost_at)
    assert_equal(cluster, "successor", undisturbed)
    assert num_repeated(text) <= INTERVAL


@pytest.mark.parametrize("loss", ["killed", "cut off"])
def test_where_fewer_workers_are_allowed_a_run_goes_on_without_a_lost_node(
    cluster: Cluster, undisturbed: list[float], record_property: Record, loss: str
) -> None:
    record_property("fault", f"a node {loss} for good, min_workers=1")
    run = f"fewer-{loss[:3]}"
    job = cluster.pretrain(run, "cluster.min_workers=1")
    lost_at = after_a_commit(cluster, job)
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
    assert num_repeated(text) <= INTERVAL
    assert_whole(cluster, run)
    # The same samples and hidden tokens, so the same losses up to rounding: neighbouring steps differ by far more.
    assert cluster.losses(run) == pytest.approx(undisturbed, rel=1e-4)
    assert cluster.losses(run)[1:] != pytest.approx(undisturbed[:-1], rel=1e-2)


def test_a_cut_of_the_network_of_20_s_changes_nothing(
    cluster: Cluster, undisturbed: list[float], record_property: Record
) -> None:
    record_property("fault", "a node's cable pulled for 20 s")
    job = cluster.pretrain("cut")
    cut_at = after_a_commit(cluster, job)
    cluster.net.hosts["b"].pull_cable()
    time.sleep(20)
    cluster.net.hosts["b"].plug_cable()
    text = job.succeeded()
    record_property("recovery_s", time.monotonic() - cut_at)
    assert_equal(cluster, "cut", undisturbed)
    assert num_repeated(text) <= INTERVAL


def test_a_store_that_is_away_for_30_s_is_waited_for(
    cluster: Cluster, undisturbed: list[float], record_property: Record
) -> None:
    record_property("fault", "kill -9 of the S3 server, back after 30 s")
    job = cluster.pretrain("store")
    away_at = after_a_commit(cluster, job)
    cluster.net.stop("s3")
    time.sleep(30)
    cluster.net.start_s3()
    text = job.succeeded()
    record_property("recovery_s", time.monotonic() - away_at)
    assert_equal(cluster, "store", undisturbed)
    assert num_repeated(text) <= INTERVAL


def test_a_tracking_server_that_is_away_stops_no_step_and_gets_every_row_once_later(
    cluster: Cluster, undisturbed: list[float], record_property: Record
) -> None:
    record_property("fault", "kill -9 of the MLflow server, back after the run, the same command again")
    job = cluster.pretrain("tracking", "train.tracking.drain_s=5", "cluster.max_failures=0")
    after_a_commit(cluster, job)
    cluster.net.stop("mlflow")
    job.wait()  # the model cannot be registered now
    assert num_repeated(job.text) == 0
    assert cluster.committed_steps("tracking")[-1] == STEPS
    back_at = time.monotonic()
    cluster.net.start_mlflow()
    cluster.net.wait_for_servers()
    text = cluster.pretrain("tracking", attempt=2).succeeded()
    record_property("recovery_s", time.monotonic() - back_at)
    assert f"loss {undisturbed[0]:.4g}" not in text
    assert_equal(cluster, "tracking", undisturbed)


def test_a_full_checkpoint_disk_is_named_and_the_run_goes_on_once_there_is_room(
    cluster: Cluster, undisturbed: list[float], record_property: Record
) -> None:
    record_property("fault", "the disk of run.scratch fills up, is emptied, the same command again")
    scratch = cluster.net.folder / "small"
    job = cluster.pretrain("full", f"run.scratch={scratch}", "cluster.max_failures=1")
    after_a_commit(cluster, job)
    fill(scratch / "filler")
    assert job.wait() != 0
    assert re.search(rf"CheckpointError: .*{scratch}\S* cannot be written: its disk is full", job.text), job.text[
        -4000:
    ]
    (scratch / "filler").unlink()
    freed_at = time.monotonic()
    cluster.pretrain("full", f"run.scratch={scratch}", attempt=2).succeeded()
    record_property("recovery_s", time.monotonic() - freed_at)
    assert_equal(cluster, "full", undisturbed)


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with path.open("wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))


def test_a_driver_that_gets_sigterm_has_saved_and_the_same_command_goes_on(
    cluster: Cluster, undisturbed: list[float], record_property: Record
) -> None:
    record_property("fault", "SIGTERM of the driver, the same command again")
    job = cluster.pretrain("terminated")
    after_a_commit(cluster, job)
    drivers = cluster.net.hosts["head"].processes("-m pretrain experiment")
    (driver,) = [each for each in drivers if each.name().startswith("python")]
    driver.terminate()
    assert job.wait() != 0
    again_at = time.monotonic()
    again = cluster.pretrain("terminated", attempt=2).succeeded()
    record_property("recovery_s", time.monotonic() - again_at)
    assert cluster.losses("terminated") == undisturbed
    assert set(cluster.tracked("terminated").values()) == {1}
    assert num_repeated(job.text + again) == 0  # it saved where it stopped


def test_a_lost_head_loses_the_job_and_the_same_command_on_a_new_one_goes_on(
    cluster: Cluster, undisturbed: list[float], record_property: Record
) -> None:
    record_property("fault", "kill -9 of the head, a new cluster, the same command again")
    job = cluster.pretrain("headless")
    after_a_commit(cluster, job)
    for name in ("head", "b"):
        cluster.net.lose_node(name)
    assert job.wait() != 0
    again_at = time.monotonic()
    cluster.net.start_node("head")
    cluster.net.start_node("b")
    cluster.net.wait_for_nodes()
    again = cluster.pretrain("headless", attempt=2).succeeded()
    record_property("recovery_s", time.monotonic() - again_at)
    assert_equal(cluster, "headless", undisturbed)
    assert num_repeated(job.text + again) <= INTERVAL


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
        assert_whole(cluster, run)


def test_a_stopped_rank_fails_the_job_in_time_and_the_log_shows_where_every_rank_was(
    cluster: Cluster, record_property: Record
) -> None:
    record_property("fault", "SIGSTOP of a worker, collective_timeout_s=30, max_failures=0")
    job = cluster.pretrain("stopped", "cluster.collective_timeout_s=30", "cluster.max_failures=0")
    stopped_at = after_a_commit(cluster, job)
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
