"""A training run that lives on S3 equals the local one, through faults and after a resume."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from s3_servers import BUCKET, Fault, FaultProxy, fault_proxy, rclone_server, use
from test_training_checkpoints import run
from training_toys import ToyConfig, toy_config

from cluster.storage import remote
from cluster.storage.stores import Store, store_for
from training.checkpoint import COMMIT, SPOOL, committed_folders, read_commit

FAULT_SECTION = "Training: checkpoints on S3"


@pytest.fixture
def proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    monkeypatch.setattr(remote, "SETTLES_S", 0.3)
    server = rclone_server(tmp_path)
    server.start()
    try:
        server.wait_until_ready()
        with fault_proxy(server.endpoint) as running:
            use(monkeypatch, running.endpoint)
            yield running
    finally:
        server.kill()


def on_s3(config: ToyConfig) -> ToyConfig:
    return replace(config, run=replace(config.run, folder=f"s3://{BUCKET}/run"))


@pytest.mark.faults
def test_a_run_on_s3_resumes_from_its_commit_and_equals_the_local_run(proxy: FaultProxy, tmp_path: Path) -> None:
    config = toy_config(tmp_path, steps=6, checkpoint_every=4)
    local = run(config)
    proxy.faults = [Fault("answer", "PUT"), Fault("cut_upload", "PUT", path="checkpoints"), Fault("drop", "HEAD")]
    run(on_s3(config))
    assert proxy.faults == []
    store = store_for(f"s3://{BUCKET}/run")
    assert [read_commit(store, folder).step for folder in committed_folders(store)] == [4, 6]
    store.delete(f"{committed_folders(store)[-1]}/{COMMIT}")  # as if the run had died just before
    proxy.faults = [Fault("cut", path="checkpoints"), Fault("answer", path="checkpoints")]
    resumed = run(on_s3(config))
    assert proxy.faults == []
    assert resumed.metrics == local.metrics
    assert newest_files(store) == newest_files(store_for(config.run.folder))


def newest_files(store: Store) -> dict[str, str]:
    """sha256 by name of the weights, optimiser and random states of the newest commit."""
    commit = read_commit(store, committed_folders(store)[-1])
    assert commit.step == 6
    return {file.name: file.sha256 for file in commit.files if file.name != SPOOL}  # the spool holds times
