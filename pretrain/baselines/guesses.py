"""What hidden voxels can be guessed from without a network: the mean, neighbouring patches, a ridge on patch means.
Global signal and drift are in pretrain.baselines.global_drift.

Everything here sees centred values (minus the training voxel mean), so the mean baseline is zero by construction.
"""

from dataclasses import dataclass

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int64
from torch import Tensor


@dataclass
class BaselineConfig:
    num_neighbours: int  # visible patches whose means a hidden patch is guessed from
    drift_degree: int  # of the polynomial in time that stands for slow drift within a window
    ridge_max_gib: float  # of memory on every rank; where it needs more it is left out, and that is said
    ridge_penalties: list[float]  # candidates, in units of the mean variance of patch means
    fit_samples: int  # training samples that the voxel statistics and the ridge are fitted on
    choice_share: float  # share of their subjects on which the penalty is chosen


def patch_counts(
    is_measured: Bool[Tensor, "batch voxel"], *, patch_of_voxel: Int64[Tensor, "voxel"], num_patches: int
) -> Float[Tensor, "batch patch"]:
    """How many voxels of each patch were measured."""
    count = torch.zeros(len(is_measured), num_patches, device=is_measured.device)
    return count.index_add_(1, patch_of_voxel, is_measured.float())


def patch_means(
    values: Float[Tensor, "batch time voxel"],
    is_measured: Bool[Tensor, "batch voxel"],
    *,
    patch_of_voxel: Int64[Tensor, "voxel"],
    num_patches: int,
) -> Float[Tensor, "batch time patch"]:
    """Each patch's mean over its measured voxels; 0 where none is measured."""
    count = patch_counts(is_measured, patch_of_voxel=patch_of_voxel, num_patches=num_patches)
    total = values.new_zeros(*values.shape[:2], num_patches)
    total.index_add_(2, patch_of_voxel, values * is_measured[:, None])
    return total / count.clamp(min=1)[:, None]


def neighbour_means(
    means: Float[Tensor, "tubelet frame patch"],
    is_visible: Bool[Tensor, "tubelet patch"],
    distance_mm: Float[Tensor, "patch patch"],
    *,
    num_neighbours: int,
) -> Float[Tensor, "tubelet frame patch"]:
    """For every token the mean of its nearest visible patches' means, frame by frame.

    Where a whole tubelet is hidden, the nearest one that shows anything stands in: in future masking, persistence.
    """
    num_visible = is_visible.sum(dim=1)
    tubelets = torch.arange(len(means), device=means.device)
    guess = torch.empty_like(means)
    nearest, shown = tubelets, None
    for tubelet in tubelets.tolist():
        distance_in_time = torch.where(num_visible > 0, (tubelets - tubelet).abs(), len(tubelets))
        source = int(distance_in_time.argmin())
        if shown is None or not torch.equal(shown, is_visible[source]):  # tube and region: the same for every tubelet
            shown = is_visible[source]
            seen = shown.nonzero().flatten()
            nearest = seen[distance_mm[:, seen].topk(min(num_neighbours, len(seen)), largest=False).indices]
        guess[tubelet] = means[source][:, nearest].mean(dim=-1)
    return guess


def ridge_bytes(num_patches: int, num_voxels: int) -> int:
    """Bytes of the second moments of patch means with one another (float64) and with voxels (float32), kept twice."""
    return 2 * (8 * num_patches * num_patches + 4 * num_patches * num_voxels)


class RidgeOracle:
    """Ridge regression of every voxel on the visible patch means of the same frame, solved exactly for any hidden set.

    Only second moments of the training frames are kept, so no hidden set has to be known when fitting.
    """

    def __init__(self, num_patches: int, num_voxels: int) -> None:
        self.patch_moments = torch.zeros(num_patches, num_patches, dtype=torch.float64)
        self.voxel_moments = torch.zeros(num_patches, num_voxels)

    def add(self, means: Float[Tensor, "batch time patch"], values: Float[Tensor, "batch time voxel"]) -> None:
        frames = rearrange(means, "batch time patch -> (batch time) patch")
        self.patch_moments += frames.double().T @ frames.double()
        self.voxel_moments.addmm_(frames.T, rearrange(values, "batch time voxel -> (batch time) voxel"))

    def merge(self, other: "RidgeOracle") -> None:
        self.patch_moments += other.patch_moments
        self.voxel_moments += other.voxel_moments

    def predict(
        self, means: Float[Tensor, "time patch"], is_visible: Bool[Tensor, "patch"], *, penalty: float
    ) -> Float[Tensor, "time voxel"]:
        """Every voxel's guess from the visible patches; 0 when none is visible. `penalty` is relative (see config)."""
        return self.weights(means, is_visible, penalty=penalty) @ self.voxel_moments

    def weights(
        self, means: Float[Tensor, "time patch"], is_visible: Bool[Tensor, "patch"], *, penalty: float
    ) -> Float[Tensor, "time patch"]:
        """What `voxel_moments` is multiplied by for the guess; 0 for patches that are not visible.

        For many sets of visible patches, put their weights together before: that product is all of the time.
        """
        seen = is_visible.nonzero().flatten()
        moments = self.patch_moments[seen][:, seen]
        absolute = penalty * self.patch_moments.diagonal().mean()
        eye = torch.eye(len(seen), dtype=torch.float64)
        factor = torch.linalg.cholesky(moments + absolute * eye)
        weights = self.voxel_moments.new_zeros(means.shape)
        solved = torch.cholesky_solve(means[:, seen].double().T, factor).T  # beta^T x, without forming beta
        weights[:, seen] = solved.to(weights.dtype)
        return weights


@dataclass
class VoxelStatistics:
    """Running sums per voxel over measured frames; `mean` and `deviation` are the training split's."""

    count: Float[Tensor, "voxel"]
    total: Float[Tensor, "voxel"]
    squares: Float[Tensor, "voxel"]

    @classmethod
    def empty(cls, num_voxels: int) -> "VoxelStatistics":
        return cls(*(torch.zeros(num_voxels, dtype=torch.float64) for _ in range(3)))

    def add(self, values: Float[Tensor, "batch time voxel"], is_measured: Bool[Tensor, "batch voxel"]) -> None:
        present = is_measured.double()
        self.count += present.sum(dim=0) * values.shape[1]
        self.total += (reduce(values.double(), "batch time voxel -> batch voxel", "sum") * present).sum(dim=0)
        self.squares += (reduce(values.double().square(), "batch time voxel -> batch voxel", "sum") * present).sum(
            dim=0
        )

    @property
    def mean(self) -> Float[Tensor, "voxel"]:
        """0 where no training scan measured the voxel."""
        return (self.total / self.count.clamp(min=1)).float()

    def deviation(self, floor: float) -> Float[Tensor, "voxel"]:
        """The standard deviation, never below `floor` of its median over voxels; the median where nothing is known."""
        mean = self.total / self.count.clamp(min=1)
        deviation = (self.squares / self.count.clamp(min=1) - mean.square()).clamp(min=0).sqrt()
        known = self.count > 1
        typical = deviation[known].median() if bool(known.any()) else deviation.new_ones(())
        return torch.where(known, deviation, typical).clamp(min=float(floor * typical)).float()
