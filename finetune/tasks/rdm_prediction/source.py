"""Batches of images, as features or as an encoder reads them, drawn from memory in the order that all sets share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from data_sharding.hashing import hash_names
from data_sharding.read.config import DataConfig
from data_sharding.read.order import RunTable, Samples
from data_sharding.splits import SPLITS
from finetune.tasks.rdm_prediction.pairs import Pairs


@dataclass
class ImageBatch:
    """Images of one split; all their pairs in it are what is learned or scored."""

    inputs: Shaped[Tensor, "batch ..."]  # features [batch, feature], or uint8 images [batch, y, x, colour]
    row: Int[Tensor, "batch"]  # of the set
    split: Int[Tensor, "batch"]  # by its number among SPLITS
    weight: Float[Tensor, "batch"]  # 0 marks padding
    sample_seed: Int[Tensor, "batch"]
    scan_ids: list[str]  # the images' names
    first_frame: list[int]

    def to(self, device: torch.device) -> ImageBatch:
        """The batch on a device."""
        moved = {name: getattr(self, name).to(device) for name in ("inputs", "row", "split", "weight", "sample_seed")}
        return dataclasses.replace(self, **moved)


@dataclass
class Taken:
    """Inputs of a batch; nothing in memory is damaged."""

    inputs: Shaped[Tensor, "batch ..."]
    damaged: dict[int, str] = field(default_factory=dict)


@dataclass
class InMemory:
    """What a source draws from: the inputs of all images of a set."""

    pairs: Pairs
    inputs: Shaped[np.ndarray, "image ..."]
    has_substitutes: bool = False
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        self.fingerprint = self.pairs.stimuli.fingerprint

    def names(self, split: str) -> list[str]:
        return [self.pairs.stimuli.names[row] for row in self.pairs.images(split)]

    def runs(self, split: str) -> RunTable:
        names = self.names(split)
        ones = np.ones(len(names), dtype=np.int64)
        return RunTable(hash_names(names), shard=0 * ones, num_frames=ones, window_frames=1)

    def fetcher(self, config: DataConfig) -> InMemory:
        return self

    def fresh(self) -> InMemory:
        return self

    def close(self) -> None: ...

    def reads(self, split: str, samples: Samples) -> np.ndarray:
        return self.pairs.images(split)[samples.run]

    def fetch(self, rows: np.ndarray) -> Taken:
        return Taken(torch.from_numpy(self.inputs[rows]))

    def batch(self, split: str, samples: Samples, weight: np.ndarray, fetched: Taken) -> ImageBatch:
        rows = self.reads(split, samples)
        return ImageBatch(
            inputs=fetched.inputs,
            row=torch.from_numpy(rows),
            split=torch.full((len(rows),), SPLITS.index(split)),
            weight=torch.from_numpy(weight),
            sample_seed=torch.from_numpy(samples.seed),
            scan_ids=[self.pairs.stimuli.names[row] for row in rows],
            first_frame=samples.first_frame.tolist(),
        )
