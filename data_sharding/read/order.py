"""Which sample comes when: pure functions of (set fingerprint, seed, epoch), computed one shuffle block at a time.

Knows nothing about bytes, files or models. A sample is (run, slot); a T1 is a run of one slot.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from data_sharding.hashing import hash_name, mix
from data_sharding.read.censored import CensoredRuns


@dataclass(frozen=True)
class RunTable:
    """What the order needs of every run, in the index's order of scan_id."""

    scan_hash: np.ndarray  # uint64 [run]
    shard: np.ndarray  # int64 [run]
    num_frames: np.ndarray  # int64 [run]
    window_frames: int
    censored: CensoredRuns = field(default_factory=CensoredRuns.none)
    pads_short_runs: bool = False

    @cached_property
    def num_slots(self) -> np.ndarray:
        """int64 [run], floor(frames / window), less where windows are censored. A run shorter than one window has none,
        or one that is padded."""
        return self._counts(self.censored.num_slots)

    @cached_property
    def num_tiled(self) -> np.ndarray:
        """int64 [run]: the windows that may be drawn when the first starts at frame 0."""
        return self._counts(self.censored.num_tiled)

    @cached_property
    def num_samples(self) -> int:
        """Samples of an epoch."""
        return int(self.num_slots.sum())

    @cached_property
    def num_padded(self) -> int:
        """Samples of an epoch that are shorter than a window, and padded."""
        return int(self.num_slots[self.num_frames < self.window_frames].sum())

    @property
    def num_whole_slots(self) -> np.ndarray:
        """int64 [run]: the slots of each run if no frame were censored."""
        counts = self.num_frames // self.window_frames
        return np.maximum(counts, np.minimum(self.num_frames, 1)) if self.pads_short_runs else counts

    def _counts(self, of_censored: np.ndarray) -> np.ndarray:
        counts = self.num_whole_slots
        counts[self.censored.run] = of_censored
        return counts


@dataclass(frozen=True)
class Samples:
    """A stretch of samples, one entry each."""

    epoch: np.ndarray  # int64 [sample]
    run: np.ndarray  # int64 [sample]
    slot: np.ndarray  # int64 [sample]
    first_frame: np.ndarray  # int64 [sample]
    seed: np.ndarray  # int64 [sample], not negative

    def __len__(self) -> int:
        return len(self.run)

    def __getitem__(self, chosen: slice | np.ndarray) -> Samples:
        return Samples(
            self.epoch[chosen], self.run[chosen], self.slot[chosen], self.first_frame[chosen], self.seed[chosen]
        )


class SampleOrder:
    """The endless order of training samples: epoch after epoch, each sample once an epoch.

    Shards are permuted and taken in blocks of `shuffle_shards`; samples are permuted inside a block. Only one block is
    in memory: the last one asked for.
    """

    def __init__(self, runs: RunTable, *, fingerprint: str, seed: int, shuffle_shards: int) -> None:
        self.runs = runs
        self.fingerprint = fingerprint
        self.seed = seed
        self.shuffle_shards = shuffle_shards
        self._epoch_blocks: tuple[int, EpochBlocks] | None = None
        self._block: tuple[tuple[int, int], Samples] | None = None

    def stretch(self, start: int, stop: int) -> Samples:
        """The samples at positions start..stop-1, counted from the beginning of training."""
        stretches: list[Samples] = []
        while start < stop:
            epoch, inside = divmod(start, self.runs.num_samples)
            number = int(np.searchsorted(self._blocks(epoch).start, inside, side="right")) - 1
            first = inside - int(self._blocks(epoch).start[number])
            stretches.append(self.block(epoch, number)[first : first + stop - start])
            start += len(stretches[-1])
        return concatenate(stretches)

    def block(self, epoch: int, number: int) -> Samples:
        """The samples of one shuffle block, in order."""
        if self._block is None or self._block[0] != (epoch, number):
            self._block = (epoch, number), self._permuted_block(epoch, number)
        return self._block[1]

    def _blocks(self, epoch: int) -> EpochBlocks:
        if self._epoch_blocks is None or self._epoch_blocks[0] != epoch:
            key = hash_name(self.fingerprint, self.seed, epoch)
            self._epoch_blocks = epoch, epoch_blocks(self.runs, key, self.shuffle_shards)
        return self._epoch_blocks[1]

    def _permuted_block(self, epoch: int, number: int) -> Samples:
        key = hash_name(self.fingerprint, self.seed, epoch)
        chosen = self._blocks(epoch).runs[number]
        run, slot = every_slot(self.runs.num_slots, chosen)
        phase = phases(self.runs, chosen, hash_name(key, "phase"))
        first_frame = first_frames(self.runs, chosen, phase, self.runs.num_slots[chosen])
        sample_hash = mix(slot, 0) ^ self.runs.scan_hash[run]
        permutation = np.argsort(mix(sample_hash, hash_name(key, "samples")), kind="stable")
        seeds = mix(sample_hash[permutation], hash_name(self.seed, epoch, "seed"))
        columns = (run[permutation], slot[permutation], first_frame[permutation])
        return Samples(np.full(len(run), epoch), *columns, (seeds >> np.uint64(1)).astype(np.int64))


