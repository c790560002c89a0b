"""The `data` section of a run's YAML: how samples are drawn. What a sample is, each part says itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from configs.parse import FREE
from data_sharding.splits import ReadingSplit


@dataclass
class DataConfig:
    """How a run reads its shard sets."""

    batch_size: int  # G: samples of one step over all ranks
    micro_batch_size: int  # samples of one forward pass on one rank
    seed: int  # of order, window phases and whatever else a sample's number decides
    shuffle_shards: int  # shards mixed with one another at a time
    num_workers: int = field(metadata=FREE)  # loader processes of a rank; 0 reads in a thread
    prefetch: int = field(metadata=FREE)  # batches prepared ahead, by each process or by the thread
    reader: Literal["indexed", "stream"]
    max_bad_fraction: float  # damaged samples, as a share of a split, before the run stops
    cache_folder: str | None = field(metadata=FREE)  # of every node, for whole shards; null reads from the store
    cache_bytes: int = field(metadata=FREE)  # what it may hold; not used where a shuffle block does not fit
    split: ReadingSplit  # who is trained on, validated on and tested
