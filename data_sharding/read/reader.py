"""Shards -> batches, exactly resumable on any number of ranks and loader processes.

The rank process holds the index and says what to read; loader processes read. Needs no NIfTI library.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from data_sharding.errors import ShardError
from data_sharding.read.addresses import AddressBook
from data_sharding.read.batch import Batch, StoredBatch
from data_sharding.read.digest import NOTHING_TAKEN, added, digest_of
from data_sharding.read.fetch import Fetched, Fetcher, FetchSettings, WindowRead
from data_sharding.read.file_cache import CacheSettings
from data_sharding.read.loading import fetched_in_order
from data_sharding.read.order import SampleOrder, Samples, micro_batches, substitute, tiled
from data_sharding.read.shard_set import ShardSet, open_set

__all__ = ["Batch", "BatchSource", "DataConfig", "DataState", "ReaderConfig", "ShardSet", "open_set"]

MAX_SUBSTITUTES = 16  # damaged samples in a row before the set itself is called damaged


@dataclass
class DataConfig:
    """The data: section of a run's YAML, how samples are drawn; what a sample is, each part says itself."""

    batch_size: int  # G: samples of one step over all ranks
    micro_batch_size: int  # samples of one forward pass on one rank
    seed: int  # of order, window phases and whatever else a sample's number decides
    shuffle_shards: int  # shards mixed with one another at a time
    num_workers: int  # loader processes of a rank
    prefetch: int  # batches a loader process prepares ahead
    reader: Literal["indexed", "stream"]
    max_bad_fraction: float  # samples that may fail to read before the run stops
    cache_folder: str | None  # of every node: keeps whole shards there; null reads each window from the store
    cache_bytes: int  # what it may hold; not used where a shuffle block does not fit


@dataclass
class ReaderConfig:
    """How training draws from a set."""

    kind: Literal["bold", "t1"]
    split: str
    window_frames: int  # 1 for T1
    batch_size: int  # G: samples of one step over all ranks
    micro_batch_size: int  # samples of one Batch
    shuffle_shards: int
    seed: int
    num_workers: int  # loader processes of this rank; 0 reads in a thread
    prefetch: int  # batches prepared ahead, by each process or by the thread
    reader: Literal["indexed", "stream"]
    max_bad_fraction: float  # damaged samples, as a share of an epoch, before the run stops
    cache_folder: str | None = None  # of this node; keeps whole shards there, which changes no sample
    cache_bytes: int = 0

    @classmethod
    def for_training(cls, data: DataConfig, *, kind: Literal["bold", "t1"], window_frames: int) -> ReaderConfig:
        """What a run's YAML says, for samples of this kind and length; steps come from the train split only."""
        return cls(kind=kind, split="train", window_frames=window_frames, **dataclasses.asdict(data))


@dataclass
class DataState:
    """Where a source goes on."""

    fingerprint: str
    seed: int
    samples_consumed: int
    samples_digest: str  # of what was read for them, 64 bits in hexadecimal; the ranks' add up to the run's
    quarantine: list[str]  # damaged samples met so far, as scan_id:slot

    def to_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> DataState:
        if "samples_digest" not in raw:
            raise ShardError(
                "the saved position has no samples_digest: older code wrote it; finish that run with the code that "
                "began it, or start a new run from its registered weights (train.start.registered)"
            )
        return cls(**raw)


def cache_settings(shard_set: ShardSet, config: ReaderConfig) -> CacheSettings | None:
    """The node's cache, where one is configured and holds a shuffle block; else each shard would be fetched for every
    few samples, so it is left out and that is said."""
    if config.cache_folder is None or config.reader == "stream":
        return None
    largest = sorted((shard.bytes for shard in shard_set.manifest.shards), reverse=True)
    block_bytes = sum(largest[: config.shuffle_shards])
    if block_bytes <= config.cache_bytes:
        return CacheSettings(config.cache_folder, config.cache_bytes)
    warnings.warn(
        f"the shard cache is not used: a shuffle block of {config.shuffle_shards} shards has {block_bytes} bytes, "
        f"cache_bytes is {config.cache_bytes}; raise it, or lower shuffle_shards",
        stacklevel=2,
    )
    return None


