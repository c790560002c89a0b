"""Which pairs of images belong to which split, and how dissimilar they truly are.

Promise: a pair exists only inside a split of images. `leaky_pairs` breaks that on purpose, to show what it does: pairs
of all images are dealt out, so most images of a tested pair have been trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from data_sharding.splits import SPLITS
from finetune.tasks.rdm_prediction.dissimilarity import Measure, block, comparable, upper_triangle
from finetune.tasks.rdm_prediction.metrics import RdmScores
from finetune.tasks.rdm_prediction.stimuli import Stimuli

SplitBy = Literal["images", "leaky_pairs"]
UNUSED = -1


def num_pairs(num_images: int) -> int:
    """How many pairs so many images have."""
    return num_images * (num_images - 1) // 2


@dataclass
class Pairs:
    """The pairs of a set. `dealt` [image, image] is None where a pair is in a split because both its images are, else
    the number of every pair's split, UNUSED for most."""

    stimuli: Stimuli
    measure: Measure
    dealt: np.ndarray | None

    def images(self, split: str) -> np.ndarray:
        """The numbers of the images that have pairs in a split."""
        return self.stimuli.rows(*([split] if self.dealt is None else SPLITS))

    def are_in(self, rows: Int64[np.ndarray, "image"], split: str) -> Bool[np.ndarray, "image image"]:
        """True above the diagonal where both images are in the split, or the pair was dealt to it."""
        if self.dealt is not None:
            return (self.dealt[np.ix_(rows, rows)] == SPLITS.index(split)) & upper_triangle(len(rows))
        is_inside = np.isin(rows, self.stimuli.rows(split))
        return upper_triangle(len(rows)) & is_inside[:, None] & is_inside

    def true(self, rows: Int64[np.ndarray, "image"]) -> Float[Tensor, "image image"]:
        """The dissimilarities of a few images, such as those of a step."""
        if self.stimuli.patterns is None:
            assert self.stimuli.matrix is not None
            return torch.from_numpy(self.stimuli.matrix[np.ix_(rows, rows)])
        patterns = comparable(torch.from_numpy(self.stimuli.patterns[rows]), self.measure)
        return block(patterns, patterns, self.measure)

    def scores(
        self, rows: Int64[np.ndarray, "image"], split: str, predicted: Float[np.ndarray, "image image"]
    ) -> RdmScores:
        """Predictions for these images, beside the truth."""
        names = tuple(self.stimuli.names[row] for row in rows)
        return RdmScores(names, predicted, self.stimuli.true_rdm(rows, self.measure), self.are_in(rows, split))


def make_pairs(stimuli: Stimuli, measure: Measure, split_by: SplitBy, *, seed: int) -> Pairs:
    """The pairs of a set. Leaky splits have as many pairs as honest ones, drawn from those of all images."""
    if split_by == "images":
        return Pairs(stimuli, measure, None)
    used, num_images = stimuli.rows(*SPLITS), len(stimuli.names)
    order = np.random.default_rng(seed).permutation(num_pairs(len(used)))
    of_pairs = np.full(len(order), UNUSED, dtype=np.int8)
    start = 0
    for number, split in enumerate(SPLITS):
        stop = start + num_pairs(len(stimuli.rows(split)))
        of_pairs[order[start:stop]] = number
        start = stop
    first, second = (used[each] for each in np.triu_indices(len(used), k=1))
    dealt = np.full((num_images, num_images), UNUSED, dtype=np.int8)
    dealt[first, second] = dealt[second, first] = of_pairs
    return Pairs(stimuli, measure, dealt)
