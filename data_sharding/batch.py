"""What training sees of a shard set: batches of windows. Knows no file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


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
