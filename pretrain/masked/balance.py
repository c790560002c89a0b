"""How much a voxel counts in the loss: all the same, or so that every region counts the same. Pure functions."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

LossKind = Literal["plain", "balanced"]


def balanced_weights(
    region: Int64[Tensor, "voxel"], can_be_hidden: Bool[Tensor, "voxel"], *, smallest_region: float
) -> Float[Tensor, "voxel"]:
    """Weights with mean 1 over the voxels that can be hidden, which give every region of them the same sum.

    A region counts as at least `smallest_region` of the median region's voxels, so no voxel weighs more than
    1 / smallest_region of one of a median region; a region below that size gets its voxels' share of an equal part.
    The weights are constants of set and arm: what a batch or a rank happens to hold does not change them.
    """
    sizes = torch.bincount(region[can_be_hidden]).double()
    floor = smallest_region * sizes[sizes > 0].quantile(0.5)
    weights = torch.where(can_be_hidden, 1 / sizes.clamp(min=float(floor))[region.clamp(max=len(sizes) - 1)], 0.0)
    return (weights * can_be_hidden.sum() / weights.sum()).float()
