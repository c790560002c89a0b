"""BIDS derivatives are found by rule, and what cannot be used is refused with a reason that says what to do."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from brain_models.space import volume_space
from data_sharding import sources
from data_sharding.config import PrivacyConfig, SourceConfig
from data_sharding.errors import SourceError
from data_sharding.scans import Found, scan_id_of
from tests import helpers_scans
from tests.helpers_scans import TEMPLATE, bold_values, save_nifti, write_bold, write_study, write_t1

SPACE = volume_space(helpers_scans.SPACE)


def source(root: Path) -> SourceConfig:
    return SourceConfig(
        "bids",
        str(root),
        ["bold", "t1"],
        subjects=None,
        tasks=None,
        allow_template_mix=False,
        options={"echo": None, "sessions": None},
    )


def found_in(root: Path) -> Found:
    return found_by(source(root))


def found_by(config: SourceConfig) -> Found:
    privacy = PrivacyConfig(key_file=None, sidecar_fields=[], participant_columns=None)
    return sources.find(config, privacy, SPACE, accepts_raw=False)


def test_scans_subjects_and_typed_participants_are_found(tmp_path: Path) -> None:
    found = found_in(write_study(tmp_path, num_subjects=3))
    assert [scan.scan_id for scan in found.scans if scan.kind == "bold"] == [
        f"sub-{number:02d}_task-rest_bold" for number in (1, 2, 3)
    ]
    first = found.scans[0]
    assert (first.subject, first.site, first.repetition_time_s, first.num_frames) == ("01", "B", 2.0, 18)
    assert found.subjects.age.dtype == np.float64
    assert pd.isna(found.subjects.at["02", "age"])
    assert found.subjects.diagnosis.tolist() == ["control", "control", "ADHD"]
    assert found.refused == []


def test_the_repetition_time_is_inherited_and_the_nearest_sidecar_wins(tmp_path: Path) -> None:
    write_bold(tmp_path, "01", sidecar=False)
    write_bold(tmp_path, "02", sidecar=False)
    (tmp_path / "task-rest_bold.json").write_text(json.dumps({"RepetitionTime": 2.5}))
    (tmp_path / "task-other_bold.json").write_text(json.dumps({"RepetitionTime": 9.0}))
    (tmp_path / "sub-02" / "sub-02_bold.json").write_text(json.dumps({"RepetitionTime": 1.5}))
    assert [scan.repetition_time_s for scan in found_in(tmp_path).scans] == [2.5, 1.5]


def test_the_header_gives_the_repetition_time_where_no_sidecar_does(tmp_path: Path) -> None:
    path = tmp_path / "sub-01" / "func" / f"sub-01_task-rest_{TEMPLATE}_desc-preproc_bold.nii.gz"
    save_nifti(path, bold_values(0, 5), repetition_time_s=1.75)
    assert found_in(tmp_path).scans[0].repetition_time_s == 1.75


def test_of_several_spaces_and_resolutions_the_fitting_one_is_taken_and_named(tmp_path: Path) -> None:
    path = write_bold(tmp_path, "01")
    for space in ("space-T1w", "space-MNI152NLin2009cAsym", ""):
        other = path.with_name(path.name.replace(f"{TEMPLATE}_res-12", space).replace("__", "_"))
        save_nifti(other, bold_values(0, 3))
    found = found_in(tmp_path)
    assert [scan.path for scan in found.scans] == [path]
    assert found.notes == [
        f"1 scans: bold {TEMPLATE} res-12, chosen over space-MNI152NLin2009cAsym, space-T1w, space-none"
    ]


def test_a_mask_beside_the_scan_is_used(tmp_path: Path) -> None:
    path = write_bold(tmp_path, "01")
    mask = path.with_name(path.name.replace("desc-preproc_bold", "desc-brain_mask"))
    save_nifti(mask, np.ones(bold_values(0, 1).shape[:3], dtype=np.uint8))
    assert found_in(tmp_path).scans[0].brain_mask == mask


def test_nothing_found_says_what_was_looked_for_and_where(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"nothing found\. Looked for sub-\*/.*desc-preproc_T1w\.nii.*_bold\.nii"):
        found_in(tmp_path)
    with pytest.raises(SourceError, match=r"nowhere is not a folder; give the top of a BIDS tree"):
        found_in(tmp_path / "nowhere")
    write_t1(tmp_path, "01")
    with pytest.raises(SourceError, match=r"source\.subjects and source\.tasks narrow it"):
        found_by(replace(source(tmp_path), subjects=["09"]))


def test_a_raw_space_scan_is_refused_with_a_hint(tmp_path: Path) -> None:
    save_nifti(tmp_path / "sub-01" / "func" / "sub-01_task-rest_bold.nii.gz", bold_values(0, 5))
    with pytest.raises(SourceError, match=r"all 1 scans were refused[\s\S]*raw space[\s\S]*fMRIPrep --output-spaces"):
        found_in(tmp_path)


def test_another_template_is_refused_unless_allowed(tmp_path: Path) -> None:
    path = write_bold(tmp_path, "01")
    path.rename(path.with_name(path.name.replace("NLin6Asym", "NLin2009cAsym")))
    (tmp_path / "task-rest_bold.json").write_text(json.dumps({"RepetitionTime": 2.0}))
    with pytest.raises(SourceError, match=r"lies in MNI152NLin2009cAsym, the space needs MNI152NLin6Asym"):
        found_in(tmp_path)
    allowed = found_by(replace(source(tmp_path), allow_template_mix=True))
    assert len(allowed.scans) == 1


def test_bad_scans_are_refused_one_by_one_with_their_reason(tmp_path: Path) -> None:
    write_t1(tmp_path, "01")
    write_bold(tmp_path, "02", sidecar=False)
    broken = write_bold(tmp_path, "03")
    broken.write_bytes(b"<html>404 Not Found</html>")
    save_nifti(write_bold(tmp_path, "04"), bold_values(0, 1)[..., 0])
    (write_bold(tmp_path, "05").with_name("sub-05_bold.json")).write_text('{"RepetitionTime": "two"}')
    named = write_bold(tmp_path, "05").name.removesuffix(".nii.gz")
    (tmp_path / "sub-05" / "func" / f"{named}.json").unlink()
    found = found_in(tmp_path)
    assert [scan.scan_id for scan in found.scans] == ["sub-01_t1"]
    reasons = {refusal.scan_id[4:6]: refusal.reason for refusal in found.refused}
    assert "no repetition time" in reasons["02"]
    assert "add sub-02" in reasons["02"]
    assert "not NIfTI" in reasons["03"]
    assert "3D image" in reasons["04"]
    assert "RepetitionTime 'two' in its sidecar is not a time" in reasons["05"]


def test_participants_must_be_one_row_a_subject(tmp_path: Path) -> None:
    write_t1(tmp_path, "01")
    (tmp_path / "participants.tsv").write_text("participant_id\tage\nsub-01\t20\nsub-01\t21\n")
    with pytest.raises(SourceError, match="several rows for 01"):
        found_in(tmp_path)
    (tmp_path / "participants.tsv").write_text("id\tage\nsub-01\t20\n")
    with pytest.raises(SourceError, match="no column participant_id"):
        found_in(tmp_path)


def test_scan_ids_are_safe_and_never_merge_two_scans() -> None:
    plain = scan_id_of({"sub": "01", "task": "rest", "run": "1"}, "bold")
    assert plain == "sub-01_task-rest_run-1_bold"
    odd = [scan_id_of({"sub": subject}, "t1") for subject in ("a.b", "ab", "a/../b", "x" * 200, "x" * 201)]
    assert len(set(odd)) == len(odd)
    assert all(len(name) <= 80 and not set(name) & set("./\\ ") for name in odd)
