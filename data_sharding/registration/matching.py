"""How well two images agree at given points, and which of several starts leads to the best agreement.

Promise: similarities are pure functions measured at 4 mm, so that a gate means the same at any spacing.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float64
from scipy import ndimage
from scipy.spatial.transform import Rotation

from brain_models.transform import Record
from data_sharding.registration.ants_calls import RegistrationError, Stage, align
from data_sharding.registration.config import RegistrationConfig
from data_sharding.registration.volumes import Volume

COARSE_MM = 4.0
MIN_SEEN = 0.3  # of the compared points must lie in the field of view
NUM_BINS = 32

Matrix = Float64[np.ndarray, "4 4"]


def best_start(
    fixed: Volume,
    moving: Volume,
    stages: list[Stage],
    *,
    starts: list[Matrix],
    compared: Bool[np.ndarray, "x y z"],
    similarity: Callable[[Matrix], float],
    seed: int,
) -> tuple[Matrix | None, list[float]]:
    """Returns the matrix that reached the highest similarity (None: no start overlaps), and every similarity."""
    aligned: list[tuple[float, Matrix]] = []
    for start in starts:
        try:
            matrix = align(fixed, moving, stages, start=start, compared=compared, seed=seed)
        except RegistrationError:  # this start left the field of view; another may not
            continue
        aligned.append((similarity(matrix), matrix))
    best = max(aligned, key=lambda pair: pair[0])[1] if aligned else None
    return best, [reached for reached, _ in aligned]


def poses(num_poses: int, seed: int, *, turn_deg: float, shift_mm: float) -> list[Float64[np.ndarray, "6"]]:
    """Returns turns about x, y, z in degrees and shifts in mm, uniform up to the given size; the first is none."""
    draws = np.random.default_rng(seed).uniform(-1, 1, size=(num_poses, 6))
    draws[0] = 0
    return list(draws * np.array([turn_deg] * 3 + [shift_mm] * 3))


def posed(from_mm: Float64[np.ndarray, "3"], to_mm: Float64[np.ndarray, "3"], pose: np.ndarray) -> Matrix:
    """Returns the matrix that lays one centre on the other, turned about it and shifted by a pose."""
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", pose[:3], degrees=True).as_matrix()
    matrix[:3, 3] = to_mm + pose[3:] - matrix[:3, :3] @ from_mm
    return matrix


def widened(selected: Bool[np.ndarray, "x y z"], grid: Volume, margin_mm: float) -> Bool[np.ndarray, "x y z"]:
    """Returns the selected voxels and those within the margin."""
    return ndimage.binary_dilation(selected, iterations=max(1, round(margin_mm / grid.spacing_mm)))


def correlation(
    values: Float64[np.ndarray, "point"], image: Volume, points_mm: Float64[np.ndarray, "point 3"]
) -> float:
    """Returns the correlation of values with an image at their points; 0 outside it, so a cut brain scores lower."""
    sampled = image.sample(points_mm)
    return float(np.corrcoef(values, sampled)[0, 1]) if np.ptp(sampled) > 0 else 0.0


def correlation_ratio(
    values: Float64[np.ndarray, "point"], image: Volume, points_mm: Float64[np.ndarray, "point 3"]
) -> float:
    """Returns how much of an image a function of `values` explains, 0-1 (Roche et al. 1998): for other contrasts.

    Places outside the field of view do not count; 0 where they are more than 70 %.
    """
    upper_mm = image.origin_mm + image.spacing_mm * (np.array(image.values.shape) - 1)
    is_seen = np.all((points_mm >= image.origin_mm) & (points_mm <= upper_mm), axis=1)
    if is_seen.mean() < MIN_SEEN:
        return 0.0
    values, sampled = values[is_seen], image.sample(points_mm[is_seen]).astype(np.float64)
    edges = np.unique(np.quantile(values, np.linspace(0, 1, NUM_BINS + 1)[1:-1]))
    bins = np.searchsorted(edges, values)
    counts = np.bincount(bins)
    means = np.bincount(bins, weights=sampled) / np.maximum(counts, 1)
    total = ((sampled - sampled.mean()) ** 2).sum()
    explained = (counts * (means - sampled.mean()) ** 2).sum()
    return float(np.sqrt(explained / total)) if total > 0 else 0.0


def require_similarity(reached: float, lowest: float, *, path: Path | str, limit: str, measure: str) -> None:
    """RegistrationError where a scan did not reach its gate."""
    if not reached >= lowest:
        raise RegistrationError(
            f"{path}: its best alignment reached similarity {reached:.3f} ({measure}), below registration.{limit}="
            f"{lowest}; look at the scan (orientation, field of view, contents), then drop it or lower the limit"
        )


def versioned(config: RegistrationConfig) -> Record:
    """Returns the part of a transform's record that states the registration's settings and version."""
    return {
        "template_file": config.template,
        "spacing_mm": config.spacing_mm,
        "seed": config.seed,
        "antspyx": importlib.metadata.version("antspyx"),
    }
