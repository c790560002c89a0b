"""The encoder: a pre-norm transformer on visible tokens, with one stem per shape of token.

Promise: positions are millimetres and seconds, so one trunk serves any resolution and repetition time; only stems
depend on a layout. Knows no task, no loss and no data set.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from brain_models.patches import PatchLayout

TokenKind = Literal["bold", "t1"]
StemName = str  # a kind, or for further token shapes of it '<kind>_<hash of the shape>'


def kind_of(name: StemName) -> str:
    """Returns the kind of scan a stem reads."""
    return name.partition("_")[0]


# Distances over which two positions stop resembling one another: neighbouring patches do, far ends of the head do not.
LENGTHS_MM = (12.0, 48.0)
LENGTHS_S = (4.0, 16.0)
LENGTHS = (LENGTHS_MM, LENGTHS_MM, LENGTHS_MM, LENGTHS_S)
POSITION_SEED = 1998


@dataclass
class EncoderConfig:
    """Sizes of the trunk; `num_frequencies` plane waves code positions.

    `time_in` frames: time is counted in frames from the window's start, and the model cannot tell repetition times
    apart: an arm to compare with, not a setting to train with.
    """

    width: int
    depth: int
    num_heads: int
    mlp_ratio: float
    num_frequencies: int
    time_in: Literal["seconds", "frames"]


class Stem(nn.Module):
    """Turns packed values into token features of one shape: a patch over `tubelet_frames` frames.

    Values are standardised per voxel by `voxel_offset` and `voxel_scale`, the train split's mean and spread, which
    travel with the weights.
    """

    gather: Int[Tensor, "patch element"]
    is_valid: Bool[Tensor, "patch element"]
    centres_mm: Float[Tensor, "patch 3"]
    voxel_offset: Float[Tensor, "voxel"]
    voxel_scale: Float[Tensor, "voxel"]

    def __init__(self, layout: PatchLayout, tubelet_frames: int, width: int) -> None:
        super().__init__()
        self.tubelet_frames = tubelet_frames
        self.patch_voxels = layout.patch_voxels
        self.num_patches = layout.num_patches
        self.layout_fingerprint = layout.fingerprint
        self.register_buffer("gather", torch.from_numpy(layout.gather).clamp(max=layout.num_voxels - 1), False)
        self.register_buffer("is_valid", torch.from_numpy(layout.is_valid), False)
        self.register_buffer("centres_mm", torch.from_numpy(layout.centres_mm), False)
        self.register_buffer("voxel_offset", torch.zeros(layout.num_voxels))
        self.register_buffer("voxel_scale", torch.ones(layout.num_voxels))
        self.num_features = layout.gather.shape[1] * tubelet_frames
        self.project = nn.Linear(self.num_features, width)

    def features(
        self, values: Float[Tensor, "batch time voxel"], is_measured: Bool[Tensor, "batch voxel"]
    ) -> Float[Tensor, "batch token feature"]:
        """Returns standardised voxels by token (tubelet-major), 0 where not measured or outside the brain."""
        centred = (values - self.voxel_offset) / self.voxel_scale * is_measured[:, None, :]
        return self.by_token(centred)

    def measured(self, is_measured: Bool[Tensor, "batch voxel"]) -> Bool[Tensor, "batch patch feature"]:
        """Returns True where a patch's feature stands for a measured voxel (equal for all tubelets)."""
        elements = is_measured[:, self.gather] & self.is_valid
        return elements.repeat(1, 1, self.tubelet_frames)

    def by_token(self, values: Float[Tensor, "batch time voxel"]) -> Float[Tensor, "batch token feature"]:
        """Returns packed values gathered by token, frames-major inside a token; 0 outside the brain."""
        elements = values[:, :, self.gather].mul_(self.is_valid)
        return rearrange(
            elements,
            "batch (tubelet frame) patch element -> batch (tubelet patch) (frame element)",
            frame=self.tubelet_frames,
        )

    def is_like(self, other: "Stem") -> bool:
        """Returns True when both cut the same space into the same tokens."""
        return (self.layout_fingerprint, self.tubelet_frames) == (other.layout_fingerprint, other.tubelet_frames)

    @torch.no_grad()
    def start_from(self, other: "Stem") -> None:
        """Take over a projection made for another token shape, by the pseudo-inverse of interpolating that shape to
        this one (FlexiViT, Beyer 2023): a token interpolated to a finer shape gives the same features.

        Only cubes can be interpolated: with patches of another kind on either side the projection stays as it is.
        """
        if self.patch_voxels is None or other.patch_voxels is None:
            return
        by_axis = "width (frame x y z) -> width frame x y z"
        old = rearrange(other.project.weight, by_axis, x=other.patch_voxels, y=other.patch_voxels, z=other.patch_voxels)
        in_time = torch.linalg.pinv(_interpolation(other.tubelet_frames, self.tubelet_frames)).to(old)
        in_space = torch.linalg.pinv(_interpolation(other.patch_voxels, self.patch_voxels)).to(old)
        new = einsum(old, in_time, in_space, "width f x y z, f frame, x p -> width frame p y z")
        new = einsum(new, in_space, in_space, "width frame p y z, y q, z r -> width frame p q r")
        self.project.weight.copy_(rearrange(new, "width frame x y z -> width (frame x y z)"))
        self.project.bias.copy_(other.project.bias)


