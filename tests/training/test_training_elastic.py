"""A run resumes on another number of ranks under every ZeRO stage, and ends where the uninterrupted one ends."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_training_engines import ZERO, exported, largest_difference, losses, report, run_launches

from cluster.errors import StoreUnavailableError
from cluster.storage.stores import LocalStore
from data_sharding.read.shard_set import open_set
from training.checkpoint import Commit, StartingPoint, StoredFile
from training.engine.elastic import fetch_state, fetch_whole
from training.errors import CheckpointError

FAULT_SECTION = "Training: another number of ranks resumes"
PAIRS = ((2, 1), (1, 2), (3, 2))
STEPS = 60
BROKEN_AT = 31  # the last commit is of step 30: between a group's opening and the end
SEEDS = (7, 8, 9)  # the first is the one of every other run
JOB = {"steps": STEPS, "checkpoint_every": 6, "keep_last": 99, "opens_at": 9}
TIMEOUT_S = 3000


def job(folder: Path, engine: str, name: str, **changes: object) -> dict:
    return {**JOB, "engine": engine, "folder": str(folder / name), **changes}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs <engine>-<ranks> in one go, and <engine>-<before>-<after>, broken off and gone on with on other ranks; plain
    ones of three seeds."""
    folder = tmp_path_factory.mktemp("elastic")
    launches = []
    for num_ranks in (1, 2, 3):
        whole = [job(folder, engine, f"{engine}-{num_ranks}") for engine in ZERO]
        broken = [job(folder, engine, f"{engine}-{num_ranks}-broken", break_at=BROKEN_AT) for engine in ZERO]
        seeds = [job(folder, "plain", f"seed-{seed}", seed=seed) for seed in SEEDS if num_ranks == 1]
        launches.append(([*whole, *broken, *seeds], num_ranks))
    assert run_launches(folder, launches, timeout_s=TIMEOUT_S) == [[0] * num_ranks for _, num_ranks in launches]
    launches = []
    for num_after in (1, 2):
        names = [f"{engine}-{before}-{after}" for before, after in PAIRS if after == num_after for engine in ZERO]
        for name in names:
            shutil.copytree(folder / f"{name.rpartition('-')[0]}-broken", folder / name)
        launches.append(([job(folder, name.partition("-")[0], name) for name in names], num_after))
    assert run_launches(folder, launches, timeout_s=TIMEOUT_S) == [[0] * num_ranks for _, num_ranks in launches]
    return folder


@pytest.mark.faults
@pytest.mark.parametrize(("num_before", "num_after"), PAIRS)
@pytest.mark.parametrize("engine", ZERO)
def test_another_number_of_ranks_resumes_within_1e_5_and_ends_inside_the_range_of_three_seeds(
    folder: Path, record_property: Callable[[str, object], None], engine: str, num_before: int, num_after: int
) -> None:
    found, whole = folder / f"{engine}-{num_before}-{num_after}", folder / f"{engine}-{num_before}"
    record_property("fault", f"{engine}: {num_before} ranks stop, {num_after} resume")
    record_property("when", f"step {BROKEN_AT} of {STEPS}, commit of step 30")
    record_property("recovery_s", report(found)["seconds"])
    assert report(found)["start"] == "own"
    assert losses(found) == pytest.approx(losses(whole), abs=1e-5)
    assert largest_difference(exported(found), exported(whole)) < 1e-4
    ends = [report(folder / f"seed-{seed}")["metrics"]["validation/loss"] for seed in SEEDS]
    assert min(ends) - 1e-5 <= report(found)["metrics"]["validation/loss"] <= max(ends) + 1e-5


def test_what_rank_0_has_written_down_comes_with_the_whole_state(tmp_path: Path) -> None:
    store, step = LocalStore(str(tmp_path / "run")), "checkpoints/step-00000004-a"
    written = {"metrics.jsonl": b"rows", "spikes.jsonl": b"spikes", "whole/whole.safetensors": b"tensors"}
    files = [StoredFile(name, len(data), hashlib.sha256(data).hexdigest(), 0) for name, data in written.items()]
    for name, data in written.items():
        store.put_if_absent(f"{step}/{name}", data)
    stored = dataclasses.replace(files[2], name="whole.safetensors")
    store.put_if_absent(f"{step}/whole/COMMIT.json", json.dumps(dataclasses.asdict(stored)).encode())
    commit = Commit(1, 4, files[:2], 2, "zero2", {}, "", "", None, {}, {})
    fetch_whole(StartingPoint("own", store, step, commit, None), tmp_path / "local")
    found = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
    assert found == {name.rpartition("/")[2]: data for name, data in written.items()}
    store.put(f"{step}/whole/whole.safetensors", b"damaged")
    with pytest.raises(CheckpointError, match=r"safetensors is damaged: .*; delete .*/whole and run again to make it"):
        fetch_whole(StartingPoint("own", store, step, commit, None), tmp_path / "local")


def test_a_store_that_goes_away_under_a_set_or_a_conversion_is_told_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so is tried again, where a damaged checkpoint and a set that is not there are not."""

    def away(*_: object) -> bytes:
        raise StoreUnavailableError("no answer")

    commit = Commit(1, 4, [StoredFile("a", 1, "", 0)], 2, "zero2", {}, "", "", None, {}, {})
    point = StartingPoint("own", LocalStore(str(tmp_path)), "checkpoints/step-00000004-a", commit, None)
    monkeypatch.setattr(LocalStore, "get_file", away)
    monkeypatch.setattr(LocalStore, "read", away)
    for attempt in (lambda: fetch_state(point, tmp_path / "local"), lambda: open_set(str(tmp_path))):
        with pytest.raises(StoreUnavailableError, match=r"^no answer$"):
            attempt()
