"""Raw scans -> their transforms to the template: a T1 by itself, a BOLD run through the T1 of its subject.

Also a group of both as files: their transforms, or the reasons why there are none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from brain_models.errors import ScanError
from brain_models.nifti import read_header
from brain_models.transform import Record, Transform, apply_matrix
from data_sharding.registration.ants_calls import RegistrationError, Stage, align, deform, require_ants
from data_sharding.registration.config import RegistrationConfig
from data_sharding.registration.matching import (
    COARSE_MM,
    Matrix,
    best_start,
    correlation,
    correlation_ratio,
    posed,
    poses,
    require_similarity,
    versioned,
    widened,
)
from data_sharding.registration.motion import estimate_motion
from data_sharding.registration.template import (
    MARGIN_MM,
    bias_corrected,
    brain_on,
    centre_mm,
    laid_over,
    skull_state,
    stripped,
    template_of,
)
from data_sharding.registration.volumes import Volume, on_upright_grid, read_volume, require_orientation

REFINE_AFFINE = [Stage("Affine", (100, 50), (2, 1), (1, 0))]
VOLUME_RATIO = (0.3, 2.0)  # of the brains of scan and template; adults against MNI152 lie at 0.6-1.0
FROM_SAME_SESSION = [Stage("Rigid", (200, 100), (2, 1), (1, 0))]
REFINE_RIGID = [Stage("Rigid", (100, 50), (2, 1), (1, 0))]
SESSION_TURN_DEG, SESSION_SHIFT_MM = 8.0, 8.0  # within a session the scanner's coordinates nearly agree
SURROUNDINGS_MM = 12.0  # air and bone are dark in BOLD: without them a shift of 8 mm scored higher than none


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
    to_scan = align(template.image, brain, REFINE_AFFINE, start=to_scan, compared=compared, seed=config.seed)
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
    turned = poses(config.num_starts, config.seed, turn_deg=SESSION_TURN_DEG, shift_mm=SESSION_SHIFT_MM)
    starts = [posed(brain_mm, target, turned[0]) for target in (brain_mm, centre_mm(mean))]
    starts += [posed(brain_mm, (brain_mm, centre_mm(mean))[number % 2], pose) for number, pose in enumerate(turned[1:])]
    matrix, similarities = best_start(
        coarse,
        coarse_mean,
        FROM_SAME_SESSION,
        starts=starts,
        compared=widened(in_coarse_brain, coarse, MARGIN_MM),
        similarity=similarity,
        seed=config.seed,
    )
    if matrix is None:
        return np.eye(4), 0.0, similarities
    compared = widened(in_brain, anatomy, MARGIN_MM)
    matrix = align(anatomy, mean, REFINE_RIGID, start=matrix, compared=compared, seed=config.seed)
    return matrix, similarity(matrix), similarities


@dataclass
class ScanGroup:
    """A T1 image and the runs that are registered through it."""

    t1_path: str
    t1_name: str  # of its transform; its scan_id where it is in the set itself
    runs: dict[str, str]  # scan_id -> path

    @property
    def names(self) -> list[str]:
        return [self.t1_name, *self.runs]


def register_group(group: ScanGroup, config: RegistrationConfig, folder: Path) -> dict[str, str]:
    """Returns the reasons of the scans that could not be registered; the others then have <name>.npz in `folder`.

    A transform that is in the folder already is kept. Without the T1's transform no run has one.
    """
    reasons: dict[str, str] = {}
    t1_file = folder / f"{group.t1_name}.npz"
    try:
        t1_transform = Transform.load(t1_file) if t1_file.exists() else register_t1(group.t1_path, config)
    except ScanError as error:
        return dict.fromkeys(group.names, str(error))
    _save(t1_transform, t1_file)
    for name, path in group.runs.items():
        if (folder / f"{name}.npz").exists():
            continue
        try:
            transform = register_bold(path, t1=group.t1_path, t1_transform=t1_transform, config=config)
        except ScanError as error:
            reasons[name] = str(error)
        else:
            _save(transform, folder / f"{name}.npz")
    return reasons


def _save(transform: Transform, path: Path) -> None:
    """A process that is killed while it saves leaves no half of a transform."""
    unfinished = path.with_name(f"unfinished-{path.name}")
    transform.save(unfinished)
    unfinished.rename(path)
