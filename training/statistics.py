"""Numbers that describe a whole split, and how far they may be trusted: one bootstrap over units, intervals, p values.

A unit is what another study would draw anew, mostly a subject. Knows no task and no file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int64

BETTER = "better than"  # how a verdict begins that is in the first model's favour
BLOCK = 2**24  # weights held at once: 128 MiB


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its interval. All are NaN where the value is undefined, the ends alone where units are
    too few to say how far it may be trusted."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """`0.812 [0.741, 0.880]`, `0.812` without ends, or a dash where there is no value."""
        ends = f" [{self.low:.3f}, {self.high:.3f}]" if math.isfinite(self.low) else ""
        return f"{self.value:.3f}{ends}" if math.isfinite(self.value) else "–"

    def signed(self) -> str:
        """The same of a difference: `+0.034 [+0.010, +0.058]`."""
        ends = f" [{self.low:+.3f}, {self.high:+.3f}]" if math.isfinite(self.low) else ""
        return f"{self.value:+.3f}{ends}" if math.isfinite(self.value) else "–"


@dataclass
class BootstrapConfig:
    """`confidence` is the interval's coverage, between 0 and 1."""

    num_resamples: int
    confidence: float
    seed: int


def bootstrap(
    function: Callable[[np.ndarray], np.ndarray], strata: np.ndarray, config: BootstrapConfig
) -> Float[np.ndarray, "draw ..."]:
    """The function of weights [draw, unit], first of the units as they are (row 0), then of every resample.

    Units are drawn with replacement inside their stratum, one fewer than it has, and count for as many as it has (Rao
    and Wu 1988, JASA 83:231): the plain bootstrap makes small strata look too certain. Where a stratum is one unit,
    resamples are NaN. The same strata and configuration give the same weights: results are paired draw by draw.
    """
    return np.concatenate([function(weights) for weights in _weights(strata, config)])


def _weights(strata: np.ndarray, config: BootstrapConfig) -> Iterator[Float[np.ndarray, "draw unit"]]:
    generator = np.random.default_rng(config.seed)
    members = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]
    size = max(2, BLOCK // max(1, len(strata)))
    for start in range(0, 1 + config.num_resamples, size):
        weights = np.ones((min(size, 1 + config.num_resamples - start), len(strata)))
        resampled = weights if start else weights[1:]
        for units in members:
            drawn = generator.multinomial(len(units) - 1, np.full(len(units), 1 / len(units)), size=len(resampled))
            resampled[:, units] = drawn * len(units) / (len(units) - 1) if len(units) > 1 else np.nan
        yield weights


def joined_strata(groups: np.ndarray, classes: np.ndarray) -> Int64[np.ndarray, "unit"]:
    """The number of each unit's stratum: its group and class.

    A unit alone in its stratum could not be drawn otherwise, so those of a class make one stratum; a single one of them
    joins the smallest stratum of its class.
    """
    (_, of_group), (_, of_class) = (np.unique(each, return_inverse=True) for each in (groups, classes))
    _, of_unit, sizes = np.unique(of_group * len(groups) + of_class, return_inverse=True, return_counts=True)
    for one in np.unique(of_class):
        alone = np.flatnonzero((of_class == one) & (sizes[of_unit] == 1))
        others = [stratum for stratum in np.unique(of_unit[of_class == one]) if sizes[stratum] > 1]
        if len(alone) > 1:
            of_unit[alone] = of_unit[alone[0]]
        elif len(alone) and others:
            of_unit[alone] = min(others, key=sizes.__getitem__)
    return of_unit


def percentile_interval(draws: Float[np.ndarray, "draw"], confidence: float) -> Interval:
    """The first of a bootstrap's draws with the percentile interval of the others; undefined ones are left out."""
    value, resampled = float(draws[0]), draws[1:][np.isfinite(draws[1:])]
    if not math.isfinite(value) or not len(resampled):
        return Interval(value if math.isfinite(value) else math.nan, math.nan, math.nan)
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def sign_flip_p(
    differences: Float[np.ndarray, "unit"], *, num_permutations: int, generator: np.random.Generator
) -> float:
    """One-sided p of the sum of differences, each as likely to have either sign: all signs where they are no more than
    `num_permutations`, else as many random ones, the true ones counted too."""
    from scipy import stats  # a machine that only times a step has no scipy

    found = stats.permutation_test(
        (differences,),
        lambda values, axis: values.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        alternative="greater",
        n_resamples=num_permutations,
        batch=max(1, BLOCK // max(1, len(differences))),
        rng=generator,
    )
    return float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number, in the order given: rejecting those below a level errs that often at most
    in any of them (Holm 1979)."""
    order = np.argsort(p_values, kind="stable")
    scaled = np.asarray(p_values, dtype=float)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(1, np.maximum.accumulate(scaled))
    return corrected.tolist()


@dataclass(frozen=True)
class Metric:
    """One number of a split. `function` gives it for every row of weights [draw, unit], NaN where it is undefined;
    `strata` [unit] says what resampling keeps."""

    name: str
    title: str
    best_is: Literal["lowest", "highest"]
    chance: float | None  # what a model that knows nothing reaches; None: that depends on the data
    function: Callable[[Any, np.ndarray], np.ndarray]
    strata: Callable[[Any], np.ndarray]

    def value(self, scores: Any) -> float:
        """The metric of these scores."""
        return float(self.function(scores, np.ones((1, len(self.strata(scores)))))[0])

    def draws(self, scores: Any, config: BootstrapConfig) -> Float[np.ndarray, "draw"]:
        """The metric of these scores and of every resample of their units."""
        return bootstrap(lambda weights: self.function(scores, weights), self.strata(scores), config)

    def interval(self, scores: Any, config: BootstrapConfig) -> Interval:
        """The metric of these scores with its bootstrap interval over units."""
        return percentile_interval(self.draws(scores, config), config.confidence)


def paired_verdict(metric: Metric, draws: Mapping[str, Float[np.ndarray, "draw"]], confidence: float) -> str:
    """What may be said of the first model beside the best of the others, from draws of the same resamples:
    `better than <name>: difference +0.034 [+0.010, +0.058]`, `worse than ...` or `not told apart from ...`.

    The best is chosen among the values that are to be compared, which favours it: the verdict errs on its side.
    """
    sign = 1 if metric.best_is == "highest" else -1
    trained, *others = draws
    best = max(others, key=lambda name: np.nan_to_num(sign * draws[name][0], nan=-np.inf))
    found = percentile_interval(draws[trained] - draws[best], confidence)
    is_better, is_worse = (found.low > 0, found.high < 0)[::sign]
    said = BETTER if is_better else "worse than" if is_worse else "not told apart from"
    if math.isnan(found.low):
        return f"{said} {best}: too few subjects for an interval of the difference"
    return f"{said} {best}: difference {found.signed()}"
