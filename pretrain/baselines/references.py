"""The guesses a model is shown beside, fitted on the training split and scored where the model is scored.

Every rank learns from its share of the samples and the sums are added up: all have the same baselines. Knows masks and
arrays; knows no model.
"""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from data_sharding.read.batch import WindowBatch
from pretrain.baselines.global_drift import GlobalDrift
from pretrain.baselines.guesses import (
    BaselineConfig,
    RidgeOracle,
    VoxelStatistics,
    neighbour_means,
    patch_counts,
    patch_means,
    ridge_bytes,
)
from pretrain.errors import PretrainError
from training.collectives import gather, sum_in_place, this_process
from training.engine.base import own_device

log = logging.getLogger(__name__)

NAMES = ("neighbour", "global_drift", "ridge")  # of the baselines, in the order of tables

HiddenTokens = Callable[[WindowBatch], Bool[Tensor, "batch tubelet patch"]]
SumsByRegion = Callable[[Float[Tensor, "batch time voxel"]], Float[Tensor, "batch region"]]


@dataclass(frozen=True)
class BaselineScores:
    """The squared errors of each baseline on samples that a model is evaluated on, under the masks it is evaluated
    with. A sample is known by its seed, which no two samples of a set share."""

    sample_seed: Int64[Tensor, "sample"]  # ascending
    errors: dict[str, Float[Tensor, "sample region"]]

    def has(self, sample_seed: Int64[Tensor, "row"]) -> Bool[Tensor, "row"]:
        """True for the samples that were scored."""
        return torch.isin(sample_seed, self.sample_seed)

    def errors_of(self, sample_seed: Int64[Tensor, "row"]) -> dict[str, Float[Tensor, "row region"]]:
        """The errors of samples that were scored, in their order, by baseline."""
        rows = torch.searchsorted(self.sample_seed, sample_seed)
        return {name: errors[rows] for name, errors in self.errors.items()}


def voxel_statistics(batches: Iterable[WindowBatch], num_voxels: int) -> VoxelStatistics:
    """Mean and deviation of every voxel over the measured frames of all ranks' `batches`."""
    statistics = VoxelStatistics.empty(num_voxels)
    for batch in batches:
        statistics.add(batch.values, batch.is_measured & (batch.weight > 0)[:, None])
    sum_over_ranks(statistics.count, statistics.total, statistics.squares)
    if not bool(statistics.count.any()):
        raise PretrainError("no training sample to take voxel statistics from; check the set's train split and kind")
    return statistics


