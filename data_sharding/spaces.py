"""Which brain space a configuration asks for: volume, surface, or the cube around a head."""

from __future__ import annotations

from pathlib import Path

from brain_models.cube import CubeSpaceConfig, cube_space
from brain_models.space import BrainSpace, SpaceConfig, volume_space
from brain_models.surfaces import SurfaceSpaceConfig, surface_space

AnySpaceConfig = SpaceConfig | SurfaceSpaceConfig | CubeSpaceConfig


def make_space(config: AnySpaceConfig, *, atlas_images: list[Path]) -> BrainSpace:
    """The space of a configuration; a volume is joined with the atlases' voxels."""
    if isinstance(config, SurfaceSpaceConfig):
        return surface_space(config)
    if isinstance(config, CubeSpaceConfig):
        return cube_space(config)
    return volume_space(config, atlas_images=atlas_images)


def validate_space(config: AnySpaceConfig) -> list[str]:
    """All problems that need no file: each names its key and what to give instead."""
    if isinstance(config, SurfaceSpaceConfig):
        problems = []
        if len(config.surfaces) not in (0, 2):
            problems.append(f"space.surfaces: {config.surfaces}; give the left and the right surface, or []")
        if len(config.vertices) not in (0, 1, 2):
            problems.append(
                f"space.vertices: {config.vertices}; give one CIFTI file, the left and the right file, or [] for all"
            )
        if config.labels and not config.vertices:
            problems.append("space.labels: needs space.vertices, the file that holds the labels")
        return problems
    problems = [f"space.spacing_mm: {config.spacing_mm}; give a voxel edge in mm"] if config.spacing_mm <= 0 else []
    if isinstance(config, CubeSpaceConfig) and not 8 <= config.edge_voxels <= 512:
        problems.append(f"space.edge_voxels: {config.edge_voxels}; give 8 to 512 (128 at 2 mm holds a whole head)")
    return problems
