"""Metrics of dissimilarity matrices equal scipy's and scikit-learn's, also for resampled images."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import r2_score

from finetune.tasks.rdm_prediction.metrics import METRICS, RdmScores, permutation_p
from training.statistics import BootstrapConfig

METRIC_OF = {metric.name: metric for metric in METRICS}


def scores(num_images: int = 14, *, noise: float = 1.0, decimals: int = 9) -> RdmScores:
    """Distances of points on a plane, and noisy ones; few decimals make ties."""
    numbers = np.random.default_rng(3)
    points = numbers.normal(size=(num_images, 2))
    true = np.linalg.norm(points[:, None] - points, axis=2)
    errors = numbers.normal(size=true.shape) * noise
    predicted = true + errors + errors.T
    names = tuple(f"image-{number}" for number in range(num_images))
    return RdmScores.of_all_pairs(names, predicted.round(decimals), true.round(decimals))


def expanded(of: RdmScores, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values of every pair as often as its images were drawn together."""
    rows, columns = np.nonzero(of.is_pair)
    return tuple(np.repeat(values, counts[rows] * counts[columns]) for values in of.pairs())  # type: ignore[return-value]


@pytest.mark.parametrize("decimals", [9, 0])
def test_the_metrics_of_a_split_equal_those_of_scipy_and_scikit_learn(decimals: int) -> None:
    found = scores(decimals=decimals)
    predicted, true = found.pairs()
    assert METRIC_OF["r2"].value(found) == pytest.approx(r2_score(true, predicted), abs=1e-12)
    assert METRIC_OF["pearson"].value(found) == pytest.approx(stats.pearsonr(predicted, true)[0], abs=1e-12)
    assert METRIC_OF["spearman"].value(found) == pytest.approx(stats.spearmanr(predicted, true)[0], abs=1e-12)
    signs = np.sign(predicted[:, None] - predicted) * np.sign(true[:, None] - true)
    tau_a = signs.sum() / (len(true) * (len(true) - 1))
    assert METRIC_OF["kendall"].value(found) == pytest.approx(tau_a, abs=1e-12)


@pytest.mark.parametrize("decimals", [9, 0])
def test_a_resample_of_images_scores_as_its_pairs_written_out(decimals: int) -> None:
    found = scores(decimals=decimals)
    counts = np.random.default_rng(0).integers(0, 4, size=14)
    predicted, true = expanded(found, counts)
    weighted = {metric.name: metric.function(found, counts[None].astype(float))[0] for metric in METRICS}
    assert weighted["r2"] == pytest.approx(r2_score(true, predicted), abs=1e-12)
    assert weighted["pearson"] == pytest.approx(stats.pearsonr(predicted, true)[0], abs=1e-12)
    assert weighted["spearman"] == pytest.approx(stats.spearmanr(predicted, true)[0], abs=1e-12)
    one = np.array([counts[row] * counts[column] for row, column in zip(*np.nonzero(found.is_pair), strict=True)])
    values = found.pairs()
    signs = np.sign(values[0][:, None] - values[0]) * np.sign(values[1][:, None] - values[1])
    assert weighted["kendall"] == pytest.approx((one @ signs @ one) / (one.sum() ** 2 - one @ one), abs=1e-12)


def test_the_interval_is_over_images_and_wider_than_one_over_pairs_would_be() -> None:
    found = scores(30)
    config = BootstrapConfig(num_resamples=300, confidence=0.95, seed=0)
    interval = METRIC_OF["spearman"].interval(found, config)
    assert interval.low < interval.value < interval.high
    predicted, true = found.pairs()
    numbers = np.random.default_rng(0)
    by_pair = [
        stats.spearmanr(predicted[drawn], true[drawn])[0]
        for drawn in numbers.integers(0, len(true), size=(300, len(true)))
    ]
    over_pairs = np.subtract(*np.quantile(by_pair, [0.975, 0.025]))
    assert interval.high - interval.low > 1.15 * over_pairs


def test_a_constant_prediction_has_no_correlation_and_agrees_in_no_order() -> None:
    found = scores()
    constant = RdmScores(found.stimuli, np.ones_like(found.true), found.true, found.is_pair)
    assert np.isnan(METRIC_OF["spearman"].value(constant))
    assert np.isnan(METRIC_OF["pearson"].value(constant))
    assert METRIC_OF["kendall"].value(constant) == 0


def test_permuted_image_labels_rarely_reach_a_true_correlation_and_often_a_false_one() -> None:
    found = scores(20, noise=0.3)
    p = permutation_p(found, num_permutations=99, generator=np.random.default_rng(0))
    assert p == 0.01
    order = np.random.default_rng(5).permutation(20)
    shuffled = RdmScores(found.stimuli, found.predicted[np.ix_(order, order)], found.true, found.is_pair)
    assert permutation_p(shuffled, num_permutations=99, generator=np.random.default_rng(0)) > 0.05
