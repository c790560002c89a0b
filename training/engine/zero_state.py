"""Whole tensors into the partitions of a fresh ZeRO optimiser, whatever the number of ranks.

DeepSpeed's own reader of such a state stops at a rank that holds nothing of a group (ZeRO 1, 2) and lets all groups
share one step count, which then runs several times as fast (ZeRO 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

WHOLE = "whole.safetensors"  # its tensors: <what>/<name>
WEIGHT = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"
BUFFER = "buffer"

Reader = Callable[[str], Tensor]


@dataclass(frozen=True)
class PartitionSlice:
    """A stretch of a flattened parameter, and where it lies in this rank's partition of a group."""

    name: str
    start: int
    at: int
    size: int


def load_whole(engine: Any, task: nn.Module, file: Path) -> None:
    """Fill a DeepSpeed engine that has made no step: its partitions of weights and moments, step counts, buffers."""
    from safetensors import safe_open

    zero = engine.optimizer
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    is_stage_3 = hasattr(zero, "fp32_partitioned_groups_flat")
    groups = _groups_of_stage_3(zero, names) if is_stage_3 else _groups_of_stage_1_2(zero, names)
    with safe_open(str(file), "pt") as state, torch.no_grad():
        for flat, members, pieces in groups:
            _fill(zero.optimizer, flat, members=members, pieces=pieces, read=state.get_tensor)
        for name, buffer in task.named_buffers():
            if f"{BUFFER}/{name}" in state.keys():  # noqa: SIM118 - a safetensors file is no mapping
                buffer.copy_(state.get_tensor(f"{BUFFER}/{name}"))
        if is_stage_3:
            _spread_stage_3(zero)
        else:
            zero.update_lp_params()


def _fill(
    optimizer: torch.optim.Optimizer, flat: Tensor, *, members: list[str], pieces: list[PartitionSlice], read: Reader
) -> None:
    """One group's partition: weights in place, moments and step count anew."""
    moments = {key: torch.zeros_like(flat) for key in MOMENTS}
    for key, target in {WEIGHT: flat.data, **moments}.items():
        for piece in pieces:
            whole = rearrange(read(f"{key}/{piece.name}"), "... -> (...)")
            target[piece.at : piece.at + piece.size].copy_(whole[piece.start : piece.start + piece.size])
    counts_on = flat.device if optimizer.defaults.get("fused") else torch.device("cpu")  # where AdamW itself keeps it
    optimizer.state[flat] = {STEP: read(f"{STEP}/{members[0]}").to(counts_on), **moments}


def _groups_of_stage_1_2(zero: Any, names: dict[int, str]) -> Iterator[tuple[Tensor, list[str], list[PartitionSlice]]]:
    for flat, group in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True):
        members = [names[id(parameter)] for parameter in group]
        pieces = []
        for name, parameter in zip(members, group, strict=True):
            if (mapping := parameter._hp_mapping) is not None:  # None: this rank holds nothing of it
                start = mapping.lp_fragment_address.start
                ours = mapping.get_hp_fragment_address()
                pieces.append(PartitionSlice(name, start, ours.start, ours.numel))
        yield flat, members, pieces


def _groups_of_stage_3(zero: Any, names: dict[int, str]) -> Iterator[tuple[Tensor, list[str], list[PartitionSlice]]]:
    """Every parameter is cut into equal parts, the last one padded; this rank's parts follow one another."""
    rank = torch.distributed.get_rank(group=zero.dp_process_group)
    for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
        members = [names[id(parameter)] for parameter in group]
        pieces, at = [], 0
        for name, parameter in zip(members, group, strict=True):
            share = parameter.partition_numel()
            start = min(rank * share, parameter.ds_numel)
            pieces.append(PartitionSlice(name, start, at, min(share, parameter.ds_numel - start)))
            at += share
        yield flat, members, pieces


def _spread_stage_3(zero: Any) -> None:
    """What the model computes with, from the fp32 partitions."""
    for index, flat in enumerate(zero.fp32_partitioned_groups_flat):
        zero.fp16_partitioned_groups_flat[index].data.copy_(flat.data)
        parts = zero.unflatten(zero.fp16_partitioned_groups_flat[index], zero.fp16_partitioned_groups[index])
        for partition, part in zip(zero.fp16_partitioned_groups[index], parts, strict=True):
            partition.data = part.data
