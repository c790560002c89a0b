"""A set is finished after any stop, mended from its scans, and made from scans on S3, always to the same bytes."""

from __future__ import annotations

import contextlib
import gzip
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from cluster.storage.stores import store_for
from configs.parse import ConfigError
from data_sharding import schema
from data_sharding.check.verify import verify
from data_sharding.config import ShardingConfig
from data_sharding.errors import ShardError
from data_sharding.verify import VerifyConfig
from data_sharding.verify import run as run_verify
from data_sharding.write.build import build
from tests.data_sharding.test_shards import contents, copy_set, flip
from tests.helpers_scans import sharding_config, write_confounds, write_study
from tests.s3_servers import BUCKET, Server, running_rclone, use  # noqa: F401  (running_rclone is a fixture)

FAULT_SECTION = "Writing a shard set"
ROOT = Path(__file__).parents[3]
VICTIMS = {"driver": "the driver", "_call_quietly": "a Ray worker", "isolation": "a packing process"}
PROGRAM = """
import sys
from pathlib import Path
from dataclasses import replace
from data_sharding.write.build import build
from tests.helpers_scans import sharding_config
root, out, cluster, num_workers = sys.argv[1:]
build(replace(sharding_config(Path(root), Path(out), cluster=cluster, num_workers=int(num_workers)), atlas="template"))
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_study(tmp_path_factory.mktemp("study"))
    for scan in root.rglob("*_bold.nii.gz"):
        write_confounds(scan, num_frames={"01": 18, "04": 18, "02": 40, "05": 40}.get(scan.name[4:6], 20), spikes=(5,))
    return root


@pytest.fixture(scope="module")
def written(study: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardingConfig:
    config = replace(sharding_config(study, tmp_path_factory.mktemp("written") / "set"), atlas="template")
    build(config)
    return config


def started(study: Path, out: Path, *, cluster: str = "inline", num_workers: int = 1) -> subprocess.Popen[str]:
    """A driver in a process group of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, str(study), str(out), cluster, str(num_workers)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def descendants(process: int) -> dict[int, str]:
    """Every process below one, with its command line."""
    found: dict[int, str] = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                found[child.pid] = " ".join(child.cmdline())
    return found


def kill(driver: subprocess.Popen[str], victim: str, chance: random.Random) -> bool:
    """Kills the driver or a process below it as soon as there is one; False when the driver ended before."""
    while driver.poll() is None:
        below = [process for process, command in descendants(driver.pid).items() if victim in command]
        if victim != "driver" and not below:
            continue
        with contextlib.suppress(ProcessLookupError):
            os.kill(driver.pid if victim == "driver" else chance.choice(below), signal.SIGKILL)
            return True
    return False


def test_a_driver_killed_between_shards_is_finished_by_the_next_and_leaves_no_process(
    study: Path, written: ShardingConfig, tmp_path: Path
) -> None:
    out = tmp_path / "set"
    driver = started(study, out)
    while not list(out.glob("receipts/*.json")):
        assert driver.poll() is None, driver.communicate()[0]
        time.sleep(0.01)
    below = descendants(driver.pid)
    assert below
    driver.kill()
    driver.communicate()
    assert not (out / schema.MANIFEST).exists()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{process}").exists() for process in below):
        assert time.monotonic() < deadline, "the packing helper outlived its driver"
        time.sleep(0.05)
    (out / "shards" / ".partial-of-the-dead").write_bytes(b"half a shard")
    build(replace(written, out=str(out)))
    assert contents(out) == contents(Path(written.out))
    (out / ".partial-of-a-manifest").write_bytes(b"{")  # killed between the commit and its tidying
    build(replace(written, out=str(out)))
    assert contents(out) == contents(Path(written.out))


def test_repair_rebuilds_only_damaged_shards_to_the_bytes_they_had(
    written: ShardingConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = copy_set(Path(written.out), tmp_path / "copy")
    whole = contents(copied)
    shards = sorted(name for name in whole if name.endswith(".tar"))
    flip(copied / shards[0], 5000)
    (copied / shards[2]).write_bytes(whole[shards[2]][:-700])
    flip(copied / schema.INDEX, 300)
    flip(copied / schema.SPACE, 400)
    (copied / schema.QUALITY).unlink()
    kept = (copied / shards[1]).stat().st_mtime_ns
    assert run_verify(VerifyConfig(str(copied), repair=[])) == 1
    assert f"{copied} source.root=<the scans>" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"source\.root: required"):
        run_verify(VerifyConfig(str(copied), repair=["limits.timeout_s=500.0"]))
    assert contents(copied)[shards[1]] == whole[shards[1]]
    assert run_verify(VerifyConfig(str(copied), repair=[f"source.root={written.source.root}"])) == 0
    assert f"{len(shards) - 2} of {len(shards)} shards are written already" in capsys.readouterr().out
    assert contents(copied) == whole
    assert (copied / shards[1]).stat().st_mtime_ns == kept


