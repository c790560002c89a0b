"""Dissimilarities between patterns of numbers, one pattern per image, in blocks of the matrix of all images.

`pearson` is 1 - Pearson correlation (0 to 2), `euclidean` the distance, as rsatoolbox defines both (it squares the
second). Everything is float32: a block is one matrix product, and of the matrix one triangle is computed. Euclidean
distances are exact to 1e-6 of their size unless two patterns are nearly equal: those come out below 1e-3 of a pattern.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from finetune.errors import FinetuneError

Measure = Literal["pearson", "euclidean"]
BLOCK_ROWS = 1024


def comparable(
    patterns: Float[Tensor, "image feature"], measure: Measure, *, overwrites: bool = False
) -> Float[Tensor, "image feature"]:
    """The patterns so that `block` compares them: each with mean 0 and length 1, or all about their common mean; in
    their own memory where that may be overwritten. FinetuneError for a constant pattern, which correlates with nothing.
    """
    patterns = patterns if overwrites else patterns.clone()
    if measure == "euclidean":
        return patterns.sub_(patterns.mean(dim=0))
    sizes = patterns.norm(dim=1)
    lengths = patterns.sub_(patterns.mean(dim=1, keepdim=True)).norm(dim=1)
    if constant := torch.nonzero(lengths <= 1e-6 * sizes).flatten().tolist():
        raise FinetuneError(
            f"pattern {constant[0]} of {len(patterns)} is the same number {patterns.shape[1]} times, so 1 - Pearson is "
            "undefined; use task.measure=euclidean, or a larger region"
        )
    return patterns.div_(lengths[:, None])


def block(
    first: Float[Tensor, "row feature"], second: Float[Tensor, "column feature"], measure: Measure
) -> Float[Tensor, "row column"]:
    """The dissimilarities of comparable patterns, every row's with every column's."""
    products = first @ second.T
    if measure == "pearson":
        return products.neg_().add_(1)
    of_first, of_second = (torch.linalg.vector_norm(side, dim=1).square() for side in (first, second))
    squares = (of_first[:, None] + of_second).sub_(products.mul_(2))  # in this order (b, a) comes out as (a, b)
    return squares.clamp_(min=0).sqrt_()


def rdm(
    patterns: Float[Tensor, "image feature"],
    measure: Measure,
    *,
    block_rows: int = BLOCK_ROWS,
    overwrites: bool = False,
) -> Float[Tensor, "image image"]:
    """The symmetric matrix of all dissimilarities, zero on its diagonal; FinetuneError for a constant pattern."""
    rows = comparable(patterns, measure, overwrites=overwrites)
    matrix = torch.zeros(len(rows), len(rows), dtype=rows.dtype)
    for start in range(0, len(rows), block_rows):
        stop = start + block_rows
        found = block(rows[start:stop], rows[start:], measure)
        matrix[start:stop, start:] = found
        matrix[start:, start:stop] = found.T
    return matrix.fill_diagonal_(0)


def upper_triangle(num_images: int) -> Bool[np.ndarray, "image image"]:
    """True above the diagonal: a matrix's values there come out row by row, as in rsatoolbox and scipy."""
    return np.triu(np.ones((num_images, num_images), dtype=bool), k=1)
