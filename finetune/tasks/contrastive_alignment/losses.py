"""Losses of two sides' embeddings, the temperature, and the two levels that a loss is read against.

All rows of a step are here: every rank holds them (training.whole_step).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from training.whole_step import offered, symmetric_info_nce

ROWS_OF_RANDOM_LEVEL = 8192  # drawn at least: the expectation is then known to .01


@dataclass
class LossConfig:
    """`info_nce`, or `mse`: the mean squared difference of unit vectors, as in a memorisation test. A learned
    temperature stays between `lowest_temperature` and `highest_temperature`."""

    kind: Literal["info_nce", "mse"]
    temperature: float  # fixed, or where a learned one starts
    learns_temperature: bool
    lowest_temperature: float
    highest_temperature: float


class Temperature(nn.Module):
    """The temperature, fixed or learned between its bounds; its logarithm moves along a sigmoid, so a bound stops it
    without taking its gradient away."""

    position: Tensor

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.lowest, self.highest = config.lowest_temperature, config.highest_temperature
        share = math.log(config.temperature / self.lowest) / math.log(self.highest / self.lowest)
        position = torch.full((1,), math.log(share / (1 - share)))
        if config.learns_temperature:
            self.position = nn.Parameter(position)
        else:
            self.register_buffer("position", position)

    def forward(self) -> Float[Tensor, "1"]:
        """The temperature, of shape [1]: a parameter without dimensions cannot be divided among ranks."""
        return self.lowest * (self.highest / self.lowest) ** torch.sigmoid(self.position)


def temperature_problems(config: LossConfig, key: str) -> list[str]:
    """What is wrong with the temperatures; `key` is the loss's full name in the composed configuration."""
    if 0 < config.lowest_temperature < config.temperature < config.highest_temperature:
        return []
    return [
        f"{key}.temperature: {config.temperature}; must lie between {key}.lowest_temperature "
        f"{config.lowest_temperature} (above 0) and {key}.highest_temperature {config.highest_temperature}"
    ]


def alignment_losses(
    first: Float[Tensor, "all width"],
    second: Float[Tensor, "all width"],
    weight: Float[Tensor, "all"],
    *,
    subjects: Int[Tensor, "all"],
    temperature: Float[Tensor, "1"],
    kind: Literal["info_nce", "mse"],
) -> dict[str, Float[Tensor, ""]]:
    """The loss under "loss"; of InfoNCE also its two levels for just these rows, which `levels` describes."""
    if kind == "mse":
        return {"loss": mean_squared_difference(first, second, weight)}
    loss = symmetric_info_nce(first, second, weight, temperature=temperature, groups=subjects)
    return {"loss": loss} | levels(weight, subjects, width=first.shape[1], temperature=temperature.detach())


def mean_squared_difference(
    first: Float[Tensor, "all width"], second: Float[Tensor, "all width"], weight: Float[Tensor, "all"]
) -> Float[Tensor, ""]:
    """(2 - 2 cosine) / width, averaged over real pairs: the mean over dimensions of unit vectors."""
    is_real = (weight > 0).float()
    cosines = functional.cosine_similarity(first.float(), second.float(), dim=-1)
    return ((2 - 2 * cosines) * is_real).sum() / is_real.sum().clamp(min=1) / first.shape[1]


def levels(
    weight: Float[Tensor, "all"], subjects: Int[Tensor, "all"], *, width: int, temperature: Float[Tensor, "1"]
) -> dict[str, Float[Tensor, ""]]:
    """InfoNCE of these rows for two models that know nothing: `constant_level`, when all similarities are equal (the
    mean logarithm of the number of candidates), and `random_level`, the expectation for independent unit embeddings.

    The second is higher, by about (1 - 1/B) / (2 width temperature^2) in a batch of B. A loss that rests on the first
    comes from embeddings that have collapsed to one vector per side, not from embeddings that are merely unrelated.
    """
    is_real, is_offered = (weight > 0).float(), offered(weight, subjects)
    num_real = is_real.sum().clamp(min=1)
    constant = (is_offered.sum(dim=1).clamp(min=1).log() * is_real).sum() / num_real
    similarities = _random_similarities(len(weight), width).to(weight.device)
    scores = (similarities / temperature).masked_fill(~is_offered, torch.finfo(torch.float32).min)
    random = (scores.logsumexp(dim=-1).mean(dim=0) * is_real).sum() / num_real
    return {"constant_level": constant, "random_level": random}


@functools.lru_cache(maxsize=4)
def _random_similarities(num_rows: int, width: int) -> Float[Tensor, "draw row row"]:
    """Cosines of independent unit vectors, seeded: the same in every step, on every rank."""
    generator = torch.Generator().manual_seed(0)
    shape = (max(1, ROWS_OF_RANDOM_LEVEL // num_rows), num_rows, width)
    first, second = (functional.normalize(torch.randn(shape, generator=generator), dim=-1) for _ in range(2))
    return first @ second.mT
