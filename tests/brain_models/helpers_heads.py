"""Heads with a known place: the template nilearn ships, a marker on its right, bone and skin around it, and scans of
them."""

from __future__ import annotations

import nibabel
import numpy as np
from nilearn.datasets import load_mni152_template
from scipy import ndimage

from brain_models.transform import apply_matrix
from data_sharding.registration.template import solid
from data_sharding.registration.volumes import Volume, on_upright_grid
from tests.scans import grid_positions_mm

SCAN_TO_TEMPLATE = nibabel.affines.from_matvec(
    nibabel.eulerangles.euler2mat(0.1, 0.05, -0.2) @ np.diag([1.12, 1.05, 1.08]), [9.0, -25.0, 14.0]
)
T1_AFFINE = nibabel.affines.from_matvec(
    nibabel.eulerangles.euler2mat(0.05, 0.02, 0.1) @ np.diag([-4.0, 4.0, 4.0]), [95.0, -105.0, -95.0]
)
T1_SHAPE = (48, 58, 54)
BOLD_AFFINE = np.array([[5.0, 0, 0, -92], [0, 5.0, 0, -100], [0, 0, 5.5, -75], [0, 0, 0, 1]])
BOLD_SHAPE = (36, 42, 26)
MARKER_MM = np.array([40.0, -15.0, 20.0])  # right of the midline


def marked_brain() -> Volume:
    """The template with a bright marker on the right: without it a flip could not be seen."""
    packaged = load_mni152_template(resolution=1)
    image = on_upright_grid(np.asarray(packaged.dataobj), packaged.affine, spacing_mm=4.0)
    everywhere = np.ones(image.values.shape, dtype=bool)
    distance_mm = np.linalg.norm(image.points_mm(everywhere) - MARKER_MM, axis=1).reshape(image.values.shape)
    return image.with_values(image.values * (1 + np.exp(-0.5 * (distance_mm / 8) ** 2)))


def head_around(brain: Volume) -> Volume:
    """The brain with dark bone around it, and bright skin around that."""
    padded = Volume(np.pad(brain.values, 8), brain.origin_mm - 32, 4.0)
    depth = ndimage.distance_transform_edt(~np.pad(solid(brain), 8)) * 4.0
    skin = np.where((depth > 8) & (depth <= 16), 0.6 * brain.values.max(), 0)
    return padded.with_values(padded.values + skin)


def scanned(image: Volume, affine: np.ndarray, shape: tuple[int, int, int], to_template: np.ndarray) -> np.ndarray:
    """What a scanner with this grid sees of a head in template space."""
    points_mm = apply_matrix(to_template, grid_positions_mm(affine, shape).reshape(-1, 3))
    return image.sample(points_mm).reshape(shape) * 800


def bold_frames(brain: Volume, bold_to_template: np.ndarray, motion: np.ndarray) -> np.ndarray:
    """[x, y, z, time]: the brain in another contrast, moved by every pose, with noise."""
    t2_like = brain.with_values(solid(brain) * (1.4 * brain.values.max() - brain.values))
    zoomed = ndimage.zoom(t2_like.values, 2, order=1, grid_mode=True, mode="grid-constant")
    fine = Volume(ndimage.gaussian_filter(zoomed, 5 / 2.35 / 2), brain.origin_mm - 1, 2.0)  # a voxel averages over 5 mm
    frames = [
        scanned(fine, BOLD_AFFINE, BOLD_SHAPE, bold_to_template @ np.linalg.inv(pose)) * (1 + 0.01 * frame)
        for frame, pose in enumerate(motion)
    ]
    noise = np.random.default_rng(0).normal(scale=5, size=(*BOLD_SHAPE, len(motion)))
    return np.stack(frames, axis=-1) + noise
