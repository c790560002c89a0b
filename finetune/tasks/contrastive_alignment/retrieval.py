"""How well a subject is found by its other side: numbers over a split with intervals over subjects.

Every subject asks once in each direction, for its own scan among those of all subjects of the split. Knows no model and
no file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from training.statistics import Metric

TIED = 1e-6  # cosines this close are the same: float32 tells no more
Direction = Literal["both", "structure_to_function", "function_to_structure"]
TITLES: dict[Direction, str] = {
    "both": "",
    "structure_to_function": ", T1 to fMRI",
    "function_to_structure": ", fMRI to T1",
}


@dataclass(frozen=True)
class Similarities:
    """The cosine of every subject's structure (row) with every subject's function (column)."""

    subjects: tuple[str, ...]
    cosines: Float[np.ndarray, "subject subject"]

    def questions(self, direction: Direction) -> Float[np.ndarray, "question candidate"]:
        """The cosines of each question with all candidates; both directions: those from structure first."""
        if direction == "both":
            return np.concatenate([self.cosines, self.cosines.T])
        return self.cosines if direction == "structure_to_function" else self.cosines.T


def similarities(
    subjects: tuple[str, ...], first: Float[np.ndarray, "subject width"], second: Float[np.ndarray, "subject width"]
) -> Similarities:
    """The cosines of all pairs of embeddings."""
    return Similarities(subjects, unit(first) @ unit(second).T)


def unit(rows: Float[np.ndarray, "subject width"]) -> Float[np.ndarray, "subject width"]:
    """The rows at length 1, in float64."""
    rows = np.asarray(rows, dtype=np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def better_and_tied(
    cosines: Float[np.ndarray, "question candidate"],
) -> tuple[np.ndarray, np.ndarray]:
    """How many candidates are nearer than a question's own one, and how many others are as near."""
    own = cosines[np.arange(len(cosines)), np.arange(len(cosines)) % cosines.shape[1]][:, None]
    return (cosines > own + TIED).sum(axis=1), (np.abs(cosines - own) <= TIED).sum(axis=1) - 1


def hits(cosines: Float[np.ndarray, "question candidate"], k: int) -> Float[np.ndarray, "question"]:
    """The probability that a question's own candidate is among the k nearest, ties being ordered at random."""
    better, tied = better_and_tied(cosines)
    return np.clip((k - better) / (tied + 1), 0, 1)


def ranks(cosines: Float[np.ndarray, "question candidate"]) -> Float[np.ndarray, "question"]:
    """The place of a question's own candidate, from 1; of ties, the middle one."""
    better, tied = better_and_tied(cosines)
    return 1 + better + tied / 2


def recall(k: int, direction: Direction) -> Callable[[Similarities, np.ndarray], np.ndarray]:
    """The share of questions whose own candidate is among the k nearest, for weights of subjects."""

    def metric(found: Similarities, weights: np.ndarray) -> np.ndarray:
        of_questions = hits(found.questions(direction), k).reshape(-1, len(found.subjects)).mean(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return weights @ of_questions / weights.sum(axis=1)

    return metric


def median_rank(direction: Direction) -> Callable[[Similarities, np.ndarray], np.ndarray]:
    """The weighted median place of the own candidate, for weights of subjects."""

    def metric(found: Similarities, weights: np.ndarray) -> np.ndarray:
        places = ranks(found.questions(direction))
        order = np.argsort(places, kind="stable")
        below = np.cumsum(np.tile(weights, len(places) // len(found.subjects))[:, order], axis=1)
        half = below[:, -1:] / 2
        ends = [(below < half).sum(axis=1), (below <= half).sum(axis=1)]  # of an even number: the middle two
        lower, upper = (places[order][np.minimum(end, len(places) - 1)] for end in ends)
        return np.where(np.isfinite(below[:, -1]), (lower + upper) / 2, np.nan)

    return metric


def _metrics(direction: Direction) -> list[Metric]:
    suffix = "" if direction == "both" else f"_{direction}"

    def one_stratum(found: Similarities) -> np.ndarray:
        return np.zeros(len(found.subjects), dtype=int)

    recalls = [
        Metric(f"recall_{k}{suffix}", f"R@{k}{TITLES[direction]}", "highest", None, recall(k, direction), one_stratum)
        for k in (1, 5, 10)
    ]
    title = f"median rank{TITLES[direction]}"
    return [*recalls, Metric(f"median_rank{suffix}", title, "lowest", None, median_rank(direction), one_stratum)]


METRICS = tuple(metric for direction in TITLES for metric in _metrics(direction))
OF_BOTH_DIRECTIONS = METRICS[:4]


def chance(metric: str, num_subjects: int) -> float:
    """What a model that knows nothing reaches by the metric of this name among so many subjects."""
    if metric.startswith("median_rank"):
        return (num_subjects + 1) / 2
    return min(1.0, int(metric.split("_")[1]) / num_subjects)


def shuffled_recall(
    found: Similarities, *, num_permutations: int, generator: np.random.Generator
) -> Float[np.ndarray, "permutation"]:
    """R@1 of both directions when subjects are paired at random: a control, whose mean is chance."""
    orders = (generator.permutation(len(found.subjects)) for _ in range(num_permutations))
    shuffled = (Similarities(found.subjects, found.cosines[:, order]) for order in orders)
    return np.array([hits(each.questions("both"), 1).mean() for each in shuffled])


def geometry(first: Float[np.ndarray, "subject width"], second: Float[np.ndarray, "subject width"]) -> dict[str, float]:
    """How two sides' unit embeddings lie: cosines of pairs and of non-pairs, alignment (mean squared distance of
    pairs) and uniformity (log mean exp of -2 squared distances; Wang and Isola 2020), and by side the variance and the
    effective number of dimensions (Roy and Vetterli 2007), both 0 for a constant embedding."""
    first, second = unit(first), unit(second)
    cosines, is_pair = first @ second.T, np.eye(len(first), dtype=bool)
    numbers = {
        "positive_cosine": float(cosines[is_pair].mean()),
        "negative_cosine": float(cosines[~is_pair].mean()) if len(first) > 1 else np.nan,
        "alignment": float((2 - 2 * cosines[is_pair]).mean()),
    }
    for name, side in (("structure", first), ("function", second)):
        distances = 2 - 2 * (side @ side.T)[~is_pair]
        numbers[f"uniformity_{name}"] = float(np.log(np.exp(-2 * distances).mean())) if len(side) > 1 else np.nan
        numbers[f"variance_{name}"] = float(1 - np.square(side.mean(axis=0)).sum())
        numbers[f"rank_{name}"] = effective_rank(side)
    return numbers


def effective_rank(rows: Float[np.ndarray, "subject width"]) -> float:
    """exp of the entropy of the centred rows' singular values; 0 where nothing varies."""
    sizes = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False)
    if sizes.sum() < TIED * len(rows):
        return 0.0
    shares = sizes[sizes > 0] / sizes.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))