def test_repair_from_other_scans_replaces_nothing(
    written: ShardingConfig,
    study: Path,
    tmp_path: Path,
) -> None:
    copied = copy_set(Path(written.out), tmp_path / "copy")
    flip(copied / "shards/000000.tar", 5000)
    damaged = contents(copied)
    other = write_study(tmp_path / "other", num_subjects=5)
    with pytest.raises(ShardError, match="does not hold the scans this set was made of"):
        run_verify(VerifyConfig(str(copied), repair=[f"source.root={other}"]))
    assert contents(copied) == damaged


def test_repair_says_when_the_scans_now_give_another_set(written: ShardingConfig, tmp_path: Path) -> None:
    copied = copy_set(Path(written.out), tmp_path / "copy")
    study = copy_set(Path(written.source.root), tmp_path / "study")
    flip(copied / "shards/000000.tar", 5000)
    scan = next(study.rglob("*_T1w.nii.gz"))
    values = bytearray(gzip.decompress(scan.read_bytes()))
    values[-len(values) // 4 :] = bytes(len(values) // 4 + (len(values) % 4 > 0))
    size = scan.stat().st_size
    scan.write_bytes(gzip.compress(values, 9).ljust(size, b"\0"))  # the plan knows a scan by its name and size
    assert scan.stat().st_size == size
    with pytest.raises(ShardError, match=r"so this is another set \(fingerprint"):
        run_verify(VerifyConfig(str(copied), repair=[f"source.root={study}"]))


def test_verify_holds_a_block_and_not_a_shard_in_memory(
    written: ShardingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_sharding.check.verify.BLOCK_BYTES", 1000)
    asked = []
    read_into = "cluster.storage.stores.LocalRangeReader.read_into"
    from cluster.storage.stores import LocalRangeReader

    original = LocalRangeReader.read_into
    monkeypatch.setattr(
        read_into, lambda self, offset, buffer: (asked.append(len(buffer)), original(self, offset, buffer))[1]
    )
    assert verify(written.out) == []
    assert max(asked) == 1000


@pytest.fixture
def remote(
    study: Path, written: ShardingConfig, rclone: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> ShardingConfig:
    """The same set, to be made of scans on S3."""
    use(monkeypatch, rclone.endpoint)
    root = f"s3://{BUCKET}/{tmp_path.name}"
    store = store_for(root)
    for path in study.rglob("*"):
        if path.is_file():
            store.put(path.relative_to(study).as_posix(), path)
    return replace(written, out=str(tmp_path / "set"), source=replace(written.source, root=root))


def test_scans_on_s3_give_the_bytes_of_scans_in_a_folder(
    written: ShardingConfig, remote: ShardingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "data_sharding.sources.remote.WHOLE_BYTES", 1000
    )  # scans are found and planned by their headers alone
    monkeypatch.setattr("data_sharding.sources.remote.HEAD_BYTES", 600)
    build(remote)
    assert contents(Path(remote.out)) == contents(Path(written.out))


def test_a_scan_that_cannot_be_fetched_stops_the_run_and_is_no_refusal(
    remote: ShardingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(store: object, plan: object, config: object) -> None:
        source = store_for(remote.source.root)
        for name in source.list("sub-03"):
            source.delete(name)

    monkeypatch.setattr("data_sharding.write.build._claim", lose)  # between finding the scans and packing them
    with pytest.raises(
        ShardError, match=r"s3://.*sub-03.* could not be fetched: .*; run the same command again, it resumes"
    ):
        build(remote)
    assert not (Path(remote.out) / schema.MANIFEST).exists()


@pytest.mark.faults
@pytest.mark.parametrize("trial", range(20))
def test_a_kill_at_any_moment_of_any_process_loses_and_duplicates_nothing(
    trial: int,
    study: Path,
    written: ShardingConfig,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Even trials run in one process, odd ones on Ray with two workers; the victim takes turns."""
    chance = random.Random(trial)
    out = tmp_path / "set"
    cluster, num_workers = ("local", 2) if trial % 2 else ("inline", 1)
    victims = ("driver", "_call_quietly", "isolation") if trial % 2 else ("driver", "isolation")
    victim = victims[trial // 2 % len(victims)]
    wanted, pause_s = chance.randrange(0, 4), chance.uniform(0, 0.6)
    while True:
        driver = started(study, out, cluster=cluster, num_workers=num_workers)
        while driver.poll() is None and len(list(out.glob("receipts/*.json"))) < wanted:
            time.sleep(0.005)
        time.sleep(pause_s)
        if kill(driver, victim, chance):
            break
        shutil.rmtree(out)  # it had ended: earlier, then
        wanted, pause_s = max(0, wanted - 1), pause_s / 2
    num_written = len(list(out.glob("receipts/*.json")))
    record_property("fault", f"SIGKILL of {VICTIMS[victim]}, {'2 Ray workers' if trial % 2 else 'one process'}")
    record_property("when", f"{num_written} shards written, after {pause_s:.2f} s")
    killed = time.monotonic()
    driver.communicate(timeout=120)
    for process in descendants(driver.pid):
        os.kill(process, signal.SIGKILL)
    again = started(study, out, cluster="inline")
    printed, _ = again.communicate(timeout=120)
    assert again.returncode == 0, printed
    assert contents(out) == contents(Path(written.out))
    record_property("recovery_s", time.monotonic() - killed)
