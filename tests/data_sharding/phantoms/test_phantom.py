"""The phantom's promises: reproducible bytes, independent subjects, a diagnosis that acts through one number."""

import json
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
import yaml

from configs.parse import parse
from data_sharding.phantoms.study.config import PhantomConfig, PhantomError, validate_phantom
from data_sharding.phantoms.study.population import Population, load_population
from data_sharding.phantoms.study.regions import COUPLED_NETWORKS, region_maps, regions
from data_sharding.phantoms.study.scans import (
    band_limited,
    bold_frames,
    bold_mean,
    brain_voxels,
    field_of_view,
    region_courses,
    subject_tissue,
    t1_image,
)
from data_sharding.phantoms.study.subject import Subject, draw_subject, framewise_displacement, stream
from data_sharding.phantoms.study.write import write_phantom

YAML = Path(__file__).parents[3] / "configs" / "data_sharding.phantom.yaml"
SMALL = {"spacing_mm": 12.0, "t1_spacing_mm": 12.0, "num_frames": 30, "num_subjects": 6, "num_processes": 1}


@pytest.fixture(scope="module")
def config() -> PhantomConfig:
    return parse({**yaml.safe_load(YAML.read_text()), **SMALL, "out": "unused"}, PhantomConfig)


@pytest.fixture(scope="module")
def population(config: PhantomConfig) -> Population:
    return load_population(config.anatomy, spacing_mm=config.spacing_mm, population_seed=config.population_seed)


