"""A task's metrics over a split: every sample once, gathered from all ranks, without padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from training.collectives import any_true, gather
from training.engine.base import Engine
from training.errors import TrainingError
from training.task import Batch, Source, Task


@dataclass
class Evaluation:
    metrics: dict[str, float]
    predictions: dict[str, Tensor]  # on the CPU, one row per sample, sorted by scan
    scan_ids: list[str]


def evaluate(task: Task, source: Source, engine: Engine, split: str, *, limit: int | None) -> Evaluation:
    """The task's metrics over a split (or its fixed subset of `limit` samples), the same on every rank."""
    task.eval()
    rows: list[tuple[dict[str, Tensor], list[str]]] = []
    with torch.no_grad():
        for batch, is_new in _in_lockstep(source.evaluation(split, limit=limit), engine, split):
            predictions = engine.predict(batch.to(engine.device))
            if is_new:
                real = (batch.weight > 0).cpu()
                scan_ids = [scan_id for scan_id, is_real in zip(batch.scan_ids, real.tolist(), strict=True) if is_real]
                rows.append(({name: values.detach().cpu()[real] for name, values in predictions.items()}, scan_ids))
    task.train()
    shares = cast("list[list[tuple[dict[str, Tensor], list[str]]]]", gather(rows))
    parts = [part for share in shares for part in share]
    scan_ids = [scan_id for _, names in parts for scan_id in names]
    if not scan_ids:
        raise TrainingError(f"split '{split}' holds no sample; choose another in train.evaluation, or split anew")
    order = sorted(range(len(scan_ids)), key=lambda row: scan_ids[row])
    predictions = {name: torch.cat([values[name] for values, _ in parts])[order] for name in parts[0][0]}
    return Evaluation(task.metrics(predictions), predictions, [scan_ids[row] for row in order])


def _in_lockstep(batches: Iterator[Batch], engine: Engine, split: str) -> Iterator[tuple[Batch, bool]]:
    """(batch, True) for every batch; under ZeRO 3, where a forward pass is a collective, ranks that have run out repeat
    their last batch as (batch, False) until all are done."""
    if not engine.runs_in_lockstep:
        yield from ((batch, True) for batch in batches)
        return
    last: Batch | None = None
    while any_true((batch := next(batches, None)) is not None):
        if batch is None and last is None:
            raise TrainingError(f"split '{split}' is too small to give every rank a batch; use engine=zero2")
        last = batch if batch is not None else last
        assert last is not None
        yield last, batch is not None
