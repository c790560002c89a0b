"""Windows with too many censored frames are never drawn; everything else about the order stays as it was."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_sharding import schema
from data_sharding.errors import ShardError
from data_sharding.hashing import hash_names
from data_sharding.read.censored import CensoredRuns, SlotGrids
from data_sharding.read.order import RunTable, SampleOrder, substitute, tiled
from data_sharding.read.reader import Windows, open_set
from data_sharding.write.build import build
from data_sharding.write.prepare import prepare
from tests.data_sharding.test_shards import npy
from tests.helpers_scans import sharding_config, write_bold, write_confounds

WINDOW, NUM_FRAMES = 5, 33
CENSORED = {1: [0, 1, 2, 3, 4, 5, 6, 7, 20, 21], 3: list(range(NUM_FRAMES)), 5: [12], 6: [2, 3]}


def run_table(*, with_censored: bool = True) -> RunTable:
    censored = CensoredRuns(
        run=np.array(list(CENSORED)),
        num_frames=np.full(len(CENSORED), NUM_FRAMES),
        ranges=[schema.frame_ranges(frames) for frames in CENSORED.values()],
        window_frames=WINDOW,
        max_censored_fraction=0.2,
    )
    return RunTable(
        scan_hash=hash_names([f"sub-{run}" for run in range(8)]),
        shard=np.arange(8) % 3,
        num_frames=np.full(8, NUM_FRAMES),
        window_frames=WINDOW,
        censored=censored if with_censored else CensoredRuns.none(),
    )


def order_of(runs: RunTable) -> SampleOrder:
    return SampleOrder(runs, fingerprint="set", seed=1, shuffle_shards=2)


def num_censored(run: int, first_frame: int) -> int:
    return len(set(CENSORED.get(run, ())) & set(range(first_frame, first_frame + WINDOW)))


def test_no_drawn_window_has_more_than_a_fifth_of_its_frames_censored() -> None:
    runs = run_table()
    samples = order_of(runs).stretch(0, 30 * runs.num_samples)
    windows = list(zip(samples.run.tolist(), samples.first_frame.tolist(), strict=True))
    assert max(num_censored(run, first) for run, first in windows) == 1  # one of five is a fifth: still allowed
    assert all(first + WINDOW <= NUM_FRAMES for _, first in windows)
    assert 3 not in samples.run
    assert runs.num_slots.tolist() == [6, 4, 6, 0, 6, 6, 6, 6]
    phases_of = {run: {first % WINDOW for of, first in windows if of == run} for run in (0, 5, 6)}
    assert phases_of[0] == {0, 1, 2, 3}
    assert phases_of[6] == {3}  # the only phase that leaves six windows: 2 and 3 fall before, or into different ones


def test_windows_counted_for_all_runs_at_once_are_those_of_each_run() -> None:
    generator = np.random.default_rng(3)
    lengths = generator.integers(1, 40, size=60)
    frames = [sorted(set(generator.integers(0, length, size=generator.integers(1, 20)).tolist())) for length in lengths]
    runs = CensoredRuns(
        run=3 * np.arange(60),
        num_frames=lengths,
        ranges=[schema.frame_ranges(each) for each in frames],
        window_frames=WINDOW,
        max_censored_fraction=0.2,
    )
    for place, (length, each) in enumerate(zip(lengths.tolist(), frames, strict=True)):
        one = SlotGrids(num_frames=length, window_frames=WINDOW, censored=np.array(each), max_censored_fraction=0.2)
        assert (runs.num_slots[place], runs.num_tiled[place]) == (one.num_slots, len(one.starts(0)))
        assert 3 * place in runs
        assert 3 * place + 1 not in runs
        assert runs[3 * place].phases.tolist() == one.phases.tolist()


def test_an_epoch_has_the_same_number_of_samples_each_time_and_no_window_overlaps_another() -> None:
    runs = run_table()
    for epoch in range(12):
        samples = order_of(runs).stretch(epoch * runs.num_samples, (epoch + 1) * runs.num_samples)
        assert set(samples.epoch.tolist()) == {epoch}
        for run in range(8):
            starts = np.sort(samples.first_frame[samples.run == run])
            assert len(starts) == runs.num_slots[run]
            assert (np.diff(starts) >= WINDOW).all()


def test_runs_without_censored_frames_are_drawn_as_before() -> None:
    with_censored, without = run_table(), run_table(with_censored=False)
    for epoch in range(3):
        drawn = []
        for runs in (with_censored, without):
            samples = order_of(runs).stretch(epoch * runs.num_samples, (epoch + 1) * runs.num_samples)
            is_clean = ~np.isin(samples.run, list(CENSORED))
            columns = (samples.run, samples.first_frame, samples.seed)
            drawn.append([tuple(column[is_clean].tolist()) for column in columns])
        assert drawn[0] == drawn[1]


def test_evaluation_tiles_and_substitutes_only_what_may_be_drawn() -> None:
    runs = run_table()
    samples = tiled(runs, fingerprint="set", limit=None)
    windows = list(zip(samples.run.tolist(), samples.first_frame.tolist(), strict=True))
    expected = [
        (run, first)
        for run in range(8)
        for first in range(0, NUM_FRAMES - WINDOW + 1, WINDOW)
        if num_censored(run, first) < 2
    ]
    assert windows == expected
    subset = tiled(runs, fingerprint="set", limit=5)
    assert set(zip(subset.run.tolist(), subset.first_frame.tolist(), strict=True)) < set(expected)
    drawn = [substitute(runs, seed, attempt) for seed in range(60) for attempt in range(2)]
    assert max(num_censored(run, first) for run, first in drawn) < 2
    assert {run for run, _ in drawn} == {0, 1, 2, 4, 5, 6, 7}


def test_region_series_drop_and_censor_the_frames_that_their_voxels_do(tmp_path: Path) -> None:
    spikes = (4, 5, 13)  # of the scan; its first two frames are dropped
    scan = write_bold(tmp_path / "study", "01", num_frames=20)
    write_confounds(scan, num_frames=20, num_non_steady=2, spikes=spikes)
    config = sharding_config(tmp_path / "study", tmp_path / "set")
    config = replace(
        config,
        source=replace(config.source, kinds=["bold", "parcels"]),
        atlas="template",
        splits=replace(config.splits, rule="none"),
    )
    build(config)
    shard_set = open_set(config.out)
    run, series = ("sub-01_task-rest_bold", "sub-01_task-rest_parcels")
    (values,), (frames,) = (npy(shard_set, series, kind) for kind in (schema.PARCELS, schema.FRAMES))
    values = np.nan_to_num(values[:, np.isfinite(values).all(axis=0)].astype(np.float32))
    expected = np.array([frame + 2 not in spikes for frame in range(18)])
    np.testing.assert_array_equal(frames[:, schema.FRAME_COLUMNS.index("keep")], expected)
    np.testing.assert_array_equal(frames, npy(shard_set, run, schema.FRAMES)[0])
    assert np.abs(values[expected].mean(axis=0)).max() < 1e-3
    np.testing.assert_allclose(values[expected].std(axis=0), 1, atol=2e-3)
    assert shard_set.runs("parcels", ["train"]).censored.tolist() == ["2-3,11"]
    drawn = {kind: Windows(shard_set, kind=kind, window_frames=4).runs("train") for kind in ("bold", "parcels")}
    assert drawn["parcels"].num_slots.tolist() == drawn["bold"].num_slots.tolist() == [2]
    starts = {kind: tiled(runs, fingerprint="set", limit=None).first_frame.tolist() for kind, runs in drawn.items()}
    assert starts["parcels"] == starts["bold"] == [4, 12]  # frames 2-3 and 11 lie in the windows from 0 and 8
    assert prepare(config).plan.num_bytes == shard_set.manifest.counts["bytes"]


def test_a_run_with_fewer_than_two_frames_left_has_no_region_series(tmp_path: Path) -> None:
    scan = write_bold(tmp_path / "study", "01", num_frames=8)
    write_confounds(scan, num_frames=8, spikes=tuple(range(8)))
    config = sharding_config(tmp_path / "study", tmp_path / "set")
    source = replace(config.source, kinds=["parcels"])
    config = replace(config, source=source, atlas="template", splits=replace(config.splits, rule="none"))
    with pytest.raises(ShardError, match="1 of its frames are not censored, too few for region series"):
        build(config)
