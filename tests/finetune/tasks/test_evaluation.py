"""Classification metrics against scikit-learn and against counting pairs by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from finetune.errors import FinetuneError
from finetune.promotion import refusals
from finetune.tasks.subject_prediction.evaluation import (
    BootstrapConfig,
    Scores,
    auroc,
    balanced_accuracy,
    bootstrap,
    choose_threshold,
    evaluate,
    roc_curve,
    subject_scores,
    within_site_auroc,
)

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
    assert auroc(scores.values, scores.is_case) == pytest.approx(
        sklearn_metrics.roc_auc_score(scores.is_case, scores.values), abs=1e-12
    )
    is_called = scores.values > 0.3
    assert balanced_accuracy(is_called, scores.is_case) == pytest.approx(
        sklearn_metrics.balanced_accuracy_score(scores.is_case, is_called), abs=1e-12
    )
    false_rate, true_rate, _ = sklearn_metrics.roc_curve(scores.is_case, scores.values, drop_intermediate=False)
    ours = roc_curve(scores.values, scores.is_case)
    np.testing.assert_allclose(ours[0], false_rate, atol=1e-12)
    np.testing.assert_allclose(ours[1], true_rate, atol=1e-12)


def test_within_site_auroc_counts_only_pairs_of_one_site() -> None:
    scores = draw_scores(1)
    won = pairs = 0.0
    for case in np.flatnonzero(scores.is_case):
        for control in np.flatnonzero(~scores.is_case):
            if scores.sites[case] == scores.sites[control]:
                pairs += 1
                difference = scores.values[case] - scores.values[control]
                won += 1.0 if difference > 0 else 0.5 if difference == 0 else 0.0
    assert within_site_auroc(scores.values, scores.is_case, scores.sites) == pytest.approx(won / pairs, abs=1e-12)


def test_a_score_that_knows_only_the_site_is_worth_nothing_within_sites() -> None:
    sites = np.repeat(["low", "high"], 50)
    is_case = np.concatenate([np.arange(50) < 10, np.arange(50) < 40])
    prevalence = np.where(sites == "high", 0.8, 0.2)
    assert auroc(prevalence, is_case) == pytest.approx(0.8)
    assert within_site_auroc(prevalence, is_case, sites) == 0.5


def test_bootstrap_is_seeded_holds_the_value_and_narrows_with_subjects() -> None:
    def interval(num_subjects: int) -> tuple[float, float, float]:
        result = evaluate(draw_scores(2, num_subjects), threshold=0.3, config=BOOTSTRAP).within_site_auroc
        return result.low, result.value, result.high

    small, large = interval(40), interval(600)
    assert small == interval(40)
    assert small[0] < small[1] < small[2]
    assert large[2] - large[0] < 0.5 * (small[2] - small[0])


def test_bootstrap_interval_covers_the_population_value_about_as_often_as_it_says() -> None:
    truth = 0.7143  # normal shift .8: Phi(.8 / sqrt 2)
    config = BootstrapConfig(num_resamples=150, confidence=0.9, seed=0)
    covered = 0
    for seed in range(60):
        scores = draw_scores(seed + 100, 120)
        interval = bootstrap(
            lambda values, is_case, sites: auroc(values, is_case), scores, strata=scores.is_case, config=config
        )
        covered += interval.low <= truth <= interval.high
    assert 0.78 <= covered / 60 <= 1.0


def test_a_site_with_one_class_gives_no_pairs_and_a_split_with_one_class_gives_nan() -> None:
    scores = draw_scores(4)
    only_controls = Scores(scores.subjects, scores.values, np.zeros(80, dtype=bool), scores.sites)
    result = evaluate(only_controls, threshold=0.0, config=BOOTSTRAP)
    assert np.isnan([result.auroc.value, result.auroc.low, result.within_site_auroc.value]).all()
    assert result.majority_accuracy == 1.0
    assert evaluate(scores, threshold=0.0, config=BOOTSTRAP).majority_accuracy == max(
        scores.is_case.mean(), 1 - scores.is_case.mean()
    )


def test_threshold_is_the_best_cut_and_the_middle_of_ties() -> None:
    values, is_case = np.array([0.1, 0.2, 0.6, 0.9]), np.array([False, False, True, True])
    assert choose_threshold(values, is_case) == pytest.approx(0.4)
    scores = draw_scores(5)
    cut = choose_threshold(scores.values, scores.is_case)
    best = max(balanced_accuracy(scores.values > level, scores.is_case) for level in np.arange(-4, 4, 0.05))
    assert balanced_accuracy(scores.values > cut, scores.is_case) == pytest.approx(best)
    with pytest.raises(FinetuneError, match="one class only; enlarge it"):
        choose_threshold(values, np.ones(4, dtype=bool))


def test_runs_of_a_subject_are_averaged_before_anything_is_counted() -> None:
    scores = subject_scores(
        np.array([1.0, 3.0, -1.0]),
        ["s2", "s2", "s1"],
        is_case=np.array([True, True, False]),
        sites=np.array(["b", "b", "a"]),
    )
    assert scores.subjects == ("s1", "s2")
    np.testing.assert_array_equal(scores.values, [-1.0, 2.0])
    np.testing.assert_array_equal(scores.sites, ["a", "b"])
    with pytest.raises(FinetuneError, match="labels belong to subjects"):
        subject_scores(np.zeros(2), ["s1", "s1"], is_case=np.array([True, False]), sites=np.array(["a", "a"]))


def test_an_empty_split_is_refused() -> None:
    empty = Scores((), np.zeros(0), np.zeros(0, dtype=bool), np.zeros(0, dtype=str))
    with pytest.raises(FinetuneError, match="no labelled subject"):
        evaluate(empty, threshold=0.0, config=BOOTSTRAP)


def test_champion_is_refused_for_overlap_for_ignorance_and_for_chance() -> None:
    is_case = np.arange(40) % 2 == 0
    sites = np.full(40, "a")
    config = BootstrapConfig(num_resamples=50, confidence=0.95, seed=0)
    names = tuple(f"s{index:02d}" for index in range(40))
    good = evaluate(Scores(names, is_case + 0.1 * np.arange(40) % 1, is_case, sites), threshold=0.5, config=config)
    flat = evaluate(Scores(names, np.zeros(40), is_case, sites), threshold=0.5, config=config)
    assert refusals(good, [], needed_low=0.5) == []
    assert refusals(good, ["s01"], needed_low=0.5) == ["the backbone saw 1 of the test subjects"]
    assert refusals(good, None, needed_low=0.5) == ["the backbone does not say which subjects it saw"]
    assert refusals(flat, [], needed_low=0.5) == ["within-site AUROC's lower end 0.500 is not above 0.5"]
