"""The BIDS source on its phantom: choices by rule, refusals with reasons, volumes and surfaces with known values."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from brain_models.surfaces import SurfaceSpaceConfig, surface_space
from data_sharding import schema, sources
from data_sharding.errors import SourceError
from data_sharding.phantoms import bids as phantom
from data_sharding.phantoms.fields import bold_values, vertex_values
from data_sharding.scans import SourceContents, scan_id_of
from data_sharding.schema import Event
from data_sharding.sources.bids_files import is_by_fmriprep
from data_sharding.write.prepare import prepare
from data_sharding.write.tables import alignment_of
from tests.helpers_scans import TEMPLATE, save_nifti, write_bold, write_t1
from tests.helpers_scans import bold_values as scan_values
from tests.helpers_sources import AS_IT_IS, array, config_of, events_of, found_by, run_values, set_of, write_phantom

RUN = "sub-01_ses-1_task-rest_run-1"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom("bids", tmp_path_factory.mktemp("bids"))


def volumes(root: Path, *overrides: str) -> SourceContents:
    return found_by("dataset=bids", f"source.root={root}", "space=mni12", *overrides)[0]


def reasons(found: SourceContents) -> dict[str, str]:
    return {refusal.scan_id: refusal.reason for refusal in found.refused}


def test_sessions_and_runs_are_scans_of_their_own_and_choices_are_said(root: Path) -> None:
    found = volumes(root)
    of_subject = [scan.scan_id for scan in found.scans if scan.subject == "01"]
    assert of_subject == [
        f"{RUN}_bold",
        "sub-01_ses-1_task-rest_run-2_bold",
        "sub-01_ses-2_task-rest_run-1_bold",
        "sub-01_ses-1_t1",
    ]
    chosen_over = "chosen over space-MNI152NLin2009cAsym res-12, space-MNI152NLin6Asym res-18"
    assert f"1 scans: bold space-MNI152NLin6Asym res-12, {chosen_over}" in found.notes
    assert [scan.scan_id for scan in volumes(root, "source.options.sessions=['2']").scans] == [
        "sub-01_ses-2_task-rest_run-1_bold"
    ]


def test_echoes_parts_and_raw_scans_follow_their_rules(root: Path) -> None:
    found = volumes(root)
    taken = {scan.scan_id for scan in found.scans if scan.subject == "02"}
    assert {"sub-02_task-combined_bold", "sub-02_task-parts_bold"} <= taken
    assert "1 scans: bold space-MNI152NLin6Asym res-12, combined over echoes 1, 2" in found.notes
    assert set(reasons(found)) == {
        "sub-02_task-echoes_bold",
        "sub-02_task-parts_part-phase_bold",
        "sub-02_task-raw_bold",
    }
    assert "has echoes 1, 2 and no combination" in reasons(found)["sub-02_task-echoes_bold"]
    assert "part-phase is not a magnitude image" in reasons(found)["sub-02_task-parts_part-phase_bold"]
    assert "register it first" in reasons(found)["sub-02_task-raw_bold"]
    with_echo = volumes(root, "source.options.echo='2'")
    scan = next(scan for scan in with_echo.scans if scan.task == "echoes")
    assert scan.scan_id == "sub-02_task-echoes_echo-2_bold"
    assert "_echo-2_" in Path(scan.path).name
    assert "not source.options.echo=9" in reasons(volumes(root, "source.options.echo='9'"))["sub-02_task-echoes_bold"]


def test_raw_scans_are_handed_on_with_their_t1_only_where_they_will_be_registered(root: Path, tmp_path: Path) -> None:
    overrides = ("dataset=bids", f"source.root={root}", "space=mni12")
    refused = reasons(found_by(*overrides, accepts_raw=True)[0])["sub-02_task-raw_bold"]
    assert "has no T1w image to register it through" in refused
    phantom._bold(tmp_path, "sub-07_ses-1_task-raw_bold", 0)
    phantom._t1(tmp_path, "sub-07_ses-2_T1w", 0)
    phantom._t1(tmp_path, "sub-07_ses-1_T1w", 0)
    found = found_by("dataset=bids", f"source.root={tmp_path}", "space=mni12", accepts_raw=True)[0]
    run = next(scan for scan in found.scans if scan.kind == "bold")
    assert run.is_raw
    assert Path(run.files["t1w"]).name == "sub-07_ses-1_T1w.nii.gz"


def test_participants_events_confounds_and_allowed_sidecar_fields_are_joined(root: Path) -> None:
    found = volumes(root)
    assert found.subjects.loc[["01", "02"], "sex"].tolist() == ["male", "female"]
    assert found.subjects.age.dtype == np.float64
    assert np.isnan(found.subjects.at["02", "age"])
    run = next(scan for scan in found.scans if scan.scan_id == f"{RUN}_bold")
    assert run.events == [Event(2.0, 1.5, "face"), Event(6.0, 1.5, "house")]
    assert run.confounds is not None
    assert Path(run.confounds).name == f"{RUN}_desc-confounds_timeseries.tsv"
    assert run.sidecar == {"RepetitionTime": 2.0, "EchoTime": 0.03, "TaskName": "rest"}  # not InstitutionName
    assert (run.site, run.repetition_time_s, run.num_frames) == ("B", 2.0, phantom.NUM_FRAMES)


def test_voxels_come_back_as_the_phantoms_field_at_their_places(root: Path, tmp_path: Path) -> None:
    overrides = ["dataset=bids", f"source.root={root}", "space=mni6", "atlas=null", "splits.rule=none", *AS_IT_IS]
    chosen = ["source.kinds=[bold]", "source.subjects=['03']", "acceptance.max_refused_fraction=1"]
    shard_set = set_of(tmp_path / "set", *overrides, *chosen)
    scan_id = "sub-03_ses-1_task-rest_run-1_bold"
    values, half_unit = run_values(shard_set, scan_id)
    truth = bold_values(shard_set.space.positions_mm.astype(np.float64), phantom.NUM_FRAMES, (0, scan_id[:-5]))
    is_measured = np.isfinite(values[0])
    assert is_measured.mean() > 0.9
    error = np.abs(values - truth.T)[:, is_measured]
    is_clipped = np.abs(truth.T - truth.mean(axis=1))[:, is_measured] > 6 * 42 * half_unit[is_measured]
    assert ((error <= half_unit[is_measured] * 1.01 + 0.01) | is_clipped).all()
    assert is_clipped.mean() < 0.05
    assert events_of(shard_set, scan_id) == []


def test_a_gifti_pair_becomes_a_run_on_fsaverage5(root: Path, tmp_path: Path) -> None:
    overrides = ["dataset=bids", f"source.root={root}", "source.kinds=[bold]", "space=fsaverage5", "atlas=null"]
    shard_set = set_of(tmp_path / "set", *overrides, "splits.rule=none", *AS_IT_IS)
    assert shard_set.space.kind == "surface"
    assert shard_set.runs("bold", ["train"]).scan_id.tolist() == [f"{RUN}_bold"]
    values, half_unit = run_values(shard_set, f"{RUN}_bold")
    truth = vertex_values(2 * phantom.FSAVERAGE5_VERTICES, phantom.NUM_FRAMES, (0, RUN))
    assert np.median(np.abs(values - truth) / half_unit) < 1
    assert (np.abs(values - truth) <= half_unit * 1.01 + 0.01).mean() > 0.99
    assert [event.name for event in events_of(shard_set, f"{RUN}_bold")] == ["face", "house"]


def test_a_cifti_run_is_found_on_fslr_and_a_mesh_of_another_size_is_refused(root: Path, tmp_path: Path) -> None:
    folder = root / "sub-01" / "ses-1" / "func"
    cifti = folder / f"{RUN}_space-fsLR_den-91k_bold.dtseries.nii"
    overrides = ["dataset=bids", f"source.root={root}", "source.kinds=[bold]", "space=fslr32k"]
    found, space = found_by(*overrides, f"space.vertices=[{cifti}]")
    assert [scan.path for scan in found.scans] == [str(cifti)]
    assert (found.scans[0].repetition_time_s, found.scans[0].num_frames) == (2.0, phantom.NUM_FRAMES)
    assert space.num_voxels == sum(mask.sum() for mask in phantom.fslr_cortex())
    np.save(tmp_path / "few.npy", np.ones(642))
    few = surface_space(SurfaceSpaceConfig("few", "fsLR", [], [str(tmp_path / "few.npy")] * 2, []))
    config = config_of(*overrides[:3], "out=unused")
    with pytest.raises(SourceError, match=r"meshes of \[10242\] vertices, the space few has 642 on that side"):
        sources.find(config.source, config.privacy, replace(few, template="fsaverage5"), accepts_raw=False)


def test_a_run_in_its_persons_own_space_is_no_rival_of_one_in_the_template(tmp_path: Path) -> None:
    path = write_bold(tmp_path, "01")
    for space in ("space-T1w", ""):
        other = path.with_name(path.name.replace(f"{TEMPLATE}_res-12", space).replace("__", "_"))
        save_nifti(other, scan_values(0, 3))
    found = volumes(tmp_path)
    assert [scan.path for scan in found.scans] == [str(path)]
    assert found.notes == [f"1 scans: bold {TEMPLATE} res-12, chosen over space-T1w, space-none"]


def test_the_repetition_time_is_inherited_and_the_nearest_sidecar_wins(tmp_path: Path) -> None:
    write_bold(tmp_path, "01", sidecar=False)
    write_bold(tmp_path, "02", sidecar=False)
    (tmp_path / "task-rest_bold.json").write_text(json.dumps({"RepetitionTime": 2.5}))
    (tmp_path / "task-other_bold.json").write_text(json.dumps({"RepetitionTime": 9.0}))
    (tmp_path / "sub-02" / "sub-02_bold.json").write_text(json.dumps({"RepetitionTime": 1.5}))
    assert [scan.repetition_time_s for scan in volumes(tmp_path).scans] == [2.5, 1.5]


def test_the_header_gives_the_repetition_time_where_no_sidecar_does(tmp_path: Path) -> None:
    path = tmp_path / "sub-01" / "func" / f"sub-01_task-rest_{TEMPLATE}_desc-preproc_bold.nii.gz"
    save_nifti(path, scan_values(0, 5), repetition_time_s=1.75)
    assert volumes(tmp_path).scans[0].repetition_time_s == 1.75


def test_a_mask_beside_the_scan_is_used(tmp_path: Path) -> None:
    path = write_bold(tmp_path, "01")
    mask = path.with_name(path.name.replace("desc-preproc_bold", "desc-brain_mask"))
    save_nifti(mask, np.ones(scan_values(0, 1).shape[:3], dtype=np.uint8))
    assert volumes(tmp_path).scans[0].brain_mask == str(mask)


def test_nothing_found_says_what_was_looked_for_and_where(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no scan found\. Looked for sub-\*/.*desc-preproc_T1w\.nii.*_bold\.nii"):
        volumes(tmp_path)
    with pytest.raises(SourceError, match=r"nowhere is not a folder; give the top of a BIDS tree"):
        volumes(tmp_path / "nowhere")
    write_t1(tmp_path, "01")
    with pytest.raises(SourceError, match=r"source\.subjects and source\.tasks narrow it"):
        volumes(tmp_path, "source.subjects=['09']")


def test_a_raw_space_scan_is_refused_with_a_hint(tmp_path: Path) -> None:
    save_nifti(tmp_path / "sub-01" / "func" / "sub-01_task-rest_bold.nii.gz", scan_values(0, 5))
    with pytest.raises(
        SourceError, match=r"every scan was refused \(1\)[\s\S]*raw space[\s\S]*fMRIPrep --output-spaces"
    ):
        volumes(tmp_path)


def test_another_template_is_refused_unless_allowed(tmp_path: Path) -> None:
    path = write_bold(tmp_path, "01")
    path.rename(path.with_name(path.name.replace("NLin6Asym", "NLin2009cAsym")))
    (tmp_path / "task-rest_bold.json").write_text(json.dumps({"RepetitionTime": 2.0}))
    with pytest.raises(SourceError, match=r"lies in MNI152NLin2009cAsym, the space needs MNI152NLin6Asym"):
        volumes(tmp_path)
    allowed = volumes(tmp_path, "source.allow_template_mix=true")
    assert len(allowed.scans) == 1


def test_bad_scans_are_refused_one_by_one_with_their_reason(tmp_path: Path) -> None:
    write_t1(tmp_path, "01")
    write_bold(tmp_path, "02", sidecar=False)
    broken = write_bold(tmp_path, "03")
    broken.write_bytes(b"<html>404 Not SourceContents</html>")
    save_nifti(write_bold(tmp_path, "04"), scan_values(0, 1)[..., 0])
    (write_bold(tmp_path, "05").with_name("sub-05_bold.json")).write_text('{"RepetitionTime": "two"}')
    named = write_bold(tmp_path, "05").name.removesuffix(".nii.gz")
    (tmp_path / "sub-05" / "func" / f"{named}.json").unlink()
    found = volumes(tmp_path)
    assert [scan.scan_id for scan in found.scans] == ["sub-01_t1"]
    reason_of = {refusal.scan_id[4:6]: refusal.reason for refusal in found.refused}
    assert "no repetition time" in reason_of["02"]
    assert "add sub-02" in reason_of["02"]
    assert "not NIfTI" in reason_of["03"]
    assert "3D image" in reason_of["04"]
    assert "RepetitionTime 'two' in its sidecar is not a time" in reason_of["05"]


def test_participants_must_be_one_row_a_subject(tmp_path: Path) -> None:
    write_t1(tmp_path, "01")
    (tmp_path / "participants.tsv").write_text("participant_id\tage\nsub-01\t20\nsub-01\t21\n")
    with pytest.raises(SourceError, match="several rows for 01"):
        volumes(tmp_path)
    (tmp_path / "participants.tsv").write_text("id\tage\nsub-01\t20\n")
    with pytest.raises(SourceError, match="no column participant_id"):
        volumes(tmp_path)


def test_scan_ids_are_safe_and_never_merge_two_scans() -> None:
    plain = scan_id_of({"sub": "01", "task": "rest", "run": "1"}, "bold")
    assert plain == "sub-01_task-rest_run-1_bold"
    odd = [scan_id_of({"sub": subject}, "t1") for subject in ("a.b", "ab", "a/../b", "x" * 200, "x" * 201)]
    assert len(set(odd)) == len(odd)
    assert all(len(name) <= 80 and not set(name) & set("./\\ ") for name in odd)


def test_folders_that_are_no_subjects_and_broken_tables_are_named(tmp_path: Path) -> None:
    phantom._t1(tmp_path, f"sub-01_{phantom.TEMPLATE}_T1w", 0)
    (tmp_path / "sub-0..1").mkdir()
    found = volumes(tmp_path)
    assert [refusal.reason for refusal in found.refused] == [
        f"{tmp_path}/sub-0..1: not a BIDS subject folder (sub- and letters or digits only); rename it and its files"
    ]
    phantom._bold(tmp_path, f"sub-01_task-rest_{phantom.TEMPLATE}_bold", 0)
    (tmp_path / "task-rest_events.tsv").write_text("start\tduration\n1\t2\n")
    assert "it needs onset and duration" in reasons(volumes(tmp_path))["sub-01_task-rest_bold"]
    (tmp_path / "task-rest_events.tsv").write_text("onset\tduration\nsoon\t2\n")
    assert "onset and duration are times in seconds" in reasons(volumes(tmp_path))["sub-01_task-rest_bold"]


def test_unknown_sources_and_options_are_refused_with_what_is_known(root: Path) -> None:
    with pytest.raises(
        SourceError, match=r"source\.kind: 'bidz' is not one of adhd200, algonauts2023, bids, hcp_motor"
    ):
        volumes(root, "source.kind=bidz")
    with pytest.raises(SourceError, match=r"source\.options\.ecko: unknown key, did you mean echo"):
        volumes(root, "+source.options.ecko=1")


def test_a_data_dictionary_with_missing_levels_leaves_the_codes(tmp_path: Path) -> None:
    phantom._t1(tmp_path, f"sub-01_{phantom.TEMPLATE}_T1w", 0)
    (tmp_path / "participants.tsv").write_text("participant_id\tgroup\nsub-01\t3\n")
    (tmp_path / "participants.json").write_text(json.dumps({"group": {"Levels": {"1": "a"}}}))
    assert volumes(tmp_path).subjects.at["01", "group"] == 3


ANTS = [{"Name": "ANTs"}]
FMRIPREP = [{"Name": "fMRIPrep", "Version": "23.2.0"}]


@pytest.mark.parametrize(
    ("described", "alignment"),
    [
        ({"DatasetType": "derivative", "GeneratedBy": FMRIPREP}, "fmriprep"),
        ({"DatasetType": "derivative", "GeneratedBy": ANTS + FMRIPREP}, "fmriprep"),
        ({"PipelineDescription": {"Name": "fmriprep"}}, "fmriprep"),  # as it was written until version 20.1
        ({"DatasetType": "derivative", "GeneratedBy": ANTS}, "given"),
        ({"DatasetType": "raw", "GeneratedBy": FMRIPREP}, "given"),
        ({}, "given"),
    ],
)
def test_who_brought_scans_to_their_template_is_read_from_their_folders_description(
    tmp_path: Path, described: dict[str, object], alignment: str
) -> None:
    phantom._t1(tmp_path, f"sub-01_{phantom.TEMPLATE}_T1w", 0)
    (tmp_path / "dataset_description.json").write_text(json.dumps({"Name": "a study"} | described))
    config = config_of("out=unused", "dataset=bids", f"source.root={tmp_path}", "space=mni12")
    found = volumes(tmp_path)
    assert alignment_of(found, config) == alignment


def test_one_scan_that_fmriprep_did_not_make_leaves_the_set_given(tmp_path: Path) -> None:
    for folder, maker in (("fmriprep", FMRIPREP), ("other", ANTS)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "dataset_description.json").write_text(json.dumps({"Name": folder, "GeneratedBy": maker}))
    assert is_by_fmriprep(tmp_path / "fmriprep" / "sub-01" / "scan.nii", root=tmp_path)
    assert not is_by_fmriprep(tmp_path / "other" / "sub-01" / "scan.nii", root=tmp_path)
    assert not is_by_fmriprep(tmp_path / "scan.nii", root=tmp_path)
    phantom._t1(tmp_path / "fmriprep", f"sub-01_{phantom.TEMPLATE}_T1w", 0)
    phantom._t1(tmp_path / "fmriprep", f"sub-02_{phantom.TEMPLATE}_T1w", 0)
    found = volumes(tmp_path / "fmriprep")
    config = config_of("out=unused", "dataset=bids", f"source.root={tmp_path}", "space=mni12")
    assert alignment_of(found, config) == "fmriprep"
    found.scans[1].is_fmriprep = False
    assert alignment_of(found, config) == "given"


def test_the_plan_knows_the_bytes_of_events_series_and_dropped_frames(root: Path, tmp_path: Path) -> None:
    table = root / "sub-01" / "ses-1" / "func" / f"{RUN}_desc-confounds_timeseries.tsv"
    rows = table.read_text().splitlines()
    marked = [f"{row}\t{text}" for row, text in zip(rows, ["non_steady_state_outlier00", "1", *"0" * 30], strict=False)]
    table.write_text("\n".join(marked) + "\n")
    narrow = ["source.subjects=['01']", "source.options.sessions=['1']", "source.kinds=[bold,parcels]"]
    overrides = ["dataset=bids", f"source.root={root}", "space=mni12", "splits.rule=none", *narrow]
    shard_set = set_of(tmp_path / "set", *overrides)
    runs = shard_set.runs("bold", ["train"]).set_index("scan_id").num_frames
    assert runs.to_dict() == {f"{RUN}_bold": 19, "sub-01_ses-1_task-rest_run-2_bold": 20}
    assert events_of(shard_set, f"{RUN}_bold")[0] == Event(0.0, 1.5, "face"), "one frame of 2 s was dropped"
    assert len(array(shard_set, f"{RUN}_parcels", schema.PARCELS)) == 19
    assert prepare(config_of("out=unused", *overrides)).plan.num_bytes == shard_set.manifest.counts["bytes"]
