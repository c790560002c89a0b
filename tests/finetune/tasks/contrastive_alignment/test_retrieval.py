"""Retrieval, its chance, and how embeddings lie: known values, and a control that must give chance."""

from __future__ import annotations

import math

import numpy as np
import pytest

from finetune.tasks.contrastive_alignment.retrieval import (
    METRICS,
    Similarities,
    chance,
    geometry,
    shuffled_recall,
    similarities,
)
from training.statistics import BootstrapConfig

BY_NAME = {metric.name: metric for metric in METRICS}
BOOTSTRAP = BootstrapConfig(num_resamples=200, confidence=0.95, seed=0)


def of(cosines: np.ndarray) -> Similarities:
    return Similarities(tuple(f"s{row}" for row in range(len(cosines))), cosines)


def test_a_constant_embedding_is_found_by_exactly_chance() -> None:
    constant = of(np.full((8, 8), 0.23))
    for metric in METRICS:
        assert metric.value(constant) == pytest.approx(chance(metric.name, 8))
    assert [chance(f"recall_{k}", 8) for k in (1, 5, 10)] == [1 / 8, 5 / 8, 1.0]
    assert chance("median_rank", 5) == 3.0


def test_recall_and_rank_are_those_of_each_direction() -> None:
    cosines = np.array([[0.9, 0.1, 0.2, 0.3], [0.8, 0.7, 0.0, 0.1], [0.0, 0.1, 0.2, 0.3], [0.1, 0.2, 0.3, 0.4]])
    found = of(cosines)
    values = {name: metric.value(found) for name, metric in BY_NAME.items()}
    assert values["recall_1_structure_to_function"] == 2 / 4  # of rows 0 and 3
    assert values["recall_1_function_to_structure"] == 3 / 4  # of column 2, row 3 is nearer
    assert values["recall_1"] == 5 / 8
    assert values["recall_5"] == 1.0
    assert values["median_rank_structure_to_function"] == 1.5
    assert values["median_rank_function_to_structure"] == 1.0


def test_intervals_are_of_subjects_whose_questions_are_drawn_together() -> None:
    generator = np.random.default_rng(1)
    first = generator.standard_normal((40, 16))
    found = similarities(of(np.eye(40)).subjects, first, first + 1.5 * generator.standard_normal((40, 16)))
    metric = BY_NAME["recall_1"]
    interval = metric.interval(found, BOOTSTRAP)
    assert 0 < interval.low < interval.value < interval.high < 1
    weights = np.zeros((1, 40))
    weights[0, [3, 7]] = 1
    rows = [found.cosines[3], found.cosines[:, 3], found.cosines[7], found.cosines[:, 7]]
    expected = np.mean([row.argmax() == own for row, own in zip(rows, (3, 3, 7, 7), strict=True)])
    assert metric.function(found, weights) == pytest.approx([expected])
    assert BY_NAME["median_rank"].value(found) == np.median(
        [1 + (row > row[own]).sum() for side in (found.cosines, found.cosines.T) for own, row in enumerate(side)]
    )


def test_shuffled_pairs_are_found_by_chance() -> None:
    perfect = of(np.eye(10))
    assert BY_NAME["recall_1"].value(perfect) == 1.0
    found = shuffled_recall(perfect, num_permutations=2000, generator=np.random.default_rng(0))
    assert found.mean() == pytest.approx(0.1, abs=4 * found.std() / math.sqrt(len(found)))


def test_a_collapsed_side_is_told_from_an_unrelated_one() -> None:
    generator = np.random.default_rng(2)
    unrelated, constant = generator.standard_normal((20, 512)), np.ones((20, 512))
    numbers = geometry(unrelated, constant)
    assert numbers["rank_structure"] == pytest.approx(18.9, abs=0.2)
    assert (numbers["rank_function"], numbers["variance_function"]) == pytest.approx((0.0, 0.0), abs=1e-9)
    assert numbers["variance_structure"] == pytest.approx(0.95, abs=0.02)
    assert numbers["uniformity_function"] == pytest.approx(0.0, abs=1e-9)
    assert numbers["uniformity_structure"] == pytest.approx(-4.0, abs=0.05)


def test_alignment_and_cosines_of_known_vectors() -> None:
    first = np.array([[1.0, 0.0], [0.0, 2.0]])
    second = np.array([[0.6, 0.8], [0.0, 1.0]])
    numbers = geometry(first, second)
    assert numbers["positive_cosine"] == pytest.approx((0.6 + 1.0) / 2)
    assert numbers["negative_cosine"] == pytest.approx((0.0 + 0.8) / 2)
    assert numbers["alignment"] == pytest.approx((0.8 + 0.0) / 2)
