"""A killed run resumes as if nothing had happened; what is not whole does not exist; what is damaged is named."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import time
from pathlib import Path

import pytest
from test_training_engines import exported, largest_difference, losses, report, run_launches
from torch import Tensor
from training_toys import ToyBatch, ToyConfig, ToySource, ToyTask, services, toy_config

from cluster.errors import StorageError, StoreUnavailableError
from cluster.hanging import HEARTBEAT
from cluster.storage.stores import LocalStore
from training import checkpoint
from training.checkpoint import (
    COMMIT,
    Checkpoints,
    Commit,
    StartingPoint,
    StoredFile,
    committed_folders,
    fetch,
    full_disk_is_an_error,
    kept,
    read_commit,
    starting_point,
)
from training.config import CheckpointConfig, StartConfig
from training.engine.elastic import check_space, fetch_state
from training.errors import CheckpointError, TrainingError
from training.loop import FitResult, fit

STEPS = 8
ENGINES = {"plain": 1, "zero2": 2, "zero3": 2}  # and on how many ranks each is killed


def run(config: ToyConfig) -> FitResult:
    return fit(ToyTask(), ToySource(), config, services(config))


@pytest.fixture
def trained(tmp_path: Path) -> ToyConfig:
    """A finished run with commits at steps 2, 4 and 6, of which the last two are kept."""
    config = toy_config(tmp_path, steps=6, checkpoint_every=4)
    run(config)
    return config


def newest(config: ToyConfig) -> Path:
    store = LocalStore(config.run.folder)
    return Path(store.join(committed_folders(store)[-1]))


def test_a_run_killed_and_rerun_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    """plain, and ZeRO 2 and 3 on two ranks; what ZeRO 2 left is also gone on with on one rank."""
    job = {"steps": STEPS, "checkpoint_every": 2, "opens_at": 4}
    whole, killed = (
        {engine: {**job, "engine": engine, "folder": str(tmp_path / f"{engine}-{name}")} for engine in ENGINES}
        for name in ("whole", "killed")
    )
    copy = {**killed["zero2"], "folder": str(tmp_path / "copy"), "copy_of": killed["zero2"]["folder"], "keep_last": 99}
    launches = [
        ([whole["plain"]], 1),
        ([whole["zero2"], whole["zero3"]], 2),
        *(([{**each, "kill_at": 5}], ENGINES[engine]) for engine, each in killed.items()),
        ([copy], 1),
        ([killed["plain"]], 1),
        ([killed["zero2"], killed["zero3"]], 2),
    ]
    codes = run_launches(tmp_path, launches, timeout_s=280)
    assert codes == [[0], [0, 0], [9], [9, 9], [9, 9], [0], [0], [0, 0]]
    check_one_rank_resumed(Path(copy["folder"]), uninterrupted=Path(whole["zero2"]["folder"]))

    for engine in ENGINES:
        rerun, uninterrupted = tmp_path / f"{engine}-killed", tmp_path / f"{engine}-whole"
        assert report(rerun)["start"] == "own"
        assert len(losses(uninterrupted)) == STEPS
        assert losses(rerun) == losses(uninterrupted)
        assert largest_difference(exported(rerun), exported(uninterrupted)) == 0.0
        assert report(rerun)["metrics"] == report(uninterrupted)["metrics"]


def check_one_rank_resumed(copy: Path, *, uninterrupted: Path) -> None:
    """What two killed ranks left, gone on with on one rank: the same losses up to rounding; and damage is named."""
    damaged = copy.with_name("damaged")
    assert report(copy)["start"] == "own"
    assert losses(copy) == pytest.approx(losses(uninterrupted), abs=1e-5)
    assert largest_difference(exported(copy), exported(uninterrupted)) < 1e-5

    (start,) = (copy / "run").glob(f"checkpoints/*/whole/{COMMIT}")
    shutil.copytree(copy, damaged)
    point = StartingPoint("own", LocalStore(damaged / "run"), f"checkpoints/{start.parent.parent.name}", None, None)
    assert point.store is not None
    whole = Path(point.store.join(f"{point.folder}/whole/whole.safetensors"))
    whole.write_bytes(whole.read_bytes()[:-8] + bytes(8))
    point.commit = read_commit(point.store, point.folder)
    with pytest.raises(CheckpointError, match=r"whole\.safetensors is damaged: sha256"):
        fetch_state(point, damaged / "fetched")


def test_once_training_is_over_no_step_is_expected(trained: ToyConfig) -> None:
    """Or a long report would be told as a rank that hangs."""
    run(trained)
    assert HEARTBEAT.first_at is not None
    assert HEARTBEAT.silent_s() == 0.0


def test_however_long_an_upload_takes_no_more_than_an_interval_lies_between_a_step_and_the_newest_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kill would repeat, at every forward pass, while an upload takes as long as many steps."""
    config = toy_config(tmp_path, steps=30, checkpoint_every=7)
    at_risk: list[int] = []
    put, forward = LocalStore.put, ToyTask.forward

    def slow_put(store: LocalStore, name: str, source: bytes | Path) -> None:
        time.sleep(0.03)
        put(store, name, source)

    def watched_forward(task: ToyTask, batch: ToyBatch) -> dict[str, Tensor]:
        committed = [int(folder.split("-")[1]) for folder in committed_folders(store)]  # one may be deleted meanwhile
        at_risk.append(len(at_risk) // ToySource().num_micro_batches - max(committed, default=0))
        return forward(task, batch)

    store = LocalStore(config.run.folder)
    monkeypatch.setattr(LocalStore, "put", slow_put)
    monkeypatch.setattr(ToyTask, "forward", watched_forward)
    run(config)
    assert 4 < max(at_risk) <= 7  # above 4: an upload was under way, for as long as the run waits for none


def test_a_conversion_that_has_no_room_on_scratch_says_how_much_it_needs(
    trained: ToyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 8, 2))
    commit = read_commit(LocalStore(trained.run.folder), committed_folders(LocalStore(trained.run.folder))[-1])
    with pytest.raises(
        CheckpointError,
        match=r"has 2 bytes free; resuming on 1 rank from a checkpoint .* another run\.scratch",
    ):
        check_space(commit, tmp_path)


