"""Arms compared on the same subjects when both the seeds and the subjects could have been others.

Seeds are to a model what readers are to a radiograph, so the variances are those of multi-reader multi-case studies
(Obuchowski and Rockette 1995, Commun. Stat. Simul. Comput. 24:285): of a mean over seeds, what seeds differ by, plus
what subjects move all seeds by together. The second comes from a bootstrap that draws the same subjects for every arm
and seed, inside strata of site and class, one fewer than a stratum has (Rao and Wu 1988, JASA 83:231: else few
subjects look too certain; subjects alone in theirs are joined). Each part has its own Student quantile and the
squares are added (Howe 1974, JASA 69:789). Pairs are corrected by Holm 1979. Not a percentile bootstrap over seeds as
well: with two or three seeds its intervals held the truth in 81 to 100 % of simulated studies; nor pooled degrees of
freedom (Hillis 2007): with two seeds, two corrected comparisons erred in 5 to 16 % (docs/experiments.md). Scores in,
verdicts out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from einops import einsum, rearrange
from scipy import stats
from scipy.optimize import brentq

from training.statistics import BootstrapConfig

SMALLEST_P = 1e-12

Metric = Literal["within_site_auroc", "auroc", "balanced_accuracy"]


@dataclass(frozen=True)
class Readings:
    """Scores of every arm on the same subjects: `values[arm]` is [unit, repeat, subject].

    Units are what another study would draw anew: pretrained encoders, or seeds where an arm has one encoder. Repeats of
    a unit (fine-tuning seeds of one encoder) are averaged. Scores above 0 call a case.
    """

    values: Mapping[str, np.ndarray]
    is_case: np.ndarray
    sites: np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A mean over units with its interval over units and subjects; `p` is two-sided, of the value being `null`."""

    value: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Difference:
    """One arm minus the reference. `p_corrected` counts all comparisons that were made together."""

    estimate: Estimate
    p_corrected: float
    verdict: str


def resampled_metrics(readings: Readings, metric: Metric, config: BootstrapConfig) -> dict[str, np.ndarray]:
    """[1 + resample, unit] of every arm; row 0 is the metric of the subjects as they are."""
    weights = subject_weights(strata_of(readings), config)
    found = {}
    for arm, values in readings.values.items():
        flat = rearrange(values, "unit repeat subject -> (unit repeat) subject")
        numbers = weighted_metric(flat, readings, weights=weights, metric=metric)
        numbers = numbers[np.isfinite(numbers).all(axis=1)]  # no draw without a pair of one site, whatever the arm
        found[arm] = rearrange(numbers, "draw (unit repeat) -> draw unit repeat", unit=len(values)).mean(axis=-1)
    return found


def strata_of(readings: Readings) -> np.ndarray:
    """[subject]: the number of each one's stratum of site and class.

    A subject alone in its stratum could not be drawn otherwise and would count as certain, so those of a class make one
    stratum; a single one of them joins the smallest stratum of its class.
    """
    _, of_subject, sizes = np.unique(
        np.char.add(readings.sites.astype(str), readings.is_case.astype(int).astype(str)),
        return_inverse=True,
        return_counts=True,
    )
    for of_class in (readings.is_case, ~readings.is_case):
        alone = np.flatnonzero(of_class & (sizes[of_subject] == 1))
        others = [stratum for stratum in np.unique(of_subject[of_class]) if sizes[stratum] > 1]
        if len(alone) > 1:
            of_subject[alone] = of_subject[alone[0]]
        elif len(alone) and others:
            of_subject[alone] = min(others, key=sizes.__getitem__)
    return of_subject


def subject_weights(strata: np.ndarray, config: BootstrapConfig) -> np.ndarray:
    """[1 + resample, subject]: how often each subject counts; row 0 counts everybody once."""
    generator = np.random.default_rng(config.seed)
    weights = np.ones((1 + config.num_resamples, len(strata)))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        size = len(members)
        if size > 1:  # else it is all there is of a class
            counts = generator.multinomial(size - 1, np.full(size, 1 / size), size=config.num_resamples)
            weights[1:, members] = counts * size / (size - 1)
    return weights


