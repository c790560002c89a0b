"""What training sees of a shard set: batches of windows, of responses to images, or of pairs. Knows no file."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from torch import Tensor

from brain_models.recipe import NOT_MEASURED, UNITS_PER_SCALE

CACHED_VALUES = 1 << 18


@dataclass
class WindowBatch:
    """Windows of one kind: BOLD in robust units, T1 or region series in standard deviations; 0.0 where not measured.

    The last axis of region series is the region.
    """

    values: Float[Tensor, "batch time voxel"]
    is_measured: Bool[Tensor, "batch voxel"]
    repetition_time_s: Float[Tensor, "batch"]  # 0 for a T1
    weight: Float[Tensor, "batch"]  # 0 marks padding
    sample_seed: Int[Tensor, "batch"]  # for masks and augmentation; evaluation: the same every time
    scan_ids: list[str]
    subjects: list[str]
    first_frame: list[int]
    is_frame: Bool[Tensor, "batch time"] = field(default=None, kw_only=True)  # type: ignore[assignment]
    # False where a run shorter than the window was padded with 0.0; left out: every frame is one
    set_name: str = field(default="", kw_only=True)  # of a run over several sets

    def __post_init__(self) -> None:
        if self.is_frame is None:
            self.is_frame = torch.ones(self.frames().shape[:2], dtype=torch.bool, device=self.weight.device)

    def frames(self) -> Shaped[Tensor, "batch time voxel"]:
        """The windows as this batch holds them."""
        return self.values

    def to(self, device: torch.device | str) -> WindowBatch:
        """The batch on a device."""
        return dataclasses.replace(self, **_moved(vars(self), device))

    def rows(self, chosen: Sequence[int]) -> WindowBatch:
        """The batch of these rows."""
        of_rows: dict[str, Any] = {}
        for name in (one.name for one in dataclasses.fields(WindowBatch)):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                of_rows[name] = value[list(chosen)]
            else:
                of_rows[name] = [value[row] for row in chosen] if isinstance(value, list) else value
        return WindowBatch(**of_rows)


@dataclass
class StoredBatch(WindowBatch):
    """A batch whose windows are still as a shard holds them: `to` moves those few bytes and decodes on the device."""

    values: Float[Tensor, "batch time voxel"] = field(init=False, repr=False)  # decoded when first asked for
    is_measured: Bool[Tensor, "batch voxel"] = field(init=False, repr=False)
    stored: Shaped[Tensor, "batch time voxel"]  # int8 (BOLD) or float16

    def __getattr__(self, name: str) -> Tensor:
        if name not in ("values", "is_measured"):
            raise AttributeError(name)
        self.values, self.is_measured = decode(self.stored)
        return self.__dict__[name]

    def frames(self) -> Shaped[Tensor, "batch time voxel"]:
        return self.stored

    def to(self, device: torch.device | str) -> WindowBatch:
        """The decoded batch on a device."""
        values, is_measured = decode(self.stored.to(device, non_blocking=True))
        others = {name: value for name, value in vars(self).items() if name not in ("stored", "values", "is_measured")}
        return WindowBatch(values=values, is_measured=is_measured, **(others | _moved(others, device)))


@dataclass
class ResponseBatch:
    """Images with the responses to them; 0.0 where a vertex was not measured."""

    image: UInt8[Tensor, "batch y x rgb"]
    betas: Float[Tensor, "batch vertex"]
    is_measured: Bool[Tensor, "batch vertex"]
    weight: Float[Tensor, "batch"]  # 0 marks padding
    sample_seed: Int[Tensor, "batch"]
    scan_ids: list[str]
    subjects: list[str]
    stimuli: list[str]
    first_frame: list[int]  # a response has one frame: 0
    set_name: str = ""

    def to(self, device: torch.device | str) -> ResponseBatch:
        """The batch on a device."""
        return dataclasses.replace(self, **_moved(vars(self), device))


@dataclass
class PairedBatch:
    """Windows of the same subjects from several sides; a row with a damaged side has weight 0."""

    sides: dict[str, WindowBatch]
    weight: Float[Tensor, "batch"]  # 0 marks padding and pairs that are not whole
    sample_seed: Int[Tensor, "batch"]
    scan_ids: list[str]  # the sides' scans, joined by +
    subjects: list[str]
    first_frame: list[tuple[int, ...]]  # of every side
    set_name: str = ""

    def to(self, device: torch.device | str) -> PairedBatch:
        """The batch on a device."""
        sides = {name: side.to(device) for name, side in self.sides.items()}
        return dataclasses.replace(self, sides=sides, **_moved(vars(self), device))


AnyBatch = WindowBatch | ResponseBatch | PairedBatch


def _moved(values: dict[str, object], device: torch.device | str) -> dict[str, Any]:
    return {name: value.to(device, non_blocking=True) for name, value in values.items() if isinstance(value, Tensor)}


def decode(stored: Tensor) -> tuple[Float[Tensor, "batch time voxel"], Bool[Tensor, "batch voxel"]]:
    """Values and what was measured, from stored int8 (BOLD) or float16 frames [batch, time, voxel]."""
    is_measured = stored[:, 0] != NOT_MEASURED if stored.dtype == torch.int8 else ~torch.isnan(stored[:, 0])
    units_per_scale = UNITS_PER_SCALE if stored.dtype == torch.int8 else 1
    if stored.device.type != "cpu":
        return stored.float().div_(units_per_scale).masked_fill_(~is_measured[:, None], 0.0), is_measured
    # numpy's memory comes in huge pages, and a few frames at a time stay in the cache: four times as fast.
    values = torch.from_numpy(np.empty(stored.shape, dtype=np.float32))
    frames_at_once = max(CACHED_VALUES // stored.shape[2], 1)
    for window, window_stored, in_window in zip(values, stored, is_measured, strict=True):
        unknown = torch.nonzero(~in_window)[:, 0]
        for frames, frames_stored in zip(
            window.split(frames_at_once), window_stored.split(frames_at_once), strict=True
        ):
            frames.copy_(frames_stored).div_(units_per_scale).index_fill_(1, unknown, 0.0)
    return values, is_measured
