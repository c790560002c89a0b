"""Intervals of numbers that describe a whole split. Knows no task and no file."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its interval; all NaN where the value is undefined."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """`0.812 [0.741, 0.880]`, or a dash where there is no value."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]" if math.isfinite(self.value) else "–"


@dataclass
class BootstrapConfig:
    """`confidence` is the interval's coverage, between 0 and 1."""

    num_resamples: int
    confidence: float
    seed: int


def bootstrap(statistic: Callable[[np.ndarray], float], *, strata: np.ndarray, config: BootstrapConfig) -> Interval:
    """The statistic of all units with its percentile interval; `statistic` is given the numbers of the units to use.

    Units are resampled with replacement inside each stratum, so that every resample has the strata's sizes and none is
    undefined unless the split is.
    """
    value = statistic(np.arange(len(strata)))
    if not np.isfinite(value):
        return Interval(float("nan"), float("nan"), float("nan"))
    generator = np.random.default_rng(config.seed)
    members = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]
    estimates = np.empty(config.num_resamples)
    for index in range(config.num_resamples):
        drawn = np.concatenate([generator.choice(group, size=len(group)) for group in members])
        estimates[index] = statistic(drawn)
    tail = (1 - config.confidence) / 2
    low, high = np.quantile(estimates, [tail, 1 - tail])
    return Interval(float(value), float(low), float(high))


@dataclass(frozen=True)
class Metric:
    """One number of a split. `function` is given scores that can `take` units; `strata` says what resampling keeps."""

    name: str
    title: str
    best_is: Literal["lowest", "highest"]
    chance: float | None  # what a model that knows nothing reaches; None: that depends on the data
    function: Callable[[Any], float]
    strata: Callable[[Any], np.ndarray]

    def interval(self, scores: Any, config: BootstrapConfig) -> Interval:
        """The metric of these scores with its bootstrap interval over units."""
        return bootstrap(lambda units: self.function(scores.take(units)), strata=self.strata(scores), config=config)
