"""Augmentation of T1s and region series on their device: a function of the sample's seed, whatever batch it is in."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Generators = list[torch.Generator]  # one per row


@dataclass
class StructureAugmentation:
    """Of T1s in standard deviations; each is the standard deviation of what is drawn, 0: left out. There are no flips:
    left and right differ."""

    scale: float  # of contrast, about 1
    shift: float
    noise: float
    bias: float  # share by which a smooth wave brightens and darkens
    bias_wavelength_mm: float


@dataclass
class FunctionAugmentation:
    """Of region series."""

    shortest_share: float  # of the frames: a stretch of random length and place is kept; 1: all
    dropped_regions: float  # probability that a region is 0 in all frames
    noise: float  # standard deviation


def generators_of(sample_seed: Int[Tensor, "batch"], device: torch.device) -> Generators:
    """A generator per row, on the device."""
    return [torch.Generator(device=device).manual_seed(int(seed)) for seed in sample_seed.tolist()]


def drawn(
    generators: Generators, shape: tuple[int, ...], function: Callable[..., Tensor] = torch.randn
) -> Float[Tensor, "batch ..."]:
    """Random numbers of this shape for every row, from its own generator."""
    return torch.stack([function(shape, generator=each, device=each.device) for each in generators])


def augment_t1(
    values: Float[Tensor, "batch 1 voxel"],
    is_measured: Bool[Tensor, "batch voxel"],
    positions_mm: Float[Tensor, "voxel 3"],
    *,
    generators: Generators,
    config: StructureAugmentation,
) -> Float[Tensor, "batch 1 voxel"]:
    """The T1s with another contrast, brightness, bias field and noise; 0 where not measured, as before."""
    contrast = 1 + config.scale * drawn(generators, (1, 1))
    darkest = values.amin(dim=2, keepdim=True)
    brightened = darkest + (values - darkest) * (1 + config.bias * _waves(generators, positions_mm, config))
    noise = config.noise * drawn(generators, (1, values.shape[2])) if config.noise else 0.0
    found = contrast * brightened + config.shift * drawn(generators, (1, 1)) + noise
    return found * is_measured[:, None]


def _waves(
    generators: Generators, positions_mm: Float[Tensor, "voxel 3"], config: StructureAugmentation
) -> Float[Tensor, "batch 1 voxel"]:
    """A wave through every head, in its own direction and phase."""
    direction = torch.nn.functional.normalize(drawn(generators, (3,)), dim=1)
    phase = 2 * math.pi * drawn(generators, (1,), torch.rand)
    return torch.cos(2 * math.pi / config.bias_wavelength_mm * direction @ positions_mm.T + phase)[:, None]


def augment_series(
    values: Float[Tensor, "batch time region"],
    is_frame: Bool[Tensor, "batch time"],
    *,
    generators: Generators,
    config: FunctionAugmentation,
) -> tuple[Float[Tensor, "batch time region"], Bool[Tensor, "batch time"]]:
    """The series with fewer regions and noise, and which of their frames are left."""
    num_frames, kept = is_frame.sum(dim=1, keepdim=True), drawn(generators, (2,), torch.rand)
    length = (num_frames * (config.shortest_share + (1 - config.shortest_share) * kept[:, :1])).ceil()
    first = (kept[:, 1:] * (num_frames - length + 1)).floor()
    place = torch.arange(values.shape[1], device=values.device)
    is_left = is_frame & (place >= first) & (place < first + length)
    is_region = drawn(generators, (1, values.shape[2]), torch.rand) >= config.dropped_regions
    noise = config.noise * drawn(generators, values.shape[1:]) if config.noise else 0.0
    return (values * is_region + noise) * is_left[..., None], is_left
