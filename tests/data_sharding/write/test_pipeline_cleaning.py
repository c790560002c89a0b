"""Cleaning follows nilearn's convention number for number, and never touches what it was not asked to."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from nilearn import signal
from nilearn.glm.first_level import make_first_level_design_matrix

from brain_models.cleaning import clean_bold, cosine_drifts
from brain_models.confounds import GROUPS, read_columns, read_confounds
from brain_models.errors import ScanError
from brain_models.nifti import ScanHeader, read_header
from brain_models.preprocess import PackedScan, dequantise, standardise_bold
from brain_models.recipe import CleaningConfig, validate_cleaning
from tests.scans import GRID_AFFINE, save_scan

NUM_FRAMES, NUM_VOXELS, TR_S = 150, 40, 2.0
NONE = CleaningConfig([], None, None, "cosine", False, "drop", None, None)


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> PackedScan:
    path = save_scan(tmp_path_factory.mktemp("scan") / "bold.nii", np.ones((3, 3, 3, 2)), GRID_AFFINE)
    return with_values(np.zeros((2, NUM_VOXELS)), read_header(path, "bold"))


@pytest.fixture
def packed(header: PackedScan) -> PackedScan:
    generator = np.random.default_rng(0)
    time = np.linspace(-1, 1, NUM_FRAMES)[:, None]
    drift = 30 * time * generator.normal(size=NUM_VOXELS) + 20 * time**2 * generator.normal(size=NUM_VOXELS)
    values = 1000 + drift + generator.normal(0, 10, size=(NUM_FRAMES, NUM_VOXELS))
    return with_values(values, header.header)


def with_values(values: np.ndarray, header: ScanHeader) -> PackedScan:
    return PackedScan.of_values(values.astype(np.float32), np.ones(NUM_VOXELS, bool), header)


def write_table(
    path: Path, *, num_non_steady: int = 0, num_frames: int = NUM_FRAMES, spikes: tuple[int, ...] = ()
) -> Path:
    generator = np.random.default_rng(1)
    columns = dict.fromkeys(
        GROUPS["motion24"] + GROUPS["wm_csf8"] + ["global_signal", "framewise_displacement", "std_dvars"]
    )
    table = {name: [f"{value:.6f}" for value in generator.normal(size=num_frames)] for name in columns}
    table["framewise_displacement"] = ["0.9" if frame in spikes else "0.1" for frame in range(num_frames)]
    for name in table:
        if "derivative1" in name or name in ("framewise_displacement", "std_dvars"):
            table[name][0] = "n/a"
    for number in range(num_non_steady):
        table[f"non_steady_state_outlier{number:02d}"] = [
            "1" if frame == number else "0" for frame in range(num_frames)
        ]
    lines = ["\t".join(table), *("\t".join(row) for row in zip(*table.values(), strict=True))]
    path.write_text("\n".join(lines) + "\n")
    return path


def deviations(values: np.ndarray) -> np.ndarray:
    return values - values.mean(axis=0)


def test_no_cleaning_leaves_every_bit(packed: PackedScan) -> None:
    before = packed.values.copy()
    run = clean_bold(packed, NONE, repetition_time_s=TR_S, confounds=None)
    np.testing.assert_array_equal(run.packed.values, before)
    assert run.is_kept.all()
    assert np.isnan(run.framewise_displacement_mm).all()
    short = with_values(before[:25], packed.header)  # 50 s hold no cosine slower than 128 s
    clean_bold(short, replace(NONE, high_pass_hz=1 / 128), repetition_time_s=TR_S, confounds=None)
    np.testing.assert_array_equal(short.values, before[:25])


def test_drifts_are_the_cosines_of_spm(packed: PackedScan) -> None:
    ours = cosine_drifts(NUM_FRAMES, repetition_time_s=TR_S, high_pass_hz=1 / 128)
    design = make_first_level_design_matrix(np.arange(NUM_FRAMES) * TR_S, drift_model="cosine", high_pass=1 / 128)
    np.testing.assert_allclose(ours, design.filter(like="drift").to_numpy(), atol=1e-12)
    assert ours.shape[1] == 4


@pytest.mark.parametrize("detrend", [False, True])
@pytest.mark.parametrize(
    ("low_pass_hz", "filter_name"), [(None, "cosine"), (0.15, "butterworth"), (None, "butterworth")]
)
@pytest.mark.parametrize("names", [[], ["motion24", "wm_csf"]])
def test_cleaning_equals_nilearn(
    packed: PackedScan, tmp_path: Path, detrend: bool, low_pass_hz: float | None, filter_name: str, names: list[str]
) -> None:
    # nilearn takes the linear trend over the frames left, as if those censored had never been; ours is a trend in time.
    spikes = () if detrend and filter_name == "cosine" else (40, 41, 90)
    table = write_table(tmp_path / "confounds.tsv", spikes=spikes)
    config = CleaningConfig(names, 0.01, low_pass_hz, filter_name, detrend, "drop", 0.5, None)  # type: ignore[arg-type]
    before, mean = packed.values.astype(np.float64), packed.values.mean(axis=0)
    run = clean_bold(packed, config, repetition_time_s=TR_S, confounds=table)
    assert np.flatnonzero(~run.is_kept).tolist() == list(spikes)
    fitted = run.is_kept if names else np.ones(NUM_FRAMES, bool)
    confounds = read_confounds(table, num_frames=NUM_FRAMES).regressors(names)[1] if names else None
    expected = signal.clean(
        before.copy(),
        confounds=confounds,
        sample_mask=None if fitted.all() else fitted,
        detrend=detrend,
        standardize=None,
        filter=filter_name,
        high_pass=0.01,
        low_pass=low_pass_hz,
        t_r=TR_S,
    )
    np.testing.assert_allclose(deviations(run.packed.values[fitted]), deviations(expected), atol=2e-3)
    np.testing.assert_allclose(run.packed.values.mean(axis=0), mean, rtol=2e-3)


def test_first_frames_and_censored_ones_are_known_from_the_table(packed: PackedScan, tmp_path: Path) -> None:
    table = write_table(tmp_path / "confounds.tsv", num_non_steady=3, spikes=(1, 10, 11))
    assert sum(name.startswith("non_steady") for name in read_columns(table)) == 3
    before = packed.values.copy()
    run = clean_bold(packed, replace(NONE, censor_above_fd_mm=0.5), repetition_time_s=TR_S, confounds=table)
    assert run.num_dropped == 3
    np.testing.assert_array_equal(run.packed.values, before[3:])
    assert np.flatnonzero(~run.is_kept).tolist() == [7, 8]
    assert run.framewise_displacement_mm[7] == np.float32(0.9)
    kept = clean_bold(
        packed,
        replace(NONE, non_steady_state="keep"),
        repetition_time_s=TR_S,
        confounds=table,
    )
    assert len(kept.packed.values) == NUM_FRAMES
    assert np.isnan(kept.framewise_displacement_mm[0])


def column_table(path: Path, **columns: list[object]) -> Path:
    lines = ["\t".join(columns), *("\t".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_frame_is_censored_above_either_limit_not_at_it_and_an_unknown_one_never(
    packed: PackedScan, tmp_path: Path
) -> None:
    moved: list[object] = ["n/a", *[0.1] * (NUM_FRAMES - 1)]
    changed: list[object] = ["n/a", *[1.0] * (NUM_FRAMES - 1)]
    moved[5:7], changed[8:10] = [0.5, 0.51], [1.5, 1.6]
    first = [1] + [0] * (NUM_FRAMES - 1)
    table = column_table(
        tmp_path / "confounds.tsv", framewise_displacement=moved, std_dvars=changed, non_steady_state_outlier00=first
    )
    config = replace(NONE, censor_above_fd_mm=0.5, censor_above_std_dvars=1.5)
    for change, num_dropped, censored in (("drop", 1, [5, 8]), ("keep", 0, [6, 9])):
        run = clean_bold(packed, replace(config, non_steady_state=change), repetition_time_s=TR_S, confounds=table)
        assert (run.num_dropped, np.flatnonzero(~run.is_kept).tolist()) == (num_dropped, censored)
    alone = replace(config, non_steady_state="keep")
    for changes, censored in (({"censor_above_fd_mm": None}, [9]), ({"censor_above_std_dvars": None}, [6])):
        run = clean_bold(packed, replace(alone, **changes), repetition_time_s=TR_S, confounds=table)
        assert np.flatnonzero(~run.is_kept).tolist() == censored
    registered = np.where(np.arange(NUM_FRAMES) == 3, 0.7, 0.2)
    run = clean_bold(packed, alone, repetition_time_s=TR_S, confounds=None, framewise_displacement_mm=registered)
    assert np.flatnonzero(~run.is_kept).tolist() == [3]


def test_a_band_ends_at_half_the_frame_rate(packed: PackedScan) -> None:
    config = replace(NONE, filter="butterworth", high_pass_hz=0.01)
    whole, cut = (
        clean_bold(packed, replace(config, low_pass_hz=low_pass_hz), repetition_time_s=TR_S, confounds=None)
        for low_pass_hz in (None, 0.25)
    )
    np.testing.assert_array_equal(cut.packed.values, whole.packed.values)
    with pytest.raises(ScanError, match=r"high_pass_hz=0\.25 is not below 0\.25 Hz, half the frame rate; lower it"):
        clean_bold(packed, replace(config, high_pass_hz=0.25), repetition_time_s=TR_S, confounds=None)


def test_what_cannot_be_cleaned_is_refused_with_its_cause(packed: PackedScan, tmp_path: Path) -> None:
    good = write_table(tmp_path / "good.tsv")
    short = write_table(tmp_path / "short.tsv", num_frames=20)
    broken = tmp_path / "broken.tsv"
    broken.write_text(good.read_text().replace("0.1\t", "0.1\textra\t", 1))
    holes = tmp_path / "holes.tsv"
    holes.write_text("csf\n" + "\n".join(["n/a" if frame in (0, 5) else "1.5" for frame in range(NUM_FRAMES)]) + "\n")
    words = tmp_path / "words.tsv"
    words.write_text("csf\n" + "high\n" * NUM_FRAMES)
    moving = write_table(tmp_path / "moving.tsv", spikes=tuple(range(NUM_FRAMES - 20)))
    cases = [
        (["motion6"], None, "no confound table, but preprocessing regresses motion6"),
        (["motion6"], short, "has 20 rows, its run has 150 frames"),
        (["motion6"], broken, "rows of different lengths"),
        (["csf"], holes, "column csf has no value at frame 5"),
        (["csf"], words, "column csf holds no numbers"),
        (["compcor5"], good, "has no column a_comp_cor_00"),
        (["tedana"], good, "groups: motion6, motion12"),
        (["motion24"], moving, "20 regressors for 21 frames that are not censored leave nothing"),
        (["motion6"], tmp_path / "none.tsv", "no readable confound table"),
    ]
    for names, table, cause in cases:
        config = replace(NONE, confounds=names, censor_above_fd_mm=0.5)
        with pytest.raises(ScanError, match=cause):
            clean_bold(packed, config, repetition_time_s=TR_S, confounds=table)
    few, band = with_values(packed.values[:20], packed.header), replace(NONE, filter="butterworth", low_pass_hz=0.1)
    with pytest.raises(ScanError, match="are too few for the Butterworth filter"):
        clean_bold(few, replace(band, high_pass_hz=0.01), repetition_time_s=TR_S, confounds=None)
    problems = "\n".join(validate_cleaning(replace(NONE, low_pass_hz=0.1, high_pass_hz=0.2), "preprocessing.cleaning"))
    assert "use filter=butterworth" in problems
    assert "must lie below" in problems


def test_float16_holds_the_same_run_more_finely_than_int8(packed: PackedScan) -> None:
    coarse = standardise_bold(packed, stored_as="int8")
    fine = standardise_bold(packed, stored_as="float16")
    np.testing.assert_array_equal(coarse.scale, fine.scale)
    exact = np.clip((packed.values - fine.mean) / fine.scale, -6, 6)
    assert np.abs(dequantise(fine.quantised) - exact).max() <= 6 * 2.0**-11
    assert np.abs(dequantise(coarse.quantised) - exact).max() <= 0.5001 / 21
    assert fine.is_measured.all()
