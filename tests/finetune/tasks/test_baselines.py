"""Baselines against numpy, scikit-learn and known answers; nothing of the test split may reach training."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from finetune.errors import FinetuneError
from finetune.tasks.subject_prediction.baselines import (
    LinearConfig,
    connectivity,
    fit_logistic,
    site_means,
    standardiser,
)

CONFIG = LinearConfig(strengths=[0.001, 0.1], num_folds=4, regress_out_site=False, seed=0)


def test_connectivity_is_fisher_z_of_pearson_in_row_order() -> None:
    series = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    correlation = np.corrcoef(series.T.astype(np.float64))
    expected = [np.arctanh(correlation[row, column]) for row in range(5) for column in range(row + 1, 5)]
    np.testing.assert_allclose(connectivity(series), expected, atol=1e-6)


def test_a_region_not_measured_or_constant_has_no_connectivity() -> None:
    series = np.random.default_rng(0).normal(size=(60, 4))
    series[:, 1], series[:, 3] = np.nan, 2.0
    is_known = np.isfinite(connectivity(series))
    np.testing.assert_array_equal(is_known, [False, True, False, False, False, False])
    with pytest.raises(FinetuneError, match="at least 3 frames, the run has 2"):
        connectivity(series[:2])


def test_logistic_ranks_as_scikit_learn_does_and_its_logits_are_calibrated() -> None:
    generator = np.random.default_rng(1)
    is_case = generator.random(60) < 0.5
    features = generator.normal(size=(60, 200)) + 0.4 * is_case[:, None] * (np.arange(200) < 20)
    fit = fit_logistic(features, is_case, sites=np.full(60, "a"), config=CONFIG)
    scaled = (features - features.mean(axis=0)) / features.std(axis=0)
    reference = LogisticRegression(C=fit.strength, max_iter=2000, tol=1e-8).fit(scaled, is_case)
    ours, theirs = fit.score(features, np.full(60, "a")), reference.decision_function(scaled)
    slope, shift = np.polyfit(theirs, ours, 1)
    np.testing.assert_allclose(ours, slope * theirs + shift, atol=5e-3)
    assert slope > 0
    assert fit.inner_score > 0.6


def test_an_overconfident_fit_is_calibrated_on_held_out_folds() -> None:
    generator = np.random.default_rng(4)
    is_case = np.arange(400) % 4 == 0
    features = generator.normal(size=(400, 300)) + 0.35 * is_case[:, None] * (np.arange(300) < 30)
    config = LinearConfig(strengths=[10.0], num_folds=5, regress_out_site=False, seed=0)
    sites = np.full(200, "a")
    fit = fit_logistic(features[:200], is_case[:200], sites=sites, config=config)
    held_out = fit.score(features[200:], sites)
    slope = LogisticRegression(C=1e3, class_weight="balanced").fit(held_out[:, None], is_case[200:]).coef_[0, 0]
    assert 0.5 < slope < 2


def test_penalty_is_chosen_honestly_so_noise_scores_near_chance_inside() -> None:
    generator = np.random.default_rng(2)
    inner = [
        fit_logistic(
            generator.normal(size=(60, 300)), np.arange(60) % 2 == 0, sites=np.full(60, "a"), config=CONFIG
        ).inner_score
        for _ in range(8)
    ]
    assert abs(float(np.mean(inner)) - 0.5) < 0.1


def test_site_means_come_from_training_and_a_new_site_gets_the_overall_mean() -> None:
    features = np.array([[1.0], [3.0], [11.0], [13.0]])
    scale = standardiser(features, np.array(["a", "a", "b", "b"]), by_site=True)
    np.testing.assert_allclose(scale.apply(np.array([[2.0], [12.0], [7.0]]), np.array(["a", "b", "new"])), 0.0)
    assert scale.spread[0] == 1.0


def test_missing_features_take_the_training_mean_and_touch_no_other() -> None:
    features = np.random.default_rng(3).normal(size=(20, 3))
    features[:, 2] = np.nan
    features[0, 0] = np.nan
    scale = standardiser(features, np.full(20, "a"), by_site=False)
    scaled = scale.apply(features, np.full(20, "a"))
    assert scaled[0, 0] == 0.0
    assert (scaled[:, 2] == 0.0).all()
    assert np.isfinite(scaled).all()


def test_site_alone_scores_the_training_prevalence() -> None:
    train_sites, is_case = np.array(["a", "a", "b", "b"]), np.array([True, False, True, True])
    scores = site_means(train_sites, is_case, np.array(["b", "a", "new"]))
    np.testing.assert_allclose(scores, [1.0, 0.5, 0.75])


def test_one_class_in_training_is_refused() -> None:
    with pytest.raises(FinetuneError, match="0 subjects of its rarer class"):
        fit_logistic(np.zeros((4, 2)), np.zeros(4, dtype=bool), sites=np.full(4, "a"), config=CONFIG)
