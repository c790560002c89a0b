"""How well each voxel was guessed, over many windows: maps as NIfTI in the set's space."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from brain_models.space import NO_TEMPLATE, BrainSpace, require_grid

MNI_152, SCANNER = 4, 1  # NIfTI codes of what coordinates refer to
MIN_VALUES = 8  # hidden values a voxel needs for an r2


@dataclass(frozen=True)
class VoxelMaps:
    """Arrays [voxel], NaN where a voxel was hidden in fewer than MIN_VALUES frames: r2 about the training mean, root
    mean squared error in the units of the data (standard deviations), and how many values they are of."""

    r2: np.ndarray
    rmse: np.ndarray
    num_values: np.ndarray
    num_windows: int


class ScoredVoxels(Protocol):
    """What the maps need to know of a batch, each [batch, time, voxel] and 0 where not scored."""

    squared: Tensor
    truth: Tensor  # about the training mean; also where not scored
    is_scored: Tensor


def voxel_maps(batches: Iterable[ScoredVoxels], num_voxels: int) -> VoxelMaps:
    """The maps of all hidden, measured values of the batches."""
    error, total, count = (torch.zeros(num_voxels, dtype=torch.float64) for _ in range(3))
    num_windows = 0
    for batch in batches:
        for sums, values in ((error, batch.squared), (total, batch.truth.square() * batch.is_scored)):
            sums += values.sum(dim=(0, 1)).double().cpu()
        count += batch.is_scored.sum(dim=(0, 1)).double().cpu()
        num_windows += len(batch.squared)
    is_known = (count >= MIN_VALUES) & (total > 0)
    r2 = torch.where(is_known, 1 - error / total.clamp(min=1e-12), torch.nan)
    rmse = torch.where(count >= MIN_VALUES, (error / count.clamp(min=1)).sqrt(), torch.nan)
    return VoxelMaps(r2.numpy(), rmse.numpy(), count.numpy(), num_windows)


def write_nifti(values: np.ndarray, space: BrainSpace, path: Path) -> None:
    """Write a map on the grid of its space, float32, NaN where there is none."""
    import nibabel

    affine, shape, indices = require_grid(space)
    volume = np.full(shape, np.nan, dtype=np.float32)
    volume[tuple(indices.T)] = values
    image = nibabel.Nifti1Image(volume, affine)
    code = SCANNER if space.template == NO_TEMPLATE else MNI_152
    image.set_sform(affine, code)
    image.set_qform(affine, code)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)
