"""A scan packs to the same array however it is stored, and what was not measured stays unmeasured."""

import gzip
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from nilearn.image import resample_img

from brain_models import resample
from brain_models.errors import ScanError, SpaceError
from brain_models.nifti import read_header
from brain_models.preprocess import (
    PackedScan,
    dequantise,
    dvars,
    pack_bold,
    pack_t1,
    standardise_bold,
    standardise_t1,
)
from brain_models.recipe import NOT_MEASURED, UNITS_PER_SCALE
from brain_models.space import BrainSpace, SpaceConfig, space_from_mask, volume_space
from data_sharding.scans import Scan
from data_sharding.write.isolation import grid_of, keep_weights
from tests.scans import GRID_AFFINE, GRID_SHAPE, MARKER_MM, bold_values, grid_positions_mm, reoriented, save_scan

OBLIQUE = nibabel.affines.from_matvec(
    nibabel.eulerangles.euler2mat(0.1, -0.07, 0.05) @ np.diag([12.0, 12.0, 12.0]), [-130.0, -150.0, -110.0]
)


@pytest.fixture(scope="module")
def space() -> BrainSpace:
    in_brain = np.zeros(GRID_SHAPE, dtype=bool)
    in_brain[4:12, 4:14, 4:12] = True
    return space_from_mask(in_brain, GRID_AFFINE, name="box", template="NLin6Asym")


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    return np.rint(bold_values(grid_positions_mm(GRID_AFFINE, GRID_SHAPE)))


