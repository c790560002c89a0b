"""A raw scan with its transform packs to what the aligned scan packs to, frame by frame, and a transform keeps."""

from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest

from brain_models.errors import ScanError
from brain_models.nifti import read_header
from brain_models.preprocess import pack_bold, pack_t1
from brain_models.resample import FrameResampler, Resampler
from brain_models.space import BrainSpace, space_from_mask
from brain_models.transform import Transform, apply_matrix
from tests.scans import GRID_AFFINE, GRID_SHAPE, MARKER_MM, bold_values, grid_positions_mm, save_scan

RAW_AFFINE = nibabel.affines.from_matvec(
    nibabel.eulerangles.euler2mat(0.12, -0.08, 0.15) @ np.diag([9.0, 9.0, 11.0]), [-140.0, -150.0, -120.0]
)
RAW_SHAPE = (34, 36, 26)
SCAN_TO_TEMPLATE = nibabel.affines.from_matvec(
    nibabel.eulerangles.euler2mat(-0.1, 0.2, 0.05) @ np.diag([1.1, 0.95, 1.05]), [7.0, -11.0, 4.0]
)


@pytest.fixture(scope="module")
def space() -> BrainSpace:
    in_brain = np.zeros(GRID_SHAPE, dtype=bool)
    in_brain[4:12, 4:14, 4:12] = True
    return space_from_mask(in_brain, GRID_AFFINE, name="box", template="2009aSym")


@pytest.fixture(scope="module")
def field() -> tuple[np.ndarray, np.ndarray]:
    """A displacement linear in space, which trilinear sampling gives back exactly (whole sixteenths: float16)."""
    positions_mm = grid_positions_mm(GRID_AFFINE, GRID_SHAPE)
    return (np.rint(positions_mm[..., [1, 2, 0]] * 4) / 64).astype(np.float16), GRID_AFFINE


@pytest.fixture(scope="module")
def transform(field: tuple[np.ndarray, np.ndarray]) -> Transform:
    return Transform("nonlinear", "2009aSym", SCAN_TO_TEMPLATE, *field, None, None, {"similarity": 0.9})


def moved(num_frames: int) -> np.ndarray:
    """A few mm and degrees about the origin, another pose in each frame."""
    poses = np.random.default_rng(1).uniform(-1, 1, size=(num_frames, 6))
    matrices = [
        nibabel.affines.from_matvec(nibabel.eulerangles.euler2mat(*(0.05 * pose[3:])), 4 * pose[:3]) for pose in poses
    ]
    return np.stack(matrices)


def raw_run(transform: Transform, motion: np.ndarray) -> np.ndarray:
    """What the scanner sees of a head whose template would be `bold_values`: linear in space, so sampling is exact."""
    assert transform.displacement_mm is None
    scan_mm = grid_positions_mm(RAW_AFFINE, RAW_SHAPE).reshape(-1, 3)
    frames = []
    for frame, pose in enumerate(motion):
        template_mm = apply_matrix(transform.scan_to_template @ np.linalg.inv(pose), scan_mm)
        frames.append(bold_values(template_mm, len(motion))[:, frame])
    return np.stack(frames, axis=-1).reshape(*RAW_SHAPE, len(motion))


def test_a_raw_run_packs_to_what_the_aligned_run_packs_to_every_frame_at_its_own_pose(
    space: BrainSpace, transform: Transform, tmp_path: Path
) -> None:
    motion = moved(12)
    affine_only = replace(transform, displacement_mm=None, displacement_affine=None, motion=motion)
    raw = save_scan(tmp_path / "raw.nii.gz", raw_run(affine_only, motion), RAW_AFFINE, dtype="float64")
    packed = pack_bold(raw, space, brain_mask=None, transform=affine_only)
    assert packed.is_measured.all()
    expected = bold_values(space.positions_mm.astype(np.float64)).T
    np.testing.assert_allclose(packed.values, expected, atol=0.05)
    still = pack_bold(raw, space, brain_mask=None, transform=replace(affine_only, motion=None))
    assert np.abs(still.values - expected).max() > 3  # the motion was worth correcting


def test_the_displacement_is_added_on_the_template_before_the_matrix(
    space: BrainSpace, transform: Transform, field: tuple[np.ndarray, np.ndarray]
) -> None:
    template_mm = space.positions_mm.astype(np.float64)
    displaced_mm = template_mm + field[0][tuple(space.voxel_indices.T)]
    expected = apply_matrix(np.linalg.inv(SCAN_TO_TEMPLATE), displaced_mm)
    np.testing.assert_allclose(transform.to_scan_mm(template_mm), expected, atol=1e-4)


