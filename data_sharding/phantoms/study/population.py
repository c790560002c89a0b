"""What all subjects share on one grid: tissue of the packaged MNI template, in-head positions, shape modes."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from nilearn import datasets
from scipy import ndimage

from brain_models.space import fsl_grid

from .config import AnatomyConfig

_FWHM_PER_SIGMA = 2.3548
_TISSUES = ("t1", "grey", "white", "brain")


@dataclass(frozen=True)
class Population:
    """One grid and the average brain on it; tissues are blurred to the grid's resolution, so nothing aliases."""

    spacing_mm: float
    grid_shape: tuple[int, int, int]
    affine: Float[np.ndarray, "4 4"]
    flat_indices: Int[np.ndarray, " voxel"]  # into the grid in Fortran order, as NIfTI stores it
    positions_mm: Float[np.ndarray, "voxel 3"]
    shape_modes: Float[np.ndarray, "mode voxel 3"]  # displacement in mm for a coefficient of 1
    lattice_mm: int
    lattice_origin_mm: Float[np.ndarray, " 3"]
    tissues: dict[str, Float[np.ndarray, "x y z"]]


def load_population(anatomy: AnatomyConfig, *, spacing_mm: float, population_seed: int) -> Population:
    """The average brain on the FSL grid of this spacing; the same for every seed of subjects."""
    lattice_mm = int(np.clip(spacing_mm / 2, 1, 3))
    tissues, origin_mm = _template_tissues(lattice_mm, spacing_mm)
    affine, grid_shape = fsl_grid(spacing_mm)
    steps = np.meshgrid(*(np.arange(size) for size in grid_shape), indexing="ij")
    indices = np.stack([axis.ravel(order="F") for axis in steps], axis=1)
    positions = (indices @ affine[:3, :3].T + affine[:3, 3]).astype(np.float32)
    margin = ndimage.grey_dilation(tissues["brain"], size=2 * round(6 / lattice_mm) + 1)  # room for the shape modes
    flat_indices = np.flatnonzero(_lookup(margin, positions, origin_mm, lattice_mm) > 0.05)
    positions = positions[flat_indices]
    return Population(
        spacing_mm=spacing_mm,
        grid_shape=grid_shape,
        affine=affine,
        flat_indices=flat_indices,
        positions_mm=positions,
        shape_modes=_shape_modes(anatomy, positions, population_seed),
        lattice_mm=lattice_mm,
        lattice_origin_mm=origin_mm,
        tissues=tissues,
    )


def sample_tissue(
    population: Population, tissue: str, positions_mm: Float[np.ndarray, "voxel 3"]
) -> Float[np.ndarray, " voxel"]:
    """Template tissue at any positions (trilinear), 0 outside the template's box."""
    return _lookup(population.tissues[tissue], positions_mm, population.lattice_origin_mm, population.lattice_mm)


def _lookup(volume: np.ndarray, positions_mm: np.ndarray, origin_mm: np.ndarray, lattice_mm: int) -> np.ndarray:
    coordinates = ((positions_mm - origin_mm) / lattice_mm).T
    return ndimage.map_coordinates(volume, coordinates, order=1, mode="constant", prefilter=False)


def _template_tissues(lattice_mm: int, spacing_mm: float) -> tuple[dict[str, np.ndarray], np.ndarray]:
    images = {
        "t1": datasets.load_mni152_template(resolution=1),
        "grey": datasets.load_mni152_gm_mask(resolution=1, threshold=0.5),
        "white": datasets.load_mni152_wm_mask(resolution=1, threshold=0.5),
        "brain": datasets.load_mni152_brain_mask(resolution=1),
    }
    sigma = max(spacing_mm**2 - lattice_mm**2, 0.0) ** 0.5 / _FWHM_PER_SIGMA / lattice_mm
    tissues = {}
    for name in _TISSUES:
        blocks = _block_means(np.asarray(images[name].dataobj, dtype=np.float32), lattice_mm)
        tissues[name] = ndimage.gaussian_filter(blocks, sigma, mode="constant", truncate=3.0)
    origin_mm = images["t1"].affine[:3, 3] + (lattice_mm - 1) / 2
    tissues["t1"] /= tissues["t1"].max()
    return tissues, origin_mm.astype(np.float32)


def _block_means(volume: np.ndarray, edge: int) -> np.ndarray:
    sizes = [size // edge for size in volume.shape]
    cropped = volume[: sizes[0] * edge, : sizes[1] * edge, : sizes[2] * edge]
    blocks = cropped.reshape(sizes[0], edge, sizes[1], edge, sizes[2], edge)
    return blocks.mean(axis=(1, 3, 5), dtype=np.float32)


def _shape_modes(anatomy: AnatomyConfig, positions_mm: np.ndarray, population_seed: int) -> np.ndarray:
    """Smooth displacement fields: each a sum of random plane waves, so any grid samples the same brain."""
    generator = np.random.default_rng(np.random.SeedSequence(population_seed))
    num_waves = 6
    modes = np.empty((anatomy.num_shape_modes, len(positions_mm), 3), dtype=np.float32)
    for mode in modes:
        directions = generator.standard_normal((num_waves, 3))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        lengths_mm = generator.uniform(anatomy.shortest_wave_mm, anatomy.longest_wave_mm, (num_waves, 1))
        phases = generator.uniform(0, 2 * np.pi, num_waves)
        amplitudes = generator.standard_normal((num_waves, 3))
        waves = np.cos(positions_mm @ (2 * np.pi * directions / lengths_mm).T + phases)
        mode[:] = waves @ amplitudes * np.sqrt(2 / num_waves)
    return modes * np.float32(anatomy.displacement_mm / np.sqrt(anatomy.num_shape_modes))