@pytest.fixture(scope="module")
def plain(space: BrainSpace, values: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> PackedScan:
    path = save_scan(tmp_path_factory.mktemp("scans") / "plain.nii", values, GRID_AFFINE)
    packed = pack_bold(path, space, brain_mask=None)
    assert packed.is_measured.all()
    expected = values[tuple(space.voxel_indices.T)].T
    np.testing.assert_array_equal(packed.values, expected)
    return packed


@pytest.fixture(scope="module")
def reference(plain: PackedScan) -> np.ndarray:
    return plain.values


@pytest.mark.parametrize("codes", ["RAS", "LAS", "PSR", "ILP"])
def test_axes_in_any_order_and_direction_pack_to_the_same_array(
    codes: str, space: BrainSpace, values: np.ndarray, reference: np.ndarray, tmp_path: Path
) -> None:
    path = save_scan(tmp_path / f"{codes}.nii.gz", *reoriented(values, GRID_AFFINE, codes))
    np.testing.assert_array_equal(pack_bold(path, space, brain_mask=None).values, reference)


def test_big_endian_scaled_integers_and_misnamed_files_pack_to_the_same_array(
    space: BrainSpace, values: np.ndarray, reference: np.ndarray, tmp_path: Path
) -> None:
    big_endian = nibabel.Nifti1Image(values.astype(">f4"), GRID_AFFINE, nibabel.Nifti1Header(endianness=">"))
    nibabel.save(big_endian, tmp_path / "big_endian.nii.gz")
    stored = ((values - 500) * 4).astype(np.int16)
    scaled = nibabel.Nifti1Image(stored, GRID_AFFINE)
    scaled.header.set_slope_inter(0.25, 500)
    scaled.header.set_data_dtype(np.int16)
    nibabel.save(scaled, tmp_path / "scaled.nii")
    raw = bytearray((tmp_path / "scaled.nii").read_bytes())
    raw[112:120] = np.array([0.25, 500], dtype="<f4").tobytes()
    raw[352:] = stored.tobytes(order="F")
    (tmp_path / "scaled.nii.gz").write_bytes(bytes(raw))  # plain bytes under a .gz name
    for name in ("big_endian.nii.gz", "scaled.nii.gz"):
        np.testing.assert_array_equal(pack_bold(tmp_path / name, space, brain_mask=None).values, reference)


def test_an_oblique_scan_of_the_same_field_packs_to_the_same_array(
    space: BrainSpace, reference: np.ndarray, tmp_path: Path
) -> None:
    shape = (26, 28, 24)
    oblique = bold_values(grid_positions_mm(OBLIQUE, shape))
    path = save_scan(tmp_path / "oblique.nii.gz", oblique, OBLIQUE, dtype="float64")
    packed = pack_bold(path, space, brain_mask=None)
    assert packed.is_measured.all()
    np.testing.assert_allclose(packed.values, reference, atol=0.51)  # the reference was rounded to whole numbers


def test_the_marker_lies_right_of_the_midline_however_it_is_stored(space: BrainSpace, tmp_path: Path) -> None:
    distance_mm = np.linalg.norm(grid_positions_mm(GRID_AFFINE, GRID_SHAPE) - np.array(MARKER_MM), axis=-1)
    blob = 100 * np.exp(-0.5 * (distance_mm / 10) ** 2)
    for codes in ("LAS", "RAS", "PSR"):
        path = save_scan(tmp_path / f"{codes}_T1w.nii.gz", *reoriented(blob, GRID_AFFINE, codes))
        packed = pack_t1(path, space, brain_mask=None)
        brightest_mm = space.positions_mm[packed.values[0].argmax()]
        assert brightest_mm[0] > 0
        np.testing.assert_allclose(brightest_mm, MARKER_MM, atol=6)


def test_interior_voxels_equal_nilearns_linear_interpolation(space: BrainSpace, tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    affine = np.diag([-13.0, 13.0, 13.0, 1.0])
    affine[:3, 3] = [95, -130, -80]
    path = save_scan(tmp_path / "coarse.nii.gz", generator.normal(size=(16, 19, 16, 3)) + 10, affine)
    packed = pack_bold(path, space, brain_mask=None)
    resampled = resample_img(
        nibabel.load(path),
        target_affine=GRID_AFFINE,
        target_shape=GRID_SHAPE,
        interpolation="linear",
        force_resample=True,
        copy_header=True,
    )
    expected = np.asarray(resampled.dataobj)[tuple(space.voxel_indices.T)].T
    np.testing.assert_allclose(packed.values, expected, atol=2e-5)


def test_a_coarser_target_is_smoothed_so_that_a_fine_checkerboard_vanishes(space: BrainSpace, tmp_path: Path) -> None:
    affine = np.diag([-3.0, 3.0, 3.0, 1.0])
    affine[:3, 3] = [90, -126, -72]
    shape = (61, 73, 61)
    checkerboard = 100 + 50 * (-1.0) ** np.indices(shape).sum(axis=0)
    path = save_scan(tmp_path / "fine_T1w.nii.gz", checkerboard, affine)
    np.testing.assert_allclose(pack_t1(path, space, brain_mask=None).values, 100, atol=0.5)


def test_outside_the_field_of_view_outside_the_mask_and_constant_voxels_are_not_measured(
    space: BrainSpace, values: np.ndarray, tmp_path: Path
) -> None:
    cut = values[:, :, 6:].copy()
    cut[5, 5, 3] = 7.0  # grid voxel (5, 5, 9) never varies
    cut[6, 6, 3, 2] = np.nan
    affine = GRID_AFFINE.copy()
    affine[2, 3] += 6 * 12
    mask = np.ones(cut.shape[:3])
    mask[:, :6] = 0
    run = save_scan(tmp_path / "cut.nii.gz", cut, affine)
    brain_mask = save_scan(tmp_path / "mask.nii.gz", mask, affine, dtype="uint8")
    stored = standardise_bold(pack_bold(run, space, brain_mask=brain_mask))
    x, y, z = space.voxel_indices.T
    expected = (z >= 6) & (y >= 6) & ~((x == 6) & (y == 6) & (z == 9))
    np.testing.assert_array_equal(stored.is_measured, expected)
    assert (stored.quantised[:, ~expected] == NOT_MEASURED).all()
    assert (dequantise(stored.quantised)[:, ~expected] == 0).all()


def test_standardised_run_gives_the_scan_back_within_half_a_unit(plain: PackedScan, reference: np.ndarray) -> None:
    stored = standardise_bold(plain)
    back = stored.mean + stored.scale * stored.quantised / UNITS_PER_SCALE
    units = np.abs(reference - stored.mean) / stored.scale
    is_inside = units <= 6
    assert (np.abs(back - reference) <= stored.scale / UNITS_PER_SCALE * 0.5001 + 1e-3)[is_inside].all()
    np.testing.assert_allclose(stored.clipped_fraction, (~is_inside).mean(axis=1), atol=1e-7)
    change = np.sqrt((np.diff(dequantise(stored.quantised), axis=0) ** 2).mean(axis=1))
    np.testing.assert_allclose(dvars(stored)[1:], change, rtol=1e-5)
    assert np.isnan(dvars(stored)[0])


@pytest.mark.parametrize("num_frames", [2, 3, 30, 31])
def test_the_scale_is_the_median_absolute_deviation_and_the_mean_the_mean(
    plain: PackedScan, space: BrainSpace, num_frames: int
) -> None:
    values = np.random.default_rng(5).normal(900, 10, size=(num_frames, space.num_voxels)).astype(np.float32)
    values[:, :100] = np.rint(values[:, :100] / 8)  # many frames share a value
    values[0, 100:200] += 1e4
    values[-1, 200:300] -= 1e4
    stored = standardise_bold(PackedScan.of_values(values, plain.is_measured, plain.header))
    exact = values.astype(np.float64)
    deviations = 1.4826 * np.median(np.abs(exact - np.median(exact, axis=0)), axis=0)
    expected = np.where(deviations > 0, deviations, exact.std(axis=0))
    np.testing.assert_allclose(stored.scale, expected, rtol=2e-5, atol=1e-4)
    np.testing.assert_allclose(stored.mean, np.where(expected > 0, exact.mean(axis=0), 0), rtol=2e-7)


@pytest.mark.parametrize(("spacing_mm", "dtype"), [(16.0, "int16"), (8.0, "int16"), (8.0, "float64"), (16.0, ">i2")])
def test_a_run_is_its_frames_packed_one_by_one(
    space: BrainSpace, spacing_mm: float, dtype: str, tmp_path: Path
) -> None:
    """Coarser than the space its source voxels are held, finer than the space its voxels."""
    affine = np.diag([-spacing_mm, spacing_mm, spacing_mm, 1.0])
    affine[:3, 3] = [91, -127, -73]
    size = (int(190 / spacing_mm), int(230 / spacing_mm), int(190 / spacing_mm))
    frames = np.random.default_rng(6).normal(900, 99, size=(*size, 40))
    run = pack_bold(save_scan(tmp_path / "run.nii.gz", frames, affine, dtype=dtype), space, brain_mask=None)
    stored = nibabel.load(tmp_path / "run.nii.gz").get_fdata()
    for frame in (0, 31, 32, 39):
        path = save_scan(tmp_path / f"{frame}_T1w.nii", stored[..., frame], affine)
        np.testing.assert_allclose(
            run.values[frame], pack_t1(path, space, brain_mask=None).values[0], rtol=0, atol=2e-3
        )


def test_the_weights_of_a_grid_that_comes_again_are_there_before_its_next_scan(
    space: BrainSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    affine = np.diag([-17.0, 17.0, 17.0, 1.0])
    affine[:3, 3] = [95, -130, -80]
    path = save_scan(tmp_path / "run.nii", np.random.default_rng(7).normal(9, 1, size=(12, 14, 12, 3)), affine)
    request = Scan("run", "bold", str(path), 2.0, 3, {}, "01")
    keep_weights(json.loads(json.dumps(grid_of(request, space))), space)
    monkeypatch.setattr(resample, "Resampler", None)
    assert pack_bold(path, space, brain_mask=None).is_measured.any()
    assert grid_of(replace(request, kind="t1"), space) is None


def test_standardised_t1_has_mean_0_and_std_1_over_measured_voxels(space: BrainSpace, tmp_path: Path) -> None:
    anatomy = np.random.default_rng(0).gamma(2, 100, size=GRID_SHAPE)
    stored = standardise_t1(pack_t1(save_scan(tmp_path / "T1w.nii.gz", anatomy, GRID_AFFINE), space, brain_mask=None))
    values = stored.values.astype(np.float64)
    assert abs(values.mean()) < 1e-3
    assert abs(values.std() - 1) < 1e-3
    np.testing.assert_allclose(
        stored.mean + stored.std * values, anatomy[tuple(space.voxel_indices.T)], atol=1e-3 * stored.std * 4
    )


def test_every_unusable_file_is_refused_with_its_name_and_the_cause(space: BrainSpace, tmp_path: Path) -> None:
    good = np.random.default_rng(0).normal(size=(*GRID_SHAPE, 4)).astype(np.float32)
    save_scan(tmp_path / "three_d.nii.gz", good[..., 0], GRID_AFFINE)
    save_scan(tmp_path / "one_frame.nii.gz", good[..., :1], GRID_AFFINE)
    save_scan(tmp_path / "complex.nii.gz", good, GRID_AFFINE, dtype="complex64")
    save_scan(tmp_path / "constant.nii.gz", np.ones_like(good), GRID_AFFINE)
    save_scan(tmp_path / "whole.nii.gz", good, GRID_AFFINE)
    (tmp_path / "cut.nii.gz").write_bytes((tmp_path / "whole.nii.gz").read_bytes()[:20000])
    (tmp_path / "empty.nii.gz").touch()
    (tmp_path / "page.nii.gz").write_bytes(b"<html><body>404</body></html>")
    (tmp_path / "page_gz.nii.gz").write_bytes(gzip.compress(b"<html><body>404</body></html>"))
    no_geometry = nibabel.Nifti1Image(good, None)
    no_geometry.header["sform_code"] = no_geometry.header["qform_code"] = 0
    nibabel.save(no_geometry, tmp_path / "no_geometry.nii.gz")
    far = GRID_AFFINE.copy()
    far[0, 3] += 5000
    save_scan(tmp_path / "far.nii.gz", good, far)
    causes = {
        "three_d": "a 3D image of shape (16, 19, 16) where 4D BOLD is expected",
        "one_frame": "BOLD with 1 frame",
        "complex": "complex",
        "constant": "no voxel varies over time",
        "cut": "fetch the file again",
        "empty": "empty (0 bytes)",
        "page": "not NIfTI (starts with b'<html><body>'",
        "page_gz": "not NIfTI",
        "no_geometry": "left and right are unknown",
        "far": "covers no voxel of space box",
        "missing": "no such file",
    }
    for name, cause in causes.items():
        path = tmp_path / f"{name}.nii.gz"
        with pytest.raises(ScanError) as caught:
            standardise_bold(pack_bold(path, space, brain_mask=None))
        assert str(path) in str(caught.value)
        assert cause in str(caught.value)


def test_repetition_time_is_in_seconds_whatever_the_header_unit(tmp_path: Path) -> None:
    values = np.ones((4, 4, 4, 3))
    image = nibabel.Nifti1Image(values, np.eye(4))
    image.header.set_xyzt_units("mm", "msec")
    image.header["pixdim"][4] = 720.0
    nibabel.save(image, tmp_path / "msec.nii")
    assert read_header(tmp_path / "msec.nii", "bold").repetition_time_s == pytest.approx(0.72)
    none = save_scan(tmp_path / "none.nii", values, np.eye(4), repetition_time_s=None)
    assert read_header(none, "bold").repetition_time_s is None


def test_the_default_space_keeps_the_fsl_grid_and_survives_saving(tmp_path: Path) -> None:
    space = volume_space(SpaceConfig("mni6", "NLin6Asym", 6.0, "mni152", 4.0))
    assert space.grid_shape == (31, 37, 31)
    np.testing.assert_array_equal(space.affine, [[-6, 0, 0, 90], [0, 6, 0, -126], [0, 0, 6, -72], [0, 0, 0, 1]])
    assert abs(space.positions_mm[:, 0].mean()) < 1.5
    space.save(tmp_path / "space.npz")
    assert BrainSpace.load(tmp_path / "space.npz").fingerprint == space.fingerprint
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    with pytest.raises(SpaceError, match=r"bad\.npz is not a space\.npz"):
        BrainSpace.load(tmp_path / "bad.npz")


def test_a_lying_header_costs_no_memory(tmp_path: Path) -> None:
    """A header that claims 30,000 frames is refused at the first missing frame, in a process of 1.5 GB."""
    path = save_scan(tmp_path / "liar.nii", np.ones((64, 64, 64, 2)), np.eye(4))
    raw = bytearray(path.read_bytes())
    raw[40:56] = np.array([4, 64, 64, 64, 30000, 1, 1, 1], dtype="<i2").tobytes()
    path.write_bytes(raw)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (1500 << 20,) * 2)\n"
        "from brain_models.nifti import read_header, stream_frames\n"
        "for block in stream_frames(read_header(sys.argv[1], 'bold')): pass"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert "the data end at frame 2 of the 30000 the header states" in done.stderr