def _interpolation(num_old: int, num_new: int) -> Float[Tensor, "new old"]:
    """Returns the matrix that interpolates `num_old` cells of an interval linearly to `num_new`, centre to centre."""
    centres = ((torch.arange(num_new) + 0.5) * num_old / num_new - 0.5).clamp(0, num_old - 1)
    return (1 - (centres[:, None] - torch.arange(num_old)).abs()).clamp(min=0).double()


class BrainEncoder(nn.Module):
    """A trunk with stems by name; encodes whatever subset of tokens it is given.

    `recomputes_activations`: blocks keep only their input and are computed again in the backward pass.
    """

    def __init__(self, config: EncoderConfig, stems: Mapping[StemName, tuple[PatchLayout, int]]) -> None:
        super().__init__()
        self.config = config
        self.recomputes_activations = False
        self.stems = nn.ModuleDict(
            {name: Stem(layout, tubelet_frames, config.width) for name, (layout, tubelet_frames) in stems.items()}
        )
        self.embed_position = PositionEmbedding(config.width, config.num_frequencies)
        self.blocks = nn.ModuleList(
            Block(config.width, config.num_heads, config.mlp_ratio) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width)

    def stem(self, name: StemName) -> Stem:
        """Returns the stem of that name."""
        stem = self.stems[name]
        assert isinstance(stem, Stem)
        return stem

    def layers(self) -> list[tuple[str, list[nn.Module]]]:
        """Returns what is unfrozen together, top first: the norm with the top block, blocks, stems with positions."""
        blocks = [(str(index), [block]) for index, block in enumerate(self.blocks)][::-1]
        (top, modules), *deeper = blocks
        return [(top, [*modules, self.norm]), *deeper, ("stem", [self.stems, self.embed_position])]

    def positions(
        self, name: StemName, num_tubelets: int, repetition_time_s: Float[Tensor, "batch"]
    ) -> Float[Tensor, "batch token 4"]:
        """Returns x, y, z in mm and the tubelet's centre from the window's start, in `time_in`; tubelet-major."""
        stem = self.stem(name)
        centre_frames = (torch.arange(num_tubelets, device=repetition_time_s.device) + 0.5) * stem.tubelet_frames - 0.5
        frame_length = repetition_time_s if self.config.time_in == "seconds" else torch.ones_like(repetition_time_s)
        times = frame_length[:, None] * centre_frames[None]
        batch, patches = len(repetition_time_s), stem.num_patches
        centres_mm = stem.centres_mm[None, None].expand(batch, num_tubelets, patches, 3)
        times = times[:, :, None, None].expand(batch, num_tubelets, patches, 1)
        return rearrange(
            torch.cat([centres_mm, times], dim=-1), "batch tubelet patch coordinate -> batch (tubelet patch) coordinate"
        )

    def forward(
        self, features: Float[Tensor, "batch token feature"], positions: Float[Tensor, "batch token 4"], name: StemName
    ) -> Float[Tensor, "batch token width"]:
        """Returns the encoded tokens; the caller chooses which are visible."""
        tokens = self.stem(name).project(features) + self.embed_position(positions)
        for block in self.blocks:
            tokens = _recomputed(block, tokens) if self.recomputes_activations else block(tokens)
        return self.norm(tokens)

    def encode_windows(
        self,
        values: Float[Tensor, "batch time voxel"],
        is_measured: Bool[Tensor, "batch voxel"],
        repetition_time_s: Float[Tensor, "batch"],
        name: StemName,
    ) -> Float[Tensor, "batch token width"]:
        """Returns all tokens of whole windows, none hidden, tubelet-major."""
        features = self.stem(name).features(values, is_measured)
        num_tubelets = values.shape[1] // self.stem(name).tubelet_frames
        return self(features, self.positions(name, num_tubelets, repetition_time_s), name)


