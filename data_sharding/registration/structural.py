"""A raw T1w scan, whole head or brain -> its transform to the template."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from brain_models.transform import Record, Transform
from data_sharding.registration.ants_calls import RegistrationError, Stage, align, deform, require_ants
from data_sharding.registration.config import RegistrationConfig
from data_sharding.registration.matching import COARSE_MM, Matrix, correlation, require_similarity, versioned, widened
from data_sharding.registration.skull import skull_state
from data_sharding.registration.template import MARGIN_MM, bias_corrected, laid_over, stripped, template_of
from data_sharding.registration.volumes import Volume, read_volume

REFINE = [Stage("Affine", (100, 50), (2, 1), (1, 0))]
VOLUME_RATIO = (0.3, 2.0)  # of the brains of scan and template; adults against MNI152 lie at 0.6-1.0


@dataclass(frozen=True, eq=False)
class AlignedT1:
    """A T1's transform, and its brain without skull on an upright grid of the scan."""

    transform: Transform
    brain: Volume


def register_t1(path: Path | str, config: RegistrationConfig) -> Transform:
    """Returns the transform of a raw T1w scan.

    Raises RegistrationError (a ScanError): similarity below the gate, implausible size, antspyx missing.
    """
    return align_t1(path, config).transform


def align_t1(path: Path | str, config: RegistrationConfig) -> AlignedT1:
    """Returns what `register_t1` does, and the brain it compared."""
    require_ants()
    template = template_of(config)
    whole = read_volume(path, spacing_mm=config.spacing_mm)
    if not (whole.values > 0).any():
        raise RegistrationError(f"{path}: no voxel is above 0; this is not a T1 image")
    skull, even = skull_state(whole), bias_corrected(whole)
    to_scan, similarities = laid_over(template, even, num_starts=config.num_starts, seed=config.seed)
    if to_scan is None:
        raise RegistrationError(f"{path}: no start of {config.num_starts} overlaps the template; look at the scan")
    brain = even if skull == "brain" else stripped(even, template, to_scan)
    compared = widened(template.in_brain, template.image, MARGIN_MM)
    to_scan = align(template.image, brain, REFINE, start=to_scan, compared=compared, seed=config.seed)
    require_plausible_size(to_scan, path)
    field = grid = None
    if config.kind == "nonlinear":
        field, grid = deform(template.image, brain, start=to_scan, compared=compared, seed=config.seed)
        field = field.astype(np.float16)  # steps of 0.004 mm up to 8 mm, 0.016 mm beyond
    transform = Transform(config.kind, config.template_name, np.linalg.inv(to_scan), field, grid, None, None, {})
    brain_mm = template.coarse.points_mm(template.in_coarse_brain)
    reached = correlation(
        template.coarse.values[template.in_coarse_brain], brain.coarser(COARSE_MM), transform.to_scan_mm(brain_mm)
    )
    measure = f"correlation with template {config.template_name}"
    require_similarity(reached, config.min_similarity, path=path, limit="min_similarity", measure=measure)
    record: Record = {"similarity": reached, "similarity_of_starts": similarities}
    record |= {"skull_of_scan": skull, "skull_of_template": template.skull} | versioned(config)
    return AlignedT1(replace(transform, record=record), brain)


def require_plausible_size(to_scan: Matrix, path: Path | str) -> None:
    """RegistrationError where the brain that a matrix finds in a scan is smaller or larger than brains are."""
    ratio = float(np.linalg.det(to_scan[:3, :3]))
    lowest, highest = VOLUME_RATIO
    if not lowest < ratio < highest:
        raise RegistrationError(
            f"{path}: its brain came out at {ratio:.2f} of the template's volume, outside {lowest}-{highest}; "
            "look at its voxel sizes and contents, then drop it"
        )
