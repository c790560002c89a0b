import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from pretrain.baselines.global_drift import GlobalDrift, polynomial_smoother
from pretrain.baselines.guesses import (
    RidgeOracle,
    VoxelStatistics,
    neighbour_means,
    patch_means,
)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_patch_means_skip_voxels_that_were_not_measured() -> None:
    owner = torch.tensor([0, 1, 0, 1, 0])
    values = torch.tensor([[[1.0, 2.0, 3.0, 4.0, 8.0]], [[1.0, 2.0, 3.0, 4.0, 8.0]]])
    is_measured = torch.tensor([[True, True, True, True, False], [True, False, True, False, True]])
    means = patch_means(values, is_measured, patch_of_voxel=owner, num_patches=2)
    assert means.tolist() == [[[2.0, 3.0]], [[4.0, 0.0]]]


def test_neighbour_is_the_mean_of_the_nearest_visible_patches() -> None:
    places = torch.tensor([[0.0], [1.0], [3.0], [10.0]])
    means = torch.tensor([[[1.0, 2.0, 4.0, 8.0]], [[10.0, 20.0, 40.0, 80.0]]])
    is_visible = torch.tensor([[False, True, True, True], [True, False, False, True]])
    guess = neighbour_means(means, is_visible, torch.cdist(places, places), num_neighbours=2)
    assert guess[0, 0].tolist() == [3.0, 3.0, 3.0, 6.0]
    assert guess[1, 0].tolist() == [45.0, 45.0, 45.0, 45.0]


def test_neighbour_holds_the_last_visible_tubelet_when_the_future_is_hidden() -> None:
    places = torch.tensor([[0.0], [1.0]])
    means = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]], [[0.0, 0.0]], [[0.0, 0.0]]])
    is_visible = torch.tensor([[True, True], [True, True], [False, False], [False, False]])
    guess = neighbour_means(means, is_visible, torch.cdist(places, places), num_neighbours=1)
    assert guess[2:].tolist() == [[[3.0, 4.0]], [[3.0, 4.0]]]


def test_ridge_of_any_hidden_set_equals_scikit_learn(generator: torch.Generator) -> None:
    means = torch.randn(6, 5, 7, generator=generator)
    values = torch.randn(6, 5, 20, generator=generator) + means.sum(dim=2, keepdim=True)
    oracle = RidgeOracle(7, 20)
    oracle.add(means[:2], values[:2])
    rest = RidgeOracle(7, 20)
    rest.add(means[2:], values[2:])
    oracle.merge(rest)
    is_visible = torch.tensor([True, False, True, True, False, True, False])
    frames = means.reshape(30, 7)
    absolute = 0.1 * float((frames.double().T @ frames.double()).diagonal().mean())
    reference = Ridge(alpha=absolute, fit_intercept=False).fit(frames[:, is_visible], values.reshape(30, 20))
    unseen = torch.randn(4, 7, generator=generator)
    guess = oracle.predict(unseen, is_visible, penalty=0.1)
    assert np.allclose(guess, reference.predict(unseen[:, is_visible]), atol=1e-4)
    assert not oracle.predict(unseen, torch.zeros(7, dtype=torch.bool), penalty=0.1).any()


def test_voxel_statistics_are_those_of_the_measured_frames(generator: torch.Generator) -> None:
    values = torch.randn(6, 3, 5, generator=generator) * 4 + 100
    is_measured = torch.rand(6, 5, generator=generator) < 0.7
    is_measured[:, 0], is_measured[:, 1] = False, True
    statistics = VoxelStatistics.empty(5)
    statistics.add(values[:4], is_measured[:4])
    statistics.add(values[4:], is_measured[4:])
    expected = [values[is_measured[:, voxel], :, voxel].numpy() for voxel in range(5)]
    assert np.allclose(statistics.mean, [0, *(np.mean(one) for one in expected[1:])], atol=1e-4)
    deviations = [np.std(one) for one in expected[1:]]
    assert np.allclose(statistics.deviation(0.01)[1:], deviations, rtol=1e-4)
    assert min(deviations) - 1e-4 <= statistics.deviation(0.01)[0] <= max(deviations) + 1e-4
    floor = 1.5
    assert statistics.deviation(floor).min() == pytest.approx(
        floor * float(statistics.deviation(0.0).median()), rel=0.1
    )


def test_the_drift_is_the_polynomial_of_the_shown_frames_and_extends_to_where_nothing_is_shown() -> None:
    time = torch.linspace(-1, 1, 6, dtype=torch.float64)
    is_shown = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    line = 2 + 3 * time
    smooth = polynomial_smoother(is_shown, degree=1)
    assert torch.allclose(smooth @ line, line.expand(2, -1))
    other = line + torch.tensor([0.0, 0, 0, 0, 9, 9])
    assert torch.allclose((smooth @ other)[1], line)  # what is not shown is not looked at
    alternating = torch.tensor([1.0, -1, 1, -1, 1, -1], dtype=torch.float64)
    expected = np.polyval(np.polyfit(time, alternating, 1), time)
    assert np.allclose(smooth[0] @ alternating, expected)


def test_global_signal_and_drift_are_found_and_hidden_values_are_not_looked_at(generator: torch.Generator) -> None:
    """Two voxels a patch: they follow the whole brain and their neighbourhood's drift by weights of their own."""
    owner = torch.arange(8).repeat_interleave(2)
    weights = torch.tensor([[0.5, 1.0], [2.0, 0.0]]).repeat(8, 1).T
    is_visible = torch.zeros(40, 2, 8, dtype=torch.bool)
    is_visible[:, :, ::2] = True
    means = torch.randn(40, 6, 8, generator=generator)
    neighbours = means.roll(-1, dims=2)
    oracle = GlobalDrift(16, degree=1)
    counts = torch.full((40, 8), 2.0)
    signal, slow = oracle.regressors(means, neighbours, num_measured=counts, is_visible=is_visible)
    assert torch.allclose(signal, means[:, :, ::2].mean(dim=2), atol=1e-6)
    changed = means + 100 * ~is_visible[:, :1]
    again = oracle.regressors(changed, neighbours, num_measured=counts, is_visible=is_visible)
    assert torch.equal(again[0], signal)
    assert torch.equal(again[1], slow)
    drift = slow[:, :, owner]
    truth = signal[:, :, None] * weights[0] + drift * weights[1]
    is_scored = (~is_visible[:, :1, owner]).expand_as(truth)
    oracle.add(signal, drift, centred=truth, is_scored=is_scored)
    guess = oracle.predict(signal, drift)
    assert torch.allclose(guess[is_scored], truth[is_scored], atol=0.02)
    assert not oracle.weights()[owner % 2 == 0].any()  # never hidden: nothing is learnt
