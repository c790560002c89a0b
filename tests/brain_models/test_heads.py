"""Heads against numpy: what is pooled, what is ignored, and that gradients arrive."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from brain_models.heads import AttentionPool, CovariancePool, HeadConfig, RunHead


def make_membership(num_patches: int, num_nodes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.arange(num_patches) % num_nodes, num_nodes).float()


def test_covariance_pooling_is_fisher_z_of_numpy_correlation_over_windows() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 12, 6, 5, generator=generator)
    pool = CovariancePool(5, make_membership(6, 3), num_channels=2)
    nodes = (tokens[:, :, :3] + tokens[:, :, 3:]) / 2
    channels = nodes @ pool.project.weight.detach().T
    centred = (channels - channels.mean(dim=1, keepdim=True)).numpy().astype(np.float64)
    series = centred.transpose(0, 2, 1, 3).reshape(2, 3, 24)
    unit = series / np.sqrt((series**2).sum(axis=2, keepdims=True))
    expected = [np.arctanh((run @ run.T)[np.triu_indices(3, 1)]) for run in unit]
    np.testing.assert_allclose(pool(tokens).detach().numpy(), expected, atol=1e-5)


def test_covariance_pooling_ignores_what_a_token_says_on_average() -> None:
    tokens = torch.randn(2, 8, 6, 5)
    pool = CovariancePool(5, make_membership(6, 3), num_channels=2)
    torch.testing.assert_close(pool(tokens + 10 * torch.randn(2, 1, 6, 5)), pool(tokens), atol=1e-3, rtol=1e-3)


def test_empty_node_and_constant_tokens_stay_finite() -> None:
    membership = make_membership(6, 3)
    membership[:, 2] = 0
    pool = CovariancePool(5, membership, num_channels=1)
    assert torch.isfinite(pool(torch.randn(1, 4, 6, 5))).all()
    assert torch.isfinite(pool(torch.ones(1, 4, 6, 5))).all()


def test_untrained_attention_pooling_is_the_mean_of_normalised_tokens() -> None:
    tokens = torch.randn(3, 2, 4, 8)
    pool = AttentionPool(8)
    expected = torch.nn.functional.layer_norm(tokens, (8,)).mean(dim=(1, 2))
    torch.testing.assert_close(pool(tokens), expected)


@pytest.mark.parametrize("pooling", ["covariance", "attention"])
def test_a_head_starts_at_zero_and_every_parameter_gets_a_gradient(pooling: str) -> None:
    config = HeadConfig(pooling=pooling, num_channels=2, dropout=0.0)  # type: ignore[arg-type]
    head = RunHead(config, 8, membership=make_membership(6, 3))
    tokens = torch.randn(4, 5, 6, 8)
    torch.testing.assert_close(head(tokens), torch.zeros(4))
    torch.nn.init.normal_(head.linear.weight)
    head(tokens).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in head.parameters())


def test_a_head_standardises_what_it_pools_before_its_linear_layer() -> None:
    head = RunHead(HeadConfig(pooling="attention", num_channels=1, dropout=0.0), 8)
    for tensor in (head.centre, head.spread.uniform_(0.5, 2), head.linear.weight.data, head.linear.bias.data):
        tensor.add_(torch.randn(tensor.shape).abs())
    tokens = torch.randn(3, 2, 4, 8)
    features = (head.pool(tokens) - head.centre) / head.spread
    expected = [float(row @ head.linear.weight[0] + head.linear.bias) for row in features]
    np.testing.assert_allclose(head(tokens).detach().numpy(), expected, rtol=1e-5)


def test_covariance_pooling_without_an_atlas_says_what_to_pass() -> None:
    with pytest.raises(ValueError, match=r"needs an atlas: pass membership \[patch, node\]"):
        RunHead(HeadConfig(pooling="covariance", num_channels=1, dropout=0.0), 8)