@dataclass
class References:
    """Fitted baselines; `guess` gives centred values for every voxel, to be scored where the model is scored."""

    config: BaselineConfig
    offset: Float[Tensor, "voxel"]
    patch_of_voxel: Int64[Tensor, "voxel"]
    distance_mm: Float[Tensor, "patch patch"]
    global_drift: GlobalDrift
    ridge: RidgeOracle | None  # None: it needs more memory than configured
    penalty: float

    def guess(
        self,
        centred: Float[Tensor, "batch time voxel"],
        is_measured: Bool[Tensor, "batch voxel"],
        is_hidden: Bool[Tensor, "batch tubelet patch"],
    ) -> dict[str, Float[Tensor, "batch time voxel"]]:
        """Each baseline's centred guess; like `centred`, on the CPU."""
        means = self.means(centred, is_measured)
        neighbours = self.neighbour_patches(means, ~is_hidden)
        signal, drift = self.slow(means, neighbours, is_measured, ~is_hidden)
        guesses = {
            "neighbour": neighbours[:, :, self.patch_of_voxel],
            "global_drift": self.global_drift.predict(signal, drift),
        }
        if self.ridge is not None:
            guesses["ridge"] = ridge_guess(self.ridge, means, ~is_hidden, penalty=self.penalty)
        return guesses

    def squared_errors(
        self, batch: WindowBatch, is_hidden: Bool[Tensor, "batch tubelet patch"]
    ) -> dict[str, Float[Tensor, "batch time voxel"]]:
        """Each baseline's squared error where a hidden voxel was measured, 0 elsewhere."""
        centred = centre(batch.values, batch.is_measured, self.offset)
        is_scored = hidden_voxels(is_hidden, self.patch_of_voxel, centred.shape[1]) & batch.is_measured[:, None]
        guesses = self.guess(centred, batch.is_measured, is_hidden)
        return {name: (guess - centred).square() * is_scored for name, guess in guesses.items()}

    def means(
        self, centred: Float[Tensor, "batch time voxel"], is_measured: Bool[Tensor, "batch voxel"]
    ) -> Float[Tensor, "batch time patch"]:
        return patch_means(centred, is_measured, patch_of_voxel=self.patch_of_voxel, num_patches=len(self.distance_mm))

    def neighbour_patches(
        self, means: Float[Tensor, "batch time patch"], is_visible: Bool[Tensor, "batch tubelet patch"]
    ) -> Float[Tensor, "batch time patch"]:
        """For every patch and frame the mean of its nearest visible patches."""
        split = rearrange(
            means, "batch (tubelet frame) patch -> batch tubelet frame patch", tubelet=is_visible.shape[1]
        )
        guesses = [
            neighbour_means(sample, visible, self.distance_mm, num_neighbours=self.config.num_neighbours)
            for sample, visible in zip(split, is_visible, strict=True)
        ]
        return rearrange(torch.stack(guesses), "batch tubelet frame patch -> batch (tubelet frame) patch")

    def slow(
        self,
        means: Float[Tensor, "batch time patch"],
        neighbours: Float[Tensor, "batch time patch"],
        is_measured: Bool[Tensor, "batch voxel"],
        is_visible: Bool[Tensor, "batch tubelet patch"],
    ) -> tuple[Float[Tensor, "batch time"], Float[Tensor, "batch time voxel"]]:
        """The window's global signal, and the drift of every voxel's patch."""
        counts = patch_counts(is_measured, patch_of_voxel=self.patch_of_voxel, num_patches=len(self.distance_mm))
        signal, drift = self.global_drift.regressors(means, neighbours, num_measured=counts, is_visible=is_visible)
        return signal, drift[:, :, self.patch_of_voxel]

    def learn_drift(
        self,
        centred: Float[Tensor, "batch time voxel"],
        is_measured: Bool[Tensor, "batch voxel"],
        is_hidden: Bool[Tensor, "batch tubelet patch"],
    ) -> None:
        """Add training samples to global signal and drift."""
        means = self.means(centred, is_measured)
        neighbours = self.neighbour_patches(means, ~is_hidden)
        signal, drift = self.slow(means, neighbours, is_measured, ~is_hidden)
        is_scored = hidden_voxels(is_hidden, self.patch_of_voxel, centred.shape[1]) & is_measured[:, None]
        self.global_drift.add(signal, drift, centred=centred, is_scored=is_scored)


def ridge_guess(
    ridge: RidgeOracle,
    means: Float[Tensor, "batch time patch"],
    is_visible: Bool[Tensor, "batch tubelet patch"],
    *,
    penalty: float,
) -> Float[Tensor, "batch time voxel"]:
    """Every voxel's guess from the patches that are visible in its tubelet."""
    weights = [
        torch.cat(
            [
                ridge.weights(frames, visible, penalty=penalty)
                for frames, visible in zip(sample.chunk(len(shown)), shown, strict=True)
            ]
        )
        for sample, shown in zip(means, is_visible, strict=True)
    ]
    return torch.stack(weights) @ ridge.voxel_moments


def centre(
    values: Float[Tensor, "batch time voxel"],
    is_measured: Bool[Tensor, "batch voxel"],
    offset: Float[Tensor, "voxel"],
) -> Float[Tensor, "batch time voxel"]:
    """Values minus the training voxel mean; 0 where not measured."""
    return (values - offset) * is_measured[:, None]


