"""Raw scans are registered once: what was found, or why nothing was, is stored in the set and counts ever after.

The registration itself is replaced here by known transforms; test_registration.py holds the real one.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from brain_models.transform import Transform
from data_sharding import schema
from data_sharding.check.verify import verify
from data_sharding.config import ShardingConfig, validate_config
from data_sharding.read.shard_set import open_set
from data_sharding.registration import register
from data_sharding.registration.ants_calls import RegistrationError
from data_sharding.registration.config import RegistrationConfig
from data_sharding.registration.register import ScanGroup
from data_sharding.write import isolation
from data_sharding.write.build import build
from data_sharding.write.isolation import Helper, answer_to
from tests.data_sharding.test_shards import contents, npy
from tests.helpers_scans import TEMPLATE, sharding_config, write_study

REGISTRATION = RegistrationConfig("affine", "mni152", "2009aSym", 4.0, 1, 0, 0.5, 0.5)
MOVED_MM = np.array([np.nan, *np.full(8, 0.2), 0.9, *np.full(10, 0.2)], dtype=np.float32)


def transform_of(moved_mm: np.ndarray | None) -> Transform:
    """A scan that lies in the template's place already."""
    return Transform("affine", "2009aSym", np.eye(4), None, None, None, moved_mm, {"similarity": 0.9})


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ShardingConfig, list[str]]:
    """A study of raw scans, and the list of what is registered; sub-02's T1 fails."""
    root = write_study(tmp_path / "study", num_subjects=3, num_frames=(20,))
    for path in sorted(root.rglob("*.nii.gz")) + sorted(root.rglob("*desc-preproc_bold.json")):
        path.rename(path.with_name(path.name.replace(f"_{TEMPLATE}_res-12_desc-preproc", "")))
    calls: list[str] = []

    def t1(path: str, config: RegistrationConfig) -> Transform:
        calls.append(Path(path).name)
        if "sub-02" in path:
            raise RegistrationError(f"{path}: similarity 0.2 is below registration.min_similarity=0.5")
        return transform_of(None)

    def bold(path: str, *, t1: str, t1_transform: Transform, config: RegistrationConfig) -> Transform:
        calls.append(Path(path).name)
        assert Path(t1).name[:6] == Path(path).name[:6]
        return transform_of(MOVED_MM)

    def here(_: Helper, group: ScanGroup, config: RegistrationConfig, folder: Path) -> dict[str, dict[str, str]]:
        return {"reasons": register.register_group(group, config, folder)}

    monkeypatch.setattr(register, "register_t1", t1)
    monkeypatch.setattr(register, "register_bold", bold)
    monkeypatch.setattr(Helper, "register", here)
    config = sharding_config(root, tmp_path / "set")
    source = replace(config.source, allow_template_mix=True)
    splits = replace(config.splits, rule="none")
    return replace(config, registration=REGISTRATION, source=source, splits=splits), calls


def test_raw_scans_are_packed_through_what_was_found_once(
    raw: tuple[ShardingConfig, list[str]], tmp_path: Path
) -> None:
    config, calls = raw
    manifest = build(config)
    t1_images = [f"sub-0{number}_T1w.nii.gz" for number in (1, 2, 3)]
    assert sorted(calls) == sorted([*t1_images, *(f"sub-0{number}_task-rest_bold.nii.gz" for number in (1, 3))])
    assert manifest.preprocessing["alignment"] == "affine"
    assert {refusal.scan_id for refusal in manifest.refused} == {"sub-02_t1", "sub-02_task-rest_bold"}
    assert all("similarity 0.2 is below registration.min_similarity" in refusal.reason for refusal in manifest.refused)
    quality = open_set(config.out).quality.set_index("scan_id")
    run = quality.loc["sub-01_task-rest_bold"]
    assert run.mean_framewise_displacement_mm == pytest.approx(np.nanmean(MOVED_MM), rel=1e-5)
    assert run.num_censored == 1
    assert npy(open_set(config.out), "sub-01_task-rest_bold", "frames.npy")[0][9, 3] == 0
    assert "transforms/sub-01_task-rest_bold.npz" in manifest.tables
    assert verify(config.out) == []
    calls.clear()
    whole = contents(Path(config.out))
    for name in ("manifest.json", "shards/000000.tar"):
        (Path(config.out) / name).unlink()
    build(config)
    assert calls == []
    assert contents(Path(config.out)) == whole


def test_registered_scans_in_place_equal_scans_given_there(
    raw: tuple[ShardingConfig, list[str]], tmp_path: Path
) -> None:
    config, _ = raw
    build(config)
    given = sharding_config(write_study(tmp_path / "given", num_subjects=3, num_frames=(20,)), tmp_path / "other")
    build(replace(given, splits=replace(given.splits, rule="none")))
    for kind in (schema.MEAN, schema.T1):
        scan_id = "sub-03_t1" if kind == schema.T1 else "sub-03_task-rest_bold"
        ours, theirs = npy(open_set(config.out), scan_id, kind)[0], npy(open_set(given.out), scan_id, kind)[0]
        np.testing.assert_allclose(ours.astype(float), theirs.astype(float), rtol=1e-3, atol=1e-3)


def test_a_child_that_somebody_killed_works_again_and_only_the_second_death_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    statuses: list[int] = []
    task = {"work": "registration", "path": "sub-01_T1w.nii", "output": str(tmp_path / "out"), "timeout_s": 1.0}

    def child(*_: object) -> int:
        (tmp_path / "out.json").write_text('{"reasons": {}}')
        (tmp_path / "out.err").write_text("Traceback\nValueError: no such level\n")
        return statuses.pop(0)

    monkeypatch.setattr(isolation, "_status_of_child", child)
    for given, outcome, unused in (
        ([9, 0, 7], {"reasons": {}}, [7]),
        (
            [9, 9, 7],
            {"reason": "sub-01_T1w.nii: registration died of SIGKILL; the file is likely damaged, check it"},
            [7],
        ),
        ([3 << 8, 7], {"reason": "sub-01_T1w.nii: registration failed: ValueError: no such level"}, [7]),
    ):
        statuses[:] = given
        assert json.loads(answer_to(task, None)) == outcome  # type: ignore[arg-type]
        assert statuses == unused


def test_a_template_that_is_not_the_spaces_must_be_allowed(raw: tuple[ShardingConfig, list[str]]) -> None:
    config, _ = raw
    strict = replace(config, source=replace(config.source, allow_template_mix=False))
    problems = "\n".join(validate_config(strict))
    assert "registration.template_name: 2009aSym, the space is in NLin6Asym" in problems
