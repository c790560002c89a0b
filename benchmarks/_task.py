"""A pretraining task and its batches without a scan: an ellipsoid of a brain's size, seeded int8 windows.

Imports nothing beyond torch, numpy, einops, jaxtyping and PyYAML (and deepspeed, for engines that ask for it).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml

from brain_models.atlas import Atlas
from brain_models.space import fsl_grid, space_from_mask
from configs.parse import parse
from data_sharding.read.batch import StoredBatch
from pretrain.masked.costs import ModelConfig
from pretrain.masked.masked_set import Geometry, LossConfig, SetSpec, WindowConfig
from pretrain.masked.masked_volumes import MaskedVolumes
from pretrain.masked.masking import MaskingConfig
from training.config import (
    CheckpointConfig,
    EngineConfig,
    EvaluationConfig,
    OptimizerConfig,
    ProfileConfig,
    ScheduleConfig,
    SpikeConfig,
    StartConfig,
    TrackingConfig,
    TrainConfig,
)

CONFIGS = Path(__file__).parent.parent / "configs"
CENTRE_MM, RADII_MM = np.array([0.0, -18.0, 18.0]), np.array([73.0, 92.0, 75.0])  # about the volume of the MNI mask


@dataclass(frozen=True)
class Workload:
    """What is timed: a model on windows of a space."""

    model: str
    spacing_mm: float
    window_frames: int
    tubelet_frames: int
    patch_voxels: int
    micro_batch: int
    masking: str
    hidden_share: float


def model_config(name: str) -> ModelConfig:
    """The sizes of configs/model/<name>.yaml."""
    return parse(yaml.safe_load((CONFIGS / "model" / f"{name}.yaml").read_text()), ModelConfig)


def peak_tflops(device_name: str) -> float | None:
    """The dense bf16 peak of a device in TFLOP/s from configs/peaks, None when it is not listed."""
    peaks = yaml.safe_load((CONFIGS / "peaks" / "dense_bf16.yaml").read_text())
    known = [name for name in peaks if device_name.startswith(name)]
    return peaks[max(known, key=len)] if known else None


def geometry_of(load: Workload) -> Geometry:
    """An ellipsoid on the FSL grid, without a label: all of it is pseudo-regions."""
    affine, shape = fsl_grid(load.spacing_mm)
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    positions = places @ affine[:3, :3].T + affine[:3, 3]
    in_brain = (((positions - CENTRE_MM) / RADII_MM) ** 2).sum(axis=-1) < 1
    space = space_from_mask(in_brain, affine, name="ellipsoid", template="none")
    atlas = Atlas("none", np.zeros(space.num_voxels, dtype=np.int32), {}, {})
    return Geometry.of(space, atlas, WindowConfig(load.window_frames, load.tubelet_frames, load.patch_voxels))


def packed_task(load: Workload, geometry: Geometry, batch_size: int) -> MaskedVolumes:
    """The task as `python -m pretrain` trains it."""
    torch.manual_seed(0)
    masking = MaskingConfig(load.masking, load.hidden_share, "majority", [], [])  # type: ignore[arg-type]
    return MaskedVolumes(
        model_config(load.model),
        {"bold": SetSpec("bold", geometry, 1.0)},
        masking=masking,
        loss=LossConfig("plain", 0.25),
        batch_size=batch_size,
        weight_decay=0.05,
    )


def stored_batches(load: Workload, num_voxels: int, *, pinned: bool) -> Iterator[StoredBatch]:
    """Endless micro-batches as a reader hands them over: int8 windows in host memory, four of them in turn."""
    generator = np.random.default_rng(0)
    size, windows = (load.micro_batch, load.window_frames, num_voxels), []
    for _ in range(4):
        window = torch.from_numpy(generator.integers(-60, 60, size=size, dtype=np.int8))
        windows.append(window.pin_memory() if pinned else window)
    number = 0
    while True:
        yield StoredBatch(
            stored=windows[number % len(windows)],
            repetition_time_s=torch.full((load.micro_batch,), 2.0),
            weight=torch.ones(load.micro_batch),
            sample_seed=torch.arange(load.micro_batch) + number * load.micro_batch,
            scan_ids=[f"scan{row}" for row in range(load.micro_batch)],
            subjects=[f"subject{row}" for row in range(load.micro_batch)],
            first_frame=[0] * load.micro_batch,
        )
        number += 1


def train_config(engine: str, *, precision: str, compiles: bool, recomputes: bool) -> TrainConfig:
    """A configuration of the engine under test: 'plain', or 'zero0' to 'zero3'. The loop's own parts are not used."""
    stage = int(engine.removeprefix("zero")) if engine != "plain" else 0
    return TrainConfig(
        steps=10**6,
        seed=0,
        choose="last",
        start=StartConfig(None, None),
        optimizer=OptimizerConfig("adamw", 5e-4, (0.9, 0.95), 1e-8, 1.0),
        schedule=ScheduleConfig("constant", 0, 1.0, None),
        engine=EngineConfig(
            kind="plain" if engine == "plain" else "deepspeed",
            zero_stage=stage,  # type: ignore[arg-type]
            precision=precision,  # type: ignore[arg-type]
            compile=compiles,
            activation_checkpointing=recomputes,
        ),
        checkpoint=CheckpointConfig(1, 1, None, None, "lowest"),
        evaluation=EvaluationConfig(1, "validation", 1, []),
        tracking=TrackingConfig(1, None, "benchmark", False, 1.0, 1.0),
        spikes=SpikeConfig(100, 10.0),
        profile=ProfileConfig(0, 0),
        peak_tflops={},
    )
