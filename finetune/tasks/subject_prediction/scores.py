"""Numbers of predictions for the subjects of one whole split, one score per subject. Knows no model and no file.

Thresholds are chosen elsewhere than on the split that is reported.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import rankdata

from finetune.errors import FinetuneError
from training.statistics import BootstrapConfig, Interval, Metric


@dataclass(frozen=True)
class Scores:
    """One row per subject. `truth` is True for a case, or the subject's value.

    `values` rise with the probability of being a case, or are predicted values. `reference` is the score above which a
    subject is called a case, or the mean of the training subjects' values.
    """

    subjects: tuple[str, ...]
    values: np.ndarray
    truth: np.ndarray
    sites: np.ndarray
    reference: float = 0.0

    def __post_init__(self) -> None:
        lengths = {len(self.subjects), len(self.values), len(self.truth), len(self.sites)}
        if len(lengths) != 1:
            raise FinetuneError(
                f"subjects, values, truth and sites have lengths {sorted(lengths)}; give one per subject"
            )

    def take(self, rows: np.ndarray) -> Scores:
        """The scores of these rows, which may repeat."""
        subjects = tuple(self.subjects[row] for row in rows)
        return replace(
            self, subjects=subjects, values=self.values[rows], truth=self.truth[rows], sites=self.sites[rows]
        )


def subject_scores(values: np.ndarray, subjects: list[str], *, truth: np.ndarray, sites: np.ndarray) -> Scores:
    """One score per subject, sorted by subject: the mean over that subject's runs."""
    names, first, inverse = np.unique(np.asarray(subjects), return_index=True, return_inverse=True)
    sums = np.bincount(inverse, weights=values.astype(np.float64), minlength=len(names))
    means = sums / np.bincount(inverse, minlength=len(names))
    truth = np.asarray(truth)
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


def roc_curve(values: np.ndarray, is_case: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates from (0, 0) to (1, 1), one point per distinct score."""
    order = np.argsort(-values, kind="stable")
    last_of_level = np.append(np.flatnonzero(np.diff(values[order])), len(values) - 1)
    hits = np.cumsum(is_case[order])[last_of_level]
    false_alarms = np.cumsum(~is_case[order])[last_of_level]
    return np.append(0, false_alarms) / max(1, (~is_case).sum()), np.append(0, hits) / max(1, is_case.sum())


def r2(scores: Scores) -> float:
    """Share of the values' variance about the training mean that predictions explain; negative when they add to it."""
    total = float(np.square(scores.truth - scores.reference).sum())
    return 1 - float(np.square(scores.truth - scores.values).sum()) / total if total > 0 else float("nan")


def within_site_correlation(scores: Scores) -> float:
    """Pearson correlation after each site's means are taken off: what site differences alone cannot raise."""
    predicted, truth = _without_site_means(scores.values, scores.sites), _without_site_means(scores.truth, scores.sites)
    length = float(np.sqrt(np.square(predicted).sum() * np.square(truth).sum()))
    return float(predicted @ truth) / length if length > 1e-12 else float("nan")


def _without_site_means(values: np.ndarray, sites: np.ndarray) -> np.ndarray:
    _, of_subject = np.unique(sites, return_inverse=True)
    means = np.bincount(of_subject, weights=values) / np.bincount(of_subject)
    return values - means[of_subject]


def _classes(scores: Scores) -> np.ndarray:
    return scores.truth.astype(int)


def _sites_and_classes(scores: Scores) -> np.ndarray:
    return np.char.add(np.asarray(scores.sites, dtype=str), _classes(scores).astype(str))


CLASS_METRICS = (
    Metric(
        "within_site_auroc",
        "AUROC within sites",
        "highest",
        0.5,
        lambda scores: within_site_auroc(scores.values, scores.truth, scores.sites),
        _sites_and_classes,
    ),
    Metric("auroc", "AUROC", "highest", 0.5, lambda scores: auroc(scores.values, scores.truth), _classes),
    Metric(
        "balanced_accuracy",
        "balanced accuracy",
        "highest",
        0.5,
        lambda scores: balanced_accuracy(scores.values > scores.reference, scores.truth),
        _classes,
    ),
)
VALUE_METRICS = (
    Metric(
        "within_site_correlation",
        "correlation within sites",
        "highest",
        0.0,
        within_site_correlation,
        lambda scores: scores.sites,
    ),
    Metric("r2", "R² about the training mean", "highest", 0.0, r2, lambda scores: scores.sites),
    Metric(
        "mean_absolute_error",
        "mean absolute error",
        "lowest",
        None,
        lambda scores: float(np.abs(scores.truth - scores.values).mean()),
        lambda scores: scores.sites,
    ),
)


def intervals(scores: Scores, metrics: tuple[Metric, ...], config: BootstrapConfig) -> dict[str, Interval]:
    """Every metric of these scores with its interval."""
    if not scores.subjects:
        raise FinetuneError("nothing to evaluate: the split has no labelled subject; check split and label.column")
    return {metric.name: metric.interval(scores, config) for metric in metrics}


def class_details(scores: Scores) -> dict[str, Any]:
    """Counts and accuracies of a classifier, over all subjects and by site (AUROC NaN where a site has one class)."""
    is_right = (scores.values > scores.reference) == scores.truth
    share = float(scores.truth.mean())
    sites: dict[str, dict[str, int | float]] = {}
    for site in np.unique(scores.sites):
        here = scores.sites == site
        sites[str(site)] = {
            "num_subjects": int(here.sum()),
            "num_cases": int(scores.truth[here].sum()),
            "accuracy": float(is_right[here].mean()),
            "auroc": auroc(scores.values[here], scores.truth[here]),
        }
    return {
        "num_subjects": len(scores.subjects),
        "num_cases": int(scores.truth.sum()),
        "threshold": float(scores.reference),
        "accuracy": float(is_right.mean()),
        "majority_accuracy": max(share, 1 - share),
        "sites": sites,
    }


def value_details(scores: Scores) -> dict[str, Any]:
    """Counts and errors of predicted values, over all subjects and by site."""
    sites = {
        str(site): {
            "num_subjects": int((scores.sites == site).sum()),
            "mean_absolute_error": float(np.abs(scores.truth - scores.values)[scores.sites == site].mean()),
        }
        for site in np.unique(scores.sites)
    }
    return {"num_subjects": len(scores.subjects), "training_mean": float(scores.reference), "sites": sites}
