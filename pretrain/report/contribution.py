"""Region contribution: how much a region's visibility helps to guess the rest of the brain. Knows no model and no file.

The brain is divided into contexts: random halves of it, in whole regions, are hidden, each context beside its
complement, so that a region is visible in half of them. What a region contributes in a context is what the guess of
the hidden half loses when the region is hidden as well:

  contribution = (squared error of that half, region hidden too - the same, region visible) / the half's total

summed over windows and over the contexts that show the region. The half that is scored stays the same, so it is a drop
of its r2. It is compared with control sets: as many patches that are no region, namely a random patch and the visible
ones nearest to it, the same sets in every context. They are compact, because neighbours can stand in for one another:
hiding scattered patches costs less than hiding a region, whatever they hold.

The permutation null: each subject's difference between the region and the mean of its controls is as likely to have
either sign. p is the share of signs over subjects (all of them, or random ones with the true ones) whose sum is at
least as large, one-sided; over regions the false discovery rate is controlled after Benjamini and Hochberg (1995). So a
small p says that the region adds more than a control of its size does on average; that its interval lies above 0, that
it adds something at all. Both are asked of a significant region. With few subjects no p is below 2^-subjects.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from pretrain.report.config import ContributionConfig
from pretrain.report.scores import UNKNOWN
from training.statistics import BootstrapConfig, Interval, bootstrap, percentile_interval, sign_flip_p

# Given the hidden patches [patch], each sample's squared error [sample, patch] (0 where visible).
Errors = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Contribution:
    """One region's row. Without a p-value it was not tested, and `reason` says why."""

    region: str
    num_patches: int
    num_contexts: int
    contribution: Interval
    control_mean: float | None  # the mean over controls of its size
    control_share: float | None  # of those controls, the share that contributes less
    p: float | None
    is_significant: bool
    reason: str


def contexts(patches_of: Sequence[np.ndarray], num_patches: int, *, num_contexts: int, seed: int) -> list[np.ndarray]:
    """Hidden patches [patch] of each context: random halves of the regions by patches, and their complements."""
    generator = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    while len(found) < num_contexts:
        is_hidden = np.zeros(num_patches, dtype=bool)
        for region in generator.permutation(len(patches_of)):
            if is_hidden.sum() + len(patches_of[region]) / 2 <= num_patches / 2:
                is_hidden[patches_of[region]] = True
        found += [is_hidden, ~is_hidden]
    return found[:num_contexts]


def compact_set(centre: int, size: int, is_visible: np.ndarray, distance_mm: np.ndarray) -> np.ndarray:
    """The `size` visible patches nearest to a centre, itself included."""
    candidates = np.flatnonzero(is_visible)
    return candidates[np.argsort(distance_mm[centre, candidates], kind="stable")[:size]]


class Experiment:
    """Contexts with what they cost when nothing more is hidden; losses of hiding more are kept by what was hidden."""

    def __init__(self, errors: Errors, total: np.ndarray, hidden: Sequence[np.ndarray]) -> None:
        self.errors = errors
        self.hidden = hidden
        self.totals = [total[:, is_hidden].sum(axis=1) for is_hidden in hidden]
        self.whole = [errors(is_hidden)[:, is_hidden].sum(axis=1) for is_hidden in hidden]

    def loss(self, context: int, patches: np.ndarray) -> np.ndarray:
        """What each sample's squared error of the context's part rises by when these patches are hidden too."""
        is_hidden = self.hidden[context].copy()
        is_hidden[patches] = True
        return self.errors(is_hidden)[:, self.hidden[context]].sum(axis=1) - self.whole[context]


def contributions(
    experiment: Experiment,
    regions: dict[str, np.ndarray],
    distance_mm: np.ndarray,
    *,
    subjects: Sequence[str],
    config: ContributionConfig,
    intervals: BootstrapConfig,
) -> list[Contribution]:
    """Every region's contribution with its interval over subjects, beside control sets of its size, tested."""
    controls = Controls(experiment, distance_mm, config)
    rows = [
        _contribution(experiment, controls, name, patches, subjects=subjects, intervals=intervals)
        for name, patches in regions.items()
    ]
    tested = [row for row in rows if row.p is not None]
    is_found = stats.false_discovery_control([row.p for row in tested]) <= config.false_discovery_rate
    found = {row.region for row, is_one in zip(tested, is_found, strict=True) if is_one and row.contribution.low > 0}
    return [replace(row, is_significant=row.region in found) for row in rows]


class Controls:
    """What random compact sets of patches cost, by context and size: one list serves all regions of that size."""

    def __init__(self, experiment: Experiment, distance_mm: np.ndarray, config: ContributionConfig) -> None:
        generator = np.random.default_rng((config.seed, 1))
        self.experiment = experiment
        self.distance_mm = distance_mm
        self.config = config
        self.centres = generator.choice(len(distance_mm), size=config.num_null_sets)
        self.kept: dict[tuple[int, int], np.ndarray] = {}
        self.known: dict[tuple[int, bytes], np.ndarray] = {}

    def losses(self, context: int, size: int) -> np.ndarray:
        """The loss of each control of this size in a context, [control, sample]."""
        if (context, size) not in self.kept:
            is_visible = ~self.experiment.hidden[context]
            sets = [compact_set(centre, size, is_visible, self.distance_mm) for centre in self.centres]
            self.kept[context, size] = np.stack([self._loss(context, patches) for patches in sets])
        return self.kept[context, size]

    def _loss(self, context: int, patches: np.ndarray) -> np.ndarray:
        key = (context, np.sort(patches).tobytes())  # centres of what is hidden often share their nearest patches
        if key not in self.known:
            self.known[key] = self.experiment.loss(context, patches)
        return self.known[key]


def _contribution(
    experiment: Experiment,
    controls: Controls,
    name: str,
    patches: np.ndarray,
    *,
    subjects: Sequence[str],
    intervals: BootstrapConfig,
) -> Contribution:
    used = [
        context
        for context, is_hidden in enumerate(experiment.hidden)
        if len(patches) and not is_hidden[patches].any() and len(patches) < (~is_hidden).sum()
    ]
    if not used:
        reason = "hidden in every context" if len(patches) else "no patch is mostly of this region"
        return Contribution(name, len(patches), 0, UNKNOWN, None, None, None, False, reason)
    loss = np.sum([experiment.loss(context, patches) for context in used], axis=0)
    total = np.sum([experiment.totals[context] for context in used], axis=0)
    others = np.sum([controls.losses(context, len(patches)) for context in used], axis=0)
    sums = np.stack([summed(loss, subjects), summed(total, subjects)], axis=1)
    draws = bootstrap(lambda weights: weights @ sums, np.zeros(len(sums)), intervals)
    return Contribution(
        region=name,
        num_patches=len(patches),
        num_contexts=len(used),
        contribution=percentile_interval(draws[:, 0] / draws[:, 1], intervals.confidence),
        control_mean=float(others.mean(axis=0).sum() / total.sum()),
        control_share=float((others.sum(axis=1) < loss.sum()).mean()),
        p=sign_flip_p(
            summed(loss - others.mean(axis=0), subjects),
            num_permutations=controls.config.num_permutations,
            generator=np.random.default_rng((controls.config.seed, 2)),
        ),
        is_significant=False,
        reason="",
    )


def summed(values: np.ndarray, subjects: Sequence[str]) -> np.ndarray:
    """Sums over each subject's windows."""
    _, of_row = np.unique(np.asarray(subjects), return_inverse=True)
    return np.bincount(of_row, weights=values)
