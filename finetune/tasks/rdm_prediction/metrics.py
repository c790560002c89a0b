"""How well a matrix of dissimilarities is predicted: numbers over all pairs of a split, resampled by image.

A pair counts for the product of its images' weights, so a resample of images is exact: ranks and concordance are those
of the weighted pairs. Knows no model and no file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata

from finetune.tasks.rdm_prediction.dissimilarity import upper_triangle
from training.statistics import Metric

BLOCK = 1 << 22  # weights of pairs held at once: 32 MiB


@dataclass(frozen=True)
class RdmScores:
    """Predicted and true dissimilarities of a split's images, and which of them are its pairs (above the diagonal)."""

    stimuli: tuple[str, ...]
    predicted: Float[np.ndarray, "image image"]
    true: Float[np.ndarray, "image image"]
    is_pair: Bool[np.ndarray, "image image"]

    @staticmethod
    def of_all_pairs(
        stimuli: tuple[str, ...], predicted: Float[np.ndarray, "image image"], true: Float[np.ndarray, "image image"]
    ) -> RdmScores:
        """The scores of every pair of these images."""
        return RdmScores(stimuli, predicted, true, upper_triangle(len(stimuli)))

    def pairs(self) -> tuple[Float[np.ndarray, "pair"], Float[np.ndarray, "pair"]]:
        """Predicted and true values."""
        return self.predicted[self.is_pair].astype(np.float64), self.true[self.is_pair].astype(np.float64)


PairFunction = Callable[[np.ndarray, np.ndarray], Callable[[np.ndarray], np.ndarray]]


