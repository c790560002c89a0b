"""The reader gives the same samples on any number of ranks, after any resume, by either reader, and never a bad one."""

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from brain_models.preprocess import dequantise
from data_sharding import schema
from data_sharding.errors import ShardError
from data_sharding.read import index_file
from data_sharding.read.batch import decode
from data_sharding.read.order import SampleOrder, Samples
from data_sharding.read.reader import BatchSource, DataConfig, WindowBatch, Windows, open_set
from data_sharding.splits import AS_WRITTEN
from data_sharding.write.build import build
from tests.data_sharding.test_shards import copy_set, flip, npy
from tests.helpers_scans import sharding_config, write_study

DATA = DataConfig(
    batch_size=6,
    micro_batch_size=2,
    shuffle_shards=2,
    seed=3,
    num_workers=0,
    prefetch=2,
    reader="indexed",
    max_bad_fraction=0.0,
    cache_folder=None,
    cache_bytes=0,
    split=AS_WRITTEN,
)
WINDOWS = {"kind": "bold", "window_frames": 4}
NUM_STEPS = 8


@pytest.fixture(scope="module")
def location(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = write_study(tmp_path_factory.mktemp("study"))
    out = tmp_path_factory.mktemp("written") / "set"
    build(sharding_config(root, out))
    return str(out)


def source_of(location: str, rank: int = 0, world_size: int = 1, **changes: object) -> BatchSource:
    """A rank's source; changes of what a sample is, of the split, and of the rest of DATA."""
    what = WINDOWS | {name: changes.pop(name) for name in WINDOWS if name in changes}
    data = replace(DATA, **changes)  # type: ignore[arg-type]
    windows = Windows(open_set(location, split=data.split), **what)  # type: ignore[arg-type]
    return BatchSource(windows, data, rank=rank, world_size=world_size)


def windows_of(location: str, window_frames: int = 4) -> Windows:
    return Windows(open_set(location), kind="bold", window_frames=window_frames)


def rows_of(batches: list[WindowBatch]) -> list[tuple[str, int, int, bytes]]:
    """(scan, first frame, seed, values) of every sample that counts."""
    return [
        (batch.scan_ids[row], batch.first_frame[row], int(batch.sample_seed[row]), batch.values[row].numpy().tobytes())
        for batch in batches
        for row in range(len(batch.scan_ids))
        if batch.weight[row] > 0
    ]


def steps_of(source: BatchSource, num_steps: int, state: dict[str, object] | None = None) -> list[list[WindowBatch]]:
    steps = source.steps(state or source.initial_state())
    taken = [batches for batches, _ in itertools.islice(steps, num_steps)]
    steps.close()  # type: ignore[attr-defined]
    return taken


def test_a_window_is_the_frames_of_its_run_across_chunks(location: str) -> None:
    shard_set = open_set(location)
    crossing = 0
    for batches in steps_of(source_of(location, window_frames=6), 12):
        for batch in batches:
            for row, scan_id in enumerate(batch.scan_ids):
                frames = np.concatenate(npy(shard_set, scan_id, schema.BOLD))
                first = batch.first_frame[row]
                expected = frames[first : first + 6]
                np.testing.assert_array_equal(batch.values[row].numpy(), dequantise(expected))
                np.testing.assert_array_equal(batch.is_measured[row].numpy(), expected[0] != -128)
                crossing += any(first < start < first + 6 for start, _ in schema.chunk_bounds(len(frames), 8))
            assert batch.repetition_time_s.tolist() == [2.0] * len(batch.scan_ids)
            assert batch.subjects == [scan_id[4:6] for scan_id in batch.scan_ids]
    assert crossing > 0


@pytest.mark.parametrize("changes", [{"reader": "stream"}, {"num_workers": 2}, {"prefetch": 1, "micro_batch_size": 3}])
def test_every_way_to_read_gives_the_same_samples(location: str, changes: dict[str, object]) -> None:
    reference = [rows_of(batches) for batches in steps_of(source_of(location), 8)]
    assert [rows_of(batches) for batches in steps_of(source_of(location, **changes), 8)] == reference


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_the_ranks_together_read_the_steps_of_one_rank(location: str, world_size: int) -> None:
    reference = [rows_of(batches) for batches in steps_of(source_of(location), 6)]
    ranks = [steps_of(source_of(location, rank, world_size), 6) for rank in range(world_size)]
    assert len({len(batches) for steps in ranks for batches in steps}) == 1
    assert all(len(batches) == source_of(location, 0, world_size).num_micro_batches for batches in ranks[0])
    assert [[row for steps in ranks for row in rows_of(steps[step])] for step in range(6)] == reference


@pytest.mark.parametrize("num_done", [1, 4, 9])
def test_a_resumed_source_continues_where_it_stopped(location: str, num_done: int) -> None:
    whole = [rows_of(batches) for batches in steps_of(source_of(location), 12)]
    stopped = source_of(location)
    steps = stopped.steps(stopped.initial_state())
    *_, (_, state) = itertools.islice(steps, num_done)
    steps.close()  # type: ignore[attr-defined]
    assert state["samples_consumed"] == 6 * num_done
    resumed = [rows_of(batches) for batches in steps_of(source_of(location), 12 - num_done, state)]
    assert resumed == whole[num_done:]
    with pytest.raises(ShardError, match="belongs to seed 3, this source reads 4; resume with the same set, splits"):
        next(source_of(location, seed=4).steps(state))
    with pytest.raises(ShardError, match="belongs to shard set other"):
        next(source_of(location).steps(state | {"fingerprint": "other"}))


def test_evaluation_sees_every_window_once_over_the_ranks(location: str) -> None:
    expected = [
        (run.scan_id, first)
        for run in open_set(location).runs("bold", ["test", "train"]).itertuples()
        if run.split == "train"
        for first in range(0, run.num_frames - 3, 4)
    ]
    for world_size in (1, 3):
        batches = [
            list(source_of(location, rank, world_size).evaluation("train", limit=None)) for rank in range(world_size)
        ]
        assert len({len(mine) for mine in batches}) == 1
        assert [row[:2] for mine in batches for row in rows_of(mine)] == expected
    subset = rows_of(list(source_of(location).evaluation("train", limit=7)))
    assert len(subset) == 7
    assert [row[:2] for row in subset] == [row for row in expected if row in {row[:2] for row in subset}]


def test_evaluating_in_the_middle_of_training_changes_nothing(location: str) -> None:
    reference = [rows_of(batches) for batches in steps_of(source_of(location), 5)]
    source = source_of(location)
    steps = source.steps(source.initial_state())
    taken = []
    for _ in range(5):
        taken.append(rows_of(next(steps)[0]))
        assert len(rows_of(list(source.evaluation("test", limit=2)))) == 2
    steps.close()  # type: ignore[attr-defined]
    assert taken == reference


def test_t1_batches_hold_one_frame_in_standard_deviations(location: str) -> None:
    shard_set = open_set(location)
    (batch,) = steps_of(source_of(location, kind="t1", window_frames=1, micro_batch_size=6), 1)[0]
    assert batch.values.shape == (6, 1, shard_set.space.num_voxels)
    assert batch.repetition_time_s.tolist() == [0.0] * 6
    (stored,) = npy(shard_set, batch.scan_ids[0], schema.T1)
    np.testing.assert_array_equal(batch.values[0, 0].numpy(), np.nan_to_num(stored.astype(np.float32)))
    np.testing.assert_array_equal(batch.is_measured[0].numpy(), ~np.isnan(stored))


def test_decoding_equals_what_packing_promised() -> None:
    codes = np.arange(-128, 128, dtype=np.int8).reshape(1, 1, 256)
    values, is_measured = decode(torch.from_numpy(codes.copy()))
    np.testing.assert_array_equal(values.numpy(), dequantise(codes))
    assert is_measured[0].tolist() == [False, *[True] * 255]


def test_a_damaged_sample_is_replaced_counted_and_kept_out_of_metrics(location: str, tmp_path: Path) -> None:
    damaged, member = damaged_copy(location, tmp_path / "copy")
    scan_id = member.rsplit("_", 1)[0]
    bad_frames = range(8, 16)  # the whole member: every one of its frames
    healthy = [rows_of(batches) for batches in steps_of(source_of(location), 10)]
    source = source_of(damaged, max_bad_fraction=1.0)
    steps = list(itertools.islice(source.steps(source.initial_state()), 10))
    found = [rows_of(batches) for batches, _ in steps]
    replaced = 0
    for before, after in zip(itertools.chain(*healthy), itertools.chain(*found), strict=True):
        if before[0] == scan_id and set(range(before[1], before[1] + 4)) & set(bad_frames):
            assert after[:2] != before[:2]
            assert after[2] == before[2]
            replaced += 1
        else:
            assert after == before
    assert replaced > 0
    quarantine = steps[-1][1]["quarantine"]
    assert isinstance(quarantine, list)
    assert 0 < len(quarantine) <= replaced
    assert all(name.startswith(f"{scan_id}:") for name in quarantine)
    for changes in ({"reader": "stream"}, {"num_workers": 1}):
        again = steps_of(source_of(damaged, max_bad_fraction=1.0, **changes), 10)
        assert [rows_of(batches) for batches in again] == found
    evaluated = {row[:2] for row in rows_of(list(source.evaluation("train", limit=None)))}
    assert not evaluated & {(scan_id, 8), (scan_id, 12)}
    assert (scan_id, 4) in evaluated


def damaged_copy(location: str, target: Path, split: str = "train") -> tuple[str, str]:
    """A copy of the set with every frame of one chunk of a run of this split flipped."""
    copy_set(Path(location), target)
    shard_set = open_set(str(target))
    rows = shard_set.index[(shard_set.index.kind == schema.BOLD) & (shard_set.index.split == split)]
    row = rows[(rows.first_frame == 8) & (rows.num_frames >= 8)].sort_values("num_frames", kind="stable").iloc[0]
    for frame in range(8):
        flip(target / row.shard, row.offset + schema.NPY_HEADER_BYTES + frame * shard_set.space.num_voxels + 3)
    return str(target), row.member


def test_more_damage_than_tolerated_stops_with_the_place(location: str, tmp_path: Path) -> None:
    damaged, member = damaged_copy(location, tmp_path / "copy")
    with pytest.raises(ShardError, match=rf"damaged samples, more than max_bad_fraction=0\.0.*{member}: frame \d"):
        steps_of(source_of(damaged), 20)


def test_damage_that_is_met_in_every_epoch_is_counted_once(location: str, tmp_path: Path) -> None:
    damaged, _ = damaged_copy(location, tmp_path / "copy")
    source = source_of(damaged, max_bad_fraction=1.0, window_frames=6)  # 40 frames: the phase is one of five
    *_, (_, state) = itertools.islice(source.steps(source.initial_state()), source.drawn.runs("train").num_samples)
    quarantine = state["quarantine"]
    assert isinstance(quarantine, list)
    assert 0 < len(quarantine) <= 3  # the chunk has eight frames


def test_damage_in_one_split_does_not_use_up_what_another_tolerates(location: str, tmp_path: Path) -> None:
    damaged, _ = damaged_copy(location, tmp_path / "copy")
    again, _ = damaged_copy(damaged, tmp_path / "again", split="validation")
    num_windows = len(rows_of(list(source_of(location).evaluation("validation", limit=None))))
    source = source_of(again, max_bad_fraction=2 / num_windows)
    list(source.evaluation("train", limit=None))
    assert len(source.quarantine) == 2
    assert len(rows_of(list(source.evaluation("validation", limit=None)))) == num_windows - 2
    with pytest.raises(ShardError, match="2 damaged samples, more than"):
        list(source_of(again, max_bad_fraction=1 / num_windows).evaluation("validation", limit=None))


def test_the_damage_that_ranks_have_met_is_tolerated_together(location: str) -> None:
    source = source_of(location, max_bad_fraction=1 / source_of(location).drawn.runs("train").num_samples)
    scan_id = source.drawn.names("train")[0]
    states = [source.initial_state() | {"quarantine": [f"{scan_id}:{slot}"]} for slot in (0, 0, 1)]
    assert source.merge_states(states[:2])["quarantine"] == [f"{scan_id}:0"]
    with pytest.raises(ShardError, match="2 damaged samples, more than max_bad_fraction"):
        source.merge_states(states)


def test_a_loader_process_that_is_killed_ends_the_reading_with_its_name(location: str) -> None:
    source = source_of(location, num_workers=1)
    steps = source.steps(source.initial_state())
    next(steps)
    ours = psutil.Process()
    loaders = [child for child in ours.children(recursive=True) if child.ppid() != ours.pid]
    max(loaders, key=psutil.Process.create_time).kill()
    with pytest.raises(RuntimeError, match=r"loader process|DataLoader worker"):  # its batch was on the way, or not
        list(itertools.islice(steps, 20))


def test_what_no_split_or_window_holds_is_said(location: str) -> None:
    with pytest.raises(ShardError, match=r"split 'train' holds no bold window of 99 frames \(the longest run has 40"):
        next(source_of(location, window_frames=99).steps(source_of(location).initial_state()))
    with pytest.raises(ShardError, match="split 'holdout' holds no bold window"):
        list(source_of(location).evaluation("holdout", limit=None))


def test_an_index_in_many_groups_gives_the_same_samples(
    location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = tmp_path / "copy"
    copy_set(Path(location), copied)
    index = open_set(location).index
    index.to_parquet(copied / schema.INDEX, index=False, row_group_size=5)  # a run has more rows
    monkeypatch.setattr(index_file, "KEPT_GROUPS", 2)
    monkeypatch.setattr(index_file, "ROWS_AT_A_TIME", 7)
    for split in ("train", "validation"):
        whole, grouped = (windows_of(each).book(split) for each in (location, str(copied)))
        windows = [(run, first) for run in range(len(whole.scan_ids)) for first in (0, 6, 13)]
        assert [whole.window(*window) for window in windows] == [grouped.window(*window) for window in windows]
    expected = [rows_of(batches) for batches in steps_of(source_of(location), 5)]
    assert [rows_of(batches) for batches in steps_of(source_of(str(copied)), 5)] == expected


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_that_ends_with_its_epoch_holds_what_is_left_of_it(location: str, world_size: int) -> None:
    windows = Windows(open_set(location), **WINDOWS)
    num_samples = windows.runs("train").num_samples
    batch_size = num_samples - 5
    data = replace(DATA, batch_size=batch_size, micro_batch_size=4)
    sources = [
        BatchSource(windows, data, rank=rank, world_size=world_size, cuts_epochs=True) for rank in range(world_size)
    ]
    found, consumed = [], []
    for steps in zip(*(steps_of(source, 4) for source in sources), strict=True):
        found.append([row for batches in steps for row in rows_of(batches)])
    for _, state in itertools.islice(sources[0].steps(sources[0].initial_state()), 4):
        consumed.append(state["samples_consumed"])
    assert [len(rows) for rows in found] == [batch_size, 5, batch_size, 5]
    assert consumed == [batch_size, num_samples, num_samples + batch_size, 2 * num_samples]
    epochs = [sorted(row[:2] for row in found[at] + found[at + 1]) for at in (0, 2)]
    assert len(set(epochs[0])) == num_samples


def test_reading_needs_no_nifti_library(location: str) -> None:
    program = f"""
import sys
for name in ("nibabel", "nilearn", "ray"):
    sys.modules[name] = None
from data_sharding.read.reader import BatchSource, DataConfig, Windows, open_set
windows = Windows(open_set({location!r}), kind="bold", window_frames=4)
config = DataConfig(6, 2, 3, 2, 0, 2, "indexed", 0.0, None, 0, None)
source = BatchSource(windows, config, rank=0, world_size=1)
batches, state = next(source.steps(source.initial_state()))
print(len(batches), state["samples_consumed"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["3", "6"], done.stderr


def stored_states(
    location: str, world_size: int, state: dict[str, object] | None = None, **changes: object
) -> Iterator[dict[str, object]]:
    """What a commit after each step would hold, as it comes back from JSON."""
    ranks = [source_of(location, rank, world_size, **changes) for rank in range(world_size)]
    streams = [rank.steps(state or rank.initial_state()) for rank in ranks]
    for steps in zip(*streams, strict=True):
        yield json.loads(json.dumps(ranks[0].merge_states([after for _, after in steps])))


def digests(states: Iterator[dict[str, object]], num_steps: int) -> list[str]:
    return [str(state["samples_digest"]) for state in itertools.islice(states, num_steps)]


def test_a_run_stopped_and_resumed_on_other_ranks_has_the_digests_of_the_whole_one(location: str) -> None:
    whole = digests(stored_states(location, 1), NUM_STEPS)
    assert len(set(whole)) == NUM_STEPS
    assert digests(stored_states(location, 2), NUM_STEPS) == whole
    for world_sizes in ((1, 2), (2, 1), (3, 2)):
        *_, stopped = itertools.islice(stored_states(location, world_sizes[0]), 3)
        assert stopped["samples_digest"] == whole[2]
        assert digests(stored_states(location, world_sizes[1], stopped), NUM_STEPS - 3) == whole[3:]
    *_, stopped = itertools.islice(stored_states(location, 2), 3)
    assert digests(stored_states(location, 1, stopped | {"samples_consumed": 12}), 1) != whole[3:4]


@pytest.mark.parametrize("wrong", ["skips one", "reads one twice", "swaps two steps", "draws other masks"])
def test_a_source_that_takes_other_samples_has_another_digest(
    location: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = digests(stored_states(location, 2), NUM_STEPS)
    stretch = SampleOrder.stretch

    def other(order: SampleOrder, first: int, last: int) -> Samples:
        right = stretch(order, first, last)
        if wrong == "skips one" and first >= 12:
            return stretch(order, first + 1, last + 1)
        if wrong == "reads one twice" and first == 12:
            return right[[0, 0, 2, 3, 4, 5]]
        if wrong == "swaps two steps" and first in (12, 18):
            return stretch(order, 30 - first, 36 - first)
        if wrong == "draws other masks" and first == 12:
            return replace(right, seed=right.seed + 1)
        return right

    monkeypatch.setattr(SampleOrder, "stretch", other)
    found = digests(stored_states(location, 2), NUM_STEPS)
    assert found[:2] == whole[:2]
    assert not set(found[2:]) & set(whole[2:])


def test_the_digest_is_of_the_samples_read_not_of_those_planned(
    location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged, _ = damaged_copy(location, tmp_path / "copy")
    states = list(itertools.islice(stored_states(damaged, 1, max_bad_fraction=1.0), 10))
    whole = digests(stored_states(location, 1), 10)
    replaced = [bool(state["quarantine"]) for state in states]
    assert [state["samples_digest"] != digest for state, digest in zip(states, whole, strict=True)] == replaced
    assert any(replaced)
    *_, shared = itertools.islice(stored_states(damaged, 3, max_bad_fraction=1.0), 10)
    assert shared["samples_digest"] == states[-1]["samples_digest"]