def fit_references(
    batches: Callable[[], Iterable[WindowBatch]],
    config: BaselineConfig,
    *,
    offset: Float[Tensor, "voxel"],
    patch_of_voxel: Int64[Tensor, "voxel"],
    centres_mm: Float[Tensor, "patch 3"],
    hidden_tokens: HiddenTokens,
) -> References:
    """Baselines fitted on training batches; the ridge's penalty is chosen on subjects it had not seen by then.

    `batches()` gives this rank's share, the same each time; batches are read again and never kept.
    """
    num_patches, num_voxels = len(centres_mm), len(offset)
    references = References(
        config=config,
        offset=offset,
        patch_of_voxel=patch_of_voxel,
        distance_mm=torch.cdist(centres_mm, centres_mm),
        global_drift=GlobalDrift(num_voxels, degree=config.drift_degree),
        ridge=None,
        penalty=config.ridge_penalties[0],
    )
    subjects = []
    for batch in batches():
        real = batch.weight > 0
        subjects += list(itertools.compress(batch.subjects, real))
        if bool(real.any()):
            centred = centre(batch.values[real], batch.is_measured[real], offset)
            references.learn_drift(centred, batch.is_measured[real], hidden_tokens(batch)[real])
    sum_over_ranks(references.global_drift.moments, references.global_drift.products)
    if has_ridge(config, num_patches, num_voxels):
        of_all = cast("list[list[str]]", gather(subjects))
        is_kept = ~rows_set_aside_of_rank(of_all, config.choice_share, rank=this_process().rank)
        fit_ridge(references, batches, is_kept, hidden_tokens)
    return references


def score_baselines(
    references: References,
    batches: Iterable[WindowBatch],
    *,
    hidden_tokens: HiddenTokens,
    by_region: SumsByRegion,
) -> BaselineScores:
    """The errors of the samples of all ranks' `batches`, on every rank; padding is left out."""
    seeds: list[Tensor] = []
    errors: dict[str, list[Tensor]] = {}
    for batch in batches:
        real = batch.weight > 0
        seeds.append(batch.sample_seed[real])
        for name, squared in references.squared_errors(batch, hidden_tokens(batch)).items():
            errors.setdefault(name, []).append(by_region(squared)[real])
    shares = cast("list[tuple[list[Tensor], dict[str, list[Tensor]]]]", gather((seeds, errors)))
    sample_seed, rows = torch.cat([seed for own, _ in shares for seed in own]).unique(return_inverse=True)
    order = torch.empty_like(sample_seed).scatter_(0, rows, torch.arange(len(rows)))
    return BaselineScores(
        sample_seed, {name: torch.cat([each for _, own in shares for each in own[name]])[order] for name in errors}
    )


def fit_ridge(
    references: References,
    batches: Callable[[], Iterable[WindowBatch]],
    is_kept: Bool[Tensor, "row"],
    hidden_tokens: HiddenTokens,
) -> None:
    """Give the references a ridge of all rows, with the penalty that a ridge of the kept rows wants on the others."""
    num_patches, num_voxels = len(references.distance_mm), len(references.offset)
    ridge, set_aside = RidgeOracle(num_patches, num_voxels), RidgeOracle(num_patches, num_voxels)
    for oracle, chosen in ((ridge, is_kept), (set_aside, ~is_kept)):
        for batch, rows in _with_rows(batches(), chosen):
            centred = centre(batch.values[rows], batch.is_measured[rows], references.offset)
            oracle.add(references.means(centred, batch.is_measured[rows]), centred)
        sum_over_ranks(oracle.patch_moments, oracle.voxel_moments)
    references.penalty = _best_penalty(references, ridge, _with_rows(batches(), ~is_kept), hidden_tokens)
    ridge.merge(set_aside)
    references.ridge = ridge


