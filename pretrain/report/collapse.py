"""Is the embedding still alive: its effective rank and variance over scans, and a word when they fall.

An encoder that maps every scan to the same point, or to a line, can still have a falling loss.
"""

import logging
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from training.collectives import this_process

log = logging.getLogger(__name__)

POOLED, TOKEN = "pooled", "token"
NOTHING = 1e-5  # of the vectors' norm: what rounding leaves of equal vectors
NAMES = {POOLED: "embedding", TOKEN: "token"}  # how metrics call them


@dataclass
class SentinelConfig:
    """When to say that an embedding collapses: shares of what the untrained encoder has on the same samples."""

    tokens_per_sample: int
    min_rank_share: float
    min_variance_share: float


def sampled(encoded: Float[Tensor, "batch token width"], tokens_per_sample: int) -> dict[str, Tensor]:
    """The mean token of each sample, and a few single ones at even distances: the same ones at every evaluation."""
    num_tokens = encoded.shape[1]
    chosen: Int64[Tensor, "chosen"] = torch.linspace(0, num_tokens - 1, tokens_per_sample, device=encoded.device).long()
    return {POOLED: encoded.mean(dim=1).float(), TOKEN: encoded[:, chosen].float()}


def embedding_metrics(rows: dict[str, Tensor]) -> dict[str, float]:
    """embedding_rank, embedding_variance, token_rank and token_variance of the rows of a set."""
    found: dict[str, float] = {}
    for key, name in NAMES.items():
        vectors = rows[key].flatten(0, -2)
        found |= {f"{name}_rank": effective_rank(vectors), f"{name}_variance": variance(vectors)}
    return found


def effective_rank(vectors: Float[Tensor, "sample width"]) -> float:
    """exp(entropy) of the normalised singular values of the centred vectors (Roy and Vetterli 2007; RankMe, Garrido
    2023, without centring): how many directions they fill, between 1 and the smaller of width and samples - 1.

    0 when all are the same vector: nothing is filled.
    """
    centred = vectors.double() - vectors.double().mean(dim=0)
    few = centred.T @ centred if centred.shape[0] > centred.shape[1] else centred @ centred.T
    sizes = torch.linalg.eigvalsh(few).clamp(min=0).sqrt()
    if float(sizes.sum()) <= NOTHING * float(vectors.double().norm()):
        return 0.0
    shares = sizes / sizes.sum()
    return float(torch.special.entr(shares).sum().exp())


def variance(vectors: Float[Tensor, "sample width"]) -> float:
    """The variance over samples, averaged over the width; 0 for a single sample."""
    return float(vectors.double().var(dim=0, correction=0).mean())


@dataclass(frozen=True)
class Sentinels:
    """What watches an embedding: the limits, and by set what the weights before training gave on the same samples."""

    config: SentinelConfig
    untrained: dict[str, dict[str, float]]

    def metrics(self, name: str, rows: dict[str, Tensor]) -> dict[str, float]:
        """The embedding's metrics of a set; with embedding_collapsed, and a warning, where a limit is passed."""
        found = embedding_metrics(rows)
        if name not in self.untrained:
            return found
        problems = collapses(found, self.untrained[name], self.config)
        if problems and this_process().is_main:
            log.warning(
                "the embedding of %s is collapsing: %s (report.sentinels); lower the learning rate or warm up longer",
                name,
                ", ".join(problems),
            )
        return found | {"embedding_collapsed": float(bool(problems))}


def collapses(found: dict[str, float], untrained: dict[str, float], config: SentinelConfig) -> list[str]:
    """A sentence for every number that has fallen below its share of the untrained encoder's."""
    limits = {"rank": config.min_rank_share, "variance": config.min_variance_share}
    return [
        f"{name} {found[name]:.3g} is below {share} of the untrained encoder's {untrained[name]:.3g}"
        for name in untrained
        if found[name] < (share := limits[name.rpartition("_")[2]]) * untrained[name]
    ]
