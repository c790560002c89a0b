"""ADHD-200 on its phantom: the phenotype table as it really is, both forms, sessions apart, quality columns obeyed."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data_sharding.errors import SourceError
from data_sharding.phantoms import adhd200 as phantom
from data_sharding.phantoms.fields import bold_values
from data_sharding.sources.adhd200 import read_phenotypes
from tests.helpers_sources import AS_IT_IS, found_by, run_values, set_of, write_phantom

SUBJECTS = ["0010000", "9000137", "0010014", "9000411"]  # the phantom's, in its order


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom("adhd200", tmp_path_factory.mktemp("adhd200"), num_subjects=4)


def athena(root: Path, *overrides: str) -> list[str]:
    return ["dataset=adhd200", f"source.root={root}", "space=mni12", "splits.rule=none", *overrides]


def test_the_phenotype_table_is_typed_and_what_is_missing_is_missing(root: Path) -> None:
    table = read_phenotypes([root / "adhd200_phenotypic.csv"]).loc[SUBJECTS]
    assert table.site.tolist() == ["Peking", "NYU", "Peking", "NYU"]
    assert table.sex.tolist()[:3] == ["F", "M", "M"]
    assert pd.isna(table.sex.iloc[3])
    assert table.age.tolist()[:2] == [11.34, 8.0]
    assert np.isnan(table.age.iloc[2])
    assert table.handedness.tolist()[:2] == [1.0, 0.0]
    assert np.isnan(table.handedness.iloc[2])
    assert table.diagnosis.tolist()[:2] == ["control", "ADHD"]
    assert pd.isna(table.diagnosis.iloc[2]), "pending is no diagnosis"
    assert table.subtype.tolist()[1] == "inattentive"
    assert table.diagnosis.iloc[3] == "ADHD"
    assert table.qc_rest_2.tolist()[:2] == [0.0, 1.0]
    assert table.full_iq.tolist()[0] == 109


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("Gender,Age", "Gender,Years"), r"lacks the columns Age; give the ADHD-200 phenotype CSV"),
        (("11.34", "eleven"), r"Age holds 'eleven', neither a number nor a mark for missing"),
        (("10000,1,0", "10000,11,0"), r"Site holds 11, not one of \[1, 2"),
        (("9000137,", "10000,"), r"several rows for subject 0010000; keep one row a subject"),
        (("9000137,", "9000137b,"), r"ScanDir ID '9000137b' is not a number"),
    ],
)
def test_a_broken_phenotype_table_says_where(root: Path, tmp_path: Path, change: tuple[str, str], message: str) -> None:
    text = (root / "adhd200_phenotypic.csv").read_text()
    assert change[0] in text
    (tmp_path / "table.csv").write_text(text.replace(*change, 1))
    with pytest.raises(SourceError, match=message):
        read_phenotypes([tmp_path / "table.csv"])


def test_athena_runs_keep_sessions_apart_and_leave_out_what_failed(root: Path) -> None:
    found, _ = found_by(*athena(root))
    names = [scan.scan_id for scan in found.scans]
    assert [name for name in names if "9000137" in name] == [
        f"sub-9000137_ses-{session}_task-rest_run-{run}_bold" for session in (1, 2) for run in (1, 2)
    ]
    assert [(refusal.scan_id, refusal.reason.split(": ")[1][:45]) for refusal in found.refused] == [
        ("sub-0010000_ses-1_task-rest_run-2_bold", "qc_rest_2 of the phenotype table is 0, its qu")
    ]
    assert found.subjects.loc["9000137", "diagnosis"] == "ADHD"
    assert "1 subjects have no diagnosis (pending or missing)" in found.notes
    assert {scan.site for scan in found.scans} == {"Peking", "NYU"}
    assert len(found_by(*athena(root, "source.options.refuse_failed_quality=false"))[0].scans) == 10
    assert {scan.session for scan in found_by(*athena(root, "source.options.sessions=['2']"))[0].scans} == {"2"}


def test_athena_voxels_are_the_phantoms_and_the_table_travels_with_the_set(root: Path, tmp_path: Path) -> None:
    chosen = ["source.subjects=['0010014']", "source.options.sessions=['1']", *AS_IT_IS, "atlas=null"]
    shard_set = set_of(tmp_path / "set", *athena(root, *chosen))
    values, half_unit = run_values(shard_set, "sub-0010014_ses-1_task-rest_run-2_bold")
    positions = shard_set.space.positions_mm.astype(np.float64)
    truth = bold_values(positions, phantom.NUM_FRAMES, (0, "0010014", 1, 2)).T
    is_within = np.abs(truth - truth.mean(axis=0)) < 5.9 * 42 * half_unit
    assert is_within.mean() > 0.95
    assert (np.abs(values - truth) <= half_unit * 1.01 + 0.01)[is_within].all()
    assert pd.isna(shard_set.subjects.at["0010014", "diagnosis"])
    assert shard_set.subjects.at["0010014", "site"] == "Peking"


def test_raw_trees_need_registration_and_then_bring_their_t1(root: Path) -> None:
    raw = ["source.options.form=raw", "source.kinds=[bold,t1]"]
    with pytest.raises(SourceError, match=r"every scan was refused \(15\)[\s\S]*raw space[\s\S]*registration=affine"):
        found_by(*athena(root, *raw, "source.options.refuse_failed_quality=false"))
    found, _ = found_by(*athena(root, *raw), accepts_raw=True)
    run = next(scan for scan in found.scans if scan.scan_id == "sub-9000137_ses-2_task-rest_run-1_bold")
    assert run.is_raw
    assert Path(run.files["t1w"]).name == "sub-9000137_ses-2_T1w.nii.gz"
    assert (run.site, run.repetition_time_s) == ("NYU", 2.0)
    assert "sub-9000411_ses-1_t1" in {refusal.scan_id for refusal in found.refused}, "QC_Anatomical_1 is 0"


def test_a_subject_that_two_sites_hold_is_refused_at_both(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "RawDataBIDS", tmp_path / "RawDataBIDS")
    shutil.copy(root / "adhd200_phenotypic.csv", tmp_path)
    sites = tmp_path / "RawDataBIDS"
    shutil.copytree(sites / "NYU" / "sub-9000411", sites / "Peking" / "sub-9000411")
    raw = ["source.options.form=raw", "source.kinds=[bold]"]
    found, _ = found_by(*athena(tmp_path, *raw), accepts_raw=True)
    twice = [refusal for refusal in found.refused if "2 sites have a scan of this name" in refusal.reason]
    assert len(twice) == 4
    assert "9000411" not in {scan.subject for scan in found.scans}


def test_a_space_of_another_template_and_a_missing_table_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"the Athena runs lie in 2009aSym, the space mni12 is NLin6Asym"):
        found_by(*athena(root, "source.options.athena_template=2009aSym"))
    with pytest.raises(SourceError, match=r"no phenotype table at .*give it as source\.options\.phenotypes"):
        found_by(*athena(tmp_path))
    with pytest.raises(SourceError, match=r"source\.options\.form: 'nifti'; give raw or athena"):
        found_by(*athena(root, "source.options.form=nifti"))