def has_ridge(config: BaselineConfig, num_patches: int, num_voxels: int) -> bool:
    """True where the ridge fits into its memory; otherwise says that it is left out, and why."""
    needed_gib = ridge_bytes(num_patches, num_voxels) / 2**30
    if needed_gib <= config.ridge_max_gib:
        return True
    log.warning(
        "the ridge baseline is left out: %d patches x %d voxels need %.2f GiB on every rank, "
        "baselines.ridge_max_gib is %g",
        num_patches,
        num_voxels,
        needed_gib,
        config.ridge_max_gib,
    )
    return False


def rows_set_aside(subjects: list[str], share: float) -> Bool[Tensor, "row"]:
    """True for the rows of the last `share` of the subjects, in name order; of the rows when there is one subject."""
    names = sorted(set(subjects))
    if len(names) == 1:
        return torch.arange(len(subjects)) >= round((1 - share) * len(subjects))
    last = set(names[min(len(names) - 1, round((1 - share) * len(names))) :])
    return torch.tensor([subject in last for subject in subjects])


def rows_set_aside_of_rank(subjects: list[list[str]], share: float, *, rank: int) -> Bool[Tensor, "row"]:
    """`rows_set_aside` of all ranks' rows, given by rank as they were dealt out: those of this rank."""
    dealt = sorted((row, dealt_to) for dealt_to, rows in enumerate(subjects) for row in range(len(rows)))
    is_own = torch.tensor([dealt_to == rank for _, dealt_to in dealt])
    return rows_set_aside([subjects[dealt_to][row] for row, dealt_to in dealt], share)[is_own]


def sum_over_ranks(*sums: Tensor) -> None:
    """Adds up what the ranks have learnt from their shares."""
    for each in sums:
        sum_in_place(each, own_device())


def _with_rows(
    batches: Iterable[WindowBatch], chosen: Bool[Tensor, "row"]
) -> Iterator[tuple[WindowBatch, Bool[Tensor, "batch"]]]:
    """The batches that have chosen rows, and which; padding is no row."""
    start = 0
    for batch in batches:
        rows = batch.weight > 0
        num_rows = int(rows.sum())
        rows[rows.clone()] = chosen[start : start + num_rows]
        start += num_rows
        if bool(rows.any()):
            yield batch, rows


def _best_penalty(
    references: References,
    ridge: RidgeOracle,
    held_out: Iterable[tuple[WindowBatch, Bool[Tensor, "batch"]]],
    hidden_tokens: HiddenTokens,
) -> float:
    """The candidate with the least squared error over the hidden, measured voxels of the chosen rows."""
    penalties = references.config.ridge_penalties
    errors = torch.zeros(len(penalties), dtype=torch.float64)
    for batch, rows in held_out:
        is_measured, is_hidden = batch.is_measured[rows], hidden_tokens(batch)[rows]
        centred = centre(batch.values[rows], is_measured, references.offset)
        is_scored = hidden_voxels(is_hidden, references.patch_of_voxel, centred.shape[1]) & is_measured[:, None]
        means = references.means(centred, is_measured)
        for number, penalty in enumerate(penalties):
            guess = ridge_guess(ridge, means, ~is_hidden, penalty=penalty)
            errors[number] += float((guess - centred).square()[is_scored].sum())
    sum_over_ranks(errors)
    return penalties[int(errors.argmin())]


def hidden_voxels(
    is_hidden: Bool[Tensor, "batch tubelet patch"], patch_of_voxel: Int64[Tensor, "voxel"], num_frames: int
) -> Bool[Tensor, "batch time voxel"]:
    """True for the voxels and frames of hidden tokens."""
    frames = num_frames // is_hidden.shape[1]
    return repeat(is_hidden[:, :, patch_of_voxel], "batch tubelet voxel -> batch (tubelet frame) voxel", frame=frames)
