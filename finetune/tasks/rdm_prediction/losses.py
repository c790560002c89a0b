"""Losses of predicted dissimilarities: over all pairs of a step at once, which every rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

RANK_SHIFTS = (1, 7, 61)  # each pair is compared with those so many places further


@dataclass
class LossConfig:
    """`mse`; `correlation`: alpha (1 - r) + (1 - alpha) MSE; `rank`: alpha times the logistic loss of the order of two
    dissimilarities, rest MSE; `contrastive`: alpha times the InfoNCE of images and their responses, rest MSE."""

    kind: Literal["mse", "correlation", "rank", "contrastive"]
    alpha: float  # between 0 and 1
    temperature: float  # of contrastive


def pair_losses(
    predicted: Float[Tensor, "pair"], true: Float[Tensor, "pair"], config: LossConfig, *, spread: Float[Tensor, "1"]
) -> dict[str, Float[Tensor, ""]]:
    """The loss under "loss" and its named parts, in units of the dissimilarities' `spread`; contrastive adds its own
    part elsewhere."""
    mse = ((predicted - true) / spread).square().mean()
    if config.kind == "mse":
        return {"loss": mse}
    shape = {"correlation": _uncorrelated, "rank": _misordered, "contrastive": None}[config.kind]
    if shape is None:
        return {"loss": (1 - config.alpha) * mse, "mse": mse.detach()}
    part = shape(predicted / spread, true / spread)
    return {
        "loss": config.alpha * part + (1 - config.alpha) * mse,
        "mse": mse.detach(),
        config.kind: part.detach(),
    }


def _uncorrelated(predicted: Float[Tensor, "pair"], true: Float[Tensor, "pair"]) -> Float[Tensor, ""]:
    """1 - Pearson's correlation; 1 where predictions are constant."""
    centred = [side - side.mean() for side in (predicted, true)]
    return 1 - functional.cosine_similarity(centred[0], centred[1], dim=0, eps=1e-6)


def _misordered(predicted: Float[Tensor, "pair"], true: Float[Tensor, "pair"]) -> Float[Tensor, ""]:
    """The logistic loss of the sign of differences between dissimilarities; ln 2 where predictions are constant."""
    parts = []
    for shift in RANK_SHIFTS:
        further, truly = (side - side.roll(shift) for side in (predicted, true))
        parts.append(functional.softplus(-further * truly.sign()).mean())
    return torch.stack(parts).mean()
