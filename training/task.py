"""The seam between what is trained and how: Task, Source, Batch. The loop asks for nothing else, and knows no task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from training.errors import TrainingError
from training.plateau import AtPlateau

State = Mapping[str, object]  # JSON-able: where a source resumes


class Batch(Protocol):
    """What one rank sees in one forward pass; the task knows what else it carries."""

    weight: Tensor  # float32 [batch]; 0 marks padding
    scan_ids: list[str]  # one per row

    def to(self, device: torch.device) -> Self: ...


class Source(Protocol):
    """One rank's view of the data."""

    fingerprint: str  # of the shard set; a run resumes only on the same one

    @property
    def num_micro_batches(self) -> int:
        """Batches a rank sees in every step, the same on all ranks."""
        ...

    def initial_state(self) -> State: ...

    def steps(self, state: State) -> Iterator[tuple[Sequence[Batch], State]]:
        """Endless: the micro-batches of one global step, and the state to resume from after it."""
        ...

    def merge_states(self, states: list[State]) -> State:
        """The one state to store, from all ranks' states after the same step."""
        ...

    def evaluation(self, split: str, *, limit: int | None) -> Iterator[Batch]:
        """This rank's share of a split, every sample once; `limit` keeps a fixed hashed subset of that size."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Cost:
    """What training on a batch costs, counted from shapes: never measured, never read from the device."""

    tokens: int  # that pass through the model, seen or guessed
    flops: float  # forward and backward, 2 for a multiply-add; what is computed twice to save memory counts once


@dataclass
class ParameterGroup:
    """Parameters that share a learning rate, a weight decay and the moment from which they move."""

    name: str
    parameters: list[nn.Parameter]
    learning_rate_scale: float  # times the schedule's learning rate
    weight_decay: float
    opens_at: int | AtPlateau  # a step (0: open from the start; from train.steps on: never), or a plateau of a metric


class Task(nn.Module):
    """Model, loss and metrics. Subclasses implement what raises here; their batches are what their source yields."""

    needs_whole_step = False  # True: the loss is computed on rows gathered from all ranks, see training.whole_step

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """The loss under "loss", and named parts: each divided by constants, so that the sum over all micro-batches and
        ranks of a step is the step's value, however the step was divided."""
        raise TrainingError(f"{type(self).__name__} has no forward(batch); return a dict with 'loss'")

    def predict(self, batch: Any) -> dict[str, Tensor]:
        """Small per-sample tensors, first axis batch: what `metrics` needs, never voxels. No collectives inside."""
        raise TrainingError(f"{type(self).__name__} has no predict(batch); return tensors whose first axis is batch")

    def metrics(self, predictions: dict[str, Tensor]) -> dict[str, float]:
        """Numbers over a whole split; rows are sorted by scan, padding is gone."""
        raise TrainingError(f"{type(self).__name__} has no metrics(predictions); return a dict of floats")

    def parameter_groups(self) -> list[ParameterGroup]:
        """Every parameter exactly once."""
        raise TrainingError(f"{type(self).__name__} has no parameter_groups(); see training.unfreezing.split_decay")

    def cost(self, batch: Any) -> Cost:
        """The cost of a forward and backward pass over every row of the batch, padding included, from shapes alone."""
        raise TrainingError(f"{type(self).__name__} has no cost(batch); return training.task.Cost from shapes")

    def checkpoint_activations(self) -> None:
        """From now on recompute activations in the backward pass instead of keeping them; losses stay the same."""
        raise TrainingError(
            f"{type(self).__name__} cannot checkpoint its activations; set train.engine.activation_checkpointing=false"
        )

    def load_registered(self, folder: Path) -> None:
        """Take over the weights of a registered bundle, before training."""
        raise TrainingError(
            f"{type(self).__name__} cannot start from registered weights ({folder}); set train.start.registered=null"
        )
