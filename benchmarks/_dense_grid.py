"""The model that packing and dropping are measured against: every patch of a 96^3 grid at 2 mm, hidden ones as tokens.

The same encoder as the packed model's, on a dense grid as SimMIM-like models of this field use (NeuroSTORM, SwiFT):
patches outside the brain are tokens too, hidden tokens are replaced by a learned one and encoded with the others, and a
linear layer guesses their voxels. Nothing else differs: same patches, same share hidden, same loss.
"""

import numpy as np
import torch
from torch import Tensor, nn

from brain_models.atlas import Atlas
from brain_models.encoder import BrainEncoder, EncoderConfig
from brain_models.space import require_grid, space_from_mask
from data_sharding.read.batch import WindowBatch
from pretrain.masked.masked_set import Geometry
from pretrain.masked.masked_volumes import take_tokens
from pretrain.masked.masking import MaskingConfig
from training.task import Cost, ParameterGroup, Task
from training.unfreezing import split_decay

EXTENT_MM = 192.0  # 96 voxels of 2 mm


class DenseGrid(Task):
    """Reconstruction of hidden tokens by an encoder that sees the whole grid."""

    to_grid: Tensor

    def __init__(self, config: EncoderConfig, geometry: Geometry, *, hidden_share: float, batch_size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        affine, shape, indices = require_grid(geometry.space)
        edge = round(EXTENT_MM / abs(float(affine[0, 0])))
        grid = space_from_mask(np.ones((edge,) * 3, dtype=bool), affine, name="grid", template="none")
        unlabelled = Atlas("none", np.zeros(grid.num_voxels, dtype=np.int32), {}, {})
        dense = Geometry.of(grid, unlabelled, geometry.window)
        self.masker = dense.masker(MaskingConfig("random", hidden_share, "majority", [], []))
        self.encoder = BrainEncoder(config, {"bold": (dense.layout, geometry.window.tubelet_frames)})
        self.hidden_token = nn.Parameter(torch.zeros(config.width))
        self.predict_voxels = nn.Linear(config.width, self.encoder.stem("bold").num_features)
        self.batch_size = batch_size
        shift = (np.array((edge,) * 3) - np.array(shape)) // 2
        inside = np.clip(indices + shift, 0, edge - 1)  # the ellipsoid fits; a voxel at the rim would be clipped
        self.register_buffer("to_grid", torch.from_numpy(np.ravel_multi_index(tuple(inside.T), (edge,) * 3)), False)
        self.num_voxels = grid.num_voxels

    def forward(self, batch: WindowBatch) -> dict[str, Tensor]:
        """The mean squared error over hidden tokens."""
        stem = self.encoder.stem("bold")
        values = batch.values.new_zeros(*batch.values.shape[:2], self.num_voxels)
        values.index_copy_(2, self.to_grid, batch.values)
        is_measured = torch.zeros(len(values), self.num_voxels, dtype=torch.bool, device=values.device)
        is_measured.index_copy_(1, self.to_grid, batch.is_measured)
        features = stem.features(values, is_measured)
        choice = self.masker.choose(batch.sample_seed)
        tokens = stem.project(features)
        is_hidden = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=values.device)
        is_hidden.scatter_(1, choice.hidden, True)
        tokens = torch.where(is_hidden[:, :, None], self.hidden_token.to(tokens.dtype), tokens)
        positions = self.encoder.positions("bold", self.masker.num_tubelets, batch.repetition_time_s)
        tokens = tokens + self.encoder.embed_position(positions)
        for block in self.encoder.blocks:
            tokens = block(tokens)
        guess = self.predict_voxels(take_tokens(self.encoder.norm(tokens), choice.hidden)).float()
        counted = take_tokens(stem.measured(is_measured), choice.hidden % self.masker.num_patches)
        error = ((guess - take_tokens(features, choice.hidden)) * counted).square().mean()
        return {"loss": error * len(values) / self.batch_size}

    def parameter_groups(self) -> list[ParameterGroup]:
        return split_decay("model", [self], learning_rate_scale=1.0, weight_decay=0.05, opens_at=0)

    def cost(self, batch: WindowBatch) -> Cost:
        config, tokens, rows = self.encoder.config, self.masker.num_tokens, len(batch.weight)
        matrices = sum(parameter.numel() for parameter in self.encoder.blocks.parameters() if parameter.ndim == 2)
        ends = 2 * self.encoder.stem("bold").num_features * config.width
        attention = 2 * config.depth * tokens * config.width
        return Cost(tokens=rows * tokens, flops=6.0 * rows * tokens * (matrices + ends + attention))
