"""Blocks of dissimilarities are those of the field's toolbox, whatever their size."""

from __future__ import annotations

import numpy as np
import pytest
import rsatoolbox
import torch

from finetune.errors import FinetuneError
from finetune.tasks.rdm_prediction.dissimilarity import rdm, upper_triangle


def patterns(num_images: int = 37, num_vertices: int = 90) -> torch.Tensor:
    """Responses with a common pattern, different means and different sizes."""
    numbers = np.random.default_rng(0)
    drawn = numbers.normal(size=(num_images, num_vertices)) * numbers.uniform(0.5, 3, size=(num_images, 1))
    return torch.from_numpy((drawn + numbers.normal(2, 5, size=num_vertices)).astype(np.float32))


@pytest.mark.parametrize("block_rows", [1, 8, 37, 1000])
def test_blocks_of_any_size_equal_rsatoolbox(block_rows: int) -> None:
    responses = patterns()
    dataset = rsatoolbox.data.Dataset(responses.double().numpy())
    is_pair = upper_triangle(len(responses))
    theirs = rsatoolbox.rdm.calc_rdm(dataset, method="correlation").dissimilarities[0]
    ours = rdm(responses, "pearson", block_rows=block_rows).numpy()
    np.testing.assert_allclose(ours[is_pair], theirs, atol=1e-6)
    squared = rsatoolbox.rdm.calc_rdm(dataset, method="euclidean").dissimilarities[0] * responses.shape[1]
    ours = rdm(responses, "euclidean", block_rows=block_rows).numpy()
    np.testing.assert_allclose(ours[is_pair], np.sqrt(squared), rtol=1e-6)
    np.testing.assert_array_equal(ours, ours.T)
    assert not ours.diagonal().any()
    assert ours.dtype == np.float32


def test_images_alike_are_at_zero_and_opposite_ones_at_two() -> None:
    pattern = torch.tensor([1.0, 2.0, 4.0, -3.0])
    found = rdm(torch.stack([pattern, 5 * pattern + 1, -pattern]), "pearson")
    torch.testing.assert_close(found, torch.tensor([[0.0, 0, 2], [0, 0, 2], [2, 2, 0]]), atol=1e-6, rtol=0)
    found = rdm(torch.stack([pattern, pattern + 2, pattern]), "euclidean")
    torch.testing.assert_close(found, torch.tensor([[0.0, 4, 0], [4, 0, 4], [0, 4, 0]]), atol=1e-3, rtol=0)


def test_a_constant_pattern_is_refused_with_its_number_and_what_to_do() -> None:
    responses = patterns()
    responses[5] = 3.5
    with pytest.raises(FinetuneError, match=r"pattern 5 of 37 is the same number 90 times.*task.measure=euclidean"):
        rdm(responses, "pearson")
    assert torch.isfinite(rdm(responses, "euclidean")).all()
