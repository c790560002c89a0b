"""Whether a T1 image shows a whole head or only a brain, and where the brain of a whole head is.

Promise: both answers are pure functions of the image (and of a template laid over it). Knows no registration software.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Bool
from scipy import ndimage

from data_sharding.registration.volumes import Volume

SkullState = Literal["head", "brain"]

IS_TISSUE = 0.2  # of the 98th percentile of what is not background
HEAD_ABOVE_LITRES = 2.4  # filled volume: four heads had 3.5-4.3, four brains 1.2-1.9
HEAD_ABOVE_GAPS = 0.3  # share of directions with a dark ring: heads 0.68-0.96, brains 0-0.02, averaged heads 0.06-0.12
TOP_MM = 150.0  # below the crown lies the neck
RING_MM = 25.0  # scalp and skull lie this near to the surface
GAP_MM = 3
NUM_RAYS = 600


def skull_state(image: Volume) -> SkullState:
    """Returns "head" where the tissue fills more than a brain could, or is ringed by dark bone; else "brain"."""
    tissue = largest_piece(is_tissue(image))
    return (
        "head" if filled_litres(tissue, image) > HEAD_ABOVE_LITRES or bone_share(image) > HEAD_ABOVE_GAPS else "brain"
    )


def is_tissue(image: Volume) -> Bool[np.ndarray, "x y z"]:
    """Returns where the image is bright enough to be tissue."""
    return image.values > IS_TISSUE * _bright(image)


def centre_mm(image: Volume) -> np.ndarray:
    """Returns the centre of the tissue, of a head without its neck."""
    points_mm = image.points_mm(largest_piece(is_tissue(image)))
    return points_mm[points_mm[:, 2] > points_mm[:, 2].max() - TOP_MM].mean(axis=0)


def filled_litres(tissue: Bool[np.ndarray, "x y z"], image: Volume) -> float:
    """Returns the volume of the tissue and what it encloses."""
    closed = ndimage.binary_closing(np.pad(tissue, 6), iterations=max(1, round(9 / image.spacing_mm)))
    return float(ndimage.binary_fill_holes(closed).sum() * image.spacing_mm**3 / 1e6)


def bone_share(image: Volume) -> float:
    """Returns the share of directions, upwards from the centre, in which bright tissue lies outside a dark gap."""
    turn = np.arange(NUM_RAYS) * np.pi * (3 - 5**0.5)  # evenly spread (Fibonacci) over the upper half
    height = (np.arange(NUM_RAYS) + 0.5) / NUM_RAYS * 0.95
    around = np.sqrt(1 - height**2)
    directions = np.stack([around * np.cos(turn), around * np.sin(turn), height], axis=1)
    reach_mm = np.arange(0, 140.0)
    points_mm = centre_mm(image) + directions[:, None] * reach_mm[None, :, None]
    values = image.sample(points_mm.reshape(-1, 3)).reshape(NUM_RAYS, -1)
    is_bright = values > IS_TISSUE * _bright(image)
    is_dark_gap = ndimage.minimum_filter1d((~is_bright).astype(np.int8), GAP_MM, axis=1) > 0
    outermost = np.where(is_bright.any(axis=1), len(reach_mm) - 1 - is_bright[:, ::-1].argmax(axis=1), 0)
    in_ring = (reach_mm < outermost[:, None]) & (reach_mm > outermost[:, None] - RING_MM)
    return float((is_dark_gap & in_ring).any(axis=1)[outermost > 0].mean())


def brain_of(head: Volume, near_brain: Bool[np.ndarray, "x y z"]) -> Bool[np.ndarray, "x y z"]:
    """Returns the brain of a bias-corrected head: the largest piece of tissue within a template's brain laid over it.

    `near_brain` is that template's brain, a little widened. Thin bridges to skin and eyes are cut by an opening.
    """
    steps = max(1, round(2 / head.spacing_mm))
    tissue = near_brain & (head.values > 0.5 * np.median(head.values[near_brain & is_tissue(head)]))
    core = largest_piece(ndimage.binary_erosion(tissue, iterations=steps))
    grown = ndimage.binary_dilation(core, iterations=2 * steps, mask=near_brain)
    closed = ndimage.binary_closing(np.pad(grown, 8), iterations=3 * steps)[8:-8, 8:-8, 8:-8]
    return ndimage.binary_fill_holes(closed) & near_brain


def solid(brain: Volume) -> Bool[np.ndarray, "x y z"]:
    """Returns the inside of a brain without skull: what is not background, and the holes in it."""
    steps = max(1, round(4 / brain.spacing_mm))
    piece = largest_piece(brain.values > 0.1 * _bright(brain))
    closed = ndimage.binary_closing(np.pad(piece, 2 * steps), iterations=steps)
    return ndimage.binary_fill_holes(closed)[(slice(2 * steps, -2 * steps),) * 3]


def largest_piece(selected: Bool[np.ndarray, "x y z"]) -> Bool[np.ndarray, "x y z"]:
    """Returns the largest connected piece."""
    labels, num_pieces = ndimage.label(selected)
    if num_pieces == 0:
        return selected
    return labels == 1 + np.bincount(labels.ravel())[1:].argmax()


def _bright(image: Volume) -> float:
    return float(np.percentile(image.values[image.values > 0.02 * image.values.max()], 98))
