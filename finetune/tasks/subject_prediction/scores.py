"""Numbers of predictions for the subjects of one whole split, one score per subject. Knows no model and no file.

Thresholds are chosen elsewhere than on the split that is reported.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from finetune.errors import FinetuneError
from training.statistics import BootstrapConfig, Interval, Metric, joined_strata


@dataclass(frozen=True)
class Scores:
    """One row per subject. `truth` is True (or 1) for a case, or the subject's value.

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
        """The scores of these rows, which may repeat; or of the rows with True."""
        subjects = tuple(np.asarray(self.subjects)[rows].tolist())
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


def scores_table(models: Mapping[str, Scores]) -> str:
    """scores.csv: one line per model and subject, so that every number of the report can be computed again."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")  # which quotes a site's name with a comma
    writer.writerow(["model", "subject", "site", "truth", "score", "reference"])
    for name, scores in models.items():
        for subject, site, *numbers in zip(
            scores.subjects, scores.sites, scores.truth.tolist(), scores.values, strict=True
        ):
            writer.writerow([name, subject, site, *(f"{number:.8g}" for number in (*numbers, scores.reference))])
    return text.getvalue()


def read_scores(text: str) -> dict[str, Scores]:
    """The scores of every model of scores.csv, the trained one first; a class is 1 or 0."""
    models: dict[str, list[dict[str, str]]] = {}
    for row in csv.DictReader(io.StringIO(text)):
        models.setdefault(row["model"], []).append(row)
    return {
        name: Scores(
            tuple(row["subject"] for row in rows),
            np.array([float(row["score"]) for row in rows]),
            np.array([float(row["truth"]) for row in rows]),
            np.array([row["site"] for row in rows]),
            float(rows[0]["reference"]),
        )
        for name, rows in models.items()
    }


def auroc(scores: Scores, weights: np.ndarray) -> np.ndarray:
    """Share of (case, control) pairs in which the case scores higher, ties counted half; NaN without such pairs."""
    return _share_won(scores, np.zeros(len(scores.sites)), weights)


def within_site_auroc(scores: Scores, weights: np.ndarray) -> np.ndarray:
    """The same share over pairs of one site only, pooled over sites: what site differences alone cannot raise."""
    return _share_won(scores, scores.sites, weights)


def _share_won(scores: Scores, groups: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The share [draw] of pairs inside groups, from sums over equal scores of a group: no pair is held."""
    _, groups = np.unique(groups, return_inverse=True)
    order = np.lexsort((scores.values, groups))
    is_case, weights = scores.truth.astype(bool)[order], weights[:, order]
    is_new_group = np.diff(groups[order], prepend=-1) != 0
    is_new_level = is_new_group | (np.diff(scores.values[order], prepend=np.nan) != 0)
    levels, of_groups = np.flatnonzero(is_new_level), np.flatnonzero(is_new_group[is_new_level])
    cases, controls = (np.add.reduceat(weights * of, levels, axis=1) for of in (is_case, ~is_case))
    group_cases, group_controls = (np.add.reduceat(each, of_groups, axis=1) for each in (cases, controls))
    below = cases * (controls.cumsum(axis=1) - controls / 2)  # in the groups before as well
    before = group_cases * (group_controls.cumsum(axis=1) - group_controls)
    return _ratio(below.sum(axis=1) - before.sum(axis=1), (group_cases * group_controls).sum(axis=1))


def balanced_accuracy(scores: Scores, weights: np.ndarray) -> np.ndarray:
    """Mean of sensitivity and specificity; NaN when one class is absent."""
    is_case = scores.truth.astype(bool)
    is_right = (scores.values > scores.reference) == is_case
    return (_mean(is_right[is_case], weights[:, is_case]) + _mean(is_right[~is_case], weights[:, ~is_case])) / 2


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return _ratio((weights * values).sum(axis=1), weights.sum(axis=1))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return part / np.where(whole > 0, whole, np.nan)


