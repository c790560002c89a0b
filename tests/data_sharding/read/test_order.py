"""The order of samples is a pure function of (fingerprint, seed, epoch), whatever the ranks and whenever it resumes."""

import numpy as np
import pytest
import torch

from data_sharding.hashing import hash_names, splitmix64
from data_sharding.read.order import (
    RunTable,
    SampleOrder,
    Samples,
    micro_batches,
    rank_share,
    substitute,
    tiled,
)

WINDOW = 4


def run_table(num_runs: int = 11, num_frames: tuple[int, ...] = (16, 18, 23, 7)) -> RunTable:
    return RunTable(
        scan_hash=hash_names([f"sub-{run}" for run in range(num_runs)]),
        shard=np.arange(num_runs) % 4,
        num_frames=np.array([num_frames[run % len(num_frames)] for run in range(num_runs)]),
        window_frames=WINDOW,
    )


def make_order(runs: RunTable | None = None, *, seed: int = 5, shuffle_shards: int = 2) -> SampleOrder:
    return SampleOrder(runs or run_table(), fingerprint="set", seed=seed, shuffle_shards=shuffle_shards)


def identity(samples: Samples) -> list[tuple[int, int, int, int]]:
    columns = (samples.epoch, samples.run, samples.first_frame, samples.seed)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def published_splitmix64(state: int) -> int:
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


def test_splitmix64_is_the_published_one_in_numpy_and_in_torch() -> None:
    states = np.random.default_rng(0).integers(-(2**63), 2**63, size=500)
    mixed = splitmix64(states)
    assert [int(value) % 2**64 for value in mixed] == [published_splitmix64(int(state) % 2**64) for state in states]
    assert torch.equal(splitmix64(torch.from_numpy(states)), torch.from_numpy(mixed))


def test_an_epoch_is_every_slot_of_every_run_once() -> None:
    runs = run_table()
    for epoch in range(3):
        start = epoch * runs.num_samples
        samples = make_order(runs).stretch(start, start + runs.num_samples)
        drawn = sorted(zip(samples.run.tolist(), samples.slot.tolist(), strict=True))
        assert drawn == [(run, slot) for run in range(11) for slot in range(runs.num_slots[run])]
        assert set(samples.epoch.tolist()) == {epoch}


def test_every_frame_comes_equally_often_when_windows_fill_the_run() -> None:
    runs = run_table(num_frames=(16, 8))
    samples = make_order(runs).stretch(0, 3 * runs.num_samples)
    for run in range(11):
        seen = np.zeros(int(runs.num_frames[run]), dtype=int)
        for first in samples.first_frame[samples.run == run]:
            seen[first : first + WINDOW] += 1
        assert seen.tolist() == [3] * len(seen)


def test_windows_stay_inside_the_run_and_the_phase_reaches_every_frame() -> None:
    runs = run_table(num_frames=(18,))
    samples = make_order(runs).stretch(0, 60 * runs.num_samples)
    assert samples.first_frame.min() == 0
    assert samples.first_frame.max() == 18 - WINDOW
    assert set((samples.first_frame % WINDOW).tolist()) == {0, 1, 2}
    one_epoch_of_a_run = samples.first_frame[(samples.run == 3) & (samples.epoch == 7)]
    assert sorted(np.diff(np.sort(one_epoch_of_a_run)).tolist()) == [WINDOW] * 3


def test_epochs_seeds_and_sets_have_different_orders_and_sample_seeds() -> None:
    num_samples = run_table().num_samples
    first = identity(make_order().stretch(0, num_samples))
    assert first == identity(make_order().stretch(0, num_samples))
    others = [
        identity(make_order().stretch(num_samples, 2 * num_samples)),
        identity(make_order(seed=6).stretch(0, num_samples)),
        identity(SampleOrder(run_table(), fingerprint="other", seed=5, shuffle_shards=2).stretch(0, num_samples)),
    ]
    assert all([entry[1:3] for entry in other] != [entry[1:3] for entry in first] for other in others)
    seeds = [entry[3] for order in [first, *others[:2]] for entry in order]
    assert len(set(seeds)) == len(seeds)
    assert min(seeds) >= 0


def test_a_shuffle_block_draws_from_its_own_shards_only() -> None:
    runs = run_table()
    for number in range(2):
        shards = set(runs.shard[make_order(runs).block(0, number).run].tolist())
        assert len(shards) == 2
    assert not set(runs.shard[make_order(runs).block(0, 0).run]) & set(runs.shard[make_order(runs).block(0, 1).run])


@pytest.mark.parametrize("position", [0, 1, 13, 37, 38, 39, 75, 76, 77, 100])
def test_the_order_is_the_same_when_resumed_at_any_sample(position: int) -> None:
    whole = identity(make_order().stretch(0, 140))
    assert identity(make_order().stretch(position, 140)) == whole[position:]


@pytest.mark.parametrize("world_size", [1, 2, 3, 20])
def test_the_ranks_together_see_the_step_once_in_equal_shares(world_size: int) -> None:
    for step in range(12):
        samples = make_order().stretch(step * 16, (step + 1) * 16)
        shares = [rank_share(samples, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert [entry for share in shares for entry in identity(share)] == identity(samples)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 5), (2, 3), (3, 2), (3, 16), (20, 2)])
def test_padding_gives_every_rank_the_same_full_micro_batches(world_size: int, micro_batch_size: int) -> None:
    samples = make_order().stretch(32, 48)
    per_rank = [
        micro_batches(samples, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size)
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in per_rank}) == 1
    assert {len(batch) for batches in per_rank for batch, _ in batches} == {micro_batch_size}
    weighted = [
        entry
        for batches in per_rank
        for batch, weight in batches
        for entry, one in zip(identity(batch), weight, strict=True)
        if one
    ]
    assert weighted == identity(samples)


def test_evaluation_tiles_without_phase_and_its_subset_is_fixed() -> None:
    runs = run_table()
    everything = tiled(runs, fingerprint="set", limit=None)
    assert len(everything) == runs.num_samples
    assert set((everything.first_frame % WINDOW).tolist()) == {0}
    assert everything.seed.min() >= 0
    assert len(set(everything.seed.tolist())) == runs.num_samples
    subset = identity(tiled(runs, fingerprint="set", limit=9))
    assert len(subset) == 9
    assert set(subset) <= set(identity(everything))
    assert subset == identity(tiled(runs, fingerprint="set", limit=9))
    assert set(subset) < set(identity(tiled(runs, fingerprint="set", limit=10)))


def test_a_substitute_depends_on_the_sample_alone_and_is_a_real_window() -> None:
    runs = run_table(num_frames=(16, 3))
    drawn = [substitute(runs, seed, attempt) for seed in range(50) for attempt in range(3)]
    assert drawn == [substitute(runs, seed, attempt) for seed in range(50) for attempt in range(3)]
    assert all(run % 2 == 0 and first % WINDOW == 0 and first + WINDOW <= 16 for run, first in drawn)
    assert len(set(drawn)) > 15
