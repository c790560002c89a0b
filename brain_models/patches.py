"""Patches: sets of voxels that become tokens, as one gather from the packed axis.

Promise: a model reads a gather index, validity and centres, whatever they come from; no dense grid is built and
patches outside the brain do not exist. Knows no model.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Int, Int64

from brain_models.errors import SpaceError
from brain_models.space import BrainSpace, require_grid


@dataclass(frozen=True, eq=False)
class PatchLayout:
    """Which voxels of a space each patch holds; every voxel is in exactly one patch.

    `gather` indexes the packed axis; an element without a voxel holds `num_voxels` and is False in `is_valid`.
    `centres_mm` is the mean position of a patch's voxels. `patch_voxels` is the edge of cubic patches in voxels; None
    when the patches are not cubes, so that elements of two patches do not correspond.
    """

    gather: Int64[np.ndarray, "patch element"]
    centres_mm: Float32[np.ndarray, "patch 3"]
    num_voxels: int
    patch_voxels: int | None

    @classmethod
    def from_grid(cls, space: BrainSpace, patch_voxels: int) -> "PatchLayout":
        """Returns the cubes of `patch_voxels`^3 grid voxels that hold an in-brain voxel, in C order of the grid.

        The elements of a patch are the cube's voxels in C order. SpaceError when the space has no grid.
        """
        _, grid_shape, voxel_indices = require_grid(space)
        if not 1 <= patch_voxels <= max(grid_shape):
            raise SpaceError(
                f"patch_voxels {patch_voxels} does not fit the {grid_shape} grid of space {space.name}; give 1 to "
                f"{max(grid_shape)}"
            )
        num_cubes = -(-np.array(grid_shape) // patch_voxels)
        cube = np.ravel_multi_index(tuple((voxel_indices // patch_voxels).T), tuple(num_cubes))
        element = np.ravel_multi_index(tuple((voxel_indices % patch_voxels).T), (patch_voxels,) * 3)
        return cls(*_gathered(space, cube, element, num_elements=patch_voxels**3), space.num_voxels, patch_voxels)

    @classmethod
    def from_labels(cls, space: BrainSpace, labels: Int[np.ndarray, "voxel"]) -> "PatchLayout":
        """Returns one patch per label, in ascending order of labels; the elements of a patch are in packed order.

        SpaceError when there is not one label per voxel, or the space does not know where its voxels are.
        """
        if labels.shape != (space.num_voxels,):
            raise SpaceError(f"space {space.name} has {space.num_voxels} voxels, the labels have shape {labels.shape}")
        if not np.isfinite(space.positions_mm).all():
            raise SpaceError(
                f"space {space.name} does not know the positions of its vertices; name its surfaces: space.surfaces"
            )
        order = np.argsort(labels, kind="stable")
        _, first, counts = np.unique(labels[order], return_index=True, return_counts=True)
        element = np.empty(len(labels), dtype=np.int64)
        element[order] = np.arange(len(labels)) - np.repeat(first, counts)
        return cls(*_gathered(space, labels, element, num_elements=int(counts.max())), space.num_voxels, None)

    @property
    def num_patches(self) -> int:
        return len(self.gather)

    @cached_property
    def is_valid(self) -> Bool[np.ndarray, "patch element"]:
        return self.gather < self.num_voxels

    @cached_property
    def voxels_per_patch(self) -> Int64[np.ndarray, "patch"]:
        return self.is_valid.sum(axis=1)

    @cached_property
    def patch_of_voxel(self) -> Int64[np.ndarray, "voxel"]:
        return self._index_of_voxel(0)

    @cached_property
    def element_of_voxel(self) -> Int64[np.ndarray, "voxel"]:
        return self._index_of_voxel(1)

    def _index_of_voxel(self, axis: int) -> Int64[np.ndarray, "voxel"]:
        index = np.empty(self.num_voxels, dtype=np.int64)
        index[self.gather[self.is_valid]] = np.nonzero(self.is_valid)[axis]
        return index

    @cached_property
    def fingerprint(self) -> str:
        """Returns a SHA-256 of gather index and centres: equal layouts cut the same space the same way."""
        return hashlib.sha256(self.gather.astype("<i8").tobytes() + self.centres_mm.astype("<f4").tobytes()).hexdigest()

    def save(self, path: Path | str) -> None:
        """Writes the layout as npz, without pickle."""
        sizes = {"num_voxels": np.array(self.num_voxels), "patch_voxels": np.array(self.patch_voxels or 0)}
        with open(path, "wb") as file:
            np.savez_compressed(
                file, allow_pickle=False, gather=self.gather.astype(np.int32), centres_mm=self.centres_mm, **sizes
            )

    @classmethod
    def load(cls, path: Path | str) -> "PatchLayout":
        """Returns the layout saved at `path`; SpaceError when the file is not one."""
        try:
            with np.load(path, allow_pickle=False) as file:
                gather, patch_voxels = file["gather"].astype(np.int64), int(file["patch_voxels"]) or None
                return cls(gather, file["centres_mm"], int(file["num_voxels"]), patch_voxels)
        except (OSError, ValueError, KeyError) as error:
            raise SpaceError(f"{path} is not a patch layout ({error}); fetch the bundle again") from error


def _gathered(
    space: BrainSpace, owner: Int[np.ndarray, "voxel"], element: Int64[np.ndarray, "voxel"], *, num_elements: int
) -> tuple[Int64[np.ndarray, "patch element"], Float32[np.ndarray, "patch 3"]]:
    """Returns gather index and centres of patches whose voxels have the same `owner`."""
    _, patch = np.unique(owner, return_inverse=True)
    counts = np.bincount(patch)
    gather = np.full((len(counts), num_elements), space.num_voxels, dtype=np.int64)
    gather[patch, element] = np.arange(space.num_voxels)
    sums = [np.bincount(patch, weights=space.positions_mm[:, axis]) for axis in range(3)]
    return gather, (np.stack(sums, axis=1) / counts[:, None]).astype(np.float32)