@dataclass(frozen=True)
class EpochBlocks:
    """An epoch's shuffle blocks: which runs each holds, and the position in the epoch where each starts."""

    runs: list[np.ndarray]
    start: np.ndarray


def epoch_blocks(runs: RunTable, key: int, shuffle_shards: int) -> EpochBlocks:
    """The blocks of the epoch with this key."""
    shards = np.unique(runs.shard)
    rank_of_shard = np.empty(len(shards), dtype=np.int64)
    rank_of_shard[np.argsort(mix(shards, hash_name(key, "shards")), kind="stable")] = np.arange(len(shards))
    block_of_run = rank_of_shard[np.searchsorted(shards, runs.shard)] // shuffle_shards
    by_block = np.argsort(block_of_run, kind="stable")
    num_blocks = int(block_of_run.max()) + 1
    edges = np.searchsorted(block_of_run[by_block], np.arange(num_blocks + 1))
    members = [by_block[first:last] for first, last in itertools.pairwise(edges)]
    sizes = [int(runs.num_slots[member].sum()) for member in members]
    return EpochBlocks(members, np.concatenate([[0], np.cumsum(sizes[:-1])]).astype(np.int64))


def every_slot(num_slots: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(run, slot), int64 [sample] each: all slots of the chosen runs, run by run."""
    counts = num_slots[chosen]
    run = np.repeat(chosen, counts)
    slot = np.arange(len(run)) - np.repeat(np.cumsum(counts) - counts, counts)
    return run, slot


def first_frames(runs: RunTable, chosen: np.ndarray, phase: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """int64 [sample]: where the chosen runs' windows start, run by run; `phase` and `counts` of windows are by run."""
    ends = np.cumsum(counts)
    starts = np.repeat(phase, counts)
    starts += (np.arange(len(starts)) - np.repeat(ends - counts, counts)) * runs.window_frames
    for position in runs.censored.positions_in(chosen):
        own = slice(ends[position] - counts[position], ends[position])
        starts[own] = runs.censored[int(chosen[position])].starts(int(phase[position]))
    return starts


def phases(runs: RunTable, chosen: np.ndarray, key: int) -> np.ndarray:
    """int64 [run]: the frame where slot 0 of each chosen run starts, uniform over what floor(frames / window) leaves
    free."""
    num_free = np.maximum(1, runs.num_frames[chosen] - runs.num_whole_slots[chosen] * runs.window_frames + 1)
    choices = {position: runs.censored[int(chosen[position])].phases for position in runs.censored.positions_in(chosen)}
    for position, phases_left in choices.items():
        num_free[position] = max(1, len(phases_left))
    drawn = (mix(runs.scan_hash[chosen], key) % num_free.astype(np.uint64)).astype(np.int64)
    for position, phases_left in choices.items():
        drawn[position] = phases_left[drawn[position]] if len(phases_left) else 0
    return drawn


def tiled(runs: RunTable, *, fingerprint: str, limit: int | None) -> Samples:
    """Evaluation's samples: every slot with phase 0, run by run; `limit` keeps the lowest hashes."""
    run, slot = every_slot(runs.num_tiled, np.arange(len(runs.num_frames)))
    sample_hash = mix(slot, 0) ^ runs.scan_hash[run]
    if limit is not None and limit < len(run):
        kept = np.sort(np.argsort(mix(sample_hash, hash_name(fingerprint, "subset")), kind="stable")[:limit])
        run, slot, sample_hash = run[kept], slot[kept], sample_hash[kept]
    first_frame = slot * runs.window_frames
    for number in np.unique(run[runs.censored.positions_in(run)]):
        own = slice(*np.searchsorted(run, [number, number + 1]))
        first_frame[own] = runs.censored[int(number)].starts(0)[slot[own]]
    seeds = mix(sample_hash, hash_name("evaluation"))
    return Samples(np.full(len(run), -1), run, slot, first_frame, (seeds >> np.uint64(1)).astype(np.int64))


def rank_share(samples: Samples, *, rank: int, world_size: int) -> Samples:
    """This rank's samples: consecutive, and no rank has more than one sample more than another."""
    return samples[rank * len(samples) // world_size : (rank + 1) * len(samples) // world_size]


def micro_batches(
    samples: Samples,
    *,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    is_dealt_out: bool = False,
    num_batches: int | None = None,
) -> list[tuple[Samples, np.ndarray]]:
    """This rank's (samples, weight float32 [batch]) of each micro-batch: `num_batches`, or as many as needed, the same
    number on every rank, each full.

    Its share is consecutive, or dealt out: every `world_size`-th sample. Weight 0 marks padding, which repeats the
    first sample of the share (or of all samples where the share is empty).
    """
    share = samples[rank::world_size] if is_dealt_out else rank_share(samples, rank=rank, world_size=world_size)
    largest_share = -(-len(samples) // world_size)
    num_padded = (num_batches or -(-largest_share // micro_batch_size)) * micro_batch_size
    weight = (np.arange(num_padded) < len(share)).astype(np.float32)
    source = share if len(share) else samples
    padded = source[np.where(weight > 0, np.arange(num_padded), 0)]
    starts = range(0, num_padded, micro_batch_size)
    return [(padded[at : at + micro_batch_size], weight[at : at + micro_batch_size]) for at in starts]


def drawn_window(runs: RunTable, run: int, sample_seed: int) -> int:
    """The first frame of one of the run's windows, uniform over its slots, then over the phases: a function of the
    seed."""
    slot, phase = mix(np.array([0, 1]), sample_seed)
    slot = int(slot % np.uint64(runs.num_slots[run]))
    if run in runs.censored:
        grids = runs.censored[run]
        return int(grids.starts(int(grids.phases[int(phase % np.uint64(len(grids.phases)))]))[slot])
    num_free = max(1, int(runs.num_frames[run]) - int(runs.num_slots[run]) * runs.window_frames + 1)
    return int(phase % np.uint64(num_free)) + slot * runs.window_frames


def substitute(runs: RunTable, sample_seed: int, attempt: int) -> tuple[int, int]:
    """(run, first frame) to read instead of a damaged sample: a function of the sample alone."""
    drawn = mix(np.array([2 * attempt, 2 * attempt + 1]), sample_seed)
    usable = np.flatnonzero(runs.num_slots)
    run = int(usable[int(drawn[0] % np.uint64(len(usable)))])
    slot = int(drawn[1] % np.uint64(runs.num_slots[run]))
    if run not in runs.censored:
        return run, slot * runs.window_frames
    grids = runs.censored[run]
    return run, int(grids.starts(int(grids.phases[0]))[slot])


def concatenate(stretches: list[Samples]) -> Samples:
    """The stretches one after the other."""
    names = [field.name for field in dataclasses.fields(Samples)]
    return Samples(*(np.concatenate([getattr(samples, name) for samples in stretches]) for name in names))