class PatchDecoder(nn.Module):
    """Predicts the features of hidden tokens from visible ones: hidden queries attend to the visible, then to nothing.
    One output a token shape.

    Cross-attention only (as CrossMAE, Fu 2024): cost grows with hidden x visible. The output starts at zero, which is
    the train split's mean, and attention starts as a smoothing kernel over millimetres: queries and keys are at first
    the positions themselves. From random ones, a tiny model needs several times the steps to find its neighbours.
    """

    def __init__(self, config: EncoderConfig, *, width: int, depth: int, num_features: Mapping[StemName, int]) -> None:
        super().__init__()
        self.recomputes_activations = False
        self.embed = nn.Linear(config.width, width)
        self.embed_position = PositionEmbedding(width, config.num_frequencies)
        blocks = [CrossBlock(width, config.num_heads, config.mlp_ratio) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        self.predict = nn.ModuleDict({name: nn.Linear(width, count) for name, count in num_features.items()})
        for block in blocks:
            nn.init.eye_(block.attention.query.weight)
            nn.init.eye_(block.attention.key_value.weight[:width])
        for parameter in self.predict.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self,
        visible: Float[Tensor, "batch visible width"],
        visible_positions: Float[Tensor, "batch visible 4"],
        hidden_positions: Float[Tensor, "batch hidden 4"],
        name: StemName,
    ) -> Float[Tensor, "batch hidden feature"]:
        """Returns predicted features of the hidden tokens, in the token shape of that stem."""
        context = self.embed(visible) + self.embed_position(visible_positions)
        tokens = self.embed_position(hidden_positions)
        for block in self.blocks:
            tokens = _recomputed(block, tokens, context) if self.recomputes_activations else block(tokens, context)
        return self.predict[name](self.norm(tokens))


class PositionEmbedding(nn.Module):
    """Sines and cosines of random plane waves through millimetres and seconds (Rahimi and Recht 2007), projected.

    The inner product of two embeddings starts as a Gaussian kernel of their distance, so attention can tell near from
    far before anything is learned. The waves are fixed, and travel with the weights.
    """

    wavenumbers: Float[Tensor, "coordinate frequency"]

    def __init__(self, width: int, num_frequencies: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(POSITION_SEED)
        waves = torch.randn(4, num_frequencies, generator=generator)
        lengths = [torch.logspace(math.log10(low), math.log10(high), num_frequencies) for low, high in LENGTHS]
        self.register_buffer("wavenumbers", waves / torch.stack(lengths))
        self.project = nn.Linear(2 * num_frequencies, width)
        nn.init.orthogonal_(self.project.weight, gain=math.sqrt(width / num_frequencies))  # unit variance
        nn.init.zeros_(self.project.bias)

    def forward(self, positions: Float[Tensor, "batch token 4"]) -> Float[Tensor, "batch token width"]:
        with torch.autocast(positions.device.type, enabled=False):  # bf16 would be wrong by up to a tenth of a radian
            phases = positions @ self.wavenumbers
        return self.project(torch.cat([phases.sin(), phases.cos()], dim=-1))


class Attention(nn.Module):
    """Multi-head attention of `tokens` to `context` by scaled_dot_product_attention; `is_seen` is False where the
    context is padding."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        tokens: Float[Tensor, "batch token width"],
        context: Float[Tensor, "batch other width"],
        is_seen: Bool[Tensor, "batch other"] | None = None,
    ) -> Float[Tensor, "batch token width"]:
        split = "batch token (head width) -> batch head token width"
        query = rearrange(self.query(tokens), split, head=self.num_heads)
        key, value = (rearrange(half, split, head=self.num_heads) for half in self.key_value(context).chunk(2, dim=-1))
        is_seen = None if is_seen is None else is_seen[:, None, None]
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=is_seen)
        return self.out(rearrange(attended, "batch head token width -> batch token (head width)"))


class Block(nn.Module):
    """Pre-norm self-attention and MLP."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = _mlp(width, mlp_ratio)

    def forward(
        self, tokens: Float[Tensor, "batch token width"], is_seen: Bool[Tensor, "batch token"] | None = None
    ) -> Float[Tensor, "batch token width"]:
        normed = self.norm_attention(tokens)
        tokens = tokens + self.attention(normed, normed, is_seen)
        return tokens + self.mlp(self.norm_mlp(tokens))


class CrossBlock(nn.Module):
    """Pre-norm attention of tokens to a context, and MLP."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm_tokens = nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = _mlp(width, mlp_ratio)

    def forward(
        self, tokens: Float[Tensor, "batch token width"], context: Float[Tensor, "batch other width"]
    ) -> Float[Tensor, "batch token width"]:
        tokens = tokens + self.attention(self.norm_tokens(tokens), self.norm_context(context))
        return tokens + self.mlp(self.norm_mlp(tokens))


def _mlp(width: int, mlp_ratio: float) -> nn.Sequential:
    hidden = int(width * mlp_ratio)
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def _recomputed(block: nn.Module, *tokens: Tensor) -> Tensor:
    """Returns what the block returns, keeping only its inputs. Blocks draw no random numbers, so none are restored."""
    return checkpoint(block, *tokens, use_reentrant=False, preserve_rng_state=False)
