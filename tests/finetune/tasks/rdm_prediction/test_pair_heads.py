"""Pair heads are symmetric by construction, start at what is known, and their losses have known values."""

from __future__ import annotations

import math

import pytest
import torch

from brain_models.pair_heads import PairHead, PairHeadConfig, ProjectionHead, make_head
from finetune.tasks.rdm_prediction.dissimilarity import rdm
from finetune.tasks.rdm_prediction.losses import LossConfig, pair_losses

SYMMETRIC = [("projection", 0), ("weighted", 0), ("mlp", 0), ("mlp", 2)]


def head(kind: str, num_hidden: int = 0, *, output: str = "linear", distance: str = "euclidean") -> PairHead:
    """A head whose every parameter has been moved away from its start."""
    torch.manual_seed(0)
    made = make_head(6, PairHeadConfig(kind, 5, num_hidden, 0.0, distance, output)).eval()  # type: ignore[arg-type]
    made.standardise(features() * 3 + 1, torch.tensor([0.8, 1.0, 1.3]))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return made


def features() -> torch.Tensor:
    return torch.randn(9, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("kind", "num_hidden"), SYMMETRIC)
@pytest.mark.parametrize("output", ["linear", "sigmoid"])
def test_the_order_of_a_pair_does_not_matter(kind: str, num_hidden: int, output: str) -> None:
    pairs = head(kind, num_hidden, output=output)
    embedded = pairs.embed(features())
    forwards, backwards = pairs(embedded[:-1], embedded[1:]), pairs(embedded[1:], embedded[:-1])
    torch.testing.assert_close(forwards, backwards, atol=0, rtol=0)
    assert forwards.std() > 0.01


def test_the_concatenation_is_marked_and_depends_on_the_order() -> None:
    pairs = head("concatenation", 1)
    embedded = pairs.embed(features())
    assert not pairs.is_symmetric
    assert (pairs(embedded[:-1], embedded[1:]) - pairs(embedded[1:], embedded[:-1])).abs().min() > 1e-4
    matrix = pairs.matrix(embedded)
    torch.testing.assert_close(matrix[2, 7], pairs(embedded[2:3], embedded[7:8])[0])
    torch.testing.assert_close(matrix[7, 2], pairs(embedded[7:8], embedded[2:3])[0])


@pytest.mark.parametrize(
    ("kind", "distance"), [("projection", "euclidean"), ("projection", "pearson"), ("weighted", "euclidean")]
)
def test_a_distance_head_is_least_where_both_images_are_the_same(kind: str, distance: str) -> None:
    pairs = head(kind, distance=distance)
    embedded = pairs.embed(features())
    same = pairs(embedded, embedded)
    torch.testing.assert_close(same, same[:1].expand(9))
    others = pairs(embedded[:1].expand(8, -1), embedded[1:])
    assert (others > same[0] + 1e-3).all()


@pytest.mark.parametrize(("kind", "num_hidden"), SYMMETRIC)
def test_the_matrix_holds_every_pair(kind: str, num_hidden: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("brain_models.pair_heads.PAIRS_AT_ONCE", 20)
    pairs = head(kind, num_hidden)
    embedded = pairs.embed(features())
    matrix = pairs.matrix(embedded)
    row, column = torch.triu_indices(9, 9, offset=1)
    torch.testing.assert_close(matrix[row, column], pairs(embedded[row], embedded[column]))
    torch.testing.assert_close(matrix, matrix.T, atol=0, rtol=0)
    assert not matrix.diagonal().any()


def test_a_fresh_mlp_says_the_mean_and_a_fresh_projection_ranks_as_the_features_do() -> None:
    torch.manual_seed(0)
    of_many = torch.randn(40, 300) @ torch.diag(torch.linspace(2, 0.1, 300))
    mlp = make_head(300, PairHeadConfig("mlp", 5, 1, 0.0, "euclidean", "linear"))
    mlp.standardise(of_many, torch.tensor([0.8, 1.0, 1.2]))
    row, column = torch.triu_indices(40, 40, offset=1)
    torch.testing.assert_close(mlp.matrix(mlp.embed(of_many))[row, column], torch.ones(780))
    projection = make_head(300, PairHeadConfig("projection", 256, 0, 0.0, "euclidean", "linear"))
    projection.standardise(of_many, torch.tensor([0.8, 1.0, 1.2]))
    found = projection.matrix(projection.embed(of_many))[row, column]
    distances = torch.pdist(of_many / of_many.std(dim=0))
    assert torch.corrcoef(torch.stack([found, distances]))[0, 1] > 0.5
    assert found.mean() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("distance", ["pearson", "euclidean"])
def test_a_projection_that_starts_from_an_encoding_says_the_distances_of_its_predicted_patterns(distance: str) -> None:
    numbers = torch.Generator().manual_seed(0)
    given, weights = torch.randn(30, 6, generator=numbers), torch.randn(6, 50, generator=numbers)
    made = make_head(6, PairHeadConfig("projection", 8, 0, 0.0, distance, "linear"))  # type: ignore[arg-type]
    made.standardise(given, torch.tensor([0.7, 1.0, 1.3]))
    patterns = (given - given.mean(dim=0)) / given.std(dim=0) @ weights
    row, column = torch.triu_indices(30, 30, offset=1)
    true = rdm(patterns, distance)  # type: ignore[arg-type]
    assert isinstance(made, ProjectionHead)
    made.start_from(weights)
    made.fit_line(given, 2 + 3 * true)
    found = made.matrix(made.embed(given))
    torch.testing.assert_close(found[row, column], 2 + 3 * true[row, column], rtol=1e-4, atol=1e-4)


def test_losses_have_the_values_worked_out_by_hand() -> None:
    true = torch.tensor([1.0, 2.0, 3.0, 4.0])
    predicted = torch.tensor([2.0, 4.0, 6.0, 8.0])
    spread = torch.tensor([2.0])

    def loss(kind: str, values: torch.Tensor, alpha: float = 0.5) -> float:
        return float(pair_losses(values, true, LossConfig(kind, alpha, 0.05), spread=spread)["loss"])  # type: ignore[arg-type]

    mse = (1 + 4 + 9 + 16) / 4 / 4
    assert loss("mse", predicted) == pytest.approx(mse)
    assert loss("correlation", predicted) == pytest.approx(0.5 * mse, abs=1e-6)
    assert loss("correlation", -predicted, alpha=1.0) == pytest.approx(2.0, abs=1e-6)
    assert loss("rank", torch.ones(4), alpha=1.0) == pytest.approx(math.log(2))
    assert loss("rank", 50 * true, alpha=1.0) == pytest.approx(0.0, abs=1e-6)
    assert loss("contrastive", predicted, alpha=0.25) == pytest.approx(0.75 * mse)
