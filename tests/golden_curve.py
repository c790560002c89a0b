"""The losses of twenty pretraining steps that code must keep giving: `python -m tests.golden_curve` writes them anew.

A tiny model on seeded synthetic windows, float32 on a CPU. Write them anew only with a change that means to alter
numbers, and say so in its commit message.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from brain_models.encoder import EncoderConfig
from data_sharding.read.batch import WindowBatch
from pretrain.masked.costs import DecoderConfig, ModelConfig
from pretrain.masked.masked_set import Geometry, LossConfig, SetSpec
from pretrain.masked.masked_volumes import MaskedVolumes
from pretrain.masked.masking import MaskingConfig
from tests.phantom_spaces import ball

FILE = Path(__file__).with_suffix(".json")
NUM_STEPS, BATCH_SIZE, NUM_PATTERNS = 20, 8, 6
ENCODER = EncoderConfig(width=32, depth=2, num_heads=4, mlp_ratio=2.0, num_frequencies=16, time_in="seconds")


def losses() -> list[float]:
    """The loss of each step."""
    torch.manual_seed(0)
    geometry = ball(patch_voxels=3)
    task = MaskedVolumes(
        ModelConfig(ENCODER, DecoderConfig(width=32, depth=1)),
        {"bold": SetSpec("bold", geometry, 1.0)},
        masking=MaskingConfig(kind="region", hidden_share=0.5, rule="any", groups=[], exclude=[]),
        loss=LossConfig(kind="balanced", smallest_region=0.25),
        batch_size=BATCH_SIZE,
        weight_decay=0.05,
    )
    groups = [{"params": group.parameters, "weight_decay": group.weight_decay} for group in task.parameter_groups()]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    found = []
    for step in range(NUM_STEPS):
        loss = task(windows(geometry, step))["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def windows(geometry: Geometry, step: int) -> WindowBatch:
    """A pattern all windows share, smooth ones with random courses, and noise; a voxel in twenty is not measured."""
    generator = np.random.Generator(np.random.PCG64(step))
    positions = geometry.space.positions_mm
    waves = np.random.Generator(np.random.PCG64(1000)).normal(size=(3, NUM_PATTERNS)) / 40
    patterns = np.sin(positions @ waves)
    courses = 0.5 * generator.normal(size=(BATCH_SIZE, geometry.window.window_frames, NUM_PATTERNS))
    courses[:, :, 0] += 2
    is_measured = generator.random((BATCH_SIZE, len(positions))) > 0.05
    values = courses @ patterns.T + 0.3 * generator.normal(size=(*courses.shape[:2], len(positions)))
    return WindowBatch(
        values=torch.from_numpy((values * is_measured[:, None]).astype(np.float32)),
        is_measured=torch.from_numpy(is_measured),
        repetition_time_s=torch.from_numpy(generator.uniform(0.7, 3.0, BATCH_SIZE).astype(np.float32)),
        weight=torch.ones(BATCH_SIZE),
        sample_seed=torch.arange(BATCH_SIZE) + 1000 * step,
        scan_ids=[f"scan{row}" for row in range(BATCH_SIZE)],
        subjects=[f"subject{row}" for row in range(BATCH_SIZE)],
        first_frame=[0] * BATCH_SIZE,
    )


if __name__ == "__main__":
    FILE.write_text(json.dumps({"losses": [round(loss, 7) for loss in losses()]}, indent=1) + "\n")
