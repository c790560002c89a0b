"""Networks of region series: padding cannot change a feature, and each has a known value or a plain reference."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from brain_models.series_networks import SeriesConfig, connectivity
from brain_models.towers import ProjectionConfig, Tower, series_network

CONFIG = SeriesConfig("transformer", 16, 3, 2, 2.0, 4, averages_padding=False)
KINDS = ("transformer", "cnn", "connectivity")
NUM_REGIONS, NUM_FRAMES = 7, 21


def tower(kind: str, *, averages_padding: bool = False) -> Tower:
    torch.manual_seed(3)
    config = dataclasses.replace(CONFIG, kind=kind, averages_padding=averages_padding)
    return Tower(series_network(config, NUM_REGIONS), ProjectionConfig(12, 8, dropout=0.0)).eval()


def series() -> torch.Tensor:
    return torch.randn(2, NUM_FRAMES, NUM_REGIONS, generator=torch.Generator().manual_seed(1))


def padded(values: torch.Tensor, filler: float) -> tuple[torch.Tensor, torch.Tensor]:
    padding = torch.full((2, 13, NUM_REGIONS), filler)
    return torch.cat([values, padding], dim=1), torch.arange(NUM_FRAMES + 13).expand(2, -1) < NUM_FRAMES


@pytest.mark.parametrize("kind", KINDS)
def test_padding_cannot_change_an_embedding(kind: str) -> None:
    model, seconds = tower(kind), torch.tensor([0.6, 2.0])
    expected = model(series(), torch.ones(2, NUM_FRAMES, dtype=torch.bool), seconds)
    for filler in (0.0, 50.0):
        values, is_frame = padded(series(), filler)
        torch.testing.assert_close(model(values, is_frame, seconds), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_averaging_of_padding_is_a_switch(kind: str) -> None:
    model, seconds = tower(kind, averages_padding=True), torch.tensor([0.6, 2.0])
    whole = model(series(), torch.ones(2, NUM_FRAMES, dtype=torch.bool), seconds)
    values, is_frame = padded(series(), 0.0)
    difference = (model(values, is_frame, seconds) - whole).abs().max()
    assert difference.item() > 1e-3


def test_connectivity_is_that_of_numpy_over_real_frames() -> None:
    values, is_frame = padded(series(), 9.0)
    values[0, :, 2] = 4.0  # a region that does not vary
    found = connectivity(values, is_frame)
    expected = np.corrcoef(series()[1].numpy().T)
    off_diagonal = ~np.eye(NUM_REGIONS, dtype=bool)
    np.testing.assert_allclose(found[1].numpy()[off_diagonal], np.arctanh(expected[off_diagonal]), atol=1e-5)
    assert torch.equal(found[0, 2], torch.zeros(NUM_REGIONS))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_hold_every_parameter_of_the_network_once_with_the_top_first(kind: str) -> None:
    network = tower(kind).network
    layers = network.layers()
    held = [id(parameter) for _, modules in layers for module in modules for parameter in module.parameters()]
    assert sorted(held) == sorted(id(parameter) for parameter in network.parameters())
    assert layers[0][0] == {"transformer": "2", "cnn": "2", "connectivity": "layer"}[kind]