def over_pairs(function: PairFunction) -> Callable[[RdmScores, np.ndarray], np.ndarray]:
    """The metric of weights of images [draw, image], from `function(predicted, true)` of weights of pairs [draw, pair],
    which prepares once what all draws share."""

    def metric(scores: RdmScores, weights: np.ndarray) -> np.ndarray:
        rows, columns = np.nonzero(scores.is_pair)
        of_draws = function(*scores.pairs())
        size = max(1, BLOCK // max(1, len(rows)))
        blocks = [weights[start : start + size] for start in range(0, len(weights), size)]
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.concatenate([of_draws(each[:, rows] * each[:, columns]) for each in blocks])

    return metric


def r_squared(predicted: np.ndarray, true: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """1 - squared error / squared distance from the split's own mean, as scikit-learn's r2_score."""
    squared_errors, centred = np.square(true - predicted), true - true.mean()

    def of_draws(weights: np.ndarray) -> np.ndarray:
        mean = weights @ centred / weights.sum(axis=1)
        return 1 - weights @ squared_errors / (weights @ np.square(centred) - weights.sum(axis=1) * mean**2)

    return of_draws


def pearson(predicted: np.ndarray, true: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Pearson's correlation; NaN where either side is constant."""
    return lambda weights: _correlations(predicted[None], true[None], weights)


def spearman(predicted: np.ndarray, true: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Pearson's correlation of mid-ranks; NaN where either side is constant."""
    ranks = [weighted_ranks(values) for values in (predicted, true)]
    return lambda weights: _correlations(ranks[0](weights), ranks[1](weights), weights)


def _correlations(first: np.ndarray, second: np.ndarray, weights: np.ndarray) -> np.ndarray:
    total = weights.sum(axis=1, keepdims=True)
    first, second = (side - (weights * side).sum(axis=1, keepdims=True) / total for side in (first, second))
    spread = np.sqrt((weights * first**2).sum(axis=1) * (weights * second**2).sum(axis=1))
    found = (weights * first * second).sum(axis=1) / spread
    return np.where(spread > 1e-12 * total[:, 0], found, np.nan)


def weighted_ranks(values: Float[np.ndarray, "pair"]) -> Callable[[np.ndarray], np.ndarray]:
    """A function of weights [draw, pair]: the weight below each pair, with half of that of its equals."""
    order = np.argsort(values, kind="stable")
    _, starts, dense = np.unique(values[order], return_index=True, return_inverse=True)
    number = np.empty_like(dense)
    number[order] = dense

    def of_draws(weights: np.ndarray) -> np.ndarray:
        of_equals = np.add.reduceat(weights[:, order], starts, axis=1)
        return (np.cumsum(of_equals, axis=1) - of_equals / 2)[:, number]

    return of_draws


def kendall(predicted: np.ndarray, true: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Kendall's tau-a: concordant less discordant pairs of dissimilarities over all of them, ties counting as neither.

    Two values differ first in one bit of their ranks: at every bit, those with a 1 are compared with those with a 0
    that share the higher bits, in the order of the other side. What is sorted is the same for all weights.
    """
    first, second = (np.unique(values, return_inverse=True)[1].reshape(-1) for values in (predicted, true))
    levels = [_Level(first, second, bit) for bit in range(int(first.max(initial=0)).bit_length())]

    def of_draws(weights: np.ndarray) -> np.ndarray:
        surplus = sum((level.surplus(weights) for level in levels), np.zeros(len(weights)))
        return 2 * surplus / (weights.sum(axis=1) ** 2 - np.square(weights).sum(axis=1))

    return of_draws


class _Level:
    """Comparisons of values whose ranks differ first in one bit: sorted once, summed for any weights."""

    def __init__(self, first: Int[np.ndarray, "pair"], second: Int[np.ndarray, "pair"], bit: int) -> None:
        group = first >> (bit + 1)
        self.order = np.lexsort((second, group))
        is_upper = (first >> bit & 1).astype(bool)[self.order]
        group, second = group[self.order], second[self.order]
        key = group * (second.max(initial=0) + 1) + second  # rises along the order; equal for ties inside a group
        self.is_lower, self.upper = ~is_upper, np.flatnonzero(is_upper)
        self.group_start, self.group_end = _ends(group, group[self.upper])
        self.ties_start, self.ties_end = _ends(key, key[self.upper])

    def surplus(self, weights: np.ndarray) -> Float[np.ndarray, "draw"]:
        """The weight of concordant less that of discordant comparisons."""
        ordered = weights[:, self.order]
        below = np.zeros((len(weights), ordered.shape[1] + 1))
        np.cumsum(ordered * self.is_lower, axis=1, out=below[:, 1:])
        agree = below[:, self.ties_start] - below[:, self.group_start]
        disagree = below[:, self.group_end] - below[:, self.ties_end]
        return (ordered[:, self.upper] * (agree - disagree)).sum(axis=1)


def _ends(
    ordered: Int[np.ndarray, "pair"], values: Int[np.ndarray, "upper"]
) -> tuple[Int[np.ndarray, "upper"], Int[np.ndarray, "upper"]]:
    """Where each value begins among ordered ones, and where it ends."""
    return np.searchsorted(ordered, values, side="left"), np.searchsorted(ordered, values, side="right")


def _metric(name: str, title: str, chance: float | None, function: PairFunction) -> Metric:
    return Metric(
        name, title, "highest", chance, over_pairs(function), lambda scores: np.zeros(len(scores.stimuli), dtype=int)
    )


METRICS = (
    _metric("spearman", "Spearman", 0.0, spearman),
    _metric("r2", "R²", None, r_squared),
    _metric("pearson", "Pearson", 0.0, pearson),
    _metric("kendall", "Kendall tau-a", 0.0, kendall),
)


def permutation_p(scores: RdmScores, *, num_permutations: int, generator: np.random.Generator) -> float:
    """One-sided p of Spearman's correlation when the predicted matrix's images are named at random (Mantel's test)."""
    ranks = []
    for values in scores.pairs():
        matrix = np.zeros(scores.true.shape)
        matrix[scores.is_pair] = rankdata(values) - (len(values) + 1) / 2
        ranks.append(matrix + matrix.T)
    found = np.vdot(*ranks)
    reached = 0
    for _ in range(num_permutations):
        order = generator.permutation(len(ranks[0]))
        reached += np.vdot(ranks[0][np.ix_(order, order)], ranks[1]) >= found * (1 - 1e-12)
    return (1 + int(reached)) / (1 + num_permutations)
