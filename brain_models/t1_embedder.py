"""The model kind "t1_embedder": the T1 side of an alignment, which answers with embeddings of unit length."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from brain_models.encoder import EncoderConfig, StemName
from brain_models.inputs import Column, Row, ScanInput, Stems, columns_of, example_scan, read_scan
from brain_models.scan_networks import VolumeCnnConfig
from brain_models.towers import ProjectionConfig, Tower, t1_network


@dataclass
class T1EmbedderConfig:
    """One of `encoder` and `cnn`, under a projection head."""

    encoder: EncoderConfig | None
    cnn: VolumeCnnConfig | None
    projection: ProjectionConfig


def build(config: T1EmbedderConfig, stems: Stems) -> Tower:
    """Returns a fresh tower."""
    network = config.encoder or config.cnn
    assert network is not None
    return Tower(t1_network(network, stems["t1"]), config.projection)


def examples(config: T1EmbedderConfig, stems: Stems, seed: int) -> Iterator[ScanInput]:
    """Yields one T1."""
    yield example_scan("t1", stems["t1"], num_frames=1, seed=seed)


def columns(stems: Collection[StemName]) -> dict[str, Column]:
    """Returns the columns of a T1."""
    return columns_of(["t1"])


def read(row: Row, config: T1EmbedderConfig, stems: Stems) -> ScanInput:
    """Returns a T1."""
    return read_scan(row, {"t1": stems["t1"]})


def compute(model: Tower, config: T1EmbedderConfig, scan: ScanInput) -> Float[Tensor, "1 width"]:
    """Returns the embedding at length 1, as it is compared with others."""
    return functional.normalize(model(scan.values, scan.is_measured), dim=1)


def answer(config: T1EmbedderConfig, outputs: Float[Tensor, "row width"]) -> dict[str, np.ndarray]:
    """Returns the columns embedding_0, embedding_1 ..."""
    return {f"embedding_{index}": column.numpy() for index, column in enumerate(outputs.T)}
