"""What a model says of a subject, a class or a value: its loss, its linear fit, its scores and its metrics.

Both are used by the task, by the start of its head and by the baselines, so a model and its baselines cannot differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from finetune.tasks.subject_prediction import figures
from finetune.tasks.subject_prediction.baselines import LinearConfig, LinearFit, fit_logistic, fit_ridge, site_means
from finetune.tasks.subject_prediction.labels import ClassLabel, Labels, ValueLabel
from finetune.tasks.subject_prediction.scores import (
    CLASS_METRICS,
    VALUE_METRICS,
    Scores,
    choose_threshold,
    class_details,
    value_details,
)
from reports.page import Section
from training.statistics import Metric


class ClassOutcome(nn.Module):
    """A case or a control: the model's output is a logit, above 0 for a case."""

    metrics: tuple[Metric, ...] = CLASS_METRICS
    baseline_name = "connectivity + logistic"
    model_kind = "run_classifier"  # of the registered model
    class_weights: Tensor

    def __init__(self, label: ClassLabel, labels: Labels, train_subjects: Sequence[str], *, is_balanced: bool) -> None:
        super().__init__()
        self.label = label
        weights = class_weights(labels, train_subjects) if is_balanced else (1.0, 1.0)
        self.register_buffer("class_weights", torch.tensor(weights), persistent=False)

    def losses(self, outputs: Float[Tensor, "batch"], truth: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
        """Class-weighted cross-entropy per run."""
        losses = functional.binary_cross_entropy_with_logits(outputs, truth, reduction="none")
        return self.class_weights[truth.long()] * losses

    def predicted(self, outputs: np.ndarray) -> np.ndarray:
        """Scores from outputs: the logits themselves."""
        return outputs

    def mean_loss(self, scores: Scores) -> float:
        """Cross-entropy per subject, classes not weighted."""
        return float(np.logaddexp(0, np.where(scores.truth, -scores.values, scores.values)).mean())

    def with_reference(self, rule: Literal["validation", "half"], scores: Mapping[str, Scores]) -> dict[str, Scores]:
        """The scores of every split with the logit above which a subject is called a case: the best on validation
        subjects, or 0 (even odds)."""
        cut = 0.0 if rule == "half" else choose_threshold(scores["validation"].values, scores["validation"].truth)
        return {split: replace(each, reference=cut) for split, each in scores.items()}

    def fit(self, features: np.ndarray, truth: np.ndarray, *, sites: np.ndarray, config: LinearConfig) -> LinearFit:
        """Penalised logistic regression."""
        return fit_logistic(features, truth, sites=sites, config=config)

    def from_sites(self, train_sites: np.ndarray, truth: np.ndarray, sites: np.ndarray) -> np.ndarray:
        """The logit of the site's share of cases."""
        return log_odds(site_means(train_sites, truth.astype(float), sites))

    def model_fields(self, reference: float) -> dict[str, Any]:
        """What the registered model says beside its numbers."""
        threshold = 1 / (1 + math.exp(-reference))
        return {"positive": self.label.cases[0], "negative": self.label.controls[0], "threshold": threshold}

    def details(self, scores: Scores) -> dict[str, Any]:
        return class_details(scores)

    def sections(self, models: Mapping[str, Scores], numbers: Mapping[str, Any]) -> list[Section]:
        """ROC curves of all models, and the trained model's scores and accuracy by site."""
        trained = next(iter(models.values()))
        rows = [
            [site, str(row["num_subjects"]), str(row["num_cases"]), f"{row['accuracy']:.3f}", f"{row['auroc']:.3f}"]
            for site, row in numbers["sites"].items()
        ]
        return [
            Section(
                "Classification",
                text=f"{numbers['num_cases']} of {numbers['num_subjects']} test subjects are cases. Accuracy is "
                f"{numbers['accuracy']:.3f}; always naming the more frequent class would reach "
                f"{numbers['majority_accuracy']:.3f}. Runs of one subject are averaged first. Within sites: only pairs "
                "of a case and a control of the same site count, so differences between sites cannot help. Thresholds "
                "do not come from test subjects.",
                figures=[figures.roc(models), figures.scores_by_site(trained)],
            ),
            Section("By site", table=[["site", "subjects", "cases", "accuracy", "AUROC"], *rows]),
        ]


class ValueOutcome(nn.Module):
    """A number, e.g. age: the model's output is in standard deviations of the training subjects about their mean."""

    metrics: tuple[Metric, ...] = VALUE_METRICS
    baseline_name = "connectivity + ridge"
    model_kind = "run_regressor"

    def __init__(self, label: ValueLabel, labels: Labels, train_subjects: Sequence[str]) -> None:
        super().__init__()
        self.label = label
        known = np.array([labels.truth_of[subject] for subject in train_subjects if subject in labels.truth_of])
        self.mean = float(known.mean()) if len(known) else 0.0
        self.deviation = max(float(known.std()), 1e-6) if len(known) else 1.0

    def losses(self, outputs: Float[Tensor, "batch"], truth: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
        """Half the squared error per run, in training variances."""
        return 0.5 * (outputs - (truth - self.mean) / self.deviation).square()

    def predicted(self, outputs: np.ndarray) -> np.ndarray:
        """Values in the column's unit."""
        return self.mean + self.deviation * outputs

    def mean_loss(self, scores: Scores) -> float:
        """Half the squared error per subject, in training variances."""
        return float(0.5 * np.square((scores.values - scores.truth) / self.deviation).mean())

    def with_reference(self, rule: Literal["validation", "half"], scores: Mapping[str, Scores]) -> dict[str, Scores]:
        """The scores of every split, read about the training mean."""
        return {split: replace(each, reference=self.mean) for split, each in scores.items()}

    def fit(self, features: np.ndarray, truth: np.ndarray, *, sites: np.ndarray, config: LinearConfig) -> LinearFit:
        """Ridge regression of the standardised value."""
        return fit_ridge(features, (truth - self.mean) / self.deviation, sites=sites, config=config)

    def from_sites(self, train_sites: np.ndarray, truth: np.ndarray, sites: np.ndarray) -> np.ndarray:
        """The site's mean, in the model's units."""
        return (site_means(train_sites, truth, sites) - self.mean) / self.deviation

    def model_fields(self, reference: float) -> dict[str, Any]:
        """What the registered model says beside its numbers."""
        return {"value": self.label.column, "mean": self.mean, "scale": self.deviation}

    def details(self, scores: Scores) -> dict[str, Any]:
        return value_details(scores)

    def sections(self, models: Mapping[str, Scores], numbers: Mapping[str, Any]) -> list[Section]:
        """Predicted against true values, and the error by site."""
        rows = [
            [site, str(row["num_subjects"]), f"{row['mean_absolute_error']:.3f}"]
            for site, row in numbers["sites"].items()
        ]
        head = ["site", "subjects", f"mean absolute error ({self.label.unit})"]
        label = f"{self.label.column} ({self.label.unit})"
        return [
            Section("Predicted and true values", figures=[figures.predicted_against_true(models, label=label)]),
            Section("By site", table=[head, *rows]),
        ]


Outcome = ClassOutcome | ValueOutcome


def class_weights(labels: Labels, train_subjects: Sequence[str]) -> tuple[float, float]:
    """(control, case) weights by which both classes of the training split count alike and the mean weight is 1."""
    is_case = np.array([labels.truth_of[subject] for subject in train_subjects if subject in labels.truth_of])
    share = float(np.clip(is_case.mean(), 1e-6, 1 - 1e-6)) if len(is_case) else 0.5
    return 0.5 / (1 - share), 0.5 / share


def log_odds(shares: np.ndarray) -> np.ndarray:
    """Logit of each share, kept finite: shares below 0.001 and above 0.999 count as those."""
    inside = np.clip(shares, 0.001, 0.999)
    return np.log(inside / (1 - inside))
