"""Raw heads moved by a known transform are brought back within a stated distance, and what is no head is refused.

The heads are made from the template nilearn ships: its brain, dark bone around it, bright skin around that.
"""

import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from brain_models.errors import ScanError
from brain_models.nifti import read_header
from brain_models.preprocess import pack_bold, pack_t1
from brain_models.space import BrainSpace, SpaceConfig, volume_space
from brain_models.transform import Transform, apply_matrix
from data_sharding.registration.ants_calls import RegistrationError
from data_sharding.registration.config import RegistrationConfig, validate_registration
from data_sharding.registration.motion import estimate_motion, framewise_displacement
from data_sharding.registration.register import register_bold, register_t1, require_plausible_size
from data_sharding.registration.template import skull_state, solid
from data_sharding.registration.volumes import Volume
from tests.brain_models.helpers_heads import (
    BOLD_AFFINE,
    MARKER_MM,
    SCAN_TO_TEMPLATE,
    T1_AFFINE,
    T1_SHAPE,
    bold_frames,
    head_around,
    marked_brain,
    scanned,
)
from tests.scans import grid_positions_mm, save_scan

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CONFIG = RegistrationConfig(
    kind="affine",
    template="mni152",
    template_name="2009aSym",
    spacing_mm=4.0,
    num_starts=2,
    seed=0,
    min_similarity=0.65,
    min_bold_similarity=0.7,
)

needs_ants = pytest.mark.usefixtures("ants")


@pytest.fixture(scope="module")
def ants() -> None:
    pytest.importorskip("ants", reason="antspyx is not installed: pip install -e '.[registration]'")


@pytest.fixture(scope="module")
def brain() -> Volume:
    return marked_brain()


@pytest.fixture(scope="module")
def head(brain: Volume) -> Volume:
    return head_around(brain)


def error_mm(brain: Volume, transform: Transform, to_template: np.ndarray) -> np.ndarray:
    points_mm = brain.points_mm(solid(brain))
    expected_mm = apply_matrix(np.linalg.inv(to_template), points_mm)
    return np.linalg.norm(transform.to_scan_mm(points_mm) - expected_mm, axis=1)


@dataclass
class Registered:
    path: Path
    transform: Transform


@pytest.fixture(scope="module")
def whole_head(ants: None, head: Volume, tmp_path_factory: pytest.TempPathFactory) -> Registered:
    bias = np.linspace(0.6, 1.5, T1_SHAPE[1])[None, :, None]  # a coil at the back of the head
    values = bias * scanned(head, T1_AFFINE, T1_SHAPE, SCAN_TO_TEMPLATE)
    path = save_scan(tmp_path_factory.mktemp("head") / "sub-01_T1w.nii.gz", values, T1_AFFINE)
    return Registered(path, register_t1(path, CONFIG))


@needs_ants
def test_a_whole_head_is_stripped_and_brought_back_within_two_mm(brain: Volume, whole_head: Registered) -> None:
    record = whole_head.transform.record
    assert (record["skull_of_scan"], record["skull_of_template"]) == ("head", "brain")
    assert record["similarity"] > 0.9
    assert len(record["similarity_of_starts"]) == 2
    errors_mm = error_mm(brain, whole_head.transform, SCAN_TO_TEMPLATE)
    assert errors_mm.mean() < 1  # 16 repetitions: 0.63 to 0.67 mm
    assert errors_mm.max() < 2  # 1.02 to 1.14 mm


@needs_ants
def test_a_marker_on_the_right_of_a_raw_head_is_on_the_right_of_the_space(whole_head: Registered) -> None:
    space = volume_space(SpaceConfig("mni4", "2009aSym", 4.0, "mni152", 0.0))
    packed = pack_t1(whole_head.path, space, brain_mask=None, transform=whole_head.transform).values[0]
    mirrored = space.positions_mm * np.array([-1, 1, 1], dtype=np.float32)
    near = np.linalg.norm(space.positions_mm - MARKER_MM, axis=1) < 6
    near_mirrored = np.linalg.norm(mirrored - MARKER_MM, axis=1) < 6
    assert packed[near].mean() > 1.4 * packed[near_mirrored].mean()


@needs_ants
def test_a_stripped_brain_is_seen_as_one_and_syn_follows_what_an_affine_cannot(brain: Volume, tmp_path: Path) -> None:
    grid_mm = grid_positions_mm(T1_AFFINE, T1_SHAPE).reshape(-1, 3)
    template_mm = apply_matrix(SCAN_TO_TEMPLATE, grid_mm)
    bend_mm = 6 * np.sin(template_mm[:, [1, 2, 0]] / 25)
    values = brain.sample(template_mm + bend_mm).reshape(T1_SHAPE) * 800
    path = save_scan(tmp_path / "sub-02_T1w.nii.gz", values, T1_AFFINE)
    transform = register_t1(path, replace(CONFIG, kind="nonlinear", num_starts=1))
    assert transform.alignment == "nonlinear"
    assert transform.record["skull_of_scan"] == "brain"
    distance_mm = []
    for each in (transform, replace(transform, displacement_mm=None)):
        points_mm = brain.points_mm(solid(brain))
        landed_mm = apply_matrix(SCAN_TO_TEMPLATE, each.to_scan_mm(points_mm))
        landed_mm += 6 * np.sin(landed_mm[:, [1, 2, 0]] / 25)
        distance_mm.append(np.linalg.norm(landed_mm - points_mm, axis=1).mean())
    assert distance_mm[0] < 0.6 * distance_mm[1]