def weighted_metric(values: np.ndarray, readings: Readings, *, weights: np.ndarray, metric: Metric) -> np.ndarray:
    """[draw, model] from scores [model, subject] and weights [draw, subject]: as evaluation.py's, subjects weighted."""
    is_case = readings.is_case
    case_weights, control_weights = weights[:, is_case], weights[:, ~is_case]
    if metric == "balanced_accuracy":
        called = (values > 0).astype(float)
        hits = einsum(case_weights, called[:, is_case], "draw case, model case -> draw model")
        rejections = einsum(control_weights, 1 - called[:, ~is_case], "draw control, model control -> draw model")
        shares = hits / case_weights.sum(axis=1)[:, None] + rejections / control_weights.sum(axis=1)[:, None]
        return shares / 2
    lead = values[:, is_case, None] - values[:, None, ~is_case]
    won = (lead > 0) + 0.5 * (lead == 0)
    counts = np.ones(won.shape[1:])
    if metric == "within_site_auroc":
        counts = (readings.sites[is_case, None] == readings.sites[None, ~is_case]).astype(float)
    by_control = einsum(case_weights, won * counts, "draw case, model case control -> draw model control")
    won_weight = einsum(by_control, control_weights, "draw model control, draw control -> draw model")
    pairs = einsum(case_weights, counts, control_weights, "draw case, case control, draw control -> draw")
    with np.errstate(invalid="ignore"):  # NaN where a draw leaves no pair
        return won_weight / pairs[:, None]


def estimate(draws: np.ndarray, *, spare_subjects: int, confidence: float, null: float) -> Estimate:
    """The mean over units of draws [1 + resample, unit]; `spare_subjects` is subjects less strata.

    Where nothing varies at all (one arm twice) the interval is the value itself, and nothing is claimed: p is 1.
    """
    of_units, resamples = draws[0], draws[1:]
    num_units = len(of_units)
    covariance = np.atleast_2d(np.cov(resamples, rowvar=False))
    if num_units > 1:
        by_units = float(of_units.var(ddof=1)) / num_units
        shared = (covariance.sum() - np.trace(covariance)) / (num_units * (num_units - 1))
        by_subjects = max(float(shared), 0.0)
    else:
        by_units, by_subjects = 0.0, float(covariance[0, 0])
    value, variance = float(of_units.mean()), by_units + by_subjects
    if variance < 1e-24:
        return Estimate(value, value, value, 1.0)
    half_width = partial(reach, by_units=by_units, num_units=num_units, by_subjects=by_subjects, spare=spare_subjects)
    width, distance = half_width(1 - confidence), abs(value - null)
    if distance <= half_width(1.0):
        p = 1.0
    elif distance >= half_width(SMALLEST_P):
        p = SMALLEST_P
    else:
        p = float(brentq(lambda level: half_width(level) - distance, SMALLEST_P, 1.0))
    return Estimate(value, value - width, value + width, p)


def reach(level: float, *, by_units: float, num_units: int, by_subjects: float, spare: int) -> float:
    """Half the width of the interval that misses with probability `level`: both parts' own, squared and added."""
    of_units = float(stats.t.isf(level / 2, max(num_units - 1, 1)))
    of_subjects = float(stats.t.isf(level / 2, max(spare, 1)))
    return (of_units**2 * by_units + of_subjects**2 * by_subjects) ** 0.5


def holm(values: list[float]) -> list[float]:
    """p values corrected for their number, in the order given: rejecting those below a level errs that often at most
    in any of them."""
    corrected, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = largest
    return corrected


def spare_subjects(readings: Readings) -> int:
    """Subjects less strata of site and class: the degrees of freedom of the subjects' spread."""
    return len(readings.sites) - len(np.unique(strata_of(readings)))


def differences(
    draws: Mapping[str, np.ndarray], pairs: list[tuple[str, str]], *, spare_subjects: int, confidence: float
) -> list[Difference]:
    """One for every (arm, reference), corrected for all of them; units are paired in their order."""
    found = [
        estimate(draws[arm] - draws[reference], spare_subjects=spare_subjects, confidence=confidence, null=0.0)
        for arm, reference in pairs
    ]
    corrected = holm([each.p for each in found])
    return [
        Difference(each, p, verdict(each, p, num_pairs=len(pairs), confidence=confidence))
        for each, p in zip(found, corrected, strict=True)
    ]


def verdict(found: Estimate, p_corrected: float, *, num_pairs: int, confidence: float) -> str:
    """What may be said of a difference, in words."""
    interval = f"[{found.low:+.3f}, {found.high:+.3f}]"
    if p_corrected < 1 - confidence:
        return f"{'better' if found.value > 0 else 'worse'} by {abs(found.value):.3f} {interval}"
    if found.low == found.value == found.high == 0:
        return "no difference shown: both arms are the same in every resample, as one encoder under two names would be"
    if found.low <= 0 <= found.high:
        return f"no difference shown: interval {interval} contains 0"
    if found.low == found.high:
        return "no difference shown: nothing varies between seeds or subjects"
    return f"no difference shown: {interval} does not hold for {num_pairs} comparisons (Holm p = {p_corrected:.2f})"
