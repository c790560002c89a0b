"""One line that gives any training loop the samples of a shard set, as a torch IterableDataset.

    loader = DataLoader(open_shards("s3://brains/adhd", kind="bold", window_frames=20), batch_size=8, num_workers=4)

Promise: every sample once per epoch over all workers, in an order that only the set, the seed and the epoch decide.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed
from torch.utils.data import IterableDataset, get_worker_info

from data_sharding.errors import ShardError
from data_sharding.read.batch import ResponseBatch
from data_sharding.read.config import DataConfig
from data_sharding.read.order import SampleOrder, Samples
from data_sharding.read.reader import Drawn
from data_sharding.read.shard_set import Kind, open_set
from data_sharding.read.windows import Responses, Windows
from data_sharding.splits import AS_WRITTEN, ReadingSplit

SHUFFLED_SHARDS = 16  # mixed with one another at a time
SAMPLES_AT_ONCE = 1024  # of the order


def open_shards(
    location: str,
    *,
    kind: Kind,
    window_frames: int = 1,
    split: str = "train",
    splits: ReadingSplit | None = None,
    seed: int = 0,
    pads_short_runs: bool = False,
) -> ShardDataset:
    """The samples of a split as a shuffled torch IterableDataset; ShardError when there is no such set, or no such
    sample in it.

    A sample is a dict: float32 `values` [time, voxel] (region series: [time, region]), 0.0 where not measured;
    `is_measured` [voxel]; `is_frame` [time], False in padding; `repetition_time_s`, `subject`, `scan_id` and
    `first_frame`. Responses have uint8 `image` [y, x, rgb], `betas` and `is_measured` [vertex] and `stimulus` instead.
    Call `set_epoch` before every epoch. After torch.distributed is initialised each rank gets its share, equally many
    samples on every rank: an epoch leaves out what does not divide. `splits` replaces the set's own splits.
    """
    return ShardDataset(
        {"location": location, "split": splits},
        {"kind": kind, "window_frames": window_frames, "pads_short_runs": pads_short_runs},
        split=split,
        seed=seed,
    )


class ShardDataset(IterableDataset[dict[str, Any]]):
    """What `open_shards` returns; each DataLoader worker opens the set for itself."""

    def __init__(self, where: dict[str, Any], what: dict[str, Any], *, split: str, seed: int) -> None:
        self.where = where  # arguments of open_set
        self.what = what  # arguments of Windows
        self.split = split
        self.seed = seed
        is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank() if is_distributed else 0
        self.world_size = torch.distributed.get_world_size() if is_distributed else 1
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # seen by workers that outlive an epoch
        self._num_samples = self._drawn().runs(split).num_samples // self.world_size

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order and the window phases of the next pass."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return self._num_samples

    def __iter__(self) -> Iterator[dict[str, Any]]:
        drawn, worker = self._drawn(), get_worker_info()
        fetcher = drawn.fetcher(_data_config(self.seed))
        order = SampleOrder(
            drawn.runs(self.split), fingerprint=drawn.fingerprint, seed=self.seed, shuffle_shards=SHUFFLED_SHARDS
        )
        with contextlib.closing(fetcher):
            for samples in self._share(order, 0 if worker is None else worker.id, worker.num_workers if worker else 1):
                fetched = fetcher.fetch(drawn.reads(self.split, samples))
                if fetched.damaged:
                    raise ShardError(fetched.damaged[0])
                yield _sample(drawn.batch(self.split, samples, torch.ones(1).numpy(), fetched))

    def _drawn(self) -> Drawn:
        shard_set = open_set(**self.where)
        drawn: Drawn = Responses(shard_set) if self.what["kind"] == "response" else Windows(shard_set, **self.what)
        drawn.names(self.split)  # refuses a split without samples
        return drawn

    def _share(self, order: SampleOrder, worker: int, num_workers: int) -> Iterator[Samples]:
        """The samples of one worker of this rank, one by one: every num_workers-th of the rank's."""
        first = int(self._epoch) * order.runs.num_samples + self.rank * self._num_samples
        for start in range(0, self._num_samples, SAMPLES_AT_ONCE):
            stop = min(start + SAMPLES_AT_ONCE, self._num_samples)
            samples = order.stretch(first + start, first + stop)
            for number in range((worker - start) % num_workers, len(samples), num_workers):
                yield samples[number : number + 1]


def _data_config(seed: int) -> DataConfig:
    return DataConfig(
        batch_size=1,
        micro_batch_size=1,
        seed=seed,
        shuffle_shards=SHUFFLED_SHARDS,
        num_workers=0,
        prefetch=1,
        reader="indexed",
        max_bad_fraction=0.0,
        cache_folder=None,
        cache_bytes=0,
        split=AS_WRITTEN,
    )


def _sample(batch: Any) -> dict[str, Any]:
    sample = {"subject": batch.subjects[0], "scan_id": batch.scan_ids[0], "is_measured": batch.is_measured[0]}
    if isinstance(batch, ResponseBatch):
        return sample | {"image": batch.image[0], "betas": batch.betas[0], "stimulus": batch.stimuli[0]}
    return sample | {
        "values": batch.values[0],
        "is_frame": batch.is_frame[0],
        "repetition_time_s": float(batch.repetition_time_s[0]),
        "first_frame": batch.first_frame[0],
    }
