"""Networks of packed scans: each reads the voxels where they are, and treats every row by itself."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from brain_models.atlas import Atlas
from brain_models.encoder import EncoderConfig
from brain_models.heads import CovariancePool
from brain_models.scan_networks import POOLED, VolumeCnn, VolumeCnnConfig
from brain_models.space import BrainSpace, space_from_mask
from brain_models.towers import run_network, t1_network
from tests.bundles import cubes

CONFIG = EncoderConfig(width=16, depth=2, num_heads=2, mlp_ratio=2.0, num_frequencies=4, time_in="seconds")
CNN = VolumeCnnConfig(width=8, depth=2)


def head() -> BrainSpace:
    inside = np.zeros((12, 10, 11), dtype=bool)
    inside[2:10, 1:9, 2:10] = True
    inside[2, 1, 2] = False
    return space_from_mask(inside, np.eye(4), name="head", template="none")


def test_a_volume_network_sees_the_grid_that_the_voxels_lie_on() -> None:
    torch.manual_seed(0)
    space = head()
    network, values = VolumeCnn(CNN, space), torch.randn(2, 1, space.num_voxels)
    grid = torch.zeros(2, 1, 8, 8, 8)
    for voxel, (x, y, z) in enumerate(space.voxel_indices):
        grid[:, 0, x - 2, y - 1, z - 2] = values[:, 0, voxel]
    expected = torch.nn.Sequential(*network.blocks)(grid)
    expected = torch.nn.functional.adaptive_avg_pool3d(expected, POOLED).flatten(1)
    assert torch.equal(network(values, values[:, 0] == values[:, 0]), expected)
    assert expected.shape[1] == network.num_features == 2 * 8 * POOLED**3


def test_a_row_does_not_depend_on_the_others_in_training_mode() -> None:
    torch.manual_seed(0)
    space = head()
    stem = dataclasses.replace(cubes(space, 4), tubelet_frames=1, window_frames=1)
    values, is_measured = torch.randn(3, 1, space.num_voxels), torch.ones(3, space.num_voxels, dtype=torch.bool)
    for config in (CNN, CONFIG):
        network = t1_network(config, stem).train()
        together = network(values, is_measured)
        torch.testing.assert_close(network(values[1:2], is_measured[1:2]), together[1:2])


def test_a_t1_is_the_mean_of_its_tokens_and_its_layers_open_from_the_top() -> None:
    space = head()
    stem = dataclasses.replace(cubes(space, 4), tubelet_frames=1, window_frames=1)
    network = t1_network(CONFIG, stem)
    values, is_measured = torch.randn(2, 1, space.num_voxels), torch.ones(2, space.num_voxels, dtype=torch.bool)
    tokens = network.encoder.encode_windows(values, is_measured, torch.zeros(2), "t1")
    torch.testing.assert_close(network(values, is_measured), tokens.mean(dim=1))
    assert [name for name, _ in network.layers()] == ["1", "0", "stem"]
    assert [name for name, _ in t1_network(CNN, stem).layers()] == ["1", "0"]


def test_a_run_is_the_coupling_of_its_regions_or_its_mean_token() -> None:
    torch.manual_seed(0)
    space = head()
    labels = (1 + np.arange(space.num_voxels) * 5 // space.num_voxels).astype(np.int32)
    stem = dataclasses.replace(cubes(space, 4), atlas=Atlas("slabs", labels, {n: str(n) for n in range(1, 6)}, {}))
    values, is_measured = torch.randn(2, 13, space.num_voxels), torch.ones(2, space.num_voxels, dtype=torch.bool)
    seconds = torch.full((2,), 0.6)
    network = run_network(CONFIG, stem, num_channels=3)
    assert isinstance(network.pool, CovariancePool)
    found = network(values, is_measured, seconds)
    assert found.shape == (2, network.num_features)
    torch.testing.assert_close(network(values[:, :12], is_measured, seconds), found)  # three windows of four frames
    plain = run_network(CONFIG, stem, num_channels=None)
    windows = [plain.encoder.encode_windows(values[:, at : at + 4], is_measured, seconds, "bold") for at in (0, 4, 8)]
    torch.testing.assert_close(plain(values, is_measured, seconds), torch.stack(windows).mean(dim=(0, 2)))
    held = [id(each) for _, modules in network.layers() for module in modules for each in module.parameters()]
    assert sorted(held) == sorted(id(parameter) for parameter in network.parameters())
