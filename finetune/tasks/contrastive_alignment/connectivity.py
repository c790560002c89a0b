"""From a T1 alone, functional connectivity: a ridge on the aligned embedding beside the simplest ways to predict it.

Everything is learned from training subjects. A matrix is Fisher's z of all pairs of regions. Knows no model, no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from sklearn.linear_model import RidgeCV

from finetune.tasks.contrastive_alignment.retrieval import unit
from reports.page import Section
from training.statistics import BootstrapConfig, Metric

PENALTIES = np.logspace(-2, 4, 13)  # of standardised features, chosen by leaving one training subject out
EMBEDDING, PATCHES, NEAREST, MEAN = (
    "ridge on the embedding",
    "ridge on T1 patches",
    "nearest training run",
    "group mean",
)


@dataclass(frozen=True)
class People:
    """What is known of the subjects of a split, a row each."""

    structure: Float[np.ndarray, "subject width"]  # embeddings of their T1s
    function: Float[np.ndarray, "subject width"]  # and of their runs
    patches: Float[np.ndarray, "subject patch"]  # mean intensities of their T1s
    edges: Float[np.ndarray, "subject edge"]  # of their true matrices


def predicted_edges(train: People, test: People) -> dict[str, Float[np.ndarray, "subject edge"]]:
    """The matrices of the test subjects by every way to predict them."""
    nearest = (unit(test.structure) @ unit(train.function).T).argmax(axis=1)
    return {
        EMBEDDING: _ridge(unit(train.structure), train.edges, unit(test.structure)),
        PATCHES: _ridge(train.patches, train.edges, test.patches),
        NEAREST: train.edges[nearest],
        MEAN: np.repeat(train.edges.mean(axis=0, keepdims=True), len(test.edges), axis=0),
    }


def _ridge(known: np.ndarray, edges: np.ndarray, asked: np.ndarray) -> np.ndarray:
    centre, spread = known.mean(axis=0), known.std(axis=0)
    spread = np.where(spread > 1e-8, spread, 1.0)
    return RidgeCV(PENALTIES).fit((known - centre) / spread, edges).predict((asked - centre) / spread)


def beyond_the_mean(predicted: np.ndarray, true: np.ndarray, mean: np.ndarray) -> Float[np.ndarray, "subject"]:
    """Each subject's correlation of predicted and true edges, both less the training subjects' mean; 0 for a prediction
    that is this mean."""
    first, second = (side - mean - (side - mean).mean(axis=1, keepdims=True) for side in (predicted, true))
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return np.where(lengths > 1e-8, (first * second).sum(axis=1) / np.maximum(lengths, 1e-8), 0.0)


def identified(predicted: np.ndarray, true: np.ndarray, mean: np.ndarray) -> Float[np.ndarray, "subject"]:
    """1 for each subject whose own true matrix resembles the prediction more than all others' do, beyond the mean;
    ties share."""
    every = np.stack([beyond_the_mean(np.repeat(row[None], len(true), axis=0), true, mean) for row in predicted])
    own = np.diag(every)[:, None]
    tied = (np.abs(every - own) <= 1e-9).sum(axis=1)
    return np.where((every > own + 1e-9).any(axis=1), 0.0, 1 / tied)


def mean_over_subjects(name: str, title: str, chance: float | None) -> Metric:
    """The mean of one number per subject."""
    return Metric(
        name,
        title,
        "highest",
        chance,
        lambda values, weights: weights @ values / weights.sum(axis=1),
        lambda values: np.zeros(len(values), dtype=int),
    )


def connectivity_section(
    train: People, test: People, bootstrap: BootstrapConfig
) -> tuple[Section, dict[str, Mapping[str, float]]]:
    """How well matrices are predicted, as a table and as numbers by prediction."""
    mean, num_subjects = train.edges.mean(axis=0), len(test.edges)
    metrics = [
        (mean_over_subjects("beyond_mean", "r beyond the group mean", 0.0), beyond_the_mean),
        (mean_over_subjects("identified", "identified", 1 / num_subjects), identified),
    ]
    rows: list[list[str]] = []
    numbers: dict[str, Mapping[str, float]] = {}
    for name, predicted in predicted_edges(train, test).items():
        of_subjects = {metric.name: function(predicted, test.edges, mean) for metric, function in metrics}
        rows.append([name, *(str(metric.interval(of_subjects[metric.name], bootstrap)) for metric, _ in metrics)])
        numbers[name] = {metric.name: metric.value(of_subjects[metric.name]) for metric, _ in metrics}
    text = (
        f"Learned from {len(train.edges)} training subjects, asked about {num_subjects} others. r is the correlation "
        "of predicted and true edges of a subject, both less the training subjects' mean, so the group mean has 0 by "
        f"definition. Identified: the own true matrix resembles the prediction most (chance {1 / num_subjects:.3f}). "
        "Time courses are not predicted: spontaneous activity has no phase that a T1 could know."
    )
    head = ["", *(metric.title for metric, _ in metrics)]
    return Section("Connectivity from a T1 alone", [head, *rows], text), numbers
