"""Can the pipeline memorise one batch, and what do a run's curves say? The checks that tell underfitting from a fault.

A correct pipeline drives a single batch to cosine 1 by MSE, and to loss 0 and R@1 = 1 by InfoNCE. One that cannot has
an input without information, a gradient that stops, or an optimiser that is off; the numbers here say which.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cluster.storage.stores import store_for
from configs.words import aligned
from data_sharding.read.batch import PairedBatch
from finetune.config import OneBatchConfig
from finetune.errors import FinetuneError
from finetune.tasks.contrastive_alignment.plateau import Curves, Finding, Levels, analyse
from finetune.tasks.contrastive_alignment.retrieval import METRICS, effective_rank, similarities, unit
from finetune.tasks.contrastive_alignment.study import AlignmentStudy
from finetune.tasks.contrastive_alignment.task import SIDES, ContrastiveAlignment
from training.checkpoint import SPOOL
from training.engine.base import own_device
from training.watch.progress import phase

CONSTANT = 1e-6  # inputs that differ by less from row to row say nothing of a subject
MEMORISED_COSINE, MEMORISED_SHARE = 0.99, 0.1  # of the loss of a constant similarity
MODULES = tuple(f"{side}.{part}" for side in SIDES for part in ("network", "projection"))


@dataclass(frozen=True)
class Memorised:
    """What training on one batch came to: gradient norms by module and step, and numbers after the last step."""

    kind: Literal["mse", "info_nce"]
    num_subjects: int
    losses: Sequence[float]
    constant_level: float
    cosine: float  # of pairs
    recall: float
    ranks: Mapping[str, float]
    gradient_norms: Mapping[str, Sequence[float]]

    @property
    def is_done(self) -> bool:
        """True when every pair has been learned by heart."""
        if self.kind == "mse":
            return self.cosine > MEMORISED_COSINE
        return self.recall == 1.0 and self.losses[-1] < MEMORISED_SHARE * self.constant_level

    def __str__(self) -> str:
        if self.kind == "mse":
            return f"by MSE the cosine of pairs is {self.cosine:.3f} (loss {self.losses[-1]:.2g})"
        return (
            f"by InfoNCE the loss goes from {self.losses[0]:.3f} to {self.losses[-1]:.3f} ({self.constant_level:.3f}: "
            f"constant similarity), R@1 is {self.recall:.3f}"
        )


def first_of_each_subject(batch: PairedBatch) -> PairedBatch:
    """The batch with weight 0 for the rows of a subject after its first."""
    seen: set[str] = set()
    weight = batch.weight.clone()
    for row, subject in enumerate(batch.subjects):
        weight[row] *= subject not in seen
        seen |= {subject} if weight[row] else set()
    return dataclasses.replace(batch, weight=weight)


def memorise(
    task: ContrastiveAlignment,
    batch: PairedBatch,
    kind: Literal["mse", "info_nce"],
    *,
    num_steps: int,
    learning_rate: float,
) -> Memorised:
    """Train all parameters on this batch alone, at a constant learning rate."""
    config = dataclasses.replace(task.config, loss=dataclasses.replace(task.config.loss, kind=kind))
    task.config = config
    task.train()
    optimizer = torch.optim.AdamW(task.parameters(), lr=learning_rate, weight_decay=0.0)
    losses: list[float] = []
    norms: dict[str, list[float]] = {name: [] for name in MODULES}
    constant_level = 0.0
    for _ in range(num_steps):
        optimizer.zero_grad()
        parts = task(batch)
        parts["loss"].backward()
        losses.append(parts["loss"].item())
        constant_level = float(parts.get("constant_level", torch.zeros(())))
        for name in MODULES:
            norms[name].append(gradient_norm(task.towers.get_submodule(name)))
        torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        optimizer.step()
    first, second = embeddings(task, batch)
    found = similarities(tuple(str(row) for row in range(len(first))), first, second)
    return Memorised(
        kind,
        num_subjects=len(first),
        losses=losses,
        constant_level=constant_level,
        cosine=float(np.diag(found.cosines).mean()),
        recall=METRICS[0].value(found),
        ranks={side: effective_rank(unit(rows)) for side, rows in zip(SIDES, (first, second), strict=True)},
        gradient_norms=norms,
    )


@torch.no_grad()
def embeddings(task: ContrastiveAlignment, batch: PairedBatch) -> tuple[np.ndarray, np.ndarray]:
    """The embeddings of a batch's real rows."""
    task.eval()
    is_real = (batch.weight > 0).cpu()
    first, second = (rows.cpu()[is_real].numpy() for rows in task.embedded(batch))
    return first, second


def gradient_norm(module: torch.nn.Module) -> float:
    """The norm of a module's gradient; 0 where there is none."""
    squares = [parameter.grad.square().sum() for parameter in module.parameters() if parameter.grad is not None]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def constant_inputs(batch: PairedBatch) -> list[str]:
    """The sides whose rows are all alike."""
    return [side for side, windows in batch.sides.items() if _largest_spread(windows.values) < CONSTANT]


def _largest_spread(values: Tensor) -> float:
    return float((values - values[:1]).abs().max())


