"""A cluster that could not finish a run is refused before the run starts, with the reason; a good one passes."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import preflight as checks
from cluster.config import ClusterConfig, Needs
from cluster.errors import PreflightError
from cluster.preflight import (
    Row,
    clocks,
    disks,
    needs_of,
    preflight,
    same_versions,
    table,
)
from cluster.ray.node_check import NodeFacts, free_bytes, versions, write_and_read
from cluster.storage.stores import LocalStore
from configs.entry import compose, load
from configs.parse import ConfigError
from data_sharding.read.file_cache import ENDING
from data_sharding.write.build import build
from pretrain.masked.sets import build_task, open_sets
from tests.helpers_scans import sharding_config, write_study
from training.engine.engines import checkpoint_bytes

LOCAL = ClusterConfig(**compose("pretrain", ["cluster=local"])["cluster"])


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[None]:
    """Two Ray nodes on this machine."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        node = {"num_cpus": 2, "object_store_memory": 80_000_000, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=node)
        cluster.add_node(num_cpus=2, object_store_memory=80_000_000)
        ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
        yield
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Needs:
    """Of a run that this machine can do."""
    for name in ("TIMEOUT", "MAX_RETRIES"):
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", "1")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "manifest.json").write_text("{}")
    return Needs(
        cluster=LOCAL,
        results=str(tmp_path / "run"),
        inputs={str(tmp_path / "set"): "manifest.json", str(tmp_path / "unlisted"): None},
        scratch=str(tmp_path / "scratch"),
        scratch_bytes=lambda: 3000,
        cache=(str(tmp_path / "cache"), 1000),
        tracking=f"sqlite:///{tmp_path}/mlflow.db",
    )


def failed(rows: list[Row]) -> list[str]:
    return [f"{row.check}: {row.found} ({row.needed})" for row in rows if not row.is_ok]


@pytest.mark.cluster
def test_a_good_cluster_passes_every_check_and_nothing_is_left_behind(two_nodes: None, needs: Needs) -> None:
    rows = preflight(needs)
    assert failed(rows) == []
    checks = [row.check for row in rows]
    host = socket.gethostname()
    assert checks.count(f"{host}: collectives") == 2
    assert checks.count(f"{host}: write {needs.results}") == 2
    assert {"CPUs", "torch", "callosum code", "clocks", "put-if-absent", "tracking server"} <= set(checks)
    assert [line.split()[0] for line in table(rows).splitlines()] == ["ok"] * len(rows)
    assert [path for path in Path(needs.results).rglob("*") if path.is_file()] == []


@pytest.mark.cluster
def test_each_thing_a_cluster_lacks_is_refused_with_its_sentence(
    two_nodes: None, needs: Needs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "NO_NODE_S", 0.0)  # no autoscaler is here to be waited for
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        refusing = f"http://127.0.0.1:{closed.getsockname()[1]}"
        lacking = replace(
            needs,
            cluster=replace(LOCAL, num_workers=5, use_gpu=True),
            results="/sys/callosum",
            inputs={str(tmp_path / "nothing"): "manifest.json"},
            tracking=refusing,
        )
        found = failed(preflight(lacking))
    assert found[0] == "CPUs: 4 on 2 nodes (5)"
    assert found[1].startswith("GPUs: 0 (")
    assert found[1].endswith(" (5)")
    assert sum("/sys/callosum" in each and "cannot be written" in each for each in found) == 2
    assert sum("nothing/manifest.json does not exist" in each for each in found) == 2
    assert found[-1].startswith(f"tracking server: {refusing} refused: ")
    unwritable = failed(preflight(replace(needs, scratch="/sys/scratch", inputs={}, tracking=None)))
    assert len(unwritable) == 2
    assert "/sys/scratch cannot be written: " in unwritable[0]


@pytest.mark.parametrize(("comes_after", "is_coming", "waits"), [(0, False, 0), (4, True, 4), (99, False, 2)])
def test_nodes_that_an_autoscaler_will_bring_are_asked_for_and_waited_for(
    monkeypatch: pytest.MonkeyPatch, comes_after: int, is_coming: bool, waits: int
) -> None:
    clock, asked = [0.0], []
    monkeypatch.setattr(checks.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(checks.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + 10.0))
    monkeypatch.setattr(checks, "has_resources", lambda cluster: clock[0] >= 10 * comes_after)
    monkeypatch.setattr(checks, "are_nodes_coming", lambda: is_coming)
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: asked.append(bundles))
    checks.wait_for_nodes(replace(LOCAL, num_workers=3, use_gpu=True, start_timeout_s=600))
    assert clock[0] // 10 == waits + (1 if comes_after == 99 else 0)
    assert asked == ([[{"CPU": 1, "GPU": 1}] * 3, []] if comes_after else [])


def test_an_autoscaler_that_never_brings_them_is_waited_for_as_long_as_the_run_would(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr(checks.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(checks.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + 10.0))
    monkeypatch.setattr(checks, "has_resources", lambda cluster: False)
    monkeypatch.setattr(checks, "are_nodes_coming", lambda: True)
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: None)
    checks.wait_for_nodes(replace(LOCAL, start_timeout_s=600))
    assert clock[0] == 600


