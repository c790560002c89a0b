"""A shard set on S3 is the local one byte for byte, and is read, verified and finished the same way."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from s3_servers import (  # noqa: F401  (running_ are fixtures)
    BUCKET,
    SECRET_KEY,
    Fault,
    FaultProxy,
    Server,
    aws_environment,
    fault_proxy,
    rclone_server,
    running_rclone,
    running_servers,
    use,
)
from web_servers import web_server

from cluster.errors import StoreUnavailableError
from cluster.storage import remote, s3_errors
from cluster.storage.stores import store_for
from data_sharding import schema
from data_sharding.check.verify import verify
from data_sharding.config import ShardingConfig
from data_sharding.errors import ShardError
from data_sharding.read.reader import open_set
from data_sharding.verify import VerifyConfig
from data_sharding.verify import run as run_verify
from data_sharding.write.build import build
from tests.data_sharding.read.test_reader import rows_of, source_of, steps_of
from tests.data_sharding.test_shards import contents
from tests.helpers_scans import sharding_config, write_study

FAULT_SECTION = "S3: whole shard sets"
pytestmark = pytest.mark.injected


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> ShardingConfig:
    """The same scans as a local set."""
    study = write_study(tmp_path_factory.mktemp("study"), num_subjects=4)
    config = sharding_config(study, tmp_path_factory.mktemp("written") / "set")
    build(config)
    return config


@pytest.fixture(params=["rclone", pytest.param("moto", marks=pytest.mark.faults)])
def proxy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Before rclone; in test-faults also before moto, which takes seconds to start."""
    is_moto = request.param == "moto"
    server = request.getfixturevalue("servers")["moto"] if is_moto else request.getfixturevalue("rclone")
    monkeypatch.setattr(remote, "SETTLES_S", 0.3)
    monkeypatch.setattr(s3_errors, "RETRY_FOR_S", 20.0)
    with fault_proxy(server.endpoint) as running:
        use(monkeypatch, running.endpoint)
        yield running


@pytest.fixture
def config(written: ShardingConfig, proxy: FaultProxy, tmp_path: Path) -> ShardingConfig:
    return replace(written, out=f"s3://{BUCKET}/{tmp_path.name}")


def stored(location: str) -> dict[str, bytes]:
    store = store_for(location)
    return {name: store.read(name) for name in store.list()}


def test_a_set_on_s3_is_the_local_one_byte_for_byte_through_faults(
    written: ShardingConfig,
    config: ShardingConfig,
    proxy: FaultProxy,
    capsys: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
) -> None:
    record_property("when", "500s, cut uploads and cut reads while it is written, verified and read")
    proxy.faults = [Fault("answer", "PUT"), Fault("cut_upload", "PUT", path=".tar"), Fault("drop", "HEAD")]
    build(config)
    assert proxy.faults == []
    local = contents(Path(written.out))
    assert stored(config.out) == local
    proxy.faults = [Fault("cut", path=".tar"), Fault("answer", path="index")]
    assert run_verify(VerifyConfig(config.out, repair=[])) == 0
    assert f"{config.out} is as written" in capsys.readouterr().out
    reference = [rows_of(batches) for batches in steps_of(source_of(written.out), 4)]
    for changes in ({"reader": "stream"}, {"num_workers": 2}):
        proxy.faults = [Fault("cut", path=".tar"), Fault("answer", path=".tar"), Fault("drop", path="index")]
        assert [rows_of(batches) for batches in steps_of(source_of(config.out, **changes), 4)] == reference
    assert SECRET_KEY.encode() not in b"".join(local.values())