class BatchSource:
    """One rank's view of a set: endless training steps, and evaluation of any split."""

    def __init__(self, shard_set: ShardSet, config: ReaderConfig, *, rank: int, world_size: int) -> None:
        self.shard_set = shard_set
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self.fingerprint = shard_set.fingerprint
        self.quarantine: dict[str, str] = {}  # sample -> reason
        self._books: dict[str, AddressBook] = {}
        cache = cache_settings(shard_set, config)
        self.settings = FetchSettings(
            location=shard_set.location,
            frame_type=shard_set.frame_type(config.kind),
            num_voxels=shard_set.space.num_voxels,
            window_frames=config.window_frames,
            reader=config.reader,
            num_kept_shards=config.shuffle_shards,
            cache=cache,
            shards=shard_set.cached_shards if cache else {},
        )
        self._substitutes = Fetcher(self.settings)

    @property
    def num_micro_batches(self) -> int:
        """Batches of this rank in every step, the same on all ranks."""
        largest_share = -(-self.config.batch_size // self.world_size)
        return -(-largest_share // self.config.micro_batch_size)

    @property
    def num_samples_per_epoch(self) -> int:
        return self.book(self.config.split).runs.num_samples

    def initial_state(self) -> dict[str, object]:
        return DataState(self.fingerprint, self.config.seed, 0, NOTHING_TAKEN, []).to_dict()

    def steps(self, state: Mapping[str, object]) -> Iterator[tuple[list[Batch], dict[str, object]]]:
        """Endless: this rank's batches of one global step, and the state to go on from after it."""
        start = self._checked(self.own_part(state))
        book = self.book(self.config.split)
        order = SampleOrder(
            book.runs,
            fingerprint=self.fingerprint,
            seed=self.config.seed,
            shuffle_shards=self.config.shuffle_shards,
        )
        parts = self._training_parts(order, start.samples_consumed)
        batches = self._batches(book, parts, num_workers=self.config.num_workers)
        consumed, digest = start.samples_consumed, start.samples_digest
        while True:
            step = [next(batches) for _ in range(self.num_micro_batches)]
            digest = added([digest, digest_of(step, position=consumed)])
            consumed += self.config.batch_size
            after = DataState(self.fingerprint, self.config.seed, consumed, digest, sorted(self.quarantine))
            yield step, after.to_dict()

    def evaluation(self, split: str, *, limit: int | None, is_dealt_out: bool = False) -> Iterator[Batch]:
        """This rank's share of a split, tiled without phase; `limit` keeps a fixed hashed subset of that size.

        All ranks get equally many batches, padded with weight 0; a damaged sample has weight 0 too. Dealt out, every
        rank sees some windows of every run.
        """
        book = self.book(split)
        samples = tiled(book.runs, fingerprint=self.fingerprint, limit=limit)
        parts = micro_batches(
            samples,
            rank=self.rank,
            world_size=self.world_size,
            micro_batch_size=self.config.micro_batch_size,
            is_dealt_out=is_dealt_out,
        )
        # In a thread: starting loader processes for each evaluation would take longer than most evaluations.
        yield from self._batches(book, iter(parts), num_workers=0)

    def merge_states(self, states: list[Mapping[str, object]]) -> dict[str, object]:
        """The one state to store, from all ranks' states after the same step."""
        parts = [DataState.from_dict(state) for state in states]
        assert len({part.samples_consumed for part in parts}) == 1, "states of different steps"
        merged = sorted({sample for part in parts for sample in part.quarantine})
        if merged:  # each rank has counted its own
            self._check_tolerance(merged, self.book(self.config.split))
        digest = added([part.samples_digest for part in parts])
        return dataclasses.replace(parts[0], samples_digest=digest, quarantine=merged).to_dict()

    def own_part(self, state: Mapping[str, object]) -> dict[str, object]:
        """A stored state as this rank goes on from it: rank 0 alone keeps the digest, so that the ranks' add up."""
        whole = DataState.from_dict(state)
        return (whole if self.rank == 0 else dataclasses.replace(whole, samples_digest=NOTHING_TAKEN)).to_dict()

    def close(self) -> None:
        self._substitutes.close()

    def book(self, split: str) -> AddressBook:
        """Where the windows of a split lie."""
        if split not in self._books:
            self._books[split] = AddressBook.of(
                self.shard_set, kind=self.config.kind, split=split, window_frames=self.config.window_frames
            )
        return self._books[split]

    def _checked(self, raw: Mapping[str, object]) -> DataState:
        state = DataState.from_dict(raw)
        for name, theirs, ours in (
            ("shard set", state.fingerprint, self.fingerprint),
            ("seed", state.seed, self.config.seed),
        ):
            if theirs != ours:
                raise ShardError(
                    f"the saved position belongs to {name} {theirs}, this source reads {ours}; resume with the same "
                    "set and seed, or start a new run"
                )
        self.quarantine = dict.fromkeys(state.quarantine, "met before")
        return state

    def _training_parts(self, order: SampleOrder, position: int) -> Iterator[tuple[Samples, np.ndarray]]:
        while True:
            samples = order.stretch(position, position + self.config.batch_size)
            yield from micro_batches(
                samples, rank=self.rank, world_size=self.world_size, micro_batch_size=self.config.micro_batch_size
            )
            position += self.config.batch_size

    def _batches(
        self, book: AddressBook, parts: Iterator[tuple[Samples, np.ndarray]], *, num_workers: int
    ) -> Iterator[Batch]:
        asked: deque[tuple[Samples, np.ndarray]] = deque()

        def reads() -> Iterator[list[WindowRead]]:
            for samples, weight in parts:
                asked.append((samples, weight))
                yield [book.window(run, first) for run, first in zip(samples.run, samples.first_frame, strict=True)]

        fetcher = Fetcher(
            self.settings
        )  # its own: training reads ahead in its thread while evaluation reads in another
        ahead = fetched_in_order(fetcher, reads(), num_workers=num_workers, prefetch=self.config.prefetch)
        with contextlib.closing(fetcher), contextlib.closing(ahead):
            for fetched in ahead:
                samples, weight = asked.popleft()
                yield self._batch(book, samples, weight, fetched)

    def _batch(self, book: AddressBook, samples: Samples, weight: np.ndarray, fetched: Fetched) -> StoredBatch:
        run, first_frame = samples.run.copy(), samples.first_frame.copy()
        for row, reason in fetched.failures:
            self._quarantine(book.label(run[row], samples.slot[row]), reason, book)
            run[row], first_frame[row] = self._put_substitute(book, samples.seed[row], row, fetched)
            if samples.epoch[row] < 0:
                weight[row] = 0  # a substitute would count twice in a metric
        return StoredBatch(
            stored=fetched.stored,
            repetition_time_s=torch.from_numpy(book.repetition_time_s[run]),
            weight=torch.from_numpy(weight),
            sample_seed=torch.from_numpy(samples.seed),
            scan_ids=[book.scan_ids[number] for number in run],
            subjects=[book.subjects[number] for number in run],
            first_frame=first_frame.tolist(),
        )

    def _quarantine(self, sample: str, reason: str, book: AddressBook) -> None:
        if sample not in self.quarantine:
            self.quarantine[sample] = reason
            self._check_tolerance(self.quarantine, book, last=f"; last: {reason}")

    def _check_tolerance(self, quarantine: Iterable[str], book: AddressBook, *, last: str = "") -> None:
        """ShardError when more samples of the book's split are damaged than are tolerated."""
        scan_ids = set(book.scan_ids)
        num_damaged = sum(sample.rpartition(":")[0] in scan_ids for sample in quarantine)
        if num_damaged > self.config.max_bad_fraction * book.runs.num_samples:
            raise ShardError(
                f"{num_damaged} damaged samples, more than max_bad_fraction={self.config.max_bad_fraction} of "
                f"{book.runs.num_samples}{last}"
            )

    def _put_substitute(self, book: AddressBook, seed: int, row: int, fetched: Fetched) -> tuple[int, int]:
        for attempt in range(MAX_SUBSTITUTES):
            run, first = substitute(book.runs, int(seed), attempt)
            found = self._substitutes.fetch([book.window(run, first)])
            if not found.failures:
                fetched.stored[row] = found.stored[0]
                return run, first
        raise ShardError(
            f"{self.shard_set.location}: {MAX_SUBSTITUTES} samples in a row are damaged; last: {found.failures[0][1]}"
        )