def node(host: str, **changes: object) -> NodeFacts:
    facts = NodeFacts(host, "10.0.0.1", versions(), num_gpus=0, gpu_bytes=0, free_bytes={}, disks={})
    return replace(facts, **changes)  # type: ignore[arg-type]


def test_scratch_and_cache_must_fit_on_every_node(needs: Needs) -> None:
    assert needs.scratch is not None
    needs = replace(needs, scratch_bytes=lambda: 120_000_000_000, cache=(needs.scratch, 80_000_000_000))
    free = {"a": 200_000_000_000, "b": 199_000_000_000}
    nodes = [node(host, free_bytes={needs.scratch: size}, disks={needs.scratch: 1}) for host, size in free.items()]
    rows = disks(needs, nodes)
    assert [row.is_ok for row in rows] == [True, False]
    assert failed(rows) == [f"b: disk of {needs.scratch}: 199.0 GB (200.0 GB)"]


def test_what_lies_on_one_disk_must_fit_there_together(needs: Needs) -> None:
    size = 10**9
    needs = replace(needs, scratch="/nvme/run", cache=("/nvme/cache", 6 * size), scratch_bytes=lambda: 4 * size)
    free = {"/nvme/run": 9 * size, "/nvme/cache": 9 * size}
    together, apart = node("a", free_bytes=free, disks=dict.fromkeys(free, 7)), node("b", free_bytes=free)
    apart.disks = {"/nvme/run": 7, "/nvme/cache": 8}
    assert failed(disks(needs, [together])) == ["a: disk of /nvme/run and /nvme/cache: 9.0 GB (10.0 GB)"]
    assert [(row.needed, row.is_ok) for row in disks(needs, [apart])] == [("4.0 GB", True), ("6.0 GB", True)]


def test_a_full_cache_of_an_earlier_start_counts_as_room_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(100, 95, 5))
    (tmp_path / f"shard{ENDING}").write_bytes(bytes(70))
    (tmp_path / "of-somebody-else").write_bytes(bytes(20))
    assert free_bytes(str(tmp_path)) == 75


def test_a_probe_that_a_kill_left_behind_does_not_make_an_empty_folder_look_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalStore, "delete", lambda store, name: None)
    write_and_read(str(tmp_path))
    assert LocalStore(tmp_path).list() == []


def test_other_versions_and_other_code_are_named_with_their_hosts() -> None:
    other = versions() | {"torch": "2.12.0", "callosum code": "0" * 12, "deepspeed": "missing"}
    rows = same_versions([node("a"), node("b"), node("c", versions=other)])
    found = {row.check: row.found for row in rows if not row.is_ok}
    assert set(found) == {"torch", "callosum code", "deepspeed"}
    assert found["torch"] == f"{versions()['torch']} on a, b; 2.12.0 on c"
    everywhere = [node(host, versions=versions() | {"mlflow": "missing"}) for host in ("a", "b")]
    assert failed(same_versions(everywhere)) == ["mlflow: missing on a, b (the same on all nodes)"]


def test_a_clock_that_is_off_is_named() -> None:
    assert failed(clocks([node("a"), node("b")], [0.2, -1.9])) == []
    assert failed(clocks([node("a"), node("b")], [0.2, -2.5])) == ["clocks: -2.500 s (b) (within 2 s)"]


def test_what_a_run_needs_is_read_from_the_part_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = sharding_config(write_study(tmp_path / "study", num_subjects=9), tmp_path / "set")
    build(replace(config, atlas="template"))
    monkeypatch.chdir(tmp_path)
    words = ["kind=bold", f"shards={config.out}", "windows.bold.window_frames=4", "windows.bold.tubelet_frames=2"]
    words += [
        "model=tiny",
        "run.folder=out/run",
        "cluster=local",
        f"data.cache_folder={tmp_path}",
        "data.cache_bytes=5",
    ]
    found = needs_of("pretrain", words)
    assert dict(found.inputs) == {config.out: "manifest.json"}
    assert (found.results, found.cache) == ("out/run", (str(tmp_path), 5))
    assert found.cluster is not None
    assert found.cluster.kind == "local"
    assert found.scratch == compose("pretrain", ["kind=bold"])["run"]["scratch"]
    _, pretrain = load("pretrain", words)
    task = build_task(pretrain, open_sets(pretrain))
    one = checkpoint_bytes(task, pretrain.train.engine, num_ranks=pretrain.cluster.num_workers)
    assert found.scratch_bytes() == 3 * one  # and no index: the set is on a disk that the nodes mount
    with pytest.raises(ConfigError, match=r"windows\.blod"):
        needs_of("pretrain", [*words, "windows.blod=1"])
    with pytest.raises(PreflightError, match=r"training\.runs runs in one process"):
        needs_of("training.runs", ["tracking=http://a"])
    with pytest.raises(PreflightError, match="cluster=inline runs in this process alone"):
        preflight(replace(found, cluster=replace(LOCAL, kind="inline")))
