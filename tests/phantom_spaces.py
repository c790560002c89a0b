"""Small spaces with an atlas, for tests that need geometry and no scan."""

from __future__ import annotations

import numpy as np

from brain_models.atlas import Atlas
from brain_models.space import BrainSpace, fsl_grid, space_from_mask
from pretrain.geometry import Geometry, WindowConfig


def ball(*, patch_voxels: int) -> Geometry:
    """An ellipsoid at 12 mm, windows of four frames in two tubelets."""
    affine, shape = fsl_grid(12.0)
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    in_brain = (((places - np.array([7, 9, 7])) / np.array([5.2, 6.4, 5.1])) ** 2).sum(axis=-1) < 1
    space = space_from_mask(in_brain, affine, name="ball", template="none")
    window = WindowConfig(window_frames=4, tubelet_frames=2, patch_voxels=patch_voxels)
    return Geometry.of(space, octants(space), window)


def octants(space: BrainSpace) -> Atlas:
    """Labels with a gap, one label of a single voxel, and one octant without a label."""
    above = space.positions_mm > np.median(space.positions_mm, axis=0)
    labels = (above @ np.array([1, 2, 4])).astype(np.int32) * 10
    labels[5] = 3
    names = {int(label): f"octant {label}" for label in np.unique(labels) if label}
    return Atlas("octants", labels, names, {"left": [20, 40, 60], "speck": [3], "absent": [99]})
