"""The template's brain, and brains cut out of whole heads by laying it over them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Bool
from scipy import ndimage

from brain_models.transform import Transform, apply_matrix
from data_sharding.registration.ants_calls import RegistrationError, Stage, bias_field
from data_sharding.registration.config import PACKAGED, RegistrationConfig
from data_sharding.registration.matching import COARSE_MM, Matrix, best_start, correlation, posed, poses, widened
from data_sharding.registration.skull import SkullState, brain_of, centre_mm, is_tissue, skull_state, solid
from data_sharding.registration.volumes import Volume, on_upright_grid, read_volume

MARGIN_MM = 6.0  # the rim of the brain is compared too: it holds the size
STARTS_TURN_DEG, STARTS_SHIFT_MM = 25.0, 15.0
FROM_ANY_START = [
    Stage("Rigid", (100, 100), (3, 2), (2, 1)),
    Stage("Similarity", (100, 100), (3, 2), (2, 1)),
    Stage("Affine", (200, 200), (2, 1), (1, 0)),
]


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