def test_a_marker_on_the_right_of_a_raw_scan_stays_right_of_the_midline(
    space: BrainSpace, transform: Transform, tmp_path: Path
) -> None:
    marker_scan_mm = transform.to_scan_mm(np.array([MARKER_MM]))
    distance_mm = np.linalg.norm(grid_positions_mm(RAW_AFFINE, RAW_SHAPE) - marker_scan_mm[0], axis=-1)
    path = save_scan(tmp_path / "T1w.nii.gz", 100 * np.exp(-0.5 * (distance_mm / 15) ** 2), RAW_AFFINE)
    packed = pack_t1(path, space, brain_mask=None, transform=transform)
    brightest_mm = space.positions_mm[packed.values[0].argmax()]
    assert brightest_mm[0] > 0
    np.testing.assert_allclose(brightest_mm, MARKER_MM, atol=8)


@pytest.mark.parametrize("spacing_mm", [5.0, 12.0, 15.0])
def test_frame_by_frame_equals_the_matrix_also_at_the_edges(
    space: BrainSpace, spacing_mm: float, tmp_path: Path
) -> None:
    affine = np.diag([-spacing_mm, spacing_mm, spacing_mm, 1.0])
    affine[:3, 3] = [51, -40, -31]  # the field of view ends inside the space
    values = np.random.default_rng(0).normal(size=(90 // int(spacing_mm),) * 3) + 3
    header = read_header(save_scan(tmp_path / "T1w.nii.gz", values, affine), "t1w")
    row = values.astype(np.float32).reshape(1, -1, order="F")
    matrix, direct = Resampler(header.affine, header.shape, space), FrameResampler(header, space, None)
    np.testing.assert_array_equal(direct.is_covered, matrix.is_covered)
    assert 0 < matrix.is_covered.sum() < space.num_voxels
    by_voxel = [
        np.concatenate([held.block(piece) for piece in held.pieces])
        for held in (direct.hold([row], 1), matrix.hold([row], 1))
    ]
    np.testing.assert_allclose(by_voxel[0], by_voxel[1], atol=2e-5)


def test_what_leaves_the_field_of_view_in_one_frame_is_not_measured_in_any(space: BrainSpace, tmp_path: Path) -> None:
    motion = np.stack([np.eye(4)] * 3)
    motion[1, 2, 3] = 60.0  # the head went 60 mm up
    values = np.random.default_rng(0).normal(size=(*GRID_SHAPE, 3))
    path = save_scan(tmp_path / "bold.nii.gz", values[:, :, :13], GRID_AFFINE)
    transform = Transform("affine", "2009aSym", np.eye(4), None, None, motion, None, {})
    is_measured = pack_bold(path, space, brain_mask=None, transform=transform).is_measured
    np.testing.assert_array_equal(is_measured, space.voxel_indices[:, 2] + 5 <= 12)
    with pytest.raises(ScanError, match=r"bold\.nii\.gz has 3 frames, its stored transform has motion of 2; delete"):
        pack_bold(path, space, brain_mask=None, transform=replace(transform, motion=motion[:2]))


def test_a_stored_transform_keeps_every_number_and_packs_the_same_bytes(
    space: BrainSpace, transform: Transform, tmp_path: Path
) -> None:
    motion, displacement = moved(4), np.array([np.nan, 0.1, 0.2, 0.3], dtype=np.float32)
    whole = replace(transform, motion=motion, framewise_displacement_mm=displacement)
    whole.save(tmp_path / "first.npz")
    loaded = Transform.load(tmp_path / "first.npz")
    loaded.save(tmp_path / "second.npz")
    assert (tmp_path / "first.npz").read_bytes() == (tmp_path / "second.npz").read_bytes()
    assert loaded.record == {"similarity": 0.9}
    values = np.random.default_rng(0).normal(size=(*RAW_SHAPE, 4))
    path = save_scan(tmp_path / "bold.nii.gz", values, RAW_AFFINE)
    packed = [pack_bold(path, space, brain_mask=None, transform=each).values.tobytes() for each in (whole, loaded)]
    assert packed[0] == packed[1]
    whole_bytes = (tmp_path / "first.npz").read_bytes()
    for damaged in (b"", b"nothing", whole_bytes[: len(whole_bytes) // 2]):
        (tmp_path / "bad.npz").write_bytes(damaged)
        with pytest.raises(ScanError, match=r"bad\.npz is not a stored transform .* register the scan again"):
            Transform.load(tmp_path / "bad.npz")