def test_a_finished_run_run_again_trains_no_step_and_says_the_same(trained: ToyConfig) -> None:
    again = run(trained)
    assert again.start == "own"
    assert again.checkpoint == str(newest(trained))
    assert again.metrics == run(trained).metrics


def test_a_folder_without_commit_does_not_exist(trained: ToyConfig) -> None:
    (newest(trained) / "COMMIT.json").unlink()
    point = starting_point(LocalStore(trained.run.folder), trained.start)
    assert (point.kind, point.step) == ("own", 4)


def test_a_damaged_file_is_named_with_the_older_commit_to_resume_from(trained: ToyConfig) -> None:
    folder = newest(trained)
    with (folder / "plain.pt").open("r+b") as file:
        file.seek(100)
        file.write(b"\xff\xff")
    with pytest.raises(CheckpointError, match=r"plain\.pt is damaged: sha256 .* over") as caught:
        run(trained)
    assert f"delete {folder} and run again to resume from the older" in str(caught.value)
    assert "step-00000004" in str(caught.value)
    shutil.rmtree(folder)
    assert run(trained).start == "own"


def test_a_missing_file_is_named(trained: ToyConfig) -> None:
    (newest(trained) / "plain.pt").unlink()
    with pytest.raises(CheckpointError, match=r"plain\.pt is missing"):
        run(trained)


