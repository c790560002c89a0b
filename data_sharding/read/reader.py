"""Shards -> batches, exactly resumable on any number of ranks and loader processes.

The rank process holds the index and says what to read; loader processes read. Needs no NIfTI library.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from data_sharding.errors import ShardError
from data_sharding.hashing import hash_name
from data_sharding.read.batch import AnyBatch, WindowBatch
from data_sharding.read.config import DataConfig
from data_sharding.read.loading import fetched_in_order
from data_sharding.read.order import RunTable, SampleOrder, Samples, micro_batches, substitute, tiled
from data_sharding.read.shard_set import ShardSet, open_set
from data_sharding.read.windows import Windows

__all__ = ["BatchSource", "DataConfig", "DataState", "ShardSet", "WindowBatch", "Windows", "open_set"]

MAX_SUBSTITUTES = 16  # damaged samples in a row before the set itself is called damaged
NOTHING_TAKEN = f"{0:016x}"


@dataclass
class DataState:
    """Where a source resumes."""

    fingerprint: str
    seed: int
    samples_consumed: int
    samples_digest: str  # of what was read for them, 64 bits in hexadecimal; the ranks' digests add up to the run's
    quarantine: list[str]  # damaged samples met so far, as <scan_id>:<slot>


class Drawn(Protocol):
    """What a source draws its samples from: Windows, Responses or Pairs."""

    fingerprint: str
    has_substitutes: bool  # else a damaged sample keeps its row, with weight 0

    def runs(self, split: str) -> RunTable: ...

    def names(self, split: str) -> list[str]: ...

    def fetcher(self, config: DataConfig) -> Any: ...

    def reads(self, split: str, samples: Samples) -> Any: ...

    def batch(self, split: str, samples: Samples, weight: np.ndarray, fetched: Any) -> Any: ...


class BatchSource:
    """One rank's view of a set, or of paired ones: endless training steps, and evaluation of any split.

    Epochs run on, so that all steps are equally large and one may hold a sample twice; with `cuts_epochs` a step ends
    with its epoch and holds what is left of it.
    """

    def __init__(
        self, drawn: Drawn, config: DataConfig, *, rank: int, world_size: int, cuts_epochs: bool = False
    ) -> None:
        self.drawn = drawn
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self.cuts_epochs = cuts_epochs
        self.fingerprint = drawn.fingerprint
        self.quarantine: dict[str, str] = {}  # sample -> reason
        self._fetcher = drawn.fetcher(config)  # of substitutes

    @property
    def num_micro_batches(self) -> int:
        """Batches of this rank in every step, the same on all ranks."""
        largest_share = -(-self.config.batch_size // self.world_size)
        return -(-largest_share // self.config.micro_batch_size)

    def initial_state(self) -> dict[str, object]:
        return dataclasses.asdict(DataState(self.fingerprint, self.config.seed, 0, NOTHING_TAKEN, []))

    def steps(self, state: Mapping[str, Any]) -> Iterator[tuple[list[Any], dict[str, object]]]:
        """Endless: this rank's batches of one global step of the train split, and the state to resume from after it."""
        start = self._checked(self.state_of_rank(state))
        self.drawn.names("train")  # refuses a split without samples
        order = SampleOrder(
            self.drawn.runs("train"),
            fingerprint=self.fingerprint,
            seed=self.config.seed,
            shuffle_shards=self.config.shuffle_shards,
        )
        training = self._training_batches(order, start.samples_consumed)
        batches = self._batches("train", training, num_workers=self.config.num_workers)
        consumed, digest = start.samples_consumed, start.samples_digest
        while True:
            step = [next(batches) for _ in range(self.num_micro_batches)]
            digest = sum_of_digests([digest, digest_of(step, position=consumed)])
            consumed = self._end_of_step(consumed, order.runs.num_samples)
            after = DataState(self.fingerprint, self.config.seed, consumed, digest, sorted(self.quarantine))
            yield step, dataclasses.asdict(after)

    def evaluation(self, split: str, *, limit: int | None, is_dealt_out: bool = False) -> Iterator[Any]:
        """This rank's share of a split, tiled without phase; `limit` keeps a fixed hashed subset of that size.

        All ranks get equally many batches, padded with weight 0; a damaged sample has weight 0 too. Dealt out, every
        rank sees some windows of every run.
        """
        self.drawn.names(split)  # refuses a split without samples
        samples = tiled(self.drawn.runs(split), fingerprint=self.fingerprint, limit=limit)
        shares = micro_batches(
            samples,
            rank=self.rank,
            world_size=self.world_size,
            micro_batch_size=self.config.micro_batch_size,
            is_dealt_out=is_dealt_out,
        )
        # In a thread: starting loader processes for each evaluation would take longer than most evaluations.
        yield from self._batches(split, iter(shares), num_workers=0)

    def merge_states(self, states: list[Mapping[str, Any]]) -> dict[str, object]:
        """The one state to store, from all ranks' states after the same step."""
        of_ranks = [DataState(**state) for state in states]
        assert len({state.samples_consumed for state in of_ranks}) == 1, "states of different steps"
        merged = sorted({sample for state in of_ranks for sample in state.quarantine})
        if merged:  # each rank has counted its own
            self._check_tolerance(merged, "train")
        digest = sum_of_digests([state.samples_digest for state in of_ranks])
        return dataclasses.asdict(of_ranks[0]) | {"samples_digest": digest, "quarantine": merged}

    def state_of_rank(self, state: Mapping[str, Any]) -> dict[str, object]:
        """The stored state for this rank to resume from: rank 0 alone keeps the digest, so that the ranks' digests add
        up to it."""
        return dict(state) if self.rank == 0 else {**state, "samples_digest": NOTHING_TAKEN}

    def close(self) -> None:
        self._fetcher.close()

    def _checked(self, raw: Mapping[str, Any]) -> DataState:
        state = DataState(**raw)
        for name, theirs, ours in (
            ("shard set", state.fingerprint, self.fingerprint),
            ("seed", state.seed, self.config.seed),
        ):
            if theirs != ours:
                raise ShardError(
                    f"the saved position belongs to {name} {theirs}, this source reads {ours}; resume with the same "
                    "set, splits and seed, or start a new run"
                )
        self.quarantine = dict.fromkeys(state.quarantine, "met before")
        return state

    def _training_batches(self, order: SampleOrder, position: int) -> Iterator[tuple[Samples, np.ndarray]]:
        while True:
            end = self._end_of_step(position, order.runs.num_samples)
            yield from micro_batches(
                order.stretch(position, end),
                rank=self.rank,
                world_size=self.world_size,
                micro_batch_size=self.config.micro_batch_size,
                num_batches=self.num_micro_batches,
            )
            position = end

    def _end_of_step(self, position: int, epoch_samples: int) -> int:
        end = position + self.config.batch_size
        return min(end, (position // epoch_samples + 1) * epoch_samples) if self.cuts_epochs else end

    def _batches(self, split: str, chosen: Iterator[tuple[Samples, np.ndarray]], *, num_workers: int) -> Iterator[Any]:
        requested: deque[tuple[Samples, np.ndarray]] = deque()

        def reads() -> Iterator[Any]:
            for samples, weight in chosen:
                requested.append((samples, weight))
                yield self.drawn.reads(split, samples)

        fetcher = self._fetcher.fresh()  # training reads ahead in its thread while evaluation reads in another
        ahead = fetched_in_order(fetcher, reads(), num_workers=num_workers, prefetch=self.config.prefetch)
        with contextlib.closing(fetcher), contextlib.closing(ahead):
            for fetched in ahead:
                samples, weight = requested.popleft()
                yield self._batch(split, samples, weight, fetched)

    def _batch(self, split: str, samples: Samples, weight: np.ndarray, fetched: Any) -> Any:
        run, first_frame = samples.run.copy(), samples.first_frame.copy()
        for row, reason in fetched.damaged.items():
            self._quarantine(f"{self.drawn.names(split)[run[row]]}:{samples.slot[row]}", reason, split)
            if self.drawn.has_substitutes:
                run[row], first_frame[row] = self._put_substitute(split, samples, row, fetched)
            if samples.epoch[row] < 0 or not self.drawn.has_substitutes:
                weight[row] = 0  # in a metric a substitute would count twice
        return self.drawn.batch(split, dataclasses.replace(samples, run=run, first_frame=first_frame), weight, fetched)

    def _quarantine(self, sample: str, reason: str, split: str) -> None:
        if sample not in self.quarantine:
            self.quarantine[sample] = reason
            self._check_tolerance(self.quarantine, split, last=f"; last: {reason}")

    def _check_tolerance(self, quarantine: Iterable[str], split: str, *, last: str = "") -> None:
        """ShardError when more samples of a split are damaged than are tolerated."""
        names, num_samples = set(self.drawn.names(split)), self.drawn.runs(split).num_samples
        num_damaged = sum(sample.rpartition(":")[0] in names for sample in quarantine)
        if num_damaged > self.config.max_bad_fraction * num_samples:
            raise ShardError(
                f"{num_damaged} damaged samples, more than max_bad_fraction={self.config.max_bad_fraction} of "
                f"{num_samples}{last}"
            )

    def _put_substitute(self, split: str, samples: Samples, row: int, fetched: Any) -> tuple[int, int]:
        """Reads another sample into a damaged row: its run and first frame."""
        for attempt in range(MAX_SUBSTITUTES):
            run, first = substitute(self.drawn.runs(split), int(samples.seed[row]), attempt)
            other = dataclasses.replace(samples[row : row + 1], run=np.array([run]), first_frame=np.array([first]))
            read = self._fetcher.fetch(self.drawn.reads(split, other))
            if not read.damaged:
                fetched.put(row, read)
                return run, first
        raise ShardError(f"{MAX_SUBSTITUTES} samples in a row are damaged; last: {read.damaged[0]}")


def digest_of(batches: Iterable[AnyBatch], *, position: int) -> str:
    """The sum of a hash of every sample that counts: its scan, first frame, seed, and the step's `position`."""
    rows = [
        (scan_id, first_frame, seed)
        for batch in batches
        for scan_id, first_frame, seed, weight in zip(
            batch.scan_ids, batch.first_frame, batch.sample_seed.tolist(), batch.weight.tolist(), strict=True
        )
        if weight > 0
    ]
    return sum_of_digests(f"{hash_name(position, *row):016x}" for row in rows)


def sum_of_digests(digests: Iterable[str]) -> str:
    """The digest of all samples of these digests together."""
    return f"{sum(int(digest, 16) for digest in digests) % 2**64:016x}"
