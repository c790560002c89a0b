"""The template's brain, and brains cut out of whole heads by laying it over them.

Whether an image shows a whole head or only a brain, and where the brain is, are pure functions of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from jaxtyping import Bool
from scipy import ndimage

from brain_models.transform import Transform, apply_matrix
from data_sharding.registration.ants_calls import RegistrationError, Stage, bias_field
from data_sharding.registration.config import PACKAGED, RegistrationConfig
from data_sharding.registration.matching import COARSE_MM, Matrix, best_start, correlation, posed, poses, widened
from data_sharding.registration.volumes import Volume, on_upright_grid, read_volume

MARGIN_MM = 6.0  # the rim of the brain is compared too: it holds the size
STARTS_TURN_DEG, STARTS_SHIFT_MM = 25.0, 15.0
FROM_ANY_START = [
    Stage("Rigid", (100, 100), (3, 2), (2, 1)),
    Stage("Similarity", (100, 100), (3, 2), (2, 1)),
    Stage("Affine", (200, 200), (2, 1), (1, 0)),
]

SkullState = Literal["head", "brain"]

IS_TISSUE = 0.2  # of the 98th percentile of what is not background
HEAD_ABOVE_LITRES = 2.4  # filled volume: four heads had 3.5-4.3, four brains 1.2-1.9
HEAD_ABOVE_GAPS = 0.3  # share of directions with a dark ring: heads 0.68-0.96, brains 0-0.02, averaged heads 0.06-0.12
TOP_MM = 150.0  # below the crown lies the neck
RING_MM = 25.0  # scalp and skull lie this near to the surface
GAP_MM = 3
NUM_RAYS = 600


@dataclass(frozen=True, eq=False)
class Template:
    """A template's brain without its skull, at the fine and the coarse spacing."""

    image: Volume
    in_brain: Bool[np.ndarray, "x y z"]
    coarse: Volume
    in_coarse_brain: Bool[np.ndarray, "x y z"]
    skull: SkullState  # as the file had it


def template_of(config: RegistrationConfig) -> Template:
    """Returns the template, kept for the process. One with a skull is stripped by laying the packaged brain over it."""
    return _template(config.template, config.spacing_mm, config.num_starts, config.seed)


@lru_cache(maxsize=4)
def _template(file: str, spacing_mm: float, num_starts: int, seed: int) -> Template:
    if file == PACKAGED:
        from nilearn.datasets import load_mni152_template

        packaged = load_mni152_template(resolution=1)
        image = on_upright_grid(np.asarray(packaged.dataobj), packaged.affine, spacing_mm=spacing_mm)
    else:
        image = read_volume(file, spacing_mm=spacing_mm)
    skull = skull_state(image)
    if skull == "head":
        packaged_brain = _template(PACKAGED, spacing_mm, num_starts, seed)
        to_head, _ = laid_over(packaged_brain, image, num_starts=num_starts, seed=seed)
        if to_head is None:
            raise RegistrationError(f"{file}: shows no head to strip; give a T1 template of a head or a brain")
        image = stripped(image, packaged_brain, to_head)
    coarse = image.coarser(COARSE_MM)
    return Template(image, solid(image), coarse, solid(coarse), skull)


def laid_over(template: Template, scan: Volume, *, num_starts: int, seed: int) -> tuple[Matrix | None, list[float]]:
    """Returns the best coarse affine from the template's mm to the scan's, and what every start reached.

    The scan may be a whole head: only points in and around the template's brain are compared.
    """
    coarse = scan.coarser(COARSE_MM)
    brain_mm = template.coarse.points_mm(template.in_coarse_brain)
    brain = template.coarse.values[template.in_coarse_brain]
    from_mm, to_mm = brain_mm.mean(axis=0), centre_mm(scan)
    turned = poses(num_starts, seed, turn_deg=STARTS_TURN_DEG, shift_mm=STARTS_SHIFT_MM)
    return best_start(
        template.coarse,
        coarse,
        FROM_ANY_START,
        starts=[posed(from_mm, to_mm, pose) for pose in turned],
        compared=widened(template.in_coarse_brain, template.coarse, MARGIN_MM),
        similarity=lambda matrix: correlation(brain, coarse, apply_matrix(matrix, brain_mm)),
        seed=seed,
    )


def stripped(head: Volume, template: Template, to_head: Matrix) -> Volume:
    """Returns a bias-corrected head with everything but its brain set to 0."""
    over = template.image.with_values(template.in_brain).through(np.linalg.inv(to_head), head).values > 0.5
    return head.with_values(np.where(brain_of(head, widened(over, head, MARGIN_MM)), head.values, 0))


def bias_corrected(image: Volume) -> Volume:
    """Returns the image divided by its slow change of brightness, which is estimated at 4 mm."""
    coarse = image.coarser(COARSE_MM)
    field = bias_field(coarse, is_tissue(coarse))
    everywhere = np.ones(image.values.shape, dtype=bool)
    slow = np.maximum(field.sample(image.points_mm(everywhere)), 0.1).reshape(image.values.shape)
    return image.with_values(image.values / slow)


def brain_on(anatomy: Volume, transform: Transform, template: Template) -> Bool[np.ndarray, "x y z"]:
    """Returns where the template's brain lies on a grid of the scan."""
    scan_mm = transform.to_scan_mm(template.image.points_mm(template.in_brain))
    indices = np.rint((scan_mm - anatomy.origin_mm) / anatomy.spacing_mm).astype(int)
    indices = indices[np.all((indices >= 0) & (indices < anatomy.values.shape), axis=1)]
    hit = np.zeros(anatomy.values.shape, dtype=bool)
    hit[tuple(indices.T)] = True
    return ndimage.binary_closing(hit, iterations=max(2, round(4 / anatomy.spacing_mm)))


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
