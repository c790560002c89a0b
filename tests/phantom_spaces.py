"""Small spaces with an atlas, for tests that need geometry and no scan."""

from __future__ import annotations

import numpy as np

from brain_models.atlas import Atlas, aal3_groups
from brain_models.space import BrainSpace, fsl_grid, space_from_mask
from pretrain.masked.masked_set import Geometry, WindowConfig


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


def aal3_like(*, patch_voxels: int) -> Geometry:
    """An ellipsoid of a brain's size at 2 mm with regions that have AAL3's labels (1..170 without 35, 36, 81, 82), its
    groups and sizes like its own: 166 compact regions of 185,751 voxels together, labels 133 and 134 of 2 and 1."""
    affine, shape = fsl_grid(2.0)
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    in_brain = (((places - np.array([45, 54, 45])) / np.array([36.5, 46.0, 37.5])) ** 2).sum(axis=-1) < 1
    space = space_from_mask(in_brain, affine, name="ellipsoid", template="none")
    labels = np.zeros(space.num_voxels, dtype=np.int32)
    along = np.argsort(morton(space.voxel_indices // 2), kind="stable")[:185_751]
    labels[along] = np.repeat(AAL3_LABELS, aal3_like_sizes())
    names = {int(label): f"region {label}" for label in AAL3_LABELS}
    atlas = Atlas("aal3-like", labels, names, aal3_groups())
    window = WindowConfig(window_frames=8, tubelet_frames=4, patch_voxels=patch_voxels)
    return Geometry.of(space, atlas, window)


AAL3_LABELS = np.array([label for label in range(1, 171) if label not in (35, 36, 81, 82)])


def aal3_like_sizes() -> np.ndarray:
    """Voxels of each label: a long tail, 185,751 together."""
    sizes = np.exp(np.random.default_rng(3).normal(6.3, 1.3, len(AAL3_LABELS)))
    tiny = {133: 2, 134: 1}
    is_tiny = np.isin(AAL3_LABELS, list(tiny))
    sizes = np.maximum(np.round(sizes / sizes[~is_tiny].sum() * 185_748), 3).astype(int)
    sizes[is_tiny] = [tiny[int(label)] for label in AAL3_LABELS[is_tiny]]
    sizes[sizes.argmax()] += 185_751 - sizes.sum()
    return sizes


def morton(places: np.ndarray) -> np.ndarray:
    """Position along a Z-order curve: neighbours on it are mostly neighbours in space."""
    code = np.zeros(len(places), dtype=np.int64)
    for bit in range(8):
        for axis in range(3):
            code |= ((places[:, axis] >> bit) & 1) << (3 * bit + axis)
    return code