def test_a_rerun_finishes_what_is_missing_and_another_set_is_refused(
    written: ShardingConfig, config: ShardingConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    build(config)
    store = store_for(config.out)
    store.delete("manifest.json")
    store.delete("shards/000001.tar")
    build(config)
    assert stored(config.out) == contents(Path(written.out))
    build(config)
    assert f"{config.out} is complete already; nothing to do" in capsys.readouterr().out
    with pytest.raises(ShardError, match=f"{config.out} already holds another set"):
        build(replace(config, seed=1))


def _open_index(location: str, scratch: str | None) -> None:
    assert len(open_set(location, scratch=scratch).scans("bold")) > 0


@pytest.mark.parametrize("proxy", ["rclone"], indirect=True)
def test_the_processes_of_a_node_fetch_an_index_once_and_never_read_that_of_another_set(
    written: ShardingConfig, config: ShardingConfig, proxy: FaultProxy, tmp_path: Path
) -> None:
    store, local = store_for(config.out), contents(Path(written.out))
    for name in (schema.MANIFEST, schema.INDEX):
        store.put(name, local[name])
    scratch = str(tmp_path / "scratch")
    proxy.faults = [Fault("slow", path=schema.INDEX)]
    workers = [
        multiprocessing.get_context("fork").Process(target=_open_index, args=(config.out, scratch)) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 3
    assert (
        len([request for request in proxy.requests if request.startswith(f"GET /{BUCKET}/{tmp_path.name}/index")]) == 1
    )
    whole = open_set(config.out, scratch=scratch).scans("bold")
    index = pq.read_table(io.BytesIO(local[schema.INDEX]))
    other = io.BytesIO()
    pq.write_table(index.filter(pc.not_equal(index["scan_id"], whole.scan_id[0])), other)
    store.put(schema.INDEX, other.getvalue())
    assert open_set(config.out, scratch=scratch).scans("bold").equals(whole)  # of the set as its manifest describes it
    manifest = json.loads(local[schema.MANIFEST])
    manifest["tables"][schema.INDEX] = hashlib.sha256(other.getvalue()).hexdigest()
    store.put(schema.MANIFEST, json.dumps(manifest).encode())
    assert open_set(config.out, scratch=scratch).scans("bold").scan_id.tolist() == whole.scan_id.tolist()[1:]


@pytest.mark.faults
@pytest.mark.parametrize(
    "fault",
    [Fault("slow"), Fault("answer"), Fault("answer", "PUT"), Fault("cut_upload", "PUT")],
    ids=["a trickle", "500 to reads", "500 to writes", "an upload cut short"],
)
def test_a_set_is_written_and_verified_though_every_other_request_fails(
    written: ShardingConfig,
    config: ShardingConfig,
    proxy: FaultProxy,
    fault: Fault,
    record_property: Callable[[str, object], None],
) -> None:
    started = time.monotonic()
    proxy.every_other = fault
    build(config)
    assert stored(config.out) == contents(Path(written.out))
    assert verify(config.out) == []
    record_property("when", "in every other request")
    record_property("recovery_s", time.monotonic() - started)


@pytest.mark.faults
def test_a_server_that_dies_and_returns_while_a_set_is_written_costs_time_only(
    written: ShardingConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    monkeypatch.setattr(remote, "SETTLES_S", 0.3)
    monkeypatch.setattr(s3_errors, "RETRY_FOR_S", 30.0)
    server = rclone_server(tmp_path)
    server.start()
    try:
        server.wait_until_ready()
        use(monkeypatch, server.endpoint)
        config = replace(written, out=f"s3://{BUCKET}/set")
        writer = threading.Thread(target=build, args=(config,))
        writer.start()
        receipts = tmp_path / "buckets" / BUCKET / "set" / "receipts"
        while not list(receipts.glob("*.json")):
            assert writer.is_alive()
            time.sleep(0.01)
        server.kill()
        killed = time.monotonic()
        time.sleep(3)
        server.start()
        writer.join()
        assert stored(config.out) == contents(Path(written.out))
        record_property("fault", "rclone: SIGKILL, away for 3 s")
        record_property("when", "after the first shard")
        record_property("recovery_s", time.monotonic() - killed)
    finally:
        server.kill()


def test_a_set_at_other_addresses_is_the_local_one(
    written: ShardingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scans read from a web server, the set written by a driver of fsspec, and read from the web server again."""
    monkeypatch.setattr(remote, "SETTLES_S", 0.3)
    with web_server(Path(written.source.root)) as scans:
        build(replace(written, out=f"local://{tmp_path}/set", source=replace(written.source, root=scans)))
    assert contents(tmp_path / "set") == contents(Path(written.out))
    with web_server(tmp_path) as address:
        remote_rows = [rows_of(batches) for batches in steps_of(source_of(f"{address}/set", num_workers=1), 2)]
    assert remote_rows == [rows_of(batches) for batches in steps_of(source_of(written.out), 2)]


@pytest.mark.parametrize("proxy", ["rclone"], indirect=True)  # moto takes any credentials
def test_a_set_nobody_may_reach_says_so(config: ShardingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    remote.forget_drivers()
    with pytest.raises(StoreUnavailableError, match=r"access denied|does not accept these credentials"):
        build(config)


@pytest.mark.faults
def test_the_command_writes_a_set_to_s3_with_two_ray_workers(
    written: ShardingConfig, rclone: Server, tmp_path: Path
) -> None:
    environment = os.environ | aws_environment(rclone.endpoint)
    outputs = []
    for out in (f"s3://{BUCKET}/command", str(tmp_path / "local")):
        command = [sys.executable, "-m", "data_sharding", f"source.root={written.source.root}", f"out={out}"]
        command += ["name=tiny", "space=mni6", "storage.target_bytes=2000000", "cluster.num_workers=2"]
        finished = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stdout + finished.stderr
        outputs.append(finished.stdout + finished.stderr)
    root = rclone.log.parent / "buckets" / BUCKET / "command"
    assert contents(root) == contents(tmp_path / "local")
    assert SECRET_KEY not in "".join(outputs)
    assert SECRET_KEY.encode() not in b"".join(contents(rclone.log.parent).values())
