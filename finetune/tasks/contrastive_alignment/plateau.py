"""What the curves of an alignment say: a pure function of numbers that anyone can type in, with its evidence.

It tells a collapse from chance, underfitting from memorising, and names what it cannot know. Knows no run and no file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Name = Literal["collapse", "chance", "memorising", "underfitting", "learning", "bug"]

TOLERANCE = 0.01  # of a level: a mean over batches is printed to three decimals and wanders by less
USUAL_BATCHES = (8, 16, 24, 32, 48, 64, 128, 256)
FITTED = 0.5  # of the constant level: a training loss below this share has told most pairs apart
COLLAPSED_RANK, COLLAPSED_VARIANCE = 1.5, 0.01
EXPLODING = 1e3  # times the median gradient norm


@dataclass(frozen=True)
class Levels:
    """The losses of two models that know nothing (losses.levels), and the batches they belong to."""

    constant: float
    random: float
    batches: tuple[int, ...] = ()

    @staticmethod
    def of(batches: Sequence[int], *, width: int, temperature: float) -> Levels:
        """The levels of batches of different subjects, the second to second order in 1 / temperature."""
        mean = sum(map(math.log, batches)) / len(batches)
        above = sum((1 - 1 / size) / (2 * width * temperature**2) for size in batches) / len(batches)
        return Levels(mean, mean + above, tuple(batches))


@dataclass(frozen=True)
class Curves:
    """Losses in order of time, and whatever else is known: levels, and, by side, gradient norms over time, and the
    effective rank and the variance of the embeddings at the end."""

    train: Sequence[float]
    validation: Sequence[float]
    train_levels: Levels | None = None  # None: unknown batches, candidates are named
    validation_levels: Levels | None = None
    ranks: Mapping[str, float] = field(default_factory=dict)
    variances: Mapping[str, float] = field(default_factory=dict)
    gradient_norms: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """What the curves amount to, with the numbers that say so and what they leave open."""

    name: Name
    evidence: tuple[str, ...]
    unknown: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One sentence of what, then evidence, then what is not known."""
        said = f"{self.name.capitalize()}: {'; '.join(self.evidence)}."
        return said + (f" Not known: {'; '.join(self.unknown)}." if self.unknown else "")


def analyse(curves: Curves, *, width: int, temperature: float, num_subjects: int | None) -> Finding:
    """What a run's curves say. Without `train_levels`, batches are looked for that explain the last training loss; of
    `num_subjects`, those that divide an epoch of them."""
    if broken := _broken(curves):
        return Finding("bug", tuple(broken), ("whether data or code made it so: diagnose one batch",))
    last = _settled(curves.train)
    levels = curves.train_levels
    if levels is None:
        candidates = [Levels.of(each, width=width, temperature=temperature) for each in compositions(num_subjects)]
        levels = min(candidates, key=lambda each: min(abs(last - each.constant), abs(last - each.random)))
    silent = [side for side, norms in curves.gradient_norms.items() if norms and max(norms) == 0]
    if silent:
        return Finding("bug", (f"no gradient ever reached {' and '.join(silent)}", f"training loss {last:.3f}"))
    if abs(last - levels.constant) <= TOLERANCE:
        return _at_constant_level(curves, last, levels)
    if last > levels.constant - TOLERANCE:
        return _at_random_level(curves, last, levels)
    return _below_chance(curves, last, levels)


