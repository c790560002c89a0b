"""How a head moved during a BOLD run: one rigid pose a frame, by least squares against the middle frame.

Promise: the same run gives the same bits. Smoothing and sampling distance follow SPM's realignment; the solver is the
inverse compositional Gauss-Newton of Baker & Matthews (2004), whose normal matrix is made once a run. All millimetres
are RAS+ of the scan. Knows no template.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Float64
from scipy import ndimage
from scipy.spatial.transform import Rotation

from brain_models.errors import ScanError
from brain_models.nifti import ScanHeader, stream_frames
from brain_models.resample import FWHM_PER_SIGMA
from brain_models.transform import apply_matrix

SMOOTHING_FWHM_MM = 5.0  # SPM's spm_realign, as is the distance between sampled points
SAMPLE_SPACING_MM = 4.0
IS_HEAD = 0.2  # of the reference's 98th percentile: points brighter than this are compared
CONVERGED_MM = 1e-3
MAX_ITERATIONS = 50
HEAD_RADIUS_MM = 50.0  # Power et al. 2012
FRAMES_IN_MEAN = 50


@dataclass(frozen=True)
class Motion:
    """Rigid poses of a run: a point p of the middle frame lies at `matrices[t] @ p` in frame t."""

    matrices: Float64[np.ndarray, "time 4 4"]
    framewise_displacement_mm: Float32[np.ndarray, "time"]  # NaN first
    centre_mm: Float64[np.ndarray, "3"]  # of the head: what rotations are about
    correlation: Float32[np.ndarray, "time"]  # of each aligned frame with the reference, over the compared points
    mean_image: Float32[np.ndarray, "x y z"]  # of up to 50 aligned frames, on the scan's grid


def estimate_motion(header: ScanHeader) -> Motion:
    """Returns the poses of a run. ScanError when the reference frame shows nothing to align."""
    middle = header.num_frames // 2
    reference = _Reference(header, _finite(next(itertools.islice(_rows(header), middle, None)), header))
    matrices = np.empty((header.num_frames, 4, 4))
    correlation = np.empty(header.num_frames, dtype=np.float32)
    in_mean = set(np.linspace(0, header.num_frames - 1, FRAMES_IN_MEAN).astype(int).tolist())
    mean_image = np.zeros(header.shape)
    pose = np.eye(4)
    for frame, row in enumerate(_rows(header)):
        image = _finite(row, header)
        pose, correlation[frame] = reference.pose_in(image, start=pose)
        matrices[frame] = pose
        if frame in in_mean:
            mean_image += _moved_back(image, pose, header.affine) / len(in_mean)
    displacement_mm = framewise_displacement(matrices, reference.centre_mm)
    return Motion(matrices, displacement_mm, reference.centre_mm, correlation, mean_image.astype(np.float32))


def framewise_displacement(
    matrices: Float64[np.ndarray, "time 4 4"], centre_mm: Float64[np.ndarray, "3"]
) -> Float32[np.ndarray, "time"]:
    """Returns, per frame, the sum of absolute changes of three translations and of three rotations as arcs on a sphere
    of 50 mm about `centre_mm`, in mm; NaN first (Power et al. 2012)."""
    translations_mm = matrices[:, :3, :3] @ centre_mm + matrices[:, :3, 3] - centre_mm
    arcs_mm = HEAD_RADIUS_MM * np.unwrap(Rotation.from_matrix(matrices[:, :3, :3]).as_euler("xyz"), axis=0)
    parameters = np.concatenate([translations_mm, arcs_mm], axis=1)
    change = np.abs(np.diff(parameters, axis=0)).sum(axis=1)
    return np.concatenate([[np.nan], change]).astype(np.float32)


class _Reference:
    """The middle frame, sampled at points of the head, and how its values change with a small motion."""

    def __init__(self, header: ScanHeader, image: np.ndarray) -> None:
        self.header = header
        self.spacing_mm = np.linalg.norm(header.affine[:3, :3], axis=0)
        self.to_index = np.linalg.inv(header.affine)
        smooth = self._smooth(image)
        steps = np.maximum(1, np.rint(SAMPLE_SPACING_MM / self.spacing_mm)).astype(int)
        is_sampled = np.zeros(header.shape, dtype=bool)
        is_sampled[tuple(slice(None, None, step) for step in steps)] = True
        indices = np.argwhere(is_sampled & (smooth > IS_HEAD * np.percentile(smooth, 98)))
        self.points_mm = apply_matrix(header.affine, indices.astype(np.float64))
        self.values = smooth[tuple(indices.T)].astype(np.float64)
        if len(indices) < 100 or np.ptp(self.values) == 0:
            raise ScanError(
                f"{header.path}: its middle frame shows no head ({len(indices)} points); this is no BOLD run"
            )
        self.centre_mm = self.points_mm.mean(axis=0)
        self.design = self._changes(smooth, indices)
        self.solve = np.linalg.pinv(self.design.T @ self.design) @ self.design.T

    def pose_in(self, image: np.ndarray, *, start: np.ndarray) -> tuple[np.ndarray, float]:
        """Returns the pose of the head in `image`, and the correlation with the reference there."""
        smooth = ndimage.spline_filter(self._smooth(image), order=3, output=np.float32, mode="nearest")
        pose = start
        for _ in range(MAX_ITERATIONS):
            values, is_inside = self._sample(smooth, pose)
            gain = values[is_inside] @ self.values[is_inside] / (values[is_inside] @ values[is_inside])
            step = self.solve @ np.where(is_inside, gain * values - self.values, 0)
            if not np.isfinite(step).all():
                raise ScanError(f"{self.header.path}: the head was lost between frames; check the run, or drop it")
            pose = pose @ np.linalg.inv(self._small_motion(step))
            if np.abs(step[:3]).sum() + HEAD_RADIUS_MM * np.abs(step[3:]).sum() < CONVERGED_MM:
                break
        values, is_inside = self._sample(smooth, pose)
        return pose, float(np.corrcoef(values[is_inside], self.values[is_inside])[0, 1])

    def _smooth(self, image: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(image, SMOOTHING_FWHM_MM / FWHM_PER_SIGMA / self.spacing_mm, mode="nearest")

    def _sample(self, smooth: np.ndarray, pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        coordinates = apply_matrix(self.to_index @ pose, self.points_mm)
        is_inside = np.all((coordinates >= 0) & (coordinates <= np.array(smooth.shape) - 1), axis=1)
        return ndimage.map_coordinates(smooth, coordinates.T, order=3, prefilter=False, mode="nearest"), is_inside

    def _changes(self, smooth: np.ndarray, indices: np.ndarray) -> Float[np.ndarray, "point parameter"]:
        """Returns the change of the values by a mm along, and a radian about, each axis through the centre."""
        by_index = np.stack([slope[tuple(indices.T)] for slope in np.gradient(smooth.astype(np.float64))], axis=1)
        by_mm = by_index @ self.to_index[:3, :3]
        return np.concatenate([by_mm, np.cross(self.points_mm - self.centre_mm, by_mm)], axis=1)

    def _small_motion(self, parameters: np.ndarray) -> np.ndarray:
        """Returns the rotation vector about the centre, then the translation, as a matrix."""
        matrix = np.eye(4)
        matrix[:3, :3] = Rotation.from_rotvec(parameters[3:]).as_matrix()
        matrix[:3, 3] = parameters[:3] + self.centre_mm - matrix[:3, :3] @ self.centre_mm
        return matrix


def _moved_back(image: np.ndarray, pose: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Returns the image as it would be with the head at the reference; edge values where the field of view ends."""
    by_index = np.linalg.inv(affine) @ pose @ affine
    return ndimage.affine_transform(image, by_index[:3, :3], by_index[:3, 3], order=1, mode="nearest")


def _rows(header: ScanHeader) -> Iterator[np.ndarray]:
    """Yields the run's frames [source voxel], each valid until the next."""
    return (row for block in stream_frames(header) for row in block)


def _finite(row: np.ndarray, header: ScanHeader) -> np.ndarray:
    return np.nan_to_num(row, nan=0.0, posinf=0.0, neginf=0.0).reshape(header.shape, order="F")
