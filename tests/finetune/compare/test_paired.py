"""Comparisons of arms over seeds and subjects: against known metrics, and calibrated on simulated scores."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from finetune.compare.paired import (
    Difference,
    Estimate,
    Readings,
    differences,
    estimate,
    holm,
    resampled_metrics,
    spare_subjects,
    strata_of,
    subject_weights,
    verdict,
)
from finetune.tasks.subject_prediction.scores import CLASS_METRICS, Scores
from training.statistics import BootstrapConfig

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
) -> Readings:
    """Three arms whose scores share the subjects' own difficulty; the last two tell cases better by `effect`."""
    sites = np.tile(["a", "b", "c"], num_subjects // 3)
    is_case = np.arange(num_subjects) // 3 % 2 == 0
    person = PERSON * generator.normal(size=num_subjects)
    values = {}
    for arm, gain in (("plain", 0.0), ("second", effect), ("third", effect)):
        strength = SHIFT + gain + seed_spread * generator.normal(size=(num_units, 1, 1))
        noise = NOISE * generator.normal(size=(num_units, num_repeats, num_subjects))
        values[arm] = strength * is_case + person + noise
    return Readings(values, is_case, sites)


def judged(readings: Readings, config: BootstrapConfig = CONFIG) -> list[Difference]:
    draws = resampled_metrics(readings, "within_site_auroc", config)
    pairs = [("second", "plain"), ("third", "plain")]
    return differences(draws, pairs, spare_subjects=spare_subjects(readings), confidence=config.confidence)


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


def test_metrics_without_resampling_are_those_of_the_evaluation_ties_included() -> None:
    generator = np.random.default_rng(0)
    readings = draw_readings(generator, num_units=2, seed_spread=0.2, num_repeats=3)
    rounded = {arm: np.round(values, 0) for arm, values in readings.values.items()}
    readings = Readings(rounded, readings.is_case, readings.sites)
    names = tuple(map(str, range(60)))
    for metric in CLASS_METRICS:
        found = resampled_metrics(readings, metric.name, CONFIG)["second"]  # type: ignore[arg-type]
        assert found.shape == (1 + CONFIG.num_resamples, 2)
        by_hand = [
            np.mean([metric.value(Scores(names, values, readings.is_case, readings.sites)) for values in unit])
            for unit in rounded["second"]
        ]
        np.testing.assert_allclose(found[0], by_hand, atol=1e-12)


def test_resamples_keep_every_stratums_weight_and_a_mean_varies_as_theory_says() -> None:
    strata = np.repeat(["a0", "a1", "b1"], [4, 9, 1])
    weights = subject_weights(strata, BootstrapConfig(4000, 0.95, 0))
    for name, size in (("a0", 4), ("a1", 9), ("b1", 1)):
        np.testing.assert_allclose(weights[:, strata == name].sum(axis=1), size)
    values = np.random.default_rng(0).normal(size=4)
    means = weights[1:, strata == "a0"] @ values / 4
    assert means.var() == pytest.approx(values.var(ddof=1) / 4, rel=0.1)  # a plain bootstrap gives three quarters of it


def test_a_subject_alone_in_its_site_and_class_is_drawn_with_others_of_its_class() -> None:
    sites = np.array(["a", "a", "b", "c", "d", "d", "d", "e"])
    is_case = np.array([True, True, True, True, False, False, False, False])
    readings = Readings({}, is_case, sites)
    together = [[0, 1], [2, 3], [4, 5, 6, 7]]  # the one control alone joins the smallest stratum of controls
    strata = strata_of(readings)
    assert sorted(np.flatnonzero(strata == one).tolist() for one in np.unique(strata)) == together
    assert spare_subjects(readings) == 8 - 3


def test_sites_with_one_case_and_one_control_do_not_make_intervals_too_short() -> None:
    generator = np.random.default_rng(1)
    sites = np.repeat([f"s{number:02d}" for number in range(13)], [2] * 12 + [12])
    is_case, covered = np.arange(len(sites)) % 2 == 0, 0
    for seed in range(100):
        person = is_case + generator.normal(size=len(sites))
        values = {arm: person + 0.8 * generator.normal(size=(1, 1, len(sites))) for arm in ("plain", "second")}
        readings = Readings(values, is_case, sites)
        draws = resampled_metrics(readings, "balanced_accuracy", BootstrapConfig(120, 0.95, seed))
        difference, spare = draws["second"] - draws["plain"], spare_subjects(readings)
        found = estimate(difference, spare_subjects=spare, confidence=0.95, null=0.0)
        covered += found.low <= 0 <= found.high
    assert covered >= 85  # 88; 58 where those subjects were never drawn otherwise


def test_a_draw_without_a_pair_of_one_site_is_left_out() -> None:
    sites, is_case = np.array(["a", "a", "b", "b"]), np.array([True, False, True, False])
    values = {arm: np.arange(4.0)[None, None] for arm in ("plain", "second")}
    draws = resampled_metrics(Readings(values, is_case, sites), "within_site_auroc", CONFIG)
    assert np.isfinite(draws["plain"]).all()
    assert 1 < len(draws["plain"]) < 1 + CONFIG.num_resamples
    assert len(draws["plain"]) == len(draws["second"])


def test_holm_is_the_step_down_of_its_paper() -> None:
    np.testing.assert_allclose(holm([0.04, 0.01, 0.03]), [0.06, 0.03, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]


def test_one_arm_under_two_names_shows_no_difference() -> None:
    readings = draw_readings(np.random.default_rng(0), num_units=3, seed_spread=0.5)
    twice = Readings({**readings.values, "second": readings.values["plain"]}, readings.is_case, readings.sites)
    same = judged(twice)[0]
    assert (same.estimate.value, same.estimate.low, same.estimate.high, same.p_corrected) == (0, 0, 0, 1)
    assert "as one encoder under two names" in same.verdict


def test_labels_without_meaning_put_every_arm_at_chance_and_claim_nothing() -> None:
    generator = np.random.default_rng(2)
    claims, chance = 0, 0
    for seed in range(60):
        readings = draw_readings(generator, num_units=3, seed_spread=0.3)
        permuted = np.concatenate([generator.permutation(readings.is_case[site::3]) for site in range(3)])
        permuted = permuted.reshape(3, -1).T.ravel()  # inside each site, so every site keeps its share of cases
        shuffled = Readings(readings.values, permuted, readings.sites)
        found = judged(shuffled, BootstrapConfig(120, 0.95, seed))
        claims += any(map(is_claim, found))
        draws = resampled_metrics(shuffled, "within_site_auroc", CONFIG)["plain"]
        own = estimate(draws, spare_subjects=spare_subjects(shuffled), confidence=0.95, null=0.5)
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
        draws = resampled_metrics(readings, "within_site_auroc", BootstrapConfig(120, 0.95, seed))["plain"]
        own = estimate(draws, spare_subjects=spare_subjects(readings), confidence=0.95, null=0.5)
        covered += own.low <= truth <= own.high
    assert 0.91 <= covered / NUM_STUDIES <= 0.99


def test_a_true_difference_is_found_and_its_direction_is_right() -> None:
    found = studies(num_units=5, seed_spread=0.1, effect=0.8)
    better = [each.verdict.startswith("better") for study in found for each in study]
    worse = [each.verdict.startswith("worse") for study in found for each in study]
    assert np.mean(better) > 0.8
    assert not any(worse)


def test_a_verdict_says_its_size_its_interval_and_why_not() -> None:
    def said(low: float, high: float, p_corrected: float) -> str:
        found = Estimate((low + high) / 2, low, high, p_corrected / 4)
        return verdict(found, p_corrected, num_pairs=4, confidence=0.95)

    assert said(0.01, 0.09, 0.02) == "better by 0.050 [+0.010, +0.090]"
    assert said(-0.09, -0.01, 0.02) == "worse by 0.050 [-0.090, -0.010]"
    assert said(-0.01, 0.09, 0.3) == "no difference shown: interval [-0.010, +0.090] contains 0"
    expected = "no difference shown: [+0.010, +0.090] does not hold for 4 comparisons (Holm p = 0.08)"
    assert said(0.01, 0.09, 0.08) == expected
