"""Bundles of encoders that learned nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from brain_models.atlas import cluster_labels
from brain_models.bundle import Bundle, save
from brain_models.embedding import make_encoder
from brain_models.encoder import EncoderConfig
from brain_models.inputs import StemSpec
from brain_models.patches import PatchLayout
from brain_models.space import BrainSpace, space_from_mask


def cubes(space: BrainSpace, patch_voxels: int, *, tubelet_frames: int = 4, window_frames: int = 4) -> StemSpec:
    """A stem that reads whole scans of a space, cut into cubes."""
    layout = PatchLayout.from_grid(space, patch_voxels)
    return StemSpec(space, layout, tubelet_frames, window_frames, needs_brain_mask=False)


def encoder_bundle(config: EncoderConfig, stems: dict[str, StemSpec], **made_by: str) -> Bundle:
    """A fresh encoder as a bundle; its weights come from torch's own seed."""
    return Bundle("encoder", config, make_encoder(config, stems).eval(), stems, made_by)


def save_tiny_encoder(folder: Path) -> Path:
    """The folder, which now holds a bundle of an encoder that reads 64 voxels."""
    space = space_from_mask(np.ones((4, 4, 4), dtype=bool), np.eye(4), name="cube", template="NLin6Asym")
    config = EncoderConfig(width=8, depth=1, num_heads=2, mlp_ratio=2.0, num_frequencies=4, time_in="seconds")
    return save(folder, encoder_bundle(config, {"bold": cubes(space, 2)}))


def clusters(space: BrainSpace, num_voxels: int, *, tubelet_frames: int = 4, window_frames: int = 4) -> StemSpec:
    """A stem that reads whole scans of a space, cut into clusters of at most so many voxels."""
    layout = PatchLayout.from_labels(space, cluster_labels(space, num_voxels))
    return StemSpec(space, layout, tubelet_frames, window_frames, needs_brain_mask=False)
