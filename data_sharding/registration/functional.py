"""A raw BOLD run -> its transform to the template, through the T1 of the same subject."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from brain_models.nifti import read_header
from brain_models.transform import Record, Transform, apply_matrix
from data_sharding.registration.ants_calls import Stage, align, require_ants
from data_sharding.registration.config import RegistrationConfig
from data_sharding.registration.matching import (
    COARSE_MM,
    Matrix,
    best_start,
    correlation_ratio,
    posed,
    poses,
    require_similarity,
    versioned,
    widened,
)
from data_sharding.registration.motion import estimate_motion
from data_sharding.registration.skull import centre_mm
from data_sharding.registration.template import MARGIN_MM, bias_corrected, brain_on, template_of
from data_sharding.registration.volumes import Volume, on_upright_grid, read_volume, require_orientation

FROM_ANY_START = [Stage("Rigid", (200, 100), (2, 1), (1, 0))]
REFINE = [Stage("Rigid", (100, 50), (2, 1), (1, 0))]
STARTS_TURN_DEG, STARTS_SHIFT_MM = 8.0, 8.0  # within a session the scanner's coordinates nearly agree
SURROUNDINGS_MM = 12.0  # air and bone are dark in BOLD: without them a shift of 8 mm scored higher than none


def register_bold(
    path: Path | str, *, t1: Path | str, t1_transform: Transform, config: RegistrationConfig
) -> Transform:
    """Returns the transform of a raw BOLD run: motion, mean BOLD -> T1 (rigid), then the T1's transform.

    Susceptibility distortion is not corrected. Raises RegistrationError (a ScanError): similarity below the gate, field
    of view beside the brain, antspyx missing.
    """
    require_ants()
    header = read_header(path, "bold")
    require_orientation(header)
    motion = estimate_motion(header)
    mean = bias_corrected(on_upright_grid(motion.mean_image, header.affine, spacing_mm=config.spacing_mm))
    anatomy = read_volume(t1, spacing_mm=config.spacing_mm)
    in_brain = brain_on(anatomy, t1_transform, template_of(config))
    t1_to_bold, reached, similarities = _to_bold(anatomy, mean, in_brain, config)
    measure = f"correlation ratio with {t1}"
    require_similarity(reached, config.min_bold_similarity, path=path, limit="min_bold_similarity", measure=measure)
    record: Record = {
        "similarity": reached,
        "similarity_of_starts": similarities,
        "t1_similarity": t1_transform.record["similarity"],
        "min_correlation_of_frames": float(motion.correlation.min()),
    }
    return replace(
        t1_transform,
        scan_to_template=t1_transform.scan_to_template @ np.linalg.inv(t1_to_bold),
        motion=motion.matrices,
        framewise_displacement_mm=motion.framewise_displacement_mm,
        record=record | versioned(config),
    )


def _to_bold(
    anatomy: Volume, mean: Volume, in_brain: np.ndarray, config: RegistrationConfig
) -> tuple[Matrix, float, list[float]]:
    """Returns the rigid matrix from the T1's mm to the BOLD's, the similarity there, and what every start reached.

    Starts trust the scanner's coordinates and lay centre on centre by turns: the T1 may be of another session.
    """
    coarse, coarse_mean = anatomy.coarser(COARSE_MM), mean.coarser(COARSE_MM)
    in_coarse_brain = anatomy.with_values(in_brain).coarser(COARSE_MM).values > 0.5
    around = widened(in_coarse_brain, coarse, SURROUNDINGS_MM)
    around_mm, brain = coarse.points_mm(around), np.where(in_coarse_brain, coarse.values, 0)[around]

    def similarity(matrix: Matrix) -> float:
        return correlation_ratio(brain, coarse_mean, apply_matrix(matrix, around_mm))

    brain_mm = coarse.points_mm(in_coarse_brain).mean(axis=0)
    turned = poses(config.num_starts, config.seed, turn_deg=STARTS_TURN_DEG, shift_mm=STARTS_SHIFT_MM)
    starts = [posed(brain_mm, target, turned[0]) for target in (brain_mm, centre_mm(mean))]
    starts += [posed(brain_mm, (brain_mm, centre_mm(mean))[number % 2], pose) for number, pose in enumerate(turned[1:])]
    matrix, similarities = best_start(
        coarse,
        coarse_mean,
        FROM_ANY_START,
        starts=starts,
        compared=widened(in_coarse_brain, coarse, MARGIN_MM),
        similarity=similarity,
        seed=config.seed,
    )
    if matrix is None:
        return np.eye(4), 0.0, similarities
    compared = widened(in_brain, anatomy, MARGIN_MM)
    matrix = align(anatomy, mean, REFINE, start=matrix, compared=compared, seed=config.seed)
    return matrix, similarity(matrix), similarities
