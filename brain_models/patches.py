"""Patches: sets of voxels that become tokens, as one gather from the packed axis.

Promise: no dense grid is built and patches outside the brain do not exist. Knows no model.
"""

import hashlib
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float32, Int64

from brain_models.errors import SpaceError
from brain_models.space import BrainSpace, require_grid


class PatchLayout:
    """Cubes of `patch_voxels`^3 grid voxels that hold at least one in-brain voxel, in C order of the grid.

    `gather` [patch, voxel in patch] indexes the packed axis, its second axis is the place inside the cube; places
    outside the brain hold `num_voxels` and are False in `is_valid`. `centres_mm` is the mean of the valid positions.
    """

    gather: Int64[np.ndarray, "patch place"]
    is_valid: Bool[np.ndarray, "patch place"]
    centres_mm: Float32[np.ndarray, "patch 3"]

    def __init__(self, space: BrainSpace, patch_voxels: int) -> None:
        _, grid_shape, voxel_indices = require_grid(space)
        if not 1 <= patch_voxels <= max(grid_shape):
            raise SpaceError(f"patch_voxels {patch_voxels} does not fit the {grid_shape} grid of space {space.name}")
        self.patch_voxels = patch_voxels
        self.num_voxels = space.num_voxels
        cubes = -(-np.array(grid_shape) // patch_voxels)
        cube = np.ravel_multi_index(tuple((voxel_indices // patch_voxels).T), tuple(cubes))
        place = np.ravel_multi_index(tuple((voxel_indices % patch_voxels).T), (patch_voxels,) * 3)
        _, self.patch_of_voxel = np.unique(cube, return_inverse=True)
        num_patches = int(self.patch_of_voxel.max()) + 1
        self.gather = np.full((num_patches, patch_voxels**3), space.num_voxels, dtype=np.int64)
        self.gather[self.patch_of_voxel, place] = np.arange(space.num_voxels)
        self.is_valid = self.gather < space.num_voxels
        self.voxels_per_patch = self.is_valid.sum(axis=1)
        sums = [np.bincount(self.patch_of_voxel, weights=space.positions_mm[:, axis]) for axis in range(3)]
        self.centres_mm = (np.stack(sums, axis=1) / self.voxels_per_patch[:, None]).astype(np.float32)

    @property
    def num_patches(self) -> int:
        return len(self.gather)

    @cached_property
    def fingerprint(self) -> str:
        """Returns a SHA-256 of gather index and centres: equal layouts cut the same space the same way."""
        return hashlib.sha256(self.gather.astype("<i8").tobytes() + self.centres_mm.astype("<f4").tobytes()).hexdigest()