def choose_threshold(values: np.ndarray, is_case: np.ndarray) -> float:
    """The cut (a case when value > cut) with the best balanced accuracy, the middle of the ties; for validation."""
    if is_case.all() or not is_case.any():
        raise FinetuneError("cannot choose a threshold: the validation split has one class only; enlarge it")
    levels = np.unique(values.astype(np.float64))
    cuts = np.concatenate([[levels[0] - 1.0], (levels[1:] + levels[:-1]) / 2, [levels[-1] + 1.0]])
    false_rate, true_rate = roc_curve(values, is_case)  # from the highest cut to the lowest
    quality = (true_rate + 1 - false_rate)[::-1] / 2
    best = np.flatnonzero(quality >= quality.max() - 1e-12)
    return float(cuts[best[(len(best) - 1) // 2]])


def roc_curve(values: np.ndarray, is_case: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates from (0, 0) to (1, 1), one point per distinct score."""
    order = np.argsort(-values, kind="stable")
    last_of_level = np.append(np.flatnonzero(np.diff(values[order])), len(values) - 1)
    hits = np.cumsum(is_case[order])[last_of_level]
    false_alarms = np.cumsum(~is_case[order])[last_of_level]
    return np.append(0, false_alarms) / max(1, (~is_case).sum()), np.append(0, hits) / max(1, is_case.sum())


def r2(scores: Scores, weights: np.ndarray) -> np.ndarray:
    """Share of the values' variance about the training mean that predictions explain; negative when they add to it."""
    error, total = np.square(scores.truth - scores.values), np.square(scores.truth - scores.reference)
    return 1 - _ratio((weights * error).sum(axis=1), (weights * total).sum(axis=1))


def within_site_correlation(scores: Scores, weights: np.ndarray) -> np.ndarray:
    """Pearson correlation after each site's means are taken off: what site differences alone cannot raise."""
    _, of_subject = np.unique(scores.sites, return_inverse=True)
    site = np.eye(of_subject.max() + 1)[of_subject]
    # Without the sites' unweighted means first, which a resample's own differ little from, digits would be lost.
    predicted, truth = (each - site @ (each @ site / site.sum(axis=0)) for each in (scores.values, scores.truth))

    def product(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        sums = (weights @ (one[:, None] * site)) * (weights @ (other[:, None] * site))
        return weights @ (one * other) - (sums / np.maximum(weights @ site, 1e-12)).sum(axis=1)

    length = np.sqrt(np.maximum(product(predicted, predicted) * product(truth, truth), 0))
    return product(predicted, truth) / np.where(length > 1e-12, length, np.nan)


def mean_absolute_error(scores: Scores, weights: np.ndarray) -> np.ndarray:
    """In the unit of the values."""
    return _mean(np.abs(scores.truth - scores.values), weights)


def sites_and_classes(scores: Scores) -> np.ndarray:
    """[subject]: strata of class metrics."""
    return joined_strata(scores.sites, scores.truth)


def sites_alone(scores: Scores) -> np.ndarray:
    """[subject]: strata of value metrics."""
    return joined_strata(scores.sites, np.zeros(len(scores.sites)))


AUROC = Metric("auroc", "AUROC", "highest", 0.5, auroc, sites_and_classes)
CLASS_METRICS = (
    Metric("within_site_auroc", "AUROC within sites", "highest", 0.5, within_site_auroc, sites_and_classes),
    AUROC,
    Metric("balanced_accuracy", "balanced accuracy", "highest", 0.5, balanced_accuracy, sites_and_classes),
)
VALUE_METRICS = (
    Metric("within_site_correlation", "correlation within sites", "highest", 0.0, within_site_correlation, sites_alone),
    Metric("r2", "R² about the training mean", "highest", 0.0, r2, sites_alone),
    Metric("mean_absolute_error", "mean absolute error", "lowest", None, mean_absolute_error, sites_alone),
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
            "auroc": AUROC.value(scores.take(here)),
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
