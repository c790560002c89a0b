"""Where the voxels of a set are: its space and atlas, cut into the tokens of one window. Knows no model and no file."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from brain_models.atlas import Atlas
from brain_models.patches import PatchLayout
from brain_models.space import BrainSpace
from pretrain.masked.masking import Columns, Masker, MaskingConfig, hidable_columns


@dataclass
class WindowConfig:
    """What one sample of a set is, and how it is cut into tokens."""

    window_frames: int
    tubelet_frames: int
    patch_voxels: int


@dataclass(frozen=True, eq=False)
class Geometry:
    """Where the voxels are: everything that masking and scores need of a space, an atlas and a window."""

    space: BrainSpace
    atlas: Atlas
    layout: PatchLayout
    window: WindowConfig

    @classmethod
    def of(cls, space: BrainSpace, atlas: Atlas, window: WindowConfig) -> "Geometry":
        return cls(space, atlas, PatchLayout.from_grid(space, window.patch_voxels), window)

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
