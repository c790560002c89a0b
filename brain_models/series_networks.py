"""Networks that turn region time series into features: a transformer, a light CNN, and the connectivity matrix.

Promise: padding cannot change a feature, unless a network is told to average it. Knows no task and no data set.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from brain_models.encoder import Block, PositionEmbedding
from brain_models.heads import LARGEST_CORRELATION

KERNEL = 5  # frames that a convolution sees


@dataclass
class SeriesConfig:
    """`transformer`: a token per frame; `cnn`: convolutions over time, each layer after the first halving it;
    `connectivity`: a layer on Fisher's z of all correlations, which has no depth and no heads.

    `averages_padding`: padded frames are attended to and averaged like others, as a study did: an arm to compare with.
    """

    kind: Literal["transformer", "cnn", "connectivity"]
    width: int
    depth: int
    num_heads: int
    mlp_ratio: float
    num_frequencies: int  # plane waves that code seconds
    averages_padding: bool


Layers = list[tuple[str, list[nn.Module]]]


class SeriesTransformer(nn.Module):
    """Frames as tokens; their mean after the last block."""

    def __init__(self, config: SeriesConfig, num_regions: int) -> None:
        super().__init__()
        self.averages_padding = config.averages_padding
        self.project = nn.Linear(num_regions, config.width)
        self.embed_position = PositionEmbedding(config.width, config.num_frequencies)
        self.blocks = nn.ModuleList(
            Block(config.width, config.num_heads, config.mlp_ratio) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width)
        self.num_features = config.width

    def forward(
        self,
        values: Float[Tensor, "batch time region"],
        is_frame: Bool[Tensor, "batch time"],
        repetition_time_s: Float[Tensor, "batch"],
    ) -> Float[Tensor, "batch feature"]:
        is_frame = is_frame | self.averages_padding
        seconds = repetition_time_s[:, None] * torch.arange(values.shape[1], device=values.device)
        nowhere = torch.zeros(*seconds.shape, 3, device=values.device)
        tokens = self.project(values) + self.embed_position(torch.cat([nowhere, seconds[..., None]], dim=-1))
        for block in self.blocks:
            tokens = block(tokens, is_frame)
        return mean_of_frames(self.norm(tokens), is_frame)

    def num_tokens(self, num_frames: int) -> int:
        """Returns how often every matrix is used for a row."""
        return num_frames

    def layers(self) -> Layers:
        """Returns what is unfrozen together, top first: the norm with the top block, blocks, the projection."""
        blocks: Layers = [(str(number), [block]) for number, block in enumerate(self.blocks)][::-1]
        blocks[0][1].append(self.norm)
        return [*blocks, ("stem", [self.project, self.embed_position])]


class SeriesCnn(nn.Module):
    """Convolutions over time with a norm over channels: one over time would see how much is padding."""

    def __init__(self, config: SeriesConfig, num_regions: int) -> None:
        super().__init__()
        self.averages_padding = config.averages_padding
        widths = [num_regions, *(config.width for _ in range(config.depth))]
        self.convolutions = nn.ModuleList(
            nn.Conv1d(before, after, KERNEL, stride=1 if number == 0 else 2, padding=KERNEL // 2)
            for number, (before, after) in enumerate(pairwise(widths))
        )
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(config.depth))
        self.num_features = config.width

    def forward(
        self,
        values: Float[Tensor, "batch time region"],
        is_frame: Bool[Tensor, "batch time"],
        repetition_time_s: Float[Tensor, "batch"],
    ) -> Float[Tensor, "batch feature"]:
        is_frame = is_frame | self.averages_padding
        for number, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            channels_first = rearrange(values * is_frame[..., None], "batch time channel -> batch channel time")
            values = norm(rearrange(convolution(channels_first), "batch channel time -> batch time channel")).relu()
            is_frame = is_frame if number == 0 else is_frame[:, ::2]
        return mean_of_frames(values, is_frame)

    def num_tokens(self, num_frames: int) -> int:
        """Returns how often the kernels of the first convolution are used for a row."""
        return num_frames

    def layers(self) -> Layers:
        """Returns the convolutions with their norms, top first."""
        pairs = zip(self.convolutions, self.norms, strict=True)
        return [(str(number), [convolution, norm]) for number, (convolution, norm) in enumerate(pairs)][::-1]


class ConnectivityNetwork(nn.Module):
    """A layer on Fisher's z of the correlations of all pairs of regions."""

    pairs: Tensor

    def __init__(self, config: SeriesConfig, num_regions: int) -> None:
        super().__init__()
        self.averages_padding = config.averages_padding
        self.register_buffer("pairs", torch.triu_indices(num_regions, num_regions, offset=1), persistent=False)
        self.layer = nn.Sequential(nn.Linear(self.pairs.shape[1], config.width), nn.GELU())
        self.num_features = config.width

    def forward(
        self,
        values: Float[Tensor, "batch time region"],
        is_frame: Bool[Tensor, "batch time"],
        repetition_time_s: Float[Tensor, "batch"],
    ) -> Float[Tensor, "batch feature"]:
        z = connectivity(values, is_frame | self.averages_padding)
        return self.layer(z[:, self.pairs[0], self.pairs[1]])

    def num_tokens(self, num_frames: int) -> int:
        """Returns how often every matrix is used for a row."""
        return 1

    def layers(self) -> Layers:
        """Returns the one layer."""
        return [("layer", [self.layer])]


def mean_of_frames(
    values: Float[Tensor, "batch time width"], is_frame: Bool[Tensor, "batch time"]
) -> Float[Tensor, "batch width"]:
    """Returns the mean over real frames."""
    share = is_frame.to(values) / is_frame.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.einsum("btw,bt->bw", values, share)


def connectivity(
    values: Float[Tensor, "batch time region"], is_frame: Bool[Tensor, "batch time"]
) -> Float[Tensor, "batch region other"]:
    """Returns Fisher's z of the correlation of every two regions over real frames; 0 for one that does not vary."""
    values = values.float()
    centred = (values - mean_of_frames(values, is_frame)[:, None]) * is_frame[..., None]
    length = centred.square().sum(dim=1, keepdim=True).sqrt()
    unit = torch.where(length > 1e-6, centred / length.clamp(min=1e-6), torch.zeros_like(centred))
    correlations = torch.einsum("btr,bto->bro", unit, unit)
    return torch.atanh(correlations.clamp(-LARGEST_CORRELATION, LARGEST_CORRELATION))


SERIES_NETWORKS = {"transformer": SeriesTransformer, "cnn": SeriesCnn, "connectivity": ConnectivityNetwork}
