"""One shard set as the pretraining task sees it: where its voxels lie, which tokens it hides, what they weigh.

Holds no weights: the stem it reads with and the head that guesses are the model's.
"""

import logging
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from brain_models.atlas import Atlas, cluster_labels
from brain_models.encoder import Stem, StemName, TokenKind
from brain_models.patches import PatchLayout
from brain_models.space import BrainSpace
from pretrain.baselines.references import BaselineScores
from pretrain.masked.masking import Columns, Masker, MaskingConfig, TokenChoice, eligible_patches, hidable_columns
from pretrain.report.scores import Regions
from training.collectives import this_process

LossKind = Literal["plain", "balanced"]

log = logging.getLogger(__name__)


@dataclass
class WindowConfig:
    """What one sample of a set is, and how it is cut into tokens."""

    window_frames: int
    tubelet_frames: int
    patch_voxels: int  # edge of a patch: cubes on a voxel grid, clusters of at most its square of vertices on a surface


@dataclass
class LossConfig:
    """How errors are summed."""

    kind: LossKind
    smallest_region: float  # balanced: no region counts as smaller than this share of the median one


@dataclass(frozen=True, eq=False)
class Geometry:
    """Where the voxels are: everything that masking and scores need of a space, an atlas and a window."""

    space: BrainSpace
    atlas: Atlas
    layout: PatchLayout
    window: WindowConfig

    @classmethod
    def of(cls, space: BrainSpace, atlas: Atlas, window: WindowConfig) -> "Geometry":
        """The geometry of a space cut as its window says; SpaceError where it cannot be cut so."""
        if space.kind == "volume":
            return cls(space, atlas, PatchLayout.from_grid(space, window.patch_voxels), window)
        clusters = cluster_labels(space, window.patch_voxels**2)
        return cls(space, atlas, PatchLayout.from_labels(space, clusters), window)

    @property
    def num_tubelets(self) -> int:
        return self.window.window_frames // self.window.tubelet_frames

    def masker(self, config: MaskingConfig) -> Masker:
        """The masker of this geometry; MaskingError when the budget is out of reach."""
        shares, columns = self.membership(config)
        return Masker(config, shares, columns=columns, num_tubelets=self.num_tubelets)

    def membership(self, config: MaskingConfig) -> tuple[Float[Tensor, "patch region"], Columns]:
        """Shares of each patch in each region, and the columns that may and may not be hidden."""
        membership = self.atlas.membership(self.layout, self.space)
        columns = hidable_columns(config, atlas_groups=self.atlas.groups, region_ids=membership.region_ids.tolist())
        return torch.from_numpy(membership.shares), columns


@dataclass(frozen=True, eq=False)
class SetSpec:
    """What the task must know of a set before it is built."""

    kind: TokenKind
    geometry: Geometry
    weight: float  # the set's share of the steps, up to a factor


