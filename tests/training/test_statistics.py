"""The bootstrap over units against theory and hand-made cases; intervals, p values, verdicts in words."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from training import statistics
from training.statistics import (
    BootstrapConfig,
    Interval,
    Metric,
    bootstrap,
    holm,
    joined_strata,
    paired_verdict,
    percentile_interval,
    sign_flip_p,
)


def weights_of(strata: np.ndarray, num_resamples: int = 50) -> np.ndarray:
    return bootstrap(lambda weights: weights, strata, BootstrapConfig(num_resamples, 0.95, 0))


def test_resamples_keep_every_stratums_weight_and_a_mean_varies_as_theory_says() -> None:
    strata = np.repeat(["a0", "a1"], [4, 9])
    weights = weights_of(strata, 4000)
    np.testing.assert_array_equal(weights[0], 1)
    for name, size in (("a0", 4), ("a1", 9)):
        np.testing.assert_allclose(weights[:, strata == name].sum(axis=1), size)
    values = np.random.default_rng(0).normal(size=4)
    means = weights[1:, strata == "a0"] @ values / 4
    assert means.var() == pytest.approx(values.var(ddof=1) / 4, rel=0.1)  # a plain bootstrap gives three quarters of it


def test_a_unit_alone_in_its_stratum_leaves_no_interval() -> None:
    weights = weights_of(np.array([0, 0, 1]))
    assert np.isnan(weights[1:, 2]).all()
    found = percentile_interval(weights.sum(axis=1), 0.95)
    assert found.value == 3
    assert np.isnan([found.low, found.high]).all()
    assert str(found) == "3.000"


def test_a_unit_alone_in_its_group_and_class_is_drawn_with_others_of_its_class() -> None:
    sites = np.array(["a", "a", "b", "c", "d", "d", "d", "e"])
    is_case = np.array([True, True, True, True, False, False, False, False])
    strata = joined_strata(sites, is_case)
    together = [[0, 1], [2, 3], [4, 5, 6, 7]]  # the one control alone joins the smallest stratum of controls
    assert sorted(np.flatnonzero(strata == one).tolist() for one in np.unique(strata)) == together


def test_many_units_are_resampled_in_blocks_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "BLOCK", 60)
    sizes: list[int] = []

    def mean(weights: np.ndarray) -> np.ndarray:
        sizes.append(weights.size)
        return weights @ np.arange(20.0) / 20

    draws = bootstrap(mean, np.zeros(20), BootstrapConfig(400, 0.95, 0))
    assert (len(draws), max(sizes)) == (401, 60)
    assert draws[0] == 9.5
    assert (draws == 9.5).mean() < 0.1  # only the first block holds the units as they are
    assert draws[1:].std() == pytest.approx(np.arange(20).std(ddof=1) / 20**0.5, rel=0.15)


def test_an_interval_holds_the_middle_of_the_defined_draws_and_is_undefined_with_its_value() -> None:
    draws = np.concatenate([[50.0], np.arange(101.0), [np.nan]])
    assert percentile_interval(draws, 0.5) == Interval(50, 25, 75)
    assert str(percentile_interval(np.array([np.nan, 1.0, 2.0]), 0.9)) == "–"


def test_signs_are_flipped_in_all_ways_where_these_are_few_and_at_random_where_they_are_many() -> None:
    def p(differences: list[float], num_permutations: int) -> float:
        generator = np.random.default_rng(0)
        return sign_flip_p(np.array(differences), num_permutations=num_permutations, generator=generator)

    assert p([0.5, 1, 2], 999) == 1 / 8
    assert p([-0.5, 1, 2], 999) == 2 / 8
    assert p([0, 0, 0], 999) == 1
    assert p([1] * 30, 99) == 1 / 100


def test_holm_is_the_step_down_of_its_paper() -> None:
    np.testing.assert_allclose(holm([0.04, 0.01, 0.03]), [0.06, 0.03, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]


@pytest.mark.parametrize(("best_is", "words"), [("highest", "better than"), ("lowest", "worse than")])
def test_a_verdict_names_the_best_of_the_others_and_turns_with_what_is_best(
    best_is: Literal["lowest", "highest"], words: str
) -> None:
    mean = Metric("m", "mean", best_is, None, lambda scores, weights: weights @ scores / 50, np.zeros_like)
    noise, sign = 0.1 * np.random.default_rng(0).normal(size=50), 1 if best_is == "highest" else -1

    def said(**models: np.ndarray) -> str:
        draws = {name: mean.draws(scores, BootstrapConfig(200, 0.95, 0)) for name, scores in models.items()}
        return paired_verdict(mean, draws, 0.95)

    plain = 5 + np.arange(50.0)  # whose spread over units is large, and the same for every model
    low, high = plain + noise, plain + 1 + noise[::-1]
    others = {"weak": plain - 9 * sign, "undefined": np.full(50, np.nan)}
    found = said(trained=high, strong=low, **others)
    assert found.startswith(f"{words} strong: difference +1.0")
    opposite = "worse than" if words == "better than" else "better than"
    assert said(trained=low, strong=high, **others).startswith(f"{opposite} strong: difference -1.0")
    equal = said(trained=plain + noise, strong=plain + noise.mean(), **others)
    assert equal.startswith("not told apart from strong: difference")
    assert "[-0.0" in equal
    one = said(trained=low, undefined=others["undefined"])
    assert one == "not told apart from undefined: too few subjects for an interval of the difference"