@pytest.mark.parametrize(
    "cause",
    [
        StoreUnavailableError("http://store did not answer within 120 s"),
        StorageError("/scratch cannot be written: No space left on device; free some"),
    ],
)
def test_a_store_that_is_away_or_a_full_disk_is_not_told_as_a_missing_file_to_be_deleted(
    trained: ToyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: StorageError
) -> None:
    def fail(store: LocalStore, name: str, local: Path) -> None:
        raise cause

    point = starting_point(LocalStore(trained.run.folder), trained.start)
    monkeypatch.setattr(LocalStore, "get_file", fail)
    with pytest.raises(StorageError) as caught:
        fetch(point, tmp_path / "fetched", ranks={0})
    assert caught.value is cause


def test_of_two_jobs_in_one_run_folder_the_later_continues_and_the_other_commits_nothing_more(tmp_path: Path) -> None:
    """On two nodes: each has its own scratch. The later one prunes what the other is uploading."""
    store, rules = LocalStore(tmp_path / "run"), CheckpointConfig(100, 2, None, None, "lowest")

    def save(checkpoints: Checkpoints, step: int) -> None:
        local = checkpoints.local_folder(step)
        local.mkdir(parents=True)
        (local / "plain.pt").write_bytes(bytes(100))
        checkpoints.commit_later(local, Commit(1, step, [], 1, "plain", {}, "", "", None, {}, {}))
        checkpoints.wait()

    earlier = Checkpoints(store, tmp_path / "node-a", rules, attempt="aaaa")
    save(earlier, 10)
    later = Checkpoints(store, tmp_path / "node-b", rules, attempt="bbbb")
    with pytest.raises(CheckpointError, match=r"another job started later .* names attempt bbbb, this is aaaa"):
        save(earlier, 20)
    save(later, 15)
    assert committed_folders(store) == ["checkpoints/step-00000010-aaaa", "checkpoints/step-00000015-bbbb"]
    assert not any("step-00000020" in name for name in store.list())


def test_an_unreadable_commit_is_named_and_never_skipped(trained: ToyConfig) -> None:
    (newest(trained) / "COMMIT.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"COMMIT\.json cannot be read"):
        run(trained)


@pytest.mark.parametrize("name", ["/tmp/written.pt", "../../written.pt"])
def test_a_commit_that_names_a_file_outside_its_folder_is_refused_and_nothing_is_written(
    trained: ToyConfig, name: str
) -> None:
    path = newest(trained) / "COMMIT.json"
    raw = json.loads(path.read_text())
    raw["files"][0]["name"] = name
    path.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=rf"COMMIT\.json was not written by a run: '{name}' is not a name inside"):
        run(trained)


def test_a_commit_of_another_schema_is_refused(trained: ToyConfig) -> None:
    path = newest(trained) / "COMMIT.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 1}))
    with pytest.raises(CheckpointError, match=r"has schema 1, this code reads 2; finish the run with the code that"):
        run(trained)


