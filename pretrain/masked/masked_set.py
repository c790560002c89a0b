"""One shard set as the pretraining task sees it: which tokens it hides, where their voxels lie, what they weigh.

Holds no weights: the stem it reads with and the head that guesses are the model's.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from brain_models.encoder import Stem, StemName, TokenKind
from pretrain.baselines.references import References
from pretrain.masked.balance import LossKind, balanced_weights
from pretrain.masked.geometry import Geometry
from pretrain.masked.masking import MaskingConfig, TokenChoice, eligible_patches
from pretrain.report.scores import Regions


@dataclass(frozen=True, eq=False)
class SetSpec:
    """What the task must know of a set before it is built."""

    kind: TokenKind
    geometry: Geometry
    weight: float  # the set's share of the steps, up to a factor


@dataclass
class LossConfig:
    """How errors are summed."""

    kind: LossKind
    smallest_region: float  # balanced: no region counts as smaller than this share of the median one


class MaskedSet(nn.Module):
    """Geometry, masker and weights of one set, and the references scored beside the model on it."""

    references: References | None
    region_of_voxel: Int64[Tensor, "voxel"]
    patch_of_voxel: Int64[Tensor, "voxel"]
    element_of_voxel: Int64[Tensor, "voxel"]
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
        self.references = None
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

    def hidden_patches(self, choice: TokenChoice) -> Bool[Tensor, "batch tubelet patch"]:
        """True for the tokens that are hidden."""
        flat = torch.zeros(len(choice.hidden), self.masker.num_tokens, dtype=torch.bool, device=choice.hidden.device)
        flat.scatter_(1, choice.hidden, True)
        return rearrange(flat, "batch (tubelet patch) -> batch tubelet patch", patch=self.masker.num_patches)

    def counted(
        self, stem: Stem, is_measured: Bool[Tensor, "batch voxel"], choice: TokenChoice
    ) -> Float[Tensor, "batch hidden feature"]:
        """The voxel's scale times the root of its weight where a hidden feature stands for a measured voxel, else 0."""
        scale = stem.by_token(stem.voxel_scale.expand(1, stem.tubelet_frames, -1))
        return at(stem.measured(is_measured) * (scale * self.root_weight), choice.hidden % self.masker.num_patches)

    def by_voxel(
        self, stem: Stem, tokens: Float[Tensor, "batch hidden feature"], choice: TokenChoice
    ) -> Float[Tensor, "batch time voxel"]:
        """Features of hidden tokens put back where they belong on the packed axis, 0 elsewhere."""
        every = tokens.new_zeros(len(tokens), self.masker.num_tokens, tokens.shape[2])
        every.scatter_(1, choice.hidden[:, :, None].expand_as(tokens), tokens)
        elements = rearrange(
            every,
            "batch (tubelet patch) (frame element) -> batch (tubelet frame) patch element",
            patch=self.masker.num_patches,
            frame=stem.tubelet_frames,
        )
        return elements[:, :, self.patch_of_voxel, self.element_of_voxel]

    def by_region(self, values: Float[Tensor, "batch time voxel"]) -> Float[Tensor, "batch region"]:
        """Sums over frames and the voxels of each region; the last column: no region."""
        sums = values.new_zeros(len(values), self.regions.num_columns)
        return sums.index_add_(1, self.region_of_voxel, values.sum(dim=1))


def voxel_weights(geometry: Geometry, masking: MaskingConfig, loss: LossConfig) -> Float[Tensor, "voxel"]:
    """What each voxel's squared error counts in the loss; unlabelled tissue counts by its pseudo-regions."""
    if loss.kind == "plain":
        return torch.ones(geometry.space.num_voxels)
    shares, columns = geometry.membership(masking)
    can_be_hidden = eligible_patches(shares, masking, columns)[torch.from_numpy(geometry.layout.patch_of_voxel)]
    labels = torch.from_numpy(geometry.atlas.complete_labels(geometry.space))
    return balanced_weights(labels, can_be_hidden, smallest_region=loss.smallest_region)


def at(
    tokens: Float[Tensor, "batch token feature"], chosen: Int64[Tensor, "batch chosen"]
) -> Float[Tensor, "batch chosen feature"]:
    """The chosen tokens of each sample; whole rows are copied, three times as fast as torch.gather on a CPU."""
    first_row = torch.arange(len(tokens), device=tokens.device)[:, None] * tokens.shape[1]
    rows = rearrange(tokens, "batch token feature -> (batch token) feature")
    return rows.index_select(0, (chosen + first_row).flatten()).view(*chosen.shape, tokens.shape[2])
