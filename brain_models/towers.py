"""A side of an alignment: a network under a two-layer projection head, which ends in the embedding both sides share."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from brain_models.embedding import make_encoder
from brain_models.encoder import EncoderConfig
from brain_models.inputs import StemSpec
from brain_models.scan_networks import RunTokenNetwork, T1TokenNetwork, VolumeCnn, VolumeCnnConfig
from brain_models.series_networks import SERIES_NETWORKS, SeriesConfig


@dataclass
class ProjectionConfig:
    """Two layers: `hidden` wide, then `embedding` wide, as wide as the other side's."""

    hidden: int
    embedding: int
    dropout: float


class Tower(nn.Module):
    """A network and its projection head."""

    def __init__(self, network: nn.Module, projection: ProjectionConfig) -> None:
        super().__init__()
        self.network: Any = network
        num_features = network.num_features
        assert isinstance(num_features, int)
        self.projection = nn.Sequential(
            nn.LayerNorm(num_features),
            nn.Linear(num_features, projection.hidden),
            nn.GELU(),
            nn.Dropout(projection.dropout),
            nn.Linear(projection.hidden, projection.embedding),
        )

    def forward(self, *inputs: Tensor) -> Float[Tensor, "batch embedding"]:
        """Returns the embedding, not scaled, of what the network reads."""
        return self.projection(self.network(*inputs))


def t1_network(config: EncoderConfig | VolumeCnnConfig, stem: StemSpec) -> T1TokenNetwork | VolumeCnn:
    """Returns a fresh network for T1s."""
    if isinstance(config, VolumeCnnConfig):
        return VolumeCnn(config, stem.space)
    return T1TokenNetwork(make_encoder(config, {"t1": stem}))


def run_network(config: EncoderConfig, stem: StemSpec, *, num_channels: int | None) -> RunTokenNetwork:
    """Returns a fresh network for whole runs of voxels."""
    return RunTokenNetwork(make_encoder(config, {"bold": stem}), stem, num_channels)


def series_network(config: SeriesConfig, num_regions: int) -> nn.Module:
    """Returns a fresh network for region series."""
    return SERIES_NETWORKS[config.kind](config, num_regions)
