"""Connectivity from T1s: known answers, and a planted relation that only some of the predictions can use."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.tasks.contrastive_alignment.connectivity import (
    EMBEDDING,
    MEAN,
    NEAREST,
    PATCHES,
    People,
    beyond_the_mean,
    connectivity_section,
    identified,
    predicted_edges,
)
from training.statistics import BootstrapConfig

TRUE = np.array([[1.0, 2.0, 3.0, 0.0], [3.0, 1.0, 0.0, 2.0]])
NO_MEAN = np.zeros(4)


def people(num_subjects: int, seed: int) -> People:
    """Edges follow from an embedding; patches know nothing of it."""
    weights = np.random.default_rng(0).standard_normal((8, 30))
    generator = np.random.default_rng(seed)
    structure = generator.standard_normal((num_subjects, 8))
    structure /= np.linalg.norm(structure, axis=1, keepdims=True)
    patches = generator.standard_normal((num_subjects, 12))
    return People(
        structure, structure, patches, 5 + structure @ weights + 0.1 * generator.standard_normal((num_subjects, 30))
    )


def test_correlation_is_beyond_the_group_mean() -> None:
    mean = np.array([1.0, 1.0, 2.0, 0.0])
    expected = [np.corrcoef(row - mean, other - mean)[0, 1] for row, other in zip(TRUE[::-1], TRUE, strict=True)]
    assert beyond_the_mean(TRUE[::-1], TRUE, mean) == pytest.approx(expected)
    assert beyond_the_mean(np.repeat(mean[None], 2, axis=0), TRUE, mean).tolist() == [0.0, 0.0]


def test_identification_asks_for_the_own_matrix_and_ties_share() -> None:
    assert identified(TRUE, TRUE, NO_MEAN).tolist() == [1.0, 1.0]
    assert identified(TRUE[::-1], TRUE, NO_MEAN).tolist() == [0.0, 0.0]
    assert identified(np.zeros((2, 4)), TRUE, NO_MEAN).tolist() == [0.5, 0.5]


def test_what_the_embedding_knows_is_found_and_what_patches_do_not_know_is_not() -> None:
    train, test = people(60, 1), people(10, 2)
    mean = train.edges.mean(axis=0)
    found = {
        name: beyond_the_mean(each, test.edges, mean).mean() for name, each in predicted_edges(train, test).items()
    }
    assert found[EMBEDDING] > 0.95 > found[NEAREST] > 0.5
    assert abs(found[PATCHES]) < 0.2
    assert found[MEAN] == 0.0
    section, numbers = connectivity_section(train, test, BootstrapConfig(50, 0.95, 0))
    assert [row[0] for row in section.table] == ["", EMBEDDING, PATCHES, NEAREST, MEAN]
    assert numbers[EMBEDDING]["identified"] == 1.0
    assert numbers[MEAN]["identified"] == pytest.approx(0.1)
    assert "chance 0.100" in section.text
