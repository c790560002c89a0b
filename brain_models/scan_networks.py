"""Networks that turn a packed scan into features: the mean or the coupling of an encoder's tokens, or a light 3D CNN.

An encoder may be pretrained or fresh: with patches of 16 voxels on a cube of 128 it is the 3D ViT of the literature,
with mean pooling in place of a class token. Knows no task and no data set.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from brain_models.encoder import BrainEncoder
from brain_models.heads import CovariancePool
from brain_models.inputs import StemSpec
from brain_models.run_predictor import run_tokens
from brain_models.space import BrainSpace, require_grid

CHANNELS_PER_GROUP = 8  # of GroupNorm
POOLED = 2  # cells of the last grid along each axis: a mean over all of it would forget where things are

Layers = list[tuple[str, list[nn.Module]]]


@dataclass
class VolumeCnnConfig:
    """`depth` convolutions of stride 2, each with twice the channels of the one before; the first has `width`, a
    multiple of 8."""

    width: int
    depth: int


class T1TokenNetwork(nn.Module):
    """The mean token of a T1."""

    def __init__(self, encoder: BrainEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.num_features = encoder.config.width

    def forward(
        self, values: Float[Tensor, "batch 1 voxel"], is_measured: Bool[Tensor, "batch voxel"]
    ) -> Float[Tensor, "batch feature"]:
        return self.encoder.encode_windows(values, is_measured, values.new_zeros(len(values)), "t1").mean(dim=1)

    def num_tokens(self, num_frames: int) -> int:
        """Returns how often every matrix is used for a row."""
        return self.encoder.stem("t1").num_patches

    def layers(self) -> Layers:
        """Returns the encoder's layers, top first."""
        return self.encoder.layers()


class RunTokenNetwork(nn.Module):
    """How regions vary together over a run's windows, or, without `num_channels`, the mean token."""

    def __init__(self, encoder: BrainEncoder, stem: StemSpec, num_channels: int | None) -> None:
        super().__init__()
        self.encoder = encoder
        self.window_frames = stem.window_frames
        self.pool: CovariancePool | None = None
        self.num_features = encoder.config.width
        if num_channels is not None:
            assert stem.atlas is not None, "regions vary together, so an atlas is needed"
            regions = stem.atlas.membership(stem.layout, stem.space)
            shares = torch.from_numpy(regions.shares[:, regions.is_named])
            self.pool = CovariancePool(encoder.config.width, shares, num_channels=num_channels)
            self.num_features = self.pool.num_features

    def forward(
        self,
        values: Float[Tensor, "batch time voxel"],
        is_measured: Bool[Tensor, "batch voxel"],
        repetition_time_s: Float[Tensor, "batch"],
    ) -> Float[Tensor, "batch feature"]:
        tokens = run_tokens(self.encoder, values, is_measured, repetition_time_s, window_frames=self.window_frames)
        return tokens.mean(dim=(1, 2)) if self.pool is None else self.pool(tokens)

    def num_tokens(self, num_frames: int) -> int:
        """Returns how often every matrix is used for a row."""
        stem = self.encoder.stem("bold")
        return num_frames // self.window_frames * (self.window_frames // stem.tubelet_frames) * stem.num_patches

    def layers(self) -> Layers:
        """Returns the encoder's layers, top first; the pool's channels belong to the top one."""
        (top, modules), *deeper = self.encoder.layers()
        return [(top, [*modules, *([] if self.pool is None else [self.pool])]), *deeper]


class VolumeCnn(nn.Module):
    """Convolution, GroupNorm and ReLU, on the box around the brain: BatchNorm would depend on what a rank holds."""

    places: Int[Tensor, "voxel"]

    def __init__(self, config: VolumeCnnConfig, space: BrainSpace) -> None:
        super().__init__()
        _, _, voxels = require_grid(space)
        first = voxels.min(axis=0)
        self.box = tuple(int(size) for size in voxels.max(axis=0) - first + 1)
        places = np.ravel_multi_index(tuple((voxels - first).T), self.box)
        self.register_buffer("places", torch.from_numpy(places.astype(np.int64)), persistent=False)
        widths = [1, *(config.width * 2**number for number in range(config.depth))]
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv3d(before, after, 3, stride=2, padding=1),
                nn.GroupNorm(after // CHANNELS_PER_GROUP, after),
                nn.ReLU(),
            )
            for before, after in pairwise(widths)
        )
        self.num_features = widths[-1] * POOLED**3

    def forward(
        self, values: Float[Tensor, "batch 1 voxel"], is_measured: Bool[Tensor, "batch voxel"]
    ) -> Float[Tensor, "batch feature"]:
        flat = values.new_zeros(len(values), math.prod(self.box))
        grid = flat.index_copy(1, self.places, values[:, 0]).reshape(len(values), 1, *self.box)
        for block in self.blocks:
            grid = block(grid)
        return nn.functional.adaptive_avg_pool3d(grid, POOLED).flatten(1)

    def num_tokens(self, num_frames: int) -> int:
        """Returns how often the kernels of the last convolution, which hold most parameters, are used for a row."""
        return math.prod(-(-size // 2 ** len(self.blocks)) for size in self.box)

    def layers(self) -> Layers:
        """Returns the convolutions with their norms, top first."""
        return [(str(number), [block]) for number, block in enumerate(self.blocks)][::-1]