def faults(memorised: Sequence[Memorised], constant: Sequence[str]) -> list[str]:
    """What keeps a pipeline from learning, as far as one batch can tell."""
    found = [f"all {side} inputs of the batch are alike, so they say nothing of a subject" for side in constant]
    for name in MODULES:
        norms = [norm for each in memorised for norm in each.gradient_norms[name]]
        if max(norms) == 0:
            found.append(f"no gradient reaches {name}: it is detached from the loss")
        if not all(np.isfinite(norms)):
            found.append(f"the gradient of {name} is not finite")
    for each in memorised:
        if not each.is_done and not found:
            ranks = ", ".join(f"{side} {rank:.1f}" for side, rank in each.ranks.items())
            found.append(f"{each}; effective ranks {ranks}: more steps, or another learning rate, would have to tell")
    return found


def sentence(memorised: Sequence[Memorised], constant: Sequence[str], curves: Finding | None) -> str:
    """The verdict: whether the pipeline is sound, and what then follows for a run."""
    shown = "; ".join(str(each) for each in memorised)
    if found := faults(memorised, constant):
        return f"The pipeline does not memorise one batch: {'; '.join(found)}. In numbers: {shown}."
    said = f"The pipeline memorises one batch of {memorised[0].num_subjects} subjects: {shown}."
    if curves is None:
        return f"{said} What keeps a run from learning is then its data or its recipe, not the code."
    return f"{said} The curves: {curves}"


def norm_lines(memorised: Sequence[Memorised]) -> str:
    """Gradient norms of every module under each loss: first, median, last."""
    lines = {}
    for each in memorised:
        for name, norms in each.gradient_norms.items():
            shown = ", ".join(f"{norm:.2g}" for norm in (norms[0], float(np.median(norms)), norms[-1]))
            lines[f"{each.kind} {name}"] = shown
    return aligned([("gradient norm of", "first, median, last"), *lines.items()])


def read_curves(location: str) -> Curves:
    """The curves of a run folder, with its levels and ranks, or of a CSV file with the columns train and validation."""
    if location.endswith(".csv"):
        folder, _, name = location.rpartition("/")
        rows = list(csv.DictReader(io.StringIO(store_for(folder or ".").read(name).decode())))
        columns = {key: [float(row[key]) for row in rows if row.get(key)] for key in ("train", "validation")}
        if not columns["train"]:
            raise FinetuneError(f"curves={location}: no numbers in a column train; give columns train and validation")
        return Curves(columns["train"], columns["validation"])
    history: dict[str, list[float]] = {}
    for line in store_for(location).read(SPOOL).splitlines():
        row = json.loads(line)
        history.setdefault(row["key"], []).append(float(row["value"]))
    if "train/constant_level" not in history:
        raise FinetuneError(f"curves={location}: tracks no train/constant_level; give the folder of an alignment's run")
    return Curves(
        history["train/loss"],
        history.get("validation/loss", []),
        _levels(history, "train"),
        _levels(history, "validation"),
        {side: history[f"validation/rank_{side}"][-1] for side in SIDES},
        {side: history[f"validation/variance_{side}"][-1] for side in SIDES},
    )


def _levels(history: Mapping[str, Sequence[float]], split: str) -> Levels:
    constant, random = (history[f"{split}/{name}_level"] for name in ("constant", "random"))
    return Levels(float(np.mean(constant)), float(np.mean(random)))


def finding_of(config: OneBatchConfig, study: AlignmentStudy) -> Finding:
    """What the configured curves say. A CSV file knows no batches: its validation split is taken for one batch."""
    assert config.curves is not None
    width, temperature = study.config.projection.embedding, study.config.loss.temperature
    num_train = config.num_train or len(study.pairs.names("train"))
    curves = read_curves(config.curves)
    if curves.validation_levels is None:
        num_validation = config.num_validation or len(study.pairs.names("validation"))
        levels = Levels.of([num_validation], width=width, temperature=temperature)
        curves = dataclasses.replace(curves, validation_levels=levels)
    return analyse(curves, width=width, temperature=temperature, num_subjects=num_train)


def diagnose(config: OneBatchConfig, study: AlignmentStudy) -> str:
    """The verdict on a configuration: one batch learned by heart under both losses, and the curves of a run, if any.
    Gradient norms follow."""
    source = study.make_source(study.make_task())
    (batch,), _ = next(source.steps(source.initial_state()))
    source.close()
    device = own_device()
    batch = first_of_each_subject(batch).to(device)
    memorised = []
    kinds: tuple[Literal["mse", "info_nce"], ...] = ("mse", "info_nce")
    for kind in kinds:
        phase(f"memorising {int(batch.weight.sum())} subjects by {kind}, {config.num_steps} steps")
        task = study.make_task().to(device)
        memorised.append(
            memorise(
                task,
                batch,
                kind,
                num_steps=config.num_steps,
                learning_rate=config.learning_rate,
            )
        )
    finding = None if config.curves is None else finding_of(config, study)
    return f"{sentence(memorised, constant_inputs(batch), finding)}\n\n{norm_lines(memorised)}"
