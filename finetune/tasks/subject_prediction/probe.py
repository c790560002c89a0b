"""How a head starts: principal channels of frozen tokens and a penalised linear model, before any gradient.

Linear probing first, then fine-tuning, keeps pretrained features that gradients through a random head would distort
(Kumar et al. 2022, ICLR). Uses training runs only; every rank encodes its share and all solve the same small problem.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from brain_models.heads import CovariancePool, RunHead
from brain_models.run_predictor import RunPredictor
from data_sharding.read.reader import WindowBatch
from finetune.tasks.subject_prediction.baselines import LinearConfig
from finetune.tasks.subject_prediction.labels import Labels
from finetune.tasks.subject_prediction.outcomes import Outcome
from training.collectives import from_main, gather, sum_in_place, this_process
from training.engine.base import own_device


@dataclass
class ProbeConfig:
    """`strengths` are inverse penalties chosen by inner folds; `num_runs_for_channels` runs give the channels."""

    strengths: list[float]
    num_folds: int
    num_runs_for_channels: int
    seed: int


def start_head(
    model: RunPredictor, batches: Iterable[WindowBatch], *, labels: Labels, outcome: Outcome, config: ProbeConfig
) -> None:
    """Sets the head's channels, standardisation and weights from labelled training runs; the same on every rank."""
    model.eval()
    pooled = _pooled(model, batches)
    if isinstance(model.head.pool, CovariancePool):
        first = list(islice(pooled, -(-config.num_runs_for_channels // this_process().world_size)))
        _set_channels(model.head.pool, [nodes for _, _, nodes in first])
        pooled = chain(first, pooled)
    features = {
        scan_id: (subject, _features(model.head, nodes).numpy())
        for scan_id, subject, nodes in pooled
        if subject in labels.truth_of
    }
    model.train()
    shares = cast("list[dict[str, tuple[str, np.ndarray]]]", gather(features))
    by_subject: dict[str, list[np.ndarray]] = {}
    for _, (subject, values) in sorted(chain.from_iterable(share.items() for share in shares)):
        by_subject.setdefault(subject, []).append(values)
    # One row a subject: otherwise a subject's runs would lie on both sides of an inner fold.
    table = np.stack([np.mean(runs, axis=0) for runs in by_subject.values()]).astype(np.float64)
    truth, _ = labels.rows(list(by_subject))
    sites = np.zeros(len(table), dtype=int)  # a site is unknown when a model is served, so it is not used here
    linear = LinearConfig(config.strengths, config.num_folds, regress_out_site=False, seed=config.seed)
    fit = outcome.fit(table, truth, sites=sites, config=linear)
    head = model.head
    with torch.no_grad():
        head.centre.copy_(torch.from_numpy(fit.standardise.mean))
        head.spread.copy_(torch.from_numpy(fit.standardise.spread))
        head.linear.weight.copy_(torch.from_numpy(fit.weights)[None])
        head.linear.bias.fill_(fit.bias)


def principal_channels(moment: Float[Tensor, "width width"], num_channels: int) -> Float[Tensor, "channel width"]:
    """The directions of largest variance of centred tokens, scaled so that the strongest has unit variance."""
    sizes, directions = torch.linalg.eigh(moment.double())
    strongest = directions[:, -num_channels:].T.flip(0)
    return (strongest / sizes[-1].clamp_min(1e-12).sqrt()).float()


def _pooled(model: RunPredictor, batches: Iterable[WindowBatch]) -> Iterator[tuple[str, str, Tensor]]:
    """(scan, subject, tokens pooled as far as nothing is learned) of every real run of this rank."""
    device = next(model.parameters()).device
    pool = model.head.pool
    for batch in batches:
        moved = batch.to(device)
        with torch.no_grad():
            tokens = model.tokens(moved.values, moved.is_measured, moved.repetition_time_s)
            pooled = pool.node_tokens(tokens) if isinstance(pool, CovariancePool) else pool(tokens)
        for row, weight in enumerate(batch.weight.tolist()):
            if weight > 0:
                yield f"{batch.scan_ids[row]}:{batch.first_frame[row]}", batch.subjects[row], pooled[row].cpu()


def _features(head: RunHead, pooled: Tensor) -> Tensor:
    if not isinstance(head.pool, CovariancePool):
        return pooled
    with torch.no_grad():
        device = head.pool.project.weight.device
        return head.pool.couple(pooled[None].to(device))[0].cpu()


def _set_channels(pool: CovariancePool, runs: list[Tensor]) -> None:
    width = pool.project.in_features
    moment = torch.zeros(width, width)
    for nodes in runs:
        flat = nodes.reshape(-1, width)
        moment += flat.T @ flat / len(flat)
    num_channels = pool.project.out_features
    sum_in_place(moment, own_device())
    channels = from_main(principal_channels(moment, num_channels))
    with torch.no_grad():
        pool.project.weight.copy_(cast(Tensor, channels))
