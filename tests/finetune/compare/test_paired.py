"""Comparisons of arms over seeds and subjects: against known metrics, and calibrated on simulated scores."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm

from finetune.compare.paired import (
    Difference,
    Estimate,
    differences,
    estimate,
    resampled_metrics,
    subject_freedom,
    verdict,
)
from finetune.tasks.subject_prediction.scores import CLASS_METRICS, VALUE_METRICS, Scores
from training.statistics import BootstrapConfig, Metric

WITHIN_SITES, _, BALANCED_ACCURACY = CLASS_METRICS
Arms = dict[str, list[list[Scores]]]
NUM_STUDIES = 200
CONFIG = BootstrapConfig(num_resamples=120, confidence=0.95, seed=0)
PERSON, NOISE, SHIFT = 1.0, 0.6, 1.0


def draw_readings(
    generator: np.random.Generator,
    *,
    num_units: int,
    seed_spread: float,
    effect: float = 0.0,
    num_subjects: int = 60,
    num_repeats: int = 1,
) -> Arms:
    """Three arms whose scores share the subjects' own difficulty; the last two tell cases better by `effect`."""
    sites = np.tile(["a", "b", "c"], num_subjects // 3)
    is_case = np.arange(num_subjects) // 3 % 2 == 0
    person = PERSON * generator.normal(size=num_subjects)
    values = {}
    for arm, gain in (("plain", 0.0), ("second", effect), ("third", effect)):
        strength = SHIFT + gain + seed_spread * generator.normal(size=(num_units, 1, 1))
        noise = NOISE * generator.normal(size=(num_units, num_repeats, num_subjects))
        values[arm] = strength * is_case + person + noise
    return arms_of(values, is_case, sites)


def arms_of(values: dict[str, np.ndarray], is_case: np.ndarray, sites: np.ndarray) -> Arms:
    """Scores from values [unit, repeat, subject] of every arm."""
    names = tuple(map(str, range(len(sites))))
    return {
        arm: [[Scores(names, one, is_case, sites) for one in repeats] for repeats in units]
        for arm, units in values.items()
    }


def spare(arms: Arms) -> int:
    return subject_freedom(WITHIN_SITES.strata(arms["plain"][0][0]))


def judged(arms: Arms, config: BootstrapConfig = CONFIG) -> list[Difference]:
    draws = resampled_metrics(arms, WITHIN_SITES, config)
    pairs = [("second", "plain"), ("third", "plain")]
    return differences(draws, pairs, WITHIN_SITES, subject_freedom=spare(arms), confidence=config.confidence)


def is_claim(difference: Difference) -> bool:
    return not difference.verdict.startswith("no difference shown")


def studies(*, num_units: int, seed_spread: float, effect: float = 0.0) -> list[list[Difference]]:
    generator = np.random.default_rng(1)
    return [
        judged(
            draw_readings(generator, num_units=num_units, seed_spread=seed_spread, effect=effect),
            BootstrapConfig(CONFIG.num_resamples, CONFIG.confidence, seed),
        )
        for seed in range(NUM_STUDIES)
    ]


def test_metrics_without_resampling_are_the_means_over_repeats_of_each_units_own() -> None:
    arms = draw_readings(np.random.default_rng(0), num_units=2, seed_spread=0.2, num_repeats=3)
    for metric in CLASS_METRICS:
        found = resampled_metrics(arms, metric, CONFIG)["second"]
        assert found.shape == (1 + CONFIG.num_resamples, 2)
        by_hand = [np.mean([metric.value(scores) for scores in unit]) for unit in arms["second"]]
        np.testing.assert_allclose(found[0], by_hand, atol=1e-12)


def test_sites_with_one_case_and_one_control_do_not_make_intervals_too_short() -> None:
    generator = np.random.default_rng(1)
    sites = np.repeat([f"s{number:02d}" for number in range(13)], [2] * 12 + [12])
    is_case, covered = np.arange(len(sites)) % 2 == 0, 0
    for seed in range(100):
        person = is_case + generator.normal(size=len(sites))
        values = {arm: person + 0.8 * generator.normal(size=(1, 1, len(sites))) for arm in ("plain", "second")}
        arms = arms_of(values, is_case, sites)
        draws = resampled_metrics(arms, BALANCED_ACCURACY, BootstrapConfig(120, 0.95, seed))
        difference = draws["second"] - draws["plain"]
        found = estimate(difference, subject_freedom=spare(arms), confidence=0.95, null=0.0)
        covered += found.low <= 0 <= found.high
    assert covered >= 85  # 88; 58 where those subjects were never drawn otherwise


def test_a_draw_without_a_pair_of_one_site_is_left_out() -> None:
    sites, is_case = np.array(["a", "a", "b", "b"]), np.array([True, False, True, False])
    values = {arm: np.array([[[0.0, 1.0, 2.0, 3.0]]]) * sign for arm, sign in (("plain", 1), ("second", -1))}
    draws = resampled_metrics(arms_of(values, is_case, sites), WITHIN_SITES, CONFIG)
    difference = draws["second"] - draws["plain"]
    is_defined = np.isfinite(difference[:, 0])
    assert 1 < is_defined.sum() < 1 + CONFIG.num_resamples
    kept = estimate(difference[is_defined], subject_freedom=2, confidence=0.95, null=0.0)
    assert estimate(difference, subject_freedom=2, confidence=0.95, null=0.0) == kept


def test_a_class_with_one_subject_and_a_metric_without_a_chance_claim_nothing() -> None:
    values = {arm: np.arange(4.0)[None, None] for arm in ("plain", "second", "third")}
    same = judged(arms_of(values, np.array([True, False, False, False]), np.full(4, "a")))[0]
    assert same.verdict == "no difference shown: too few test subjects of one class"
    assert (same.estimate.value, same.p_corrected) == (0, 1)
    draws = resampled_metrics(arms_of(values, np.arange(4) + 1.0, np.full(4, "a")), VALUE_METRICS[2], CONFIG)["plain"]
    error = estimate(
        draws + np.random.default_rng(0).normal(size=draws.shape), subject_freedom=3, confidence=0.95, null=None
    )
    assert np.isnan(error.p)
    assert error.low < error.value < error.high


def test_one_arm_under_two_names_shows_no_difference() -> None:
    readings = draw_readings(np.random.default_rng(0), num_units=3, seed_spread=0.5)
    twice = {**readings, "second": readings["plain"]}
    same = judged(twice)[0]
    assert (same.estimate.value, same.estimate.low, same.estimate.high, same.p_corrected) == (0, 0, 0, 1)
    assert "as one encoder under two names" in same.verdict


def test_labels_without_meaning_put_every_arm_at_chance_and_claim_nothing() -> None:
    generator = np.random.default_rng(2)
    claims, chance = 0, 0
    for seed in range(60):
        readings = draw_readings(generator, num_units=3, seed_spread=0.3)
        is_case = readings["plain"][0][0].truth
        permuted = np.concatenate([generator.permutation(is_case[site::3]) for site in range(3)])
        permuted = permuted.reshape(3, -1).T.ravel()  # inside each site, so every site keeps its share of cases
        shuffled = {
            arm: [[replace(scores, truth=permuted) for scores in unit] for unit in units]
            for arm, units in readings.items()
        }
        found = judged(shuffled, BootstrapConfig(120, 0.95, seed))
        claims += any(map(is_claim, found))
        draws = resampled_metrics(shuffled, WITHIN_SITES, CONFIG)["plain"]
        own = estimate(draws, subject_freedom=spare(shuffled), confidence=0.95, null=0.5)
        chance += own.low <= 0.5 <= own.high
    assert claims <= 6  # 5 % of 60 are 3, and twice as many are not unlikely
    assert chance >= 53


@pytest.mark.parametrize(("num_units", "seed_spread"), [(1, 0.0), (2, 0.2), (3, 0.4), (5, 0.2)])
def test_intervals_of_equal_arms_hold_zero_19_times_in_20_and_corrected_claims_stay_as_rare(
    num_units: int, seed_spread: float
) -> None:
    found = studies(num_units=num_units, seed_spread=seed_spread)
    covered = np.mean([each.estimate.low <= 0 <= each.estimate.high for study in found for each in study])
    claimed = np.mean([any(map(is_claim, study)) for study in found])
    assert 0.92 <= covered <= 1.0
    assert claimed <= 0.05 + 2 * (0.05 * 0.95 / NUM_STUDIES) ** 0.5


def test_an_arms_interval_holds_the_metric_of_all_subjects_and_seeds() -> None:
    spread = 0.3
    truth = norm.cdf(SHIFT / (2 * (PERSON**2 + NOISE**2) + spread**2) ** 0.5)
    generator, covered = np.random.default_rng(3), 0
    for seed in range(NUM_STUDIES):
        readings = draw_readings(generator, num_units=3, seed_spread=spread)
        draws = resampled_metrics(readings, WITHIN_SITES, BootstrapConfig(120, 0.95, seed))["plain"]
        own = estimate(draws, subject_freedom=spare(readings), confidence=0.95, null=0.5)
        covered += own.low <= truth <= own.high
    assert 0.91 <= covered / NUM_STUDIES <= 0.99


def test_a_true_difference_is_found_and_its_direction_is_right() -> None:
    found = studies(num_units=5, seed_spread=0.1, effect=0.8)
    better = [each.verdict.startswith("better") for study in found for each in study]
    worse = [each.verdict.startswith("worse") for study in found for each in study]
    assert np.mean(better) > 0.8
    assert not any(worse)


def test_a_verdict_says_its_size_its_interval_and_why_not() -> None:
    def said(low: float, high: float, p_corrected: float, metric: Metric = WITHIN_SITES) -> str:
        found = Estimate((low + high) / 2, low, high, p_corrected / 4)
        return verdict(found, p_corrected, metric, num_pairs=4, confidence=0.95)

    assert said(0.01, 0.09, 0.02) == "better by 0.050 [+0.010, +0.090]"
    assert said(-0.09, -0.01, 0.02) == "worse by 0.050 [-0.090, -0.010]"
    error = VALUE_METRICS[2]  # the lowest is best
    assert said(0.01, 0.09, 0.02, error) == "worse by 0.050 [+0.010, +0.090]"
    assert said(-0.09, -0.01, 0.02, error) == "better by 0.050 [-0.090, -0.010]"
    assert said(-0.01, 0.09, 0.3) == "no difference shown: interval [-0.010, +0.090] contains 0"
    expected = "no difference shown: [+0.010, +0.090] does not hold for 4 comparisons (Holm p = 0.08)"
    assert said(0.01, 0.09, 0.08) == expected
