"""Runs on a network of tests/cluster_network.py: what is submitted there, and what is left of it afterwards."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import sqlite3
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster_network import MLFLOW_ADDRESS, Job, Network
from s3_servers import BUCKET

STEPS, INTERVAL = 36, 12
SAVES = range(INTERVAL // 2, STEPS + 1, INTERVAL // 2)
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
        short += ["train.tracking.every_steps=1", f"tracking={TRACKING}", "train.tracking.timeout_s=30"]
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

    def samples(self, run: str) -> dict[int, str]:
        """The digest of all samples read up to each commit's step, after every file was checked against its commit."""
        digests = {}
        for path in sorted(self.run_folder(run).glob("checkpoints/*/COMMIT.json")):
            commit = json.loads(path.read_text())
            for file in commit["files"]:
                data = (path.parent / file["name"]).read_bytes()
                assert (len(data), hashlib.sha256(data).hexdigest()) == (file["size"], file["sha256"]), file["name"]
            assert commit["data_state"]["samples_consumed"] == commit["step"] * 16
            digests[commit["step"]] = commit["data_state"]["samples_digest"]
        return digests


def steps_of(text: str) -> list[int]:
    """The steps of a log, in the order they were done."""
    return [int(step) for step in re.findall(rf"^step (\d+)/{STEPS}  .*loss", text, flags=re.MULTILINE)]


def num_repeated(text: str) -> int:
    """How many steps of a log were done more than once."""
    return len(steps_of(text)) - len(set(steps_of(text)))


def resumptions(text: str) -> list[tuple[int, int]]:
    """Where the steps of a log fall back: the last one before, and the commit's step that was resumed from."""
    return [(before, after - 1) for before, after in itertools.pairwise(steps_of(text)) if after <= before]


def wait_for_commit(cluster: Cluster, job: Job, number: int) -> int:
    """The step of the newest commit, once the run has so many of them."""
    step, run = SAVES[number - 1], job.name.rpartition("-")[0]
    pattern = f"checkpoints/step-{step:08d}-*/COMMIT.json"
    job.wait_until(lambda: any(cluster.run_folder(run).glob(pattern)), f"commit of step {step}")
    return newest_commit(cluster, run)


def newest_commit(cluster: Cluster, run: str) -> int:
    """The step of the run's newest commit."""
    return max(json.loads(path.read_text())["step"] for path in cluster.run_folder(run).glob("*/*/COMMIT.json"))


def assert_resumed_from(committed: int, text: str) -> None:
    """No attempt of a log resumed from an older commit than the one that existed when the fault struck."""
    assert all(commit >= committed for _, commit in resumptions(text)), (committed, resumptions(text))


def assert_as_undisturbed(cluster: Cluster, run: str, *logs: str, rel: float = 0.0) -> None:
    """The samples and losses of the run 'undisturbed', every step recorded once, here and on the server, every commit
    whole, and no attempt resumed from further back than an interval, however slow the machine is."""
    assert cluster.losses(run) == pytest.approx(cluster.losses("undisturbed"), rel=rel, abs=0)
    samples, expected = cluster.samples(run), cluster.samples("undisturbed")
    assert list(expected) == list(SAVES)
    assert {step: samples.get(step) for step in SAVES} == expected
    assert len(set(samples.values())) == len(samples)
    for before, commit in (fallback for log in logs for fallback in resumptions(log)):
        assert commit in SAVES
        assert before - commit <= INTERVAL
    tracked = cluster.tracked(run)
    assert set(tracked.values()) == {1}
    assert tracked.keys() == cluster.rows(run).keys()
