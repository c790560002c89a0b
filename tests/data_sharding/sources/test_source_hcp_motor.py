"""HCP motor on its phantom: events as in the EV files, band-passed vertices of a mask, from CIFTI and GIFTI."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from nilearn.signal import clean

from data_sharding.errors import SourceError
from data_sharding.phantoms import hcp_motor as phantom
from data_sharding.phantoms.bids import FSLR_VERTICES, fslr_cortex
from data_sharding.phantoms.fields import cifti_axis, vertex_values
from data_sharding.schema import Event
from data_sharding.write.prepare import prepare
from tests.helpers_sources import AS_IT_IS, config_of, events_of, found_by, run_values, set_of, write_phantom

SOMATOMOTOR = 2  # Yeo-7's number of the network


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom("hcp_motor", tmp_path_factory.mktemp("hcp"), num_subjects=2)


def motor(root: Path, *overrides: str) -> list[str]:
    vertices = f"space.vertices=[{root}/group/yeo7.dlabel.nii]"
    return ["dataset=hcp_motor", f"source.root={root}", vertices, "splits.rule=none", *overrides]


def test_vertices_of_a_network_come_back_band_passed_and_detrended(root: Path, tmp_path: Path) -> None:
    sides = ",".join(f"{root}/group/{side}.midthickness.32k_fs_LR.surf.gii" for side in "LR")
    meshes = f"space.surfaces=[{sides}]"
    overrides = [f"space.labels=[{SOMATOMOTOR}]", meshes, "source.subjects=['100307']"]
    shard_set = set_of(tmp_path / "set", *motor(root, *overrides))
    num_cortex = sum(int(mask.sum()) for mask in fslr_cortex())
    is_wanted = 1 + np.arange(num_cortex) % 7 == SOMATOMOTOR
    assert shard_set.space.num_voxels == is_wanted.sum()
    assert np.allclose(np.linalg.norm(shard_set.space.positions_mm, axis=1), 60, atol=1e-3)
    assert shard_set.runs("bold", ["train"]).num_frames.tolist() == [phantom.NUM_FRAMES] * 2
    raw = vertex_values(len(cifti_axis(fslr_cortex())), phantom.NUM_FRAMES, (0, "100307", "RL"))[:, :num_cortex][
        :, is_wanted
    ]
    filtered = clean(
        raw.astype(np.float64),
        detrend=True,
        standardize=None,
        low_pass=0.15,
        high_pass=0.01,
        t_r=phantom.REPETITION_TIME_S,
    )
    values, half_unit = run_values(shard_set, "sub-100307_task-motor_dir-RL_bold")
    assert (np.abs(values - (filtered + raw.mean(axis=0))) < 1.01 * half_unit + 0.01).mean() > 0.999
    planned = prepare(config_of("out=unused", *motor(root, *overrides))).plan.num_bytes
    assert planned == shard_set.manifest.counts["bytes"], "events have their place in the plan"
    hands = [event for event in events_of(shard_set, "sub-100307_task-motor_dir-LR_bold") if "hand" in event.name]
    assert hands == [
        Event(11.0, 12.0, "right_hand"),
        Event(71.0, 12.0, "left_hand"),
        Event(132.0, 12.0, "right_hand"),
        Event(162.0, 12.0, "left_hand"),
    ]


def test_both_directions_are_runs_and_families_come_from_the_table(root: Path) -> None:
    found, space = found_by(*motor(root, f"source.options.subjects_table={root}/subjects.csv"))
    assert [scan.scan_id for scan in found.scans] == [
        f"sub-{subject}_task-motor_dir-{direction}_bold" for subject in (100307, 100408) for direction in ("LR", "RL")
    ]
    assert {scan.repetition_time_s for scan in found.scans} == {0.72}
    assert found.subjects["Family_ID"].tolist() == ["fam0", "fam0"]
    assert space.num_voxels == sum(int(mask.sum()) for mask in fslr_cortex())
    assert np.isnan(space.positions_mm).all(), "no surface was given, so no place is known"


def test_gifti_runs_hold_the_same_vertices_by_number(root: Path, tmp_path: Path) -> None:
    overrides = ["source.options.files=gifti", "source.subjects=['100307']", "acceptance.max_refused_fraction=0.5"]
    as_it_is = ["preprocessing.cleaning.detrend=false", "preprocessing.cleaning.low_pass_hz=null"]
    as_it_is += ["preprocessing.cleaning.filter=cosine", *AS_IT_IS]
    shard_set = set_of(tmp_path / "set", *motor(root, *overrides, *as_it_is))
    assert [refusal.scan_id for refusal in shard_set.manifest.refused] == ["sub-100307_task-motor_dir-RL_bold"]
    assert "0 files tfMRI_MOTOR_RL.L.*func.gii" in shard_set.manifest.refused[0].reason
    values, half_unit = run_values(shard_set, "sub-100307_task-motor_dir-LR_bold")
    sides = [vertex_values(FSLR_VERTICES, 20, (0, "gifti", side)) for side in "LR"]
    truth = np.concatenate([side[:, mask] for side, mask in zip(sides, fslr_cortex(), strict=True)], axis=1)
    assert (np.abs(values - truth) <= half_unit * 1.01 + 0.01).mean() > 0.99


def test_a_run_without_its_events_is_refused_and_a_broken_line_is_named(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "hcp")
    folder = tmp_path / "hcp" / "100307" / "MNINonLinear" / "Results"
    (folder / "tfMRI_MOTOR_LR" / "EVs" / "lh.txt").unlink()
    (folder / "tfMRI_MOTOR_RL" / "EVs" / "t.txt").write_text("11.0\t-12.0\t1\n")
    reasons = {refusal.scan_id[-7:-5]: refusal.reason for refusal in found_by(*motor(tmp_path / "hcp"))[0].refused}
    assert "lh.txt: cannot be read (No such file or directory); fetch the run's EVs folder" in reasons["LR"]
    assert "line [11.0, -12.0, 1.0] is not onset, duration and 1" in reasons["RL"]


def test_volumes_and_other_folders_are_refused_with_what_to_set(root: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"read on their surface; set space=fslr32k with space\.vertices"):
        found_by("dataset=hcp_motor", "space=mni12", f"source.root={root}")
    with pytest.raises(SourceError, match=r"no \*/MNINonLinear/Results/tfMRI_MOTOR_\*"):
        found_by("dataset=hcp_motor", f"source.root={tmp_path}", f"space.vertices=[{root}/group/yeo7.dlabel.nii]")
