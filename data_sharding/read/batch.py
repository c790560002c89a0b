"""What training sees of a shard set: batches of windows. Knows no file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

# What brain_models.preprocess writes; that module is not imported because it needs a NIfTI library. A test compares.
UNITS_PER_SCALE = 21
NOT_MEASURED = -128

CACHED_VALUES = 1 << 18


@dataclass
class Batch:
    """Windows of one kind: BOLD in robust units, or T1 (one frame) in standard deviations; 0.0 where not measured."""

    values: Float[Tensor, "batch time voxel"]
    is_measured: Bool[Tensor, "batch voxel"]
    repetition_time_s: Float[Tensor, "batch"]  # 0 for a T1
    weight: Float[Tensor, "batch"]  # 0 marks padding
    sample_seed: Int[Tensor, "batch"]  # for masks and augmentation; evaluation: the same every time
    scan_ids: list[str]
    subjects: list[str]
    first_frame: list[int]
    set_name: str = field(default="", kw_only=True)  # of a run over several sets

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device."""
        return dataclasses.replace(
            self,
            values=self.values.to(device, non_blocking=True),
            is_measured=self.is_measured.to(device, non_blocking=True),
            repetition_time_s=self.repetition_time_s.to(device, non_blocking=True),
            weight=self.weight.to(device, non_blocking=True),
            sample_seed=self.sample_seed.to(device, non_blocking=True),
        )


@dataclass
class StoredBatch(Batch):
    """A batch whose windows are still as a shard holds them: `to` moves those few bytes and decodes on the device."""

    values: Float[Tensor, "batch time voxel"] = field(init=False, repr=False)  # decoded when first asked for
    is_measured: Bool[Tensor, "batch voxel"] = field(init=False, repr=False)
    stored: Shaped[Tensor, "batch time voxel"]  # int8 (BOLD) or float16

    def __getattr__(self, name: str) -> Tensor:
        if name not in ("values", "is_measured"):
            raise AttributeError(name)
        self.values, self.is_measured = decode(self.stored)
        return self.__dict__[name]

    def to(self, device: torch.device | str) -> Batch:
        """The decoded batch on a device."""
        values, is_measured = decode(self.stored.to(device, non_blocking=True))
        return Batch(
            values=values,
            is_measured=is_measured,
            repetition_time_s=self.repetition_time_s.to(device, non_blocking=True),
            weight=self.weight.to(device, non_blocking=True),
            sample_seed=self.sample_seed.to(device, non_blocking=True),
            scan_ids=self.scan_ids,
            subjects=self.subjects,
            first_frame=self.first_frame,
            set_name=self.set_name,
        )


def decode(stored: Tensor) -> tuple[Float[Tensor, "batch time voxel"], Bool[Tensor, "batch voxel"]]:
    """Values and what was measured, from stored int8 (BOLD) or float16 (T1) frames [batch, time, voxel]."""
    is_measured = stored[:, 0] != NOT_MEASURED if stored.dtype == torch.int8 else ~torch.isnan(stored[:, 0])
    units_per_scale = UNITS_PER_SCALE if stored.dtype == torch.int8 else 1
    if stored.device.type != "cpu":
        return stored.float().div_(units_per_scale).masked_fill_(~is_measured[:, None], 0.0), is_measured
    # numpy's memory comes in huge pages, and a few frames at a time stay in the cache: four times as fast.
    values = torch.from_numpy(np.empty(stored.shape, dtype=np.float32))
    frames_a_piece = max(CACHED_VALUES // stored.shape[2], 1)
    for window, window_stored, in_window in zip(values, stored, is_measured, strict=True):
        unknown = torch.nonzero(~in_window)[:, 0]
        for piece, piece_stored in zip(window.split(frames_a_piece), window_stored.split(frames_a_piece), strict=True):
            piece.copy_(piece_stored).div_(units_per_scale).index_fill_(1, unknown, 0.0)
    return values, is_measured