def compositions(num_subjects: int | None) -> list[tuple[int, ...]]:
    """The batches that an epoch may have been cut into; of an unknown number of subjects, any usual pair of sizes."""
    if num_subjects is None:
        pairs = itertools.combinations_with_replacement(USUAL_BATCHES, 2)
        return [(size,) for size in USUAL_BATCHES] + [(large, small) for small, large in pairs if small != large]
    sizes = [size for size in USUAL_BATCHES if size <= num_subjects]
    cut = [(*[size] * (num_subjects // size), num_subjects % size) for size in sizes]
    return [tuple(size for size in each if size > 1) for each in cut]


def _settled(losses: Sequence[float]) -> float:
    """The mean of the last tenth."""
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def _broken(curves: Curves) -> list[str]:
    """Losses or gradients that no healthy run has."""
    found = []
    for name, losses in (("training", curves.train), ("validation", curves.validation)):
        if wrong := [step for step, loss in enumerate(losses) if not math.isfinite(loss)]:
            found.append(f"the {name} loss is not finite from point {wrong[0]} on")
    for side, norms in curves.gradient_norms.items():
        usual = sorted(norms)[len(norms) // 2] if norms else 0.0
        if norms and (not math.isfinite(max(norms)) or max(norms) > EXPLODING * max(usual, 1e-12) > 1e-9):
            found.append(f"the gradient of {side} reached {max(norms):.3g}, {usual:.3g} being usual")
    return found


def _batches(levels: Levels) -> str:
    named = " and ".join(f"{levels.batches.count(size)} x {size}" for size in sorted(set(levels.batches), reverse=True))
    return f"batches of {named}" if levels.batches else "the batches that occurred"


def _at_constant_level(curves: Curves, last: float, levels: Levels) -> Finding:
    evidence = [
        f"the training loss rests at {last:.3f}, which is that of a constant similarity in {_batches(levels)} "
        f"({levels.constant:.3f}); unrelated embeddings would give {levels.random:.3f}"
    ]
    if curves.validation and curves.validation_levels:
        evidence.append(_beside(curves.validation[-1], curves.validation_levels))
    flat = [
        side
        for side in {**curves.ranks, **curves.variances}
        if curves.ranks.get(side, math.inf) < COLLAPSED_RANK
        or curves.variances.get(side, math.inf) < COLLAPSED_VARIANCE
    ]
    for side in flat:
        evidence.append(
            f"{side} has effective rank {curves.ranks.get(side, math.nan):.1f} and variance "
            f"{curves.variances.get(side, math.nan):.3f}"
        )
    if flat:
        return Finding("collapse", tuple(evidence))
    if curves.ranks:
        ranks = ", ".join(f"{side} {rank:.1f}" for side, rank in curves.ranks.items())
        return Finding("chance", (*evidence, f"yet no side is constant: effective ranks {ranks}"))
    unknown = (
        "rank and variance of each side (a loss at just this level needs one constant vector a side)",
        "whether they collapsed, or never left a start at which fresh networks map everybody to nearly one vector",
    )
    return Finding("collapse", tuple(evidence), unknown)


def _at_random_level(curves: Curves, last: float, levels: Levels) -> Finding:
    evidence = [
        f"the training loss rests at {last:.3f}, not below {levels.constant:.3f} (constant similarity; unrelated "
        f"embeddings {levels.random:.3f}) of {_batches(levels)}"
    ]
    unknown = ("whether the pairs are right: memorise one batch, which a correct pipeline can",)
    return Finding("chance", tuple(evidence), unknown)


def _below_chance(curves: Curves, last: float, levels: Levels) -> Finding:
    evidence = [f"the training loss ends at {last:.3f}, below {levels.constant:.3f} of {_batches(levels)}"]
    share = last / levels.constant
    if not curves.validation or curves.validation_levels is None:
        name: Name = "learning" if share < FITTED else "underfitting"
        return Finding(name, tuple(evidence), ("how held-out subjects fare: no validation loss with its batches",))
    held_out = curves.validation[-1]
    evidence.append(_beside(held_out, curves.validation_levels))
    generalises = held_out < curves.validation_levels.constant - TOLERANCE
    if share < FITTED:
        return Finding("learning" if generalises else "memorising", tuple(evidence))
    evidence.append(f"training pairs are told apart by only {1 - share:.0%} of what there is")
    return Finding("underfitting", tuple(evidence), ("whether longer training would do: look at the last slope",))


def _beside(loss: float, levels: Levels) -> str:
    side = "below" if loss < levels.constant - TOLERANCE else "at" if loss < levels.constant + TOLERANCE else "above"
    return f"the validation loss ends at {loss:.3f}, {side} {levels.constant:.3f} of {_batches(levels)}"
