"""Classification metrics against scikit-learn and against counting pairs by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from finetune.errors import FinetuneError
from finetune.tasks.subject_prediction.scores import (
    AUROC,
    CLASS_METRICS,
    VALUE_METRICS,
    Scores,
    choose_threshold,
    class_details,
    intervals,
    roc_curve,
    subject_scores,
)
from training.registry.promotion import ChampionConfig, reasons_against
from training.statistics import BootstrapConfig, Interval, Metric

WITHIN_SITE_AUROC, _, BALANCED_ACCURACY = CLASS_METRICS
BOOTSTRAP = BootstrapConfig(num_resamples=200, confidence=0.95, seed=3)


def draw_scores(seed: int, num_subjects: int = 80, shift: float = 0.8) -> Scores:
    generator = np.random.default_rng(seed)
    is_case = generator.random(num_subjects) < 0.4
    values = np.round(generator.normal(size=num_subjects) + shift * is_case, 1)  # rounded: ties are the hard part
    sites = generator.choice(["a", "b", "c"], size=num_subjects)
    return Scores(tuple(f"s{index:03d}" for index in range(num_subjects)), values, is_case, sites)


@pytest.mark.parametrize("seed", range(5))
def test_auroc_balanced_accuracy_and_curve_equal_scikit_learn(seed: int) -> None:
    scores = draw_scores(seed)
    assert AUROC.value(scores) == pytest.approx(sklearn_metrics.roc_auc_score(scores.truth, scores.values), abs=1e-12)
    scores = replace(scores, reference=0.3)
    assert BALANCED_ACCURACY.value(scores) == pytest.approx(
        sklearn_metrics.balanced_accuracy_score(scores.truth, scores.values > 0.3), abs=1e-12
    )
    false_rate, true_rate, _ = sklearn_metrics.roc_curve(scores.truth, scores.values, drop_intermediate=False)
    ours = roc_curve(scores.values, scores.truth)
    np.testing.assert_allclose(ours[0], false_rate, atol=1e-12)
    np.testing.assert_allclose(ours[1], true_rate, atol=1e-12)


def test_within_site_auroc_counts_only_pairs_of_one_site() -> None:
    scores = draw_scores(1)
    won = pairs = 0.0
    for case in np.flatnonzero(scores.truth):
        for control in np.flatnonzero(~scores.truth):
            if scores.sites[case] == scores.sites[control]:
                pairs += 1
                difference = scores.values[case] - scores.values[control]
                won += 1.0 if difference > 0 else 0.5 if difference == 0 else 0.0
    assert WITHIN_SITE_AUROC.value(scores) == pytest.approx(won / pairs, abs=1e-12)


def test_a_score_that_knows_only_the_site_is_worth_nothing_within_sites() -> None:
    sites = np.repeat(["low", "high"], 50)
    is_case = np.concatenate([np.arange(50) < 10, np.arange(50) < 40])
    prevalence = np.where(sites == "high", 0.8, 0.2)
    scores = Scores(tuple(map(str, range(100))), prevalence, is_case, sites)
    assert AUROC.value(scores) == pytest.approx(0.8)
    assert WITHIN_SITE_AUROC.value(scores) == 0.5


def test_bootstrap_is_seeded_holds_the_value_and_narrows_with_subjects() -> None:
    def interval(num_subjects: int) -> tuple[float, float, float]:
        result = intervals(draw_scores(2, num_subjects), CLASS_METRICS, BOOTSTRAP)["within_site_auroc"]
        return result.low, result.value, result.high

    small, large = interval(40), interval(600)
    assert small == interval(40)
    assert small[0] < small[1] < small[2]
    assert large[2] - large[0] < 0.5 * (small[2] - small[0])


def test_every_resample_has_as_many_cases_and_controls_of_each_site_as_the_split() -> None:
    """Cases win all 3 x 5 pairs of one site and none of the 2 x 4 of the other, whoever is drawn inside them."""
    sites = np.repeat(["a", "b"], [8, 6])
    is_case = np.concatenate([np.arange(8) < 3, np.arange(6) < 2])
    names = tuple(f"s{index:02d}" for index in range(14))
    scores = Scores(names, np.where(is_case == (sites == "a"), 1.0, 0.0), is_case, sites)
    found = intervals(scores, CLASS_METRICS, BOOTSTRAP)["within_site_auroc"]
    assert [found.low, found.value, found.high] == pytest.approx([15 / 23] * 3, abs=1e-12)

    errors = np.where(sites == "a", 1.0, 8.0)
    found = intervals(Scores(names, errors, np.zeros(14), sites), VALUE_METRICS, BOOTSTRAP)["mean_absolute_error"]
    assert [found.low, found.value, found.high] == pytest.approx([4.0] * 3, abs=1e-12)


def test_bootstrap_interval_covers_the_population_value_about_as_often_as_it_says() -> None:
    truth = 0.7143  # normal shift .8: Phi(.8 / sqrt 2)
    config = BootstrapConfig(num_resamples=150, confidence=0.9, seed=0)
    covered = 0
    for seed in range(60):
        scores = draw_scores(seed + 100, 120)
        interval = AUROC.interval(scores, config)
        covered += interval.low <= truth <= interval.high
    assert 0.78 <= covered / 60 <= 1.0


@pytest.mark.parametrize("metric", [*CLASS_METRICS, *VALUE_METRICS], ids=lambda metric: metric.name)
def test_a_subjects_weight_is_how_often_it_counts(metric: Metric) -> None:
    scores = draw_scores(6)
    if metric in VALUE_METRICS:
        scores = replace(scores, truth=50 + 9 * scores.values[::-1], values=50 + 9 * scores.values, reference=48.0)
    times = np.random.default_rng(0).integers(0, 4, size=(5, 80))
    repeated = [scores.take(np.repeat(np.arange(80), row)) for row in times]
    found = metric.function(scores, times.astype(float))
    np.testing.assert_allclose(found, [metric.value(each) for each in repeated], atol=1e-12)


@pytest.mark.parametrize("metric", CLASS_METRICS, ids=lambda metric: metric.name)
def test_with_one_case_alone_there_is_no_interval_and_nothing_is_promoted(metric: Metric) -> None:
    is_case = np.arange(12) == 3
    scores = Scores(tuple(map(str, range(12))), is_case.astype(float), is_case, np.full(12, "a"), reference=0.5)
    found = metric.interval(scores, BOOTSTRAP)
    assert (found.value, str(found)) == (1.0, "1.000")
    (reason,) = reasons_against(ChampionConfig(metric.name, 0.5, None), {metric.name: found}, [])
    assert reason == f"{metric.name} has no interval: too few test subjects of one class"


def test_sites_of_one_case_and_one_control_open_the_gate_for_random_scores_as_rarely_as_they_should() -> None:
    sites, is_case = np.arange(24) // 2, np.arange(24) % 2 == 0
    names, opened = tuple(map(str, range(24))), 0
    for seed in range(200):
        scores = Scores(names, np.random.default_rng(seed).normal(size=24), is_case, sites)
        found = CLASS_METRICS[0].interval(scores, BootstrapConfig(200, 0.95, seed))
        assert found.low < found.high
        opened += found.low > 0.5
    assert opened <= 12  # 2.5 % of 200 are 5; 47 % before these subjects were drawn with others of their class


def test_a_site_with_one_class_gives_no_pairs_and_a_split_with_one_class_gives_nan() -> None:
    scores = draw_scores(4)
    only_controls = Scores(scores.subjects, scores.values, np.zeros(80, dtype=bool), scores.sites)
    result = intervals(only_controls, CLASS_METRICS, BOOTSTRAP)
    assert np.isnan([result["auroc"].value, result["auroc"].low, result["within_site_auroc"].value]).all()
    assert class_details(only_controls)["majority_accuracy"] == 1.0
    share = scores.truth.mean()
    assert class_details(scores)["majority_accuracy"] == max(share, 1 - share)


def test_threshold_is_the_best_cut_and_the_middle_of_ties() -> None:
    values, is_case = np.array([0.1, 0.2, 0.6, 0.9]), np.array([False, False, True, True])
    assert choose_threshold(values, is_case) == pytest.approx(0.4)
    scores = draw_scores(5)
    cut = choose_threshold(scores.values, scores.truth)
    best = max(BALANCED_ACCURACY.value(replace(scores, reference=level)) for level in np.arange(-4, 4, 0.05))
    assert BALANCED_ACCURACY.value(replace(scores, reference=cut)) == pytest.approx(best)
    with pytest.raises(FinetuneError, match="one class only; enlarge it"):
        choose_threshold(values, np.ones(4, dtype=bool))


def test_runs_of_a_subject_are_averaged_before_anything_is_counted() -> None:
    scores = subject_scores(
        np.array([1.0, 3.0, -1.0]),
        ["s2", "s2", "s1"],
        truth=np.array([True, True, False]),
        sites=np.array(["b", "b", "a"]),
    )
    assert scores.subjects == ("s1", "s2")
    np.testing.assert_array_equal(scores.values, [-1.0, 2.0])
    np.testing.assert_array_equal(scores.sites, ["a", "b"])
    with pytest.raises(FinetuneError, match="labels belong to subjects"):
        subject_scores(np.zeros(2), ["s1", "s1"], truth=np.array([True, False]), sites=np.array(["a", "a"]))


def test_an_empty_split_is_refused() -> None:
    empty = Scores((), np.zeros(0), np.zeros(0, dtype=bool), np.zeros(0, dtype=str))
    with pytest.raises(FinetuneError, match="no labelled subject"):
        intervals(empty, CLASS_METRICS, BOOTSTRAP)


def test_champion_is_refused_for_overlap_for_ignorance_and_for_chance() -> None:
    is_case = np.arange(40) % 2 == 0
    sites = np.full(40, "a")
    config = BootstrapConfig(num_resamples=50, confidence=0.95, seed=0)
    names = tuple(f"s{index:02d}" for index in range(40))
    good = Scores(names, is_case + 0.1 * np.arange(40) % 1, is_case, sites, reference=0.5)
    flat = Scores(names, np.zeros(40), is_case, sites, reference=0.5)
    good, flat = (intervals(scores, CLASS_METRICS, config) for scores in (good, flat))
    gate = ChampionConfig("within_site_auroc", 0.5, None)
    assert reasons_against(gate, good, []) == []
    assert reasons_against(gate, good, ["s01"]) == ["the backbone saw 1 of the test subjects"]
    assert reasons_against(gate, good, None) == ["the backbone does not say which subjects it saw"]
    assert reasons_against(gate, flat, []) == ["the lower end of within_site_auroc, 0.500, is not above 0.5"]
    assert reasons_against(None, good, []) == ["register.champion is null"]


def test_the_champion_of_an_error_lies_below_its_bound() -> None:
    gate = ChampionConfig("mean_absolute_error", None, 5.0)
    assert reasons_against(gate, {gate.metric: Interval(4.0, 3.5, 4.9)}, []) == []
    found = {gate.metric: Interval(4.0, 3.5, 5.2)}
    assert reasons_against(gate, found, []) == ["the upper end of mean_absolute_error, 5.200, is not below 5.0"]


def test_value_metrics_are_zero_for_the_training_mean_and_ignore_differences_between_sites() -> None:
    generator = np.random.default_rng(0)
    sites = np.repeat(["old", "young"], 30)
    truth = np.where(sites == "old", 60.0, 20.0) + generator.normal(size=60)
    names = tuple(f"s{index:02d}" for index in range(60))
    known = {metric.name: metric.value for metric in VALUE_METRICS}
    mean = Scores(names, np.full(60, 40.0), truth, sites, reference=40.0)
    assert known["r2"](mean) == 0
    by_site = np.where(sites == "old", 60.0, 20.0)
    knows_site = Scores(names, by_site + 0.5 * (np.arange(60) % 2), truth, sites, reference=40.0)
    assert known["r2"](knows_site) > 0.99
    assert abs(known["within_site_correlation"](knows_site)) < 0.3
    own = truth - np.where(sites == "old", 60.0, 20.0)
    assert known["within_site_correlation"](Scores(names, own, truth, sites)) == pytest.approx(1.0)
    assert known["mean_absolute_error"](mean) == pytest.approx(np.abs(truth - 40).mean())
