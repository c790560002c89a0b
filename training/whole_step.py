"""Losses of a whole step: computed on embeddings that are gathered from all ranks.

Promise: loss and gradient are those of one process that holds every row of the step. Every rank computes the same loss
on all rows and contributes its share of it, so that the sum over ranks is the step's value (see training.task).

A task with such a loss sets `needs_whole_step`, embeds its rows with `encoded_in_chunks`, passes embeddings and weights
through `gathered`, and returns the loss divided by the number of ranks (`share_of_rank`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from training.collectives import this_process
from training.errors import TrainingError
from training.task import Task

NOBODY = -1


def check_micro_batches(task: Task, num_micro_batches: int) -> None:
    """TrainingError when the loss needs all rows of a step at once and a rank would see them in several batches."""
    if task.needs_whole_step and num_micro_batches != 1:
        raise TrainingError(
            f"{type(task).__name__} compares all rows of a step with one another, so every rank needs one micro-batch "
            f"per step, but it has {num_micro_batches}; set data.micro_batch_size to data.batch_size divided by the "
            "number of ranks. Memory is bounded by the rows of a chunk, not by the micro-batch"
        )


def encoded_in_chunks(
    encode: Callable[..., Tensor], *columns: Shaped[Tensor, "batch ..."], rows_per_chunk: int
) -> Float[Tensor, "batch ..."]:
    """What `encode` returns for all rows, computed `rows_per_chunk` rows at a time.

    The backward pass computes each chunk again, with the random numbers of the first time: only the activations of one
    chunk exist at once. `encode` must treat every row by itself (no batch norm).
    """
    chunks = zip(*(column.split(rows_per_chunk) for column in columns), strict=True)
    return torch.cat([checkpoint(encode, *chunk, use_reentrant=False) for chunk in chunks])


def gathered(rows: Shaped[Tensor, "batch ..."]) -> Shaped[Tensor, "all ..."]:
    """The rows of all ranks in rank order; a loss on them sends this rank's rows their gradient. Every rank must have
    equally many rows and compute the same loss."""
    return rows if this_process().world_size == 1 else _Gather.apply(rows)


def share_of_rank(loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """What this rank contributes to the step's loss, which all ranks have computed."""
    return loss / this_process().world_size


class _Gather(torch.autograd.Function):
    """Rows of all ranks. Ranks compute the same loss, each its share: what the others would send back for this rank's
    rows is what this rank computes itself, so the backward pass exchanges nothing."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.num_rows = len(rows)
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(this_process().world_size)]
        torch.distributed.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        process = this_process()
        first = process.rank * ctx.num_rows
        return gradient[first : first + ctx.num_rows] * process.world_size


def offered(
    weight: Float[Tensor, "all"], groups: Int[Tensor, "all"] | None = None
) -> Bool[Tensor, "question candidate"]:
    """True where a row is among the answers to another one's question: every real row, but none of the same group other
    than the row itself."""
    is_real = (weight > 0).expand(len(weight), -1)
    if groups is None:
        return is_real
    is_own = torch.eye(len(weight), dtype=torch.bool, device=weight.device)
    return is_real & (is_own | (groups[:, None] != groups))


def symmetric_info_nce(
    first: Float[Tensor, "all width"],
    second: Float[Tensor, "all width"],
    weight: Float[Tensor, "all"],
    *,
    temperature: Float[Tensor, "1"],
    groups: Int[Tensor, "all"] | None = None,
) -> Float[Tensor, ""]:
    """The mean over real pairs and both directions of the cross-entropy of finding a row's partner among all real rows.

    Rows are scaled to unit length. A row of weight 0 is neither asked for nor offered as an answer, and rows of one
    group (a subject that a step holds twice) are never each other's negatives. (van den Oord 2018; symmetric as in
    CLIP, Radford 2021.)
    """
    is_real, is_offered = weight > 0, offered(weight, groups)
    first, second = (
        functional.normalize(side.float().masked_fill(~is_real[:, None], 0.0), dim=-1) for side in (first, second)
    )
    similarities = first @ second.T / temperature
    partners = torch.arange(len(first), device=first.device).masked_fill(~is_real, NOBODY)
    sums = [
        functional.cross_entropy(
            scores.masked_fill(~is_offered, torch.finfo(scores.dtype).min),
            partners,
            ignore_index=NOBODY,
            reduction="sum",
        )
        for scores in (similarities, similarities.T)
    ]
    return (sums[0] + sums[1]) / (2 * is_real.sum().clamp(min=1))