@pytest.fixture(scope="module")
def motion() -> np.ndarray:
    """Poses of eight frames about the middle one, which is the reference: up to 3 mm and 2 degrees."""
    poses = np.random.default_rng(5).uniform(-1, 1, size=(8, 6)) * np.array([3, 3, 3, 0.035, 0.035, 0.035])
    poses[4] = 0
    return np.stack([turned(pose) for pose in poses])


def turned(pose: np.ndarray) -> np.ndarray:
    centre_mm = np.array([0.0, -15.0, 5.0])
    rotation = nibabel.eulerangles.euler2mat(*pose[3:])
    return nibabel.affines.from_matvec(rotation, pose[:3] + centre_mm - rotation @ centre_mm)


@pytest.fixture(scope="module")
def bold(brain: Volume, motion: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A run of the same head in another place of the scanner, with another contrast; and where it truly lies."""
    session = nibabel.affines.from_matvec(nibabel.eulerangles.euler2mat(-0.06, 0.08, 0.04), [-6.0, 5.0, 8.0])
    bold_to_template = SCAN_TO_TEMPLATE @ np.linalg.inv(session)
    values = bold_frames(brain, bold_to_template, motion)
    path = tmp_path_factory.mktemp("bold") / "sub-01_task-rest_bold.nii.gz"
    return save_scan(path, values, BOLD_AFFINE), bold_to_template


def test_known_motion_is_found_to_a_tenth_of_a_mm_and_twice_the_same(
    bold: tuple[Path, np.ndarray], motion: np.ndarray
) -> None:
    header = read_header(bold[0], "bold")
    found, again = estimate_motion(header), estimate_motion(header)
    np.testing.assert_array_equal(found.matrices, again.matrices)
    corners_mm = grid_positions_mm(np.diag([60.0, 60, 60, 1]), (3, 3, 3)).reshape(-1, 3) - np.array([60, 75, 55])
    for pose, expected in zip(found.matrices, motion, strict=True):
        distance_mm = np.linalg.norm(apply_matrix(pose, corners_mm) - apply_matrix(expected, corners_mm), axis=1)
        assert distance_mm.mean() < 0.1
        assert distance_mm.max() < 0.2
    expected_mm = framewise_displacement(motion, found.centre_mm)
    assert np.isnan(found.framewise_displacement_mm[0])
    np.testing.assert_allclose(found.framewise_displacement_mm[1:], expected_mm[1:], atol=0.3)
    assert np.nanmean(np.abs(found.framewise_displacement_mm - expected_mm)) < 0.1
    assert found.correlation.min() > 0.99


def test_framewise_displacement_is_the_sum_of_power_et_al() -> None:
    """2 mm left, then back and 1 mm up with a turn of 0.01 rad, which is 0.5 mm on a sphere of 50 mm."""
    centre_mm = np.array([3.0, -10.0, 20.0])
    rotation = nibabel.eulerangles.euler2mat(0, 0, 0.01)
    matrices = np.stack([np.eye(4)] * 3)
    matrices[1, 0, 3] = -2
    matrices[2] = nibabel.affines.from_matvec(rotation, np.array([0, 0, 1]) + centre_mm - rotation @ centre_mm)
    found_mm = framewise_displacement(matrices, centre_mm)
    assert np.isnan(found_mm[0])
    np.testing.assert_allclose(found_mm[1:], [2.0, 2 + 1 + 0.5], atol=1e-5)


@needs_ants
def test_a_raw_run_reaches_the_template_through_its_t1_and_a_stored_transform_packs_the_same_bytes_without_ants(
    brain: Volume,
    whole_head: Registered,
    bold: tuple[Path, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, bold_to_template = bold
    transform = register_bold(path, t1=whole_head.path, t1_transform=whole_head.transform, config=CONFIG)
    errors_mm = error_mm(brain, transform, bold_to_template)
    # ANTs is not reproducible: 16 repetitions at load 20 had means of 1.18 to 1.64 mm and maxima of 1.91 to 2.88 mm
    # (standard deviations 0.11 and 0.22 mm). The bounds lie at least 7 standard deviations above the worst.
    assert errors_mm.mean() < 2.5
    assert errors_mm.max() < 4.5
    assert transform.record["similarity"] > CONFIG.min_bold_similarity
    assert transform.motion.shape == (8, 4, 4)
    space: BrainSpace = volume_space(SpaceConfig("mni6", "2009aSym", 6.0, "mni152", 0.0))
    packed = pack_bold(path, space, brain_mask=None, transform=transform)
    corrected = np.diff(packed.values / packed.values.mean(axis=1, keepdims=True), axis=0).std()
    still = pack_bold(path, space, brain_mask=None, transform=replace(transform, motion=None)).values
    assert corrected < 0.5 * np.diff(still / still.mean(axis=1, keepdims=True), axis=0).std()
    transform.save(tmp_path / "bold.npz")
    monkeypatch.setitem(sys.modules, "ants", None)
    reused = pack_bold(path, space, brain_mask=None, transform=Transform.load(tmp_path / "bold.npz"))
    assert reused.values.tobytes() == packed.values.tobytes()


@needs_ants
def test_what_is_no_head_is_refused_with_the_similarity_it_reached(
    whole_head: Registered, bold: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    noise = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=T1_SHAPE), 2) ** 2
    unrelated = save_scan(tmp_path / "noise_T1w.nii.gz", noise, T1_AFFINE)
    with pytest.raises(ScanError) as caught:
        register_t1(unrelated, replace(CONFIG, num_starts=1))
    message = str(caught.value)
    assert str(unrelated) in message
    # On noise ANTs wanders, each time elsewhere: ten runs reached -0.08 to 0.17. Impossible sizes occur too.
    gate = re.search(
        r"came out at (-?[\d.]+) of the template's volume|reached similarity (-?[\d.]+) .*min_similarity=0\.65", message
    )
    assert gate is not None, message
    size, similarity = gate.groups()
    assert similarity is None or -0.3 < float(similarity) < 0.4
    assert size is None or not 0.3 < float(size) < 2
    black = save_scan(tmp_path / "black_T1w.nii.gz", np.zeros(T1_SHAPE), T1_AFFINE)
    with pytest.raises(RegistrationError, match=r"black_T1w.*no voxel is above 0; this is not a T1 image"):
        register_t1(black, CONFIG)
    turned_over = np.diag([1.0, -1.0, -1.0, 1.0]) @ BOLD_AFFINE  # a header that has the head upside down
    values = np.asarray(nibabel.load(bold[0]).dataobj)[..., :3]
    wrong = save_scan(tmp_path / "wrong_bold.nii.gz", values, turned_over)
    with pytest.raises(RegistrationError, match=r"wrong_bold.*reached similarity 0\.\d+ .*min_bold_similarity=0\.7"):
        register_bold(
            wrong, t1=whole_head.path, t1_transform=whole_head.transform, config=replace(CONFIG, num_starts=1)
        )


@pytest.mark.parametrize("stretched", [0.5, 1.3])
def test_a_brain_of_an_impossible_size_is_refused_with_its_volume(stretched: float) -> None:
    to_scan = np.diag([stretched, stretched, stretched, 1.0])
    with pytest.raises(RegistrationError, match=rf"T1w.nii: its brain came out at {np.linalg.det(to_scan):.2f} of the"):
        require_plausible_size(to_scan, "T1w.nii")
    require_plausible_size(np.diag([0.9, 0.9, 0.9, 1.0]), "T1w.nii")


def test_heads_and_brains_are_told_apart(head: Volume, brain: Volume) -> None:
    assert skull_state(head) == "head"
    assert skull_state(brain) == "brain"
    small = Volume(head.values, head.origin_mm, 2.8)  # a head of a third of the volume
    assert skull_state(small) == "head"
    noise = np.abs(np.random.default_rng(0).normal(scale=0.05 * head.values.max(), size=head.values.shape))
    assert skull_state(head.with_values(head.values + noise)) == "head"


def test_without_antspyx_a_raw_scan_is_refused_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ants", None)
    with pytest.raises(RegistrationError, match=r"antspyx is not installed .*pip install -e '\.\[registration\]'"):
        register_t1(tmp_path / "T1w.nii.gz", CONFIG)


def test_a_run_without_a_head_or_a_known_side_is_refused(tmp_path: Path) -> None:
    empty = save_scan(tmp_path / "empty_bold.nii.gz", np.zeros((8, 8, 8, 3)), np.diag([9.0, 9, 9, 1]))
    with pytest.raises(ScanError, match=r"empty_bold.*its middle frame shows no head"):
        estimate_motion(read_header(empty, "bold"))


def test_all_problems_of_a_configuration_are_named(tmp_path: Path) -> None:
    wrong = replace(CONFIG, template=str(tmp_path / "none.nii"), spacing_mm=9.0, num_starts=0, min_similarity=2.0)
    problems = "\n".join(validate_registration(wrong, "registration"))
    for key in ("registration.template:", "registration.spacing_mm:", "num_starts: 0", "min_similarity: 2.0"):
        assert key in problems
    renamed = replace(CONFIG, template_name="NLin6Asym")
    assert "give 2009aSym" in validate_registration(renamed, "registration")[0]
