"""A model replaces the champion only when it is better than it and than its baselines, on the same subjects."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from finetune.tasks.subject_prediction.champion import kept_scores, reasons_against
from finetune.tasks.subject_prediction.scores import AUROC, Scores
from training.registry.seen_subjects import hash_subject
from training.statistics import BootstrapConfig

CONFIG = BootstrapConfig(num_resamples=200, confidence=0.95, seed=0)
NOISE = np.random.default_rng(0).normal(size=80)


def planted(shift: float, first: int = 0) -> Scores:
    """Scores of 80 subjects that are `shift` standard deviations higher for cases."""
    is_case = np.arange(80) % 2 == 0
    names = tuple(f"sub-{index + first:03d}" for index in range(80))
    return Scores(names, NOISE + shift * is_case, is_case, np.repeat(["a", "b"], 40))


def against(shift: float, champion: Scores | None, baseline: float = 0.0) -> list[str]:
    models = {"model": planted(shift), "weak": planted(-1.0), "baseline": planted(baseline)}
    return reasons_against(AUROC, models, None if champion is None else kept_scores(champion), CONFIG)


def test_the_first_champion_is_better_than_its_best_baseline() -> None:
    assert against(2.0, None) == []
    (reason,) = against(1.0, None, baseline=1.0)
    assert reason.startswith("AUROC: not told apart from baseline: difference +0.000")


def test_a_better_model_replaces_the_champion() -> None:
    assert against(2.0, planted(0.5)) == []


@pytest.mark.parametrize(
    ("shift", "told"), [(0.5, "worse than the champion: difference -"), (2.0, "not told apart from the champion")]
)
def test_a_worse_or_equal_model_does_not(shift: float, told: str) -> None:
    (reason,) = against(shift, planted(2.0), baseline=-2.0)
    assert reason.startswith(f"AUROC: {told}")


def test_a_champion_of_other_subjects_or_labels_is_not_compared() -> None:
    (reason,) = against(2.0, planted(0.0, first=20))
    assert reason.startswith("the champion was scored on other subjects: 60 of its 80 are among the 80 of this run")
    other = replace(planted(0.0), truth=~planted(0.0).truth)
    assert against(2.0, other) == ["the champion was scored with other labels or sites of the same subjects"]


def test_kept_scores_name_nobody() -> None:
    kept = kept_scores(planted(1.0))
    assert "sub-" not in kept
    assert hash_subject("000") in kept