class MaskedSet(nn.Module):
    """Masker, regions and loss weights of one set; once prepared, also what the run knows of its training split."""

    training_mean: Float[Tensor, "voxel"] | None
    baselines: BaselineScores | None  # of the samples that the run is evaluated on
    region_of_voxel: Int64[Tensor, "voxel"]
    patch_of_voxel: Int64[Tensor, "voxel"]
    element_of_voxel: Int64[Tensor, "voxel"]  # its position in its patch
    voxel_weight: Float[Tensor, "voxel"]
    root_weight: Float[Tensor, "patch feature"]

    def __init__(
        self, name: str, stem_name: StemName, spec: SetSpec, *, masking: MaskingConfig, loss: LossConfig
    ) -> None:
        super().__init__()
        geometry, layout = spec.geometry, spec.geometry.layout
        self.name = name
        self.stem_name = stem_name
        self.weight = spec.weight
        self.baselines = None
        self.register_buffer("training_mean", None, persistent=False)
        self.masker = geometry.masker(masking)
        self.regions = Regions.of(geometry.atlas)
        values_per_token = float(layout.voxels_per_patch.mean()) * geometry.window.tubelet_frames
        self.values_per_sample = self.masker.num_hidden * values_per_token  # hidden ones, as if all were measured
        weight = voxel_weights(geometry, masking, loss)
        padded = torch.cat([weight, torch.zeros(1)])
        root = padded[torch.from_numpy(layout.gather)].sqrt().repeat(1, geometry.window.tubelet_frames)
        for key, tensor in {
            "region_of_voxel": torch.from_numpy(self.regions.column_of_voxel),
            "patch_of_voxel": torch.from_numpy(layout.patch_of_voxel),
            "element_of_voxel": torch.from_numpy(layout.element_of_voxel),
            "voxel_weight": weight,
            "root_weight": root,
        }.items():
            self.register_buffer(key, tensor, persistent=False)

    def is_hidden(self, choice: TokenChoice) -> Bool[Tensor, "batch tubelet patch"]:
        """True for the tokens that are hidden."""
        flat = torch.zeros(len(choice.hidden), self.masker.num_tokens, dtype=torch.bool, device=choice.hidden.device)
        flat.scatter_(1, choice.hidden, True)
        return rearrange(flat, "batch (tubelet patch) -> batch tubelet patch", patch=self.masker.num_patches)

    def by_voxel(
        self, stem: Stem, hidden: Float[Tensor, "batch hidden feature"], choice: TokenChoice
    ) -> Float[Tensor, "batch time voxel"]:
        """Features of the hidden tokens on the packed axis, 0 where nothing is hidden."""
        every = hidden.new_zeros(len(hidden), self.masker.num_tokens, hidden.shape[2])
        every.scatter_(1, choice.hidden[:, :, None].expand_as(hidden), hidden)
        elements = rearrange(
            every,
            "batch (tubelet patch) (frame element) -> batch (tubelet frame) patch element",
            patch=self.masker.num_patches,
            frame=stem.tubelet_frames,
        )
        return elements[:, :, self.patch_of_voxel, self.element_of_voxel]

    def scored_beside_baselines(
        self, is_own: Bool[Tensor, "row"], sample_seed: Int64[Tensor, "row"]
    ) -> Bool[Tensor, "row"]:
        """True for the set's own samples that the baselines were scored on, too; says when some are not."""
        assert self.baselines is not None
        is_scored = is_own & self.baselines.has(sample_seed)
        num_own, num_scored = int(is_own.sum()), int(is_scored.sum())
        if num_scored < num_own and this_process().is_main:
            log.warning(
                "%d of %d samples of set %s are left out of the scores: they could not be read when the baselines were "
                "scored",
                num_own - num_scored,
                num_own,
                self.name,
            )
        return is_scored

    def by_region(self, values: Float[Tensor, "batch time voxel"]) -> Float[Tensor, "batch region"]:
        """Sums over frames and the voxels of each region; the last column: no region."""
        sums = values.new_zeros(len(values), self.regions.num_columns)
        return sums.index_add_(1, self.region_of_voxel, values.sum(dim=1))


def voxel_weights(geometry: Geometry, masking: MaskingConfig, loss: LossConfig) -> Float[Tensor, "voxel"]:
    """How much each voxel's squared error counts in the loss; unlabelled tissue counts by its pseudo-regions."""
    if loss.kind == "plain":
        return torch.ones(geometry.space.num_voxels)
    shares, columns = geometry.membership(masking)
    can_be_hidden = eligible_patches(shares, masking, columns)[torch.from_numpy(geometry.layout.patch_of_voxel)]
    labels = torch.from_numpy(geometry.atlas.complete_labels(geometry.space))
    return balanced_weights(labels, can_be_hidden, smallest_region=loss.smallest_region)


def balanced_weights(
    region: Int64[Tensor, "voxel"], can_be_hidden: Bool[Tensor, "voxel"], *, smallest_region: float
) -> Float[Tensor, "voxel"]:
    """Weights with mean 1 over the voxels that can be hidden, which give every region of them the same sum.

    A region counts as at least `smallest_region` of the median region's voxels, so no voxel weighs more than
    1 / smallest_region of one of a median region; a region below that size gets its voxels' share of an equal part.
    The weights are constants of set and masking: what a batch or a rank happens to hold does not change them.
    """
    sizes = torch.bincount(region[can_be_hidden]).double()
    floor = smallest_region * sizes[sizes > 0].quantile(0.5)
    weights = torch.where(can_be_hidden, 1 / sizes.clamp(min=float(floor))[region.clamp(max=len(sizes) - 1)], 0.0)
    return (weights * can_be_hidden.sum() / weights.sum()).float()
