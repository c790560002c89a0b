"""Numbers of a binary classifier over one whole split, one score a subject, each with a bootstrap interval.

Knows no model and no file. Thresholds are chosen elsewhere than on the split that is reported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from finetune.errors import FinetuneError

Statistic = Callable[[np.ndarray, np.ndarray, np.ndarray], float]


@dataclass(frozen=True)
class Scores:
    """One row a subject: `values` rise with the probability of being a case, `is_case` is the truth."""

    subjects: tuple[str, ...]
    values: np.ndarray
    is_case: np.ndarray
    sites: np.ndarray

    def __post_init__(self) -> None:
        lengths = {len(self.subjects), len(self.values), len(self.is_case), len(self.sites)}
        if len(lengths) != 1:
            raise FinetuneError(
                f"subjects, values, is_case and sites have lengths {sorted(lengths)}; give one a subject"
            )


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its bootstrap interval; all NaN where the value is undefined."""

    value: float
    low: float
    high: float


@dataclass
class BootstrapConfig:
    """`confidence` is the interval's coverage, between 0 and 1."""

    num_resamples: int
    confidence: float
    seed: int


@dataclass(frozen=True)
class Evaluation:
    """Everything reported about one classifier on one split."""

    num_subjects: int
    num_cases: int
    threshold: float
    accuracy: float
    majority_accuracy: float
    balanced_accuracy: Interval
    auroc: Interval
    within_site_auroc: Interval
    sites: dict[str, dict[str, int | float]]


def subject_scores(values: np.ndarray, subjects: list[str], *, is_case: np.ndarray, sites: np.ndarray) -> Scores:
    """One score a subject, sorted by subject: the mean over that subject's runs."""
    names, first, inverse = np.unique(np.asarray(subjects), return_index=True, return_inverse=True)
    sums = np.bincount(inverse, weights=values.astype(np.float64), minlength=len(names))
    means = sums / np.bincount(inverse, minlength=len(names))
    truth = np.asarray(is_case, dtype=bool)
    if not np.array_equal(truth, truth[first][inverse]):
        raise FinetuneError("a subject has runs with different labels; labels belong to subjects")
    return Scores(tuple(names.tolist()), means, truth[first], np.asarray(sites)[first])


def auroc(values: np.ndarray, is_case: np.ndarray) -> float:
    """Share of (case, control) pairs in which the case scores higher, ties counted half; NaN without such pairs."""
    won, pairs = _won_pairs(values, is_case)
    return won / pairs if pairs else float("nan")


def within_site_auroc(values: np.ndarray, is_case: np.ndarray, sites: np.ndarray) -> float:
    """The same share over pairs of one site only, pooled over sites: what site differences alone cannot raise."""
    results = [_won_pairs(values[sites == site], is_case[sites == site]) for site in np.unique(sites)]
    pairs = sum(count for _, count in results)
    return sum(won for won, _ in results) / pairs if pairs else float("nan")


def _won_pairs(values: np.ndarray, is_case: np.ndarray) -> tuple[float, int]:
    num_cases = int(is_case.sum())
    pairs = num_cases * (len(is_case) - num_cases)
    ranks = rankdata(values)
    return float(ranks[is_case].sum() - num_cases * (num_cases + 1) / 2), pairs


def balanced_accuracy(is_called: np.ndarray, is_case: np.ndarray) -> float:
    """Mean of sensitivity and specificity; NaN when one class is absent."""
    if is_case.all() or not is_case.any():
        return float("nan")
    return float((is_called[is_case].mean() + (~is_called[~is_case]).mean()) / 2)


def choose_threshold(values: np.ndarray, is_case: np.ndarray) -> float:
    """The cut (a case when value > cut) with the best balanced accuracy, the middle of the ties; for validation."""
    if is_case.all() or not is_case.any():
        raise FinetuneError("cannot choose a threshold: the validation split has one class only; enlarge it")
    levels = np.unique(values.astype(np.float64))
    cuts = np.concatenate([[levels[0] - 1.0], (levels[1:] + levels[:-1]) / 2, [levels[-1] + 1.0]])
    quality = np.array([balanced_accuracy(values > cut, is_case) for cut in cuts])
    best = np.flatnonzero(quality >= quality.max() - 1e-12)
    return float(cuts[best[(len(best) - 1) // 2]])


def bootstrap(statistic: Statistic, scores: Scores, *, strata: np.ndarray, config: BootstrapConfig) -> Interval:
    """The statistic with its percentile interval: subjects are resampled with replacement inside each stratum.

    Stratifying keeps every resample's class (and site) counts, so no resample is undefined unless the split is.
    """
    value = statistic(scores.values, scores.is_case, scores.sites)
    if not np.isfinite(value):
        return Interval(float("nan"), float("nan"), float("nan"))
    generator = np.random.default_rng(config.seed)
    members = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]
    estimates = np.empty(config.num_resamples)
    for index in range(config.num_resamples):
        drawn = np.concatenate([generator.choice(group, size=len(group)) for group in members])
        estimates[index] = statistic(scores.values[drawn], scores.is_case[drawn], scores.sites[drawn])
    tail = (1 - config.confidence) / 2
    low, high = np.quantile(estimates, [tail, 1 - tail])
    return Interval(float(value), float(low), float(high))


def evaluate(scores: Scores, *, threshold: float, config: BootstrapConfig) -> Evaluation:
    """All metrics of a split at a threshold that was chosen elsewhere."""
    if not len(scores.subjects):
        raise FinetuneError("nothing to evaluate: the split has no labelled subject; check split and label.column")
    is_called = scores.values > threshold
    by_class = scores.is_case.astype(int)
    by_site_and_class = np.char.add(np.asarray(scores.sites, dtype=str), by_class.astype(str))
    share = float(scores.is_case.mean())
    return Evaluation(
        num_subjects=len(scores.subjects),
        num_cases=int(scores.is_case.sum()),
        threshold=float(threshold),
        accuracy=float((is_called == scores.is_case).mean()),
        majority_accuracy=max(share, 1 - share),
        balanced_accuracy=bootstrap(
            lambda values, is_case, sites: balanced_accuracy(values > threshold, is_case),
            scores,
            strata=by_class,
            config=config,
        ),
        auroc=bootstrap(lambda values, is_case, sites: auroc(values, is_case), scores, strata=by_class, config=config),
        within_site_auroc=bootstrap(within_site_auroc, scores, strata=by_site_and_class, config=config),
        sites=_by_site(scores, is_called),
    )


def _by_site(scores: Scores, is_called: np.ndarray) -> dict[str, dict[str, int | float]]:
    """Per site: subjects, cases, accuracy, AUROC (NaN where a site has one class)."""
    rows: dict[str, dict[str, int | float]] = {}
    for site in np.unique(scores.sites):
        here = scores.sites == site
        rows[str(site)] = {
            "num_subjects": int(here.sum()),
            "num_cases": int(scores.is_case[here].sum()),
            "accuracy": float((is_called == scores.is_case)[here].mean()),
            "auroc": auroc(scores.values[here], scores.is_case[here]),
        }
    return rows


def roc_curve(values: np.ndarray, is_case: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates from (0, 0) to (1, 1), one point a distinct score."""
    order = np.argsort(-values, kind="stable")
    last_of_level = np.append(np.flatnonzero(np.diff(values[order])), len(values) - 1)
    hits = np.cumsum(is_case[order])[last_of_level]
    false_alarms = np.cumsum(~is_case[order])[last_of_level]
    return np.append(0, false_alarms) / max(1, (~is_case).sum()), np.append(0, hits) / max(1, is_case.sum())