def test_a_rank_that_sees_a_newer_commit_than_rank_0_resumes_from_the_one_of_rank_0(
    trained: ToyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(trained.run.folder)
    seen_by_main = committed_folders(store)[:1]
    monkeypatch.setattr(checkpoint, "from_main", lambda _: seen_by_main)
    assert starting_point(store, trained.start).folder == seen_by_main[0]


def test_a_commit_of_another_engine_or_data_is_refused(trained: ToyConfig) -> None:
    path = newest(trained) / "COMMIT.json"
    commit = json.loads(path.read_text())
    for change, message in (
        ({"engine": "zero2"}, "was written by engine=zero2, this run has plain"),
        ({"fingerprint": "0" * 64}, "was trained on the set 000000000000"),
    ):
        path.write_text(json.dumps({**commit, **change}))
        with pytest.raises(CheckpointError, match=message):
            run(trained)


def test_another_configuration_in_the_same_folder_is_refused_with_the_keys(trained: ToyConfig) -> None:
    changed = dataclasses.replace(trained, seed=4, steps=9)
    with pytest.raises(TrainingError, match="belongs to another configuration") as caught:
        run(changed)
    assert "- train.seed: 3 there, 4 here" in str(caught.value)
    assert "- train.steps: 6 there, 9 here" in str(caught.value)
    tracking = dataclasses.replace(trained.tracking, experiment="another")
    assert run(dataclasses.replace(trained, tracking=tracking)).start == "own"


def test_another_run_starts_from_a_named_checkpoint(trained: ToyConfig, tmp_path: Path) -> None:
    store = LocalStore(trained.run.folder)
    middle = store.join(committed_folders(store)[0])
    other = toy_config(tmp_path / "other", steps=6, checkpoint_every=2)
    result = run(dataclasses.replace(other, start=StartConfig(checkpoint=middle, registered=None)))
    assert result.start == "named"
    assert result.metrics == run(trained).metrics
    unfinished = dataclasses.replace(other, start=StartConfig(checkpoint=f"{tmp_path}/nowhere", registered=None))
    ended = toy_config(tmp_path / "ended", steps=4, checkpoint_every=2)
    with pytest.raises(CheckpointError, match=r"is of step 4, this run ends at train\.steps=4"):
        run(dataclasses.replace(ended, start=StartConfig(checkpoint=middle, registered=None)))
    unfinished.run.folder += "-2"
    with pytest.raises(CheckpointError, match=r"nowhere has no COMMIT\.json"):
        run(unfinished)


def test_the_last_k_every_nth_and_the_best_commit_are_kept() -> None:
    def commit(step: int, loss: float) -> Commit:
        file = StoredFile("plain.pt", 1, "", 0)
        return Commit(1, step, [file], 1, "plain", {}, "", "", None, {"validation/loss": loss}, {})

    commits = {f"step-{step}": commit(step, loss) for step, loss in ((1, 5), (2, 1), (3, 4), (4, 3), (5, 2), (6, 6))}
    rules = CheckpointConfig(1, 2, 4, "validation/loss", "lowest")
    assert kept(rules, commits) == {"step-5", "step-6", "step-4", "step-2"}
    assert kept(dataclasses.replace(rules, best_is="highest", keep_every_steps=None), commits) == {"step-5", "step-6"}
    assert kept(rules, {"step-0": commit(9, float("nan"))} | commits) == kept(rules, commits)  # no number is the best


def test_keep_rules_are_applied_on_disk(trained: ToyConfig) -> None:
    folders = sorted(
        path.name for path in (Path(trained.run.folder) / "checkpoints").iterdir() if any(path.rglob("*.pt"))
    )
    assert [name.rpartition("-")[0] for name in folders] == ["step-00000004", "step-00000006"]


def test_an_old_commit_that_cannot_be_read_is_left_alone_and_stops_no_run(
    trained: ToyConfig, caplog: pytest.LogCaptureFixture
) -> None:
    store = LocalStore(trained.run.folder)
    old, _ = committed_folders(store)
    kept_files = sorted(name for name in store.list() if name.startswith(old))
    store.put(f"{old}/{COMMIT}", b'{"schema": 1, "st')
    longer = dataclasses.replace(trained, steps=12)
    store.delete("run.json")
    run(longer)
    assert [path for path in Path(longer.run.scratch).rglob("*") if path.suffix == ".pt"] == []  # nor fetched ones
    assert sorted(name for name in store.list() if name.startswith(old)) == kept_files
    assert len(committed_folders(store)) == 3
    assert f"{store.join(old)}/{COMMIT} cannot be read" in caplog.text
    assert "is kept" in caplog.text


def test_a_full_disk_is_named_and_other_failures_of_writing_stay_what_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "made"
    named = rf"rank 0: {folder} cannot be written: its disk is full"
    with pytest.raises(CheckpointError, match=named), full_disk_is_an_error(folder):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(RuntimeError, match="something else"), full_disk_is_an_error(folder):
        raise RuntimeError("something else")