@pytest.fixture(scope="module")
def written(config: PhantomConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantom")
    write_phantom(replace(config, out=str(out)))
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def arrays(config: PhantomConfig, subject: Subject, population: Population) -> tuple[np.ndarray, np.ndarray]:
    tissue = subject_tissue(config, subject, population)
    bold = np.concatenate(list(bold_frames(config, subject, population, tissue, block_frames=16)))
    return bold, t1_image(config, subject, population, tissue)


def scan(folder: Path, ending: str, subject_id: str) -> Path:
    (found,) = (folder / f"sub-{subject_id}").rglob(f"*{ending}")
    return found


def test_the_same_seed_writes_the_same_bytes_with_any_number_of_processes(
    config: PhantomConfig, written: Path, tmp_path: Path
) -> None:
    write_phantom(replace(config, out=str(tmp_path), num_processes=2))
    assert contents(tmp_path) == contents(written)


def test_subject_k_is_the_same_whatever_the_number_of_subjects(
    config: PhantomConfig, written: Path, tmp_path: Path
) -> None:
    write_phantom(replace(config, out=str(tmp_path), num_subjects=2))
    many = contents(written)
    subject_files = {name: data for name, data in contents(tmp_path).items() if name.startswith("sub-")}
    assert len(subject_files) == 14
    assert all(many[name] == data for name, data in subject_files.items())


def test_another_seed_writes_other_people(config: PhantomConfig, population: Population) -> None:
    first = arrays(config, draw_subject(config, 0), population)[0]
    other = replace(config, seed=config.seed + 1)
    second = arrays(other, draw_subject(other, 0), population)[0]
    assert np.mean(first[first > 0] == second[first > 0]) < 0.01


def test_names_and_tables_are_those_of_a_bids_derivative(written: Path, config: PhantomConfig) -> None:
    names = set(contents(written / "sub-0001"))
    stem, anat = "func/sub-0001_task-rest", "anat/sub-0001_space-MNI152NLin6Asym_res-12"
    assert names == {
        f"{stem}_space-MNI152NLin6Asym_res-12_desc-preproc_bold.nii.gz",
        f"{stem}_space-MNI152NLin6Asym_res-12_desc-preproc_bold.json",
        f"{stem}_space-MNI152NLin6Asym_res-12_desc-brain_mask.nii.gz",
        f"{stem}_desc-confounds_timeseries.tsv",
        f"{anat}_desc-preproc_T1w.nii.gz",
        f"{anat}_desc-preproc_T1w.json",
        f"{anat}_desc-brain_mask.nii.gz",
    }
    assert json.loads((written / "dataset_description.json").read_text())["DatasetType"] == "derivative"
    people = pd.read_csv(written / "participants.tsv", sep="\t")
    assert list(people.columns) == ["participant_id", "site", "age", "sex", "diagnosis", "mean_fd"]
    assert list(people["site"]) == ["north", "east", "south"] * 2
    assert set(people["diagnosis"]) <= {"control", "ADHD"}


def test_repetition_time_of_the_site_is_in_header_and_sidecar(written: Path, config: PhantomConfig) -> None:
    for index, site in enumerate(config.sites):
        bold = nibabel.load(scan(written, "_bold.nii.gz", f"{index + 1:04d}"))
        sidecar = json.loads(scan(written, "_bold.json", f"{index + 1:04d}").read_text())
        assert bold.header.get_zooms()[3] == pytest.approx(site.repetition_time_s)
        assert sidecar["RepetitionTime"] == site.repetition_time_s
    assert len({site.repetition_time_s for site in config.sites}) >= 3


def test_scans_lie_on_the_fsl_grid_and_hold_what_was_computed(
    written: Path, config: PhantomConfig, population: Population
) -> None:
    bold = nibabel.load(scan(written, "_bold.nii.gz", "0001"))
    assert bold.shape == (16, 19, 16, 30)
    assert np.array_equal(bold.affine, [[-12, 0, 0, 90], [0, 12, 0, -126], [0, 0, 12, -72], [0, 0, 0, 1]])
    computed = arrays(config, draw_subject(config, 0), population)[0]
    stored = np.asarray(bold.dataobj).reshape(-1, 30, order="F")[population.flat_indices].T
    assert np.abs(stored - computed).max() <= 0.25


def test_marker_is_in_the_right_hemisphere_of_t1_and_mean_bold(written: Path, config: PhantomConfig) -> None:
    for ending in ("_bold.nii.gz", "_T1w.nii.gz"):
        images = [nibabel.load(scan(written, ending, f"{index + 1:04d}")) for index in range(config.num_subjects)]
        volume = np.mean([np.atleast_3d(np.asarray(image.dataobj)) for image in images], axis=0)
        volume = volume.mean(axis=3) if volume.ndim == 4 else volume
        # 12 mm voxels from x = 90: mirrored voxel of i is 15 - i, both 90 - 12 i mm.
        excess = volume - volume[::-1]
        found_mm = nibabel.affines.apply_affine(images[0].affine, np.unravel_index(excess.argmax(), excess.shape))
        assert found_mm[0] > 0
        assert np.linalg.norm(found_mm - config.marker.position_mm) < 12


def test_slices_below_the_cut_are_zero_and_outside_the_mask(
    written: Path, config: PhantomConfig, population: Population
) -> None:
    truth = json.loads((written / "phantom_truth.json").read_text())["subjects"]
    num_cut_voxels = 0
    for index, row in enumerate(truth):
        bold = np.asarray(nibabel.load(scan(written, "_bold.nii.gz", f"{index + 1:04d}")).dataobj)
        (mask_path,) = (written / f"sub-{index + 1:04d}" / "func").glob("*_mask.nii.gz")
        is_brain = np.asarray(nibabel.load(mask_path).dataobj) > 0
        is_cut = -72 + 12 * np.arange(bold.shape[2]) < -72 + row["fov_cut_mm"]
        assert not bold[:, :, is_cut].any()
        assert not is_brain[:, :, is_cut].any()
        assert (bold[is_brain].std(axis=1) > 0).all()
        tissue = subject_tissue(config, draw_subject(config, index), population)
        is_lost = brain_voxels(tissue) & ~field_of_view(config, draw_subject(config, index), population)
        num_cut_voxels += int(is_lost.sum())
    assert num_cut_voxels > 0


def test_without_an_effect_the_label_reaches_no_array(config: PhantomConfig, population: Population) -> None:
    healthy = replace(config, effect_size=0.0, sites=[replace(site, prevalence=0.0) for site in config.sites])
    ill = replace(config, effect_size=0.0, sites=[replace(site, prevalence=1.0) for site in config.sites])
    for index in range(3):
        control, patient = draw_subject(healthy, index), draw_subject(ill, index)
        assert (control.has_adhd, patient.has_adhd) == (False, True)
        assert (control.age, control.sex) == (patient.age, patient.sex)
        for one, other in zip(arrays(healthy, control, population), arrays(ill, patient, population), strict=True):
            assert np.array_equal(one, other)


def test_the_effect_lowers_limbic_cerebellar_coupling_by_its_stated_amount_and_no_other(
    config: PhantomConfig,
) -> None:
    longer = replace(config, num_frames=400)
    listed = regions()
    correlations = {}
    for has_adhd in (False, True):
        everyone = replace(longer, sites=[replace(site, prevalence=float(has_adhd)) for site in longer.sites])
        subjects = [draw_subject(everyone, index) for index in range(60)]
        courses = [region_courses(everyone, subject, stream(everyone, subject.index, "signal")) for subject in subjects]
        correlations[has_adhd] = np.mean([np.corrcoef(course.T) for course in courses], axis=0)
        coupling = np.mean([subject.coupling for subject in subjects])
        for limbic, cerebellar in COUPLED_NETWORKS:
            rows = [number for number, region in enumerate(listed) if region.network == limbic]
            columns = [number for number, region in enumerate(listed) if region.network == cerebellar]
            # A region's correlation is its networks' times the share of variance it owes to its network.
            expected = coupling * config.signal.network_share
            assert correlations[has_adhd][np.ix_(rows, columns)].mean() == pytest.approx(expected, abs=0.05)
    change = correlations[True] - correlations[False]
    coupled = {frozenset(pair) for pair in COUPLED_NETWORKS}
    networks = [region.network for region in listed]
    is_touched = np.array([[frozenset((one, other)) in coupled for other in networks] for one in networks])
    assert change[is_touched].mean() < -0.2
    assert np.abs(change[~is_touched]).max() < 0.05


def test_equal_prevalence_makes_every_site_equally_ill_when_asked(config: PhantomConfig) -> None:
    for is_equal, expected in ((False, [0.25, 0.40, 0.60]), (True, [0.4167] * 3)):
        drawn = [draw_subject(replace(config, equal_prevalence=is_equal), index) for index in range(1500)]
        for number, prevalence in enumerate(expected):
            share = np.mean([subject.has_adhd for subject in drawn[number::3]])
            assert share == pytest.approx(prevalence, abs=0.06)


def test_time_courses_have_no_power_outside_their_band(config: PhantomConfig) -> None:
    times_s = np.arange(4000) * 1.5
    courses = band_limited(config.signal, times_s, 8, np.random.default_rng(0))
    power = np.abs(np.fft.rfft(courses * np.hanning(4000)[:, None], axis=0)) ** 2
    frequencies_hz = np.fft.rfftfreq(4000, 1.5)
    is_inside = (frequencies_hz > 0.009) & (frequencies_hz < 0.101)
    assert power[~is_inside].sum() / power.sum() < 0.01
    assert courses.var() == pytest.approx(1.0, abs=0.1)


def test_regional_anatomy_drives_grey_matter_amplitude_and_coupling(
    config: PhantomConfig, population: Population
) -> None:
    plain = draw_subject(config, 0)
    thin = replace(plain, regional_anatomy=np.full(len(regions()), -1.0))
    thick = replace(plain, regional_anatomy=np.full(len(regions()), 1.0))
    tissue = subject_tissue(config, plain, population)
    is_grey = tissue.grey > 0.6
    t1_thin, t1_thick = (t1_image(config, subject, population, tissue)[is_grey] for subject in (thin, thick))
    assert t1_thick.mean() / t1_thin.mean() == pytest.approx(1.2, abs=0.07)
    courses = [region_courses(config, subject, np.random.default_rng(0)) for subject in (thin, thick)]
    assert courses[1].std() > 1.3 * courses[0].std()
    assert np.corrcoef(courses[1].T).mean() > np.corrcoef(courses[0].T).mean()


def test_mean_bold_is_in_thousands_and_fluctuates_by_about_a_percent(
    config: PhantomConfig, population: Population
) -> None:
    subject = draw_subject(config, 0)
    tissue = subject_tissue(config, subject, population)
    is_inner = brain_voxels(tissue) & field_of_view(config, subject, population)
    bold = arrays(config, subject, population)[0][:, is_inner]
    assert 2000 < bold_mean(config, subject, population, tissue)[is_inner].mean() < 4000
    assert 0.3 < np.median(100 * bold.std(axis=0) / bold.mean(axis=0)) < 2


def test_motion_is_worse_in_restless_subjects_and_reported(written: Path, config: PhantomConfig) -> None:
    moved_mm = [framewise_displacement(draw_subject(config, index).motion)[1:].mean() for index in range(60)]
    assert 0.1 < np.median(moved_mm) < 0.3
    assert max(moved_mm) > 2 * min(moved_mm)
    people = pd.read_csv(written / "participants.tsv", sep="\t")
    assert np.allclose(people["mean_fd"], moved_mm[: config.num_subjects], atol=1e-4)


def test_region_maps_share_out_every_voxel_and_peak_at_their_centres() -> None:
    centres = np.array([region.position_mm for region in regions()], dtype=np.float32)
    maps = region_maps(centres, 14.0)
    assert np.allclose(maps.sum(axis=0), 1, atol=1e-5)
    assert (maps.argmax(axis=0) == np.arange(len(centres))).all()
    assert {"limbic", "cerebellum"} <= {region.group for region in regions()}


def test_a_finished_phantom_is_left_alone_and_another_one_refused(
    config: PhantomConfig, written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(written)
    write_phantom(replace(config, out=str(written)))
    assert "already holds" in capsys.readouterr().out
    with pytest.raises(PhantomError, match="holds a phantom of another configuration; give another out=<folder>"):
        write_phantom(replace(config, out=str(written), seed=9))
    assert contents(written) == before


def test_a_folder_of_something_else_is_refused(config: PhantomConfig, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(PhantomError, match="holds files that are not a phantom"):
        write_phantom(replace(config, out=str(tmp_path)))
    with pytest.raises(PhantomError, match=r"thesis.txt is a file; give another out=<folder>"):
        write_phantom(replace(config, out=str(tmp_path / "thesis.txt")))


def test_every_problem_of_a_configuration_is_named_at_once(config: PhantomConfig) -> None:
    slow = replace(config.sites[0], repetition_time_s=6.0)
    broken = replace(config, num_subjects=0, marker=replace(config.marker, position_mm=[-34.0, 0.0, 0.0]), sites=[slow])
    found = validate_phantom(broken)
    assert len(found) == 3
    assert "num_subjects: 0 is not positive" in found[0]
    assert "use x > 0" in found[1]
    assert "shorten the TR" in found[2]
    assert validate_phantom(config) == []
