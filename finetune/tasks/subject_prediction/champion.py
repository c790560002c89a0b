"""Whether a model may replace the champion: paired intervals beside it and the baselines, on the same subjects.

Scores travel with a registered model under hashes of their subjects' names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from finetune.tasks.subject_prediction.scores import Scores, read_scores, scores_table
from training.registry.seen_subjects import hash_subject
from training.statistics import BETTER, BootstrapConfig, Metric, paired_verdict

CHAMPION = "the champion"
OWN = "this model"


def kept_scores(scores: Scores) -> str:
    """The table of a model's test scores to keep with it, subjects named by their hashes."""
    return scores_table({OWN: by_hash(scores)})


def by_hash(scores: Scores) -> Scores:
    """The scores with their subjects named by hashes, sorted by them."""
    hashes = np.array([hash_subject(subject) for subject in scores.subjects])
    return replace(scores, subjects=tuple(hashes.tolist())).take(np.argsort(hashes))


def reasons_against(
    metric: Metric, models: Mapping[str, Scores], champion: str | None, config: BootstrapConfig
) -> list[str]:
    """Why the first of `models`, whose others are its baselines, may not become champion; empty when it may.

    `champion` is the table kept with the present one; None where there is none yet.
    """
    draws = {name: metric.draws(scores, config) for name, scores in models.items()}
    verdicts = [paired_verdict(metric, draws, config.confidence)]
    if champion is not None:
        own, (other,) = by_hash(next(iter(models.values()))), read_scores(champion).values()
        if own.subjects != other.subjects:
            shared = len(set(own.subjects) & set(other.subjects))
            return [
                f"the champion was scored on other subjects: {shared} of its {len(other.subjects)} are among the "
                f"{len(own.subjects)} of this run; fine-tune both on one set with one test split"
            ]
        if not (np.array_equal(own.truth, other.truth) and np.array_equal(own.sites, other.sites)):
            return ["the champion was scored with other labels or sites of the same subjects"]
        both = {OWN: metric.draws(own, config), CHAMPION: metric.draws(other, config)}
        verdicts.append(paired_verdict(metric, both, config.confidence))
    return [f"{metric.title}: {verdict}" for verdict in verdicts if not verdict.startswith(BETTER)]
