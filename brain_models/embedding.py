"""The model kind "encoder": a backbone, which answers with embeddings of scans, of regions and of tokens."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from brain_models.encoder import BrainEncoder, EncoderConfig
from brain_models.inputs import Row, ScanInput, Stems, StemSpec, example_scan, read_scan, require_frames


@dataclass(frozen=True)
class ScanEmbedding:
    """What an encoder says of one scan; a window's tokens are tubelet-major.

    The embedding of a region is the mean over its voxels, each of which stands for the mean token of its patch;
    `region_names` is empty when the stem has no atlas.
    """

    tokens: Float[Tensor, "window token width"]
    regions: Float[Tensor, "region width"]
    region_names: list[str]
    scan: Float[Tensor, "width"]


def make_encoder(config: EncoderConfig, stems: Stems) -> BrainEncoder:
    """Returns a fresh encoder with these stems."""
    return BrainEncoder(config, {name: (stem.layout, stem.tubelet_frames) for name, stem in stems.items()})


def examples(config: EncoderConfig, stems: Stems, seed: int) -> Iterator[ScanInput]:
    """Yields one window for each stem."""
    for name in sorted(stems):
        yield example_scan(name, stems[name], num_frames=stems[name].window_frames, seed=seed)


def read(row: Row, config: EncoderConfig, stems: Stems) -> ScanInput:
    """Returns a scan of at least one window."""
    scan = read_scan(row, stems)
    return require_frames(scan, scan.window_frames)


def compute(encoder: BrainEncoder, config: EncoderConfig, scan: ScanInput) -> Float[Tensor, "1 width"]:
    """Returns the scan's embedding: its mean token over all whole windows."""
    means = [tokens.mean(dim=1) for tokens in _windows(encoder, scan)]
    return sum(means, torch.zeros_like(means[0])) / len(means)


def answer(config: EncoderConfig, outputs: Float[Tensor, "row width"]) -> dict[str, np.ndarray]:
    """Returns the columns embedding_0, embedding_1 ..."""
    return {f"embedding_{index}": column.numpy() for index, column in enumerate(outputs.T)}


def embed_scan(encoder: BrainEncoder, stem: StemSpec, scan: ScanInput) -> ScanEmbedding:
    """Returns all that the encoder says of a scan."""
    tokens = torch.cat(list(_windows(encoder, scan)))
    by_patch = rearrange(
        tokens, "window (tubelet patch) width -> window tubelet patch width", patch=stem.layout.num_patches
    ).mean(dim=(0, 1))
    names, weights = _region_weights(stem)
    return ScanEmbedding(tokens, weights @ by_patch, names, tokens.mean(dim=(0, 1)))


def _windows(encoder: BrainEncoder, scan: ScanInput) -> Iterator[Float[Tensor, "1 token width"]]:
    """Yields the tokens of each whole window in turn; a T1 is one window of one frame."""
    for first in range(0, scan.values.shape[1] - scan.window_frames + 1, scan.window_frames):
        frames = scan.values[:, first : first + scan.window_frames]
        yield encoder.encode_windows(frames, scan.is_measured, scan.repetition_time_s, scan.stem)


def _region_weights(stem: StemSpec) -> tuple[list[str], Float[Tensor, "region patch"]]:
    """Returns the atlas's regions, and the share of each region's voxels in every patch."""
    if stem.atlas is None:
        return [], torch.zeros(0, stem.layout.num_patches)
    membership = stem.atlas.membership(stem.layout, stem.space)
    names = [stem.atlas.names[int(label)] for label in membership.region_ids[membership.is_named]]
    voxels = (membership.shares * stem.layout.voxels_per_patch[:, None])[:, membership.is_named]
    return names, torch.from_numpy((voxels / voxels.sum(axis=0)).T.astype(np.float32))
