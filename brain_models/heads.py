"""Heads that turn the tokens of a run into one number: a logit or a standardised value; they travel with the weights.

A run reaches a head as consecutive windows of tokens. Heads know no file and no label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

# Correlations are kept this far from +-1, where Fisher's z has no value.
LARGEST_CORRELATION = 0.999


@dataclass
class HeadConfig:
    """`num_channels` is how many numbers of a token covariance pooling compares over time; attention ignores it."""

    pooling: Literal["covariance", "attention"]
    num_channels: int
    dropout: float


class AttentionPool(nn.Module):
    """One learned question, asked of every token of a run: a softmax-weighted mean of tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width
        self.normalise = nn.LayerNorm(width)
        self.importance = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.importance.weight)

    def forward(self, tokens: Float[Tensor, "batch window patch width"]) -> Float[Tensor, "batch feature"]:
        """The pooled token of each run; before training, the plain mean."""
        flat = self.normalise(rearrange(tokens, "batch window patch width -> batch (window patch) width"))
        share = self.importance(flat).softmax(dim=1)
        return (share * flat).sum(dim=1)


class CovariancePool(nn.Module):
    """Second-order pooling: how the tokens of two nodes (groups of patches) vary together over the windows of a run.

    What tokens say on average (anatomy, scanner) is removed, what they do together is kept: the model's own
    functional connectivity. Fisher's z of the correlation of every pair of nodes, averaged over channels.
    """

    pairs: Tensor
    shares: Tensor

    def __init__(self, width: int, membership: Float[Tensor, "patch node"], *, num_channels: int) -> None:
        super().__init__()
        num_nodes = membership.shape[1]
        self.num_features = num_nodes * (num_nodes - 1) // 2
        self.project = nn.Linear(width, num_channels, bias=False)
        shares = membership.float() / membership.float().sum(dim=0, keepdim=True).clamp_min(1e-6)
        self.register_buffer("shares", shares)
        self.register_buffer("pairs", torch.triu_indices(num_nodes, num_nodes, offset=1))

    def node_tokens(
        self, tokens: Float[Tensor, "batch window patch width"]
    ) -> Float[Tensor, "batch window node width"]:
        """Tokens averaged over the patches of each node, less each node's mean over the windows."""
        nodes = torch.einsum("bwpd,pn->bwnd", tokens, self.shares.to(tokens.dtype))
        return nodes - nodes.mean(dim=1, keepdim=True)

    def couple(self, nodes: Float[Tensor, "batch window node width"]) -> Float[Tensor, "batch feature"]:
        """Fisher z of every pair's correlation over windows and channels together, from centred node tokens."""
        channels = rearrange(self.project(nodes).float(), "batch window node channel -> batch node (window channel)")
        unit = channels / channels.square().sum(dim=2, keepdim=True).add(1e-8).sqrt()
        correlation = torch.einsum("bnt,bmt->bnm", unit, unit)
        flat = correlation[:, self.pairs[0], self.pairs[1]]
        return torch.atanh(flat.clamp(-LARGEST_CORRELATION, LARGEST_CORRELATION))

    def forward(self, tokens: Float[Tensor, "batch window patch width"]) -> Float[Tensor, "batch feature"]:
        """One number a pair of nodes, in the order of torch.triu_indices."""
        return self.couple(self.node_tokens(tokens))


class RunHead(nn.Module):
    """Pooling, standardisation with stored numbers, dropout and one linear layer: one number per run."""

    centre: Tensor
    spread: Tensor

    def __init__(
        self, config: HeadConfig, width: int, *, membership: Float[Tensor, "patch node"] | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.pool = _make_pool(config, width, membership)
        self.dropout = nn.Dropout(config.dropout)
        self.linear = nn.Linear(self.pool.num_features, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("centre", torch.zeros(self.pool.num_features))
        self.register_buffer("spread", torch.ones(self.pool.num_features))

    def forward(self, tokens: Float[Tensor, "batch window patch width"]) -> Float[Tensor, "batch"]:
        """The output of each run; 0 for every run before the head is trained."""
        features = (self.pool(tokens) - self.centre) / self.spread
        return self.linear(self.dropout(features)).squeeze(-1)


def _make_pool(
    config: HeadConfig, width: int, membership: Float[Tensor, "patch node"] | None
) -> AttentionPool | CovariancePool:
    if config.pooling == "attention":
        return AttentionPool(width)
    if membership is None:
        raise ValueError(
            "head.pooling=covariance needs an atlas: pass membership [patch, node], or head.pooling=attention"
        )
    return CovariancePool(width, membership, num_channels=config.num_channels)
