"""A served model treats a scan as the shards it learned from were treated, or refuses it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from brain_models import bundle
from brain_models.encoder import EncoderConfig
from brain_models.errors import ScanError
from brain_models.inputs import ScanInput, read_scan
from brain_models.preprocess import dequantise, measured
from data_sharding import schema
from data_sharding.config import ShardingConfig
from data_sharding.read.reader import open_set
from data_sharding.write.build import build
from tests.bundles import cubes, encoder_bundle
from tests.data_sharding.test_shards import npy
from tests.helpers_scans import NO_CLEANING, sharding_config, write_confounds, write_study

NUM_FRAMES = 90  # 180 s: two cosines slower than 128 s


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_study(tmp_path_factory.mktemp("study"), num_subjects=1, num_frames=(NUM_FRAMES,))
    for scan in root.rglob("*_bold.nii.gz"):
        write_confounds(scan, num_frames=NUM_FRAMES, num_non_steady=2, spikes=(40,))
    return root


def written(study: Path, out: Path, bold_type: str = "int8", **cleaning: object) -> ShardingConfig:
    config = sharding_config(study, out)
    config = replace(config, source=replace(config.source, kinds=["bold"]))
    config = replace(config, storage=replace(config.storage, bold_type=bold_type))  # type: ignore[arg-type]
    cleaned = replace(config.preprocessing, cleaning=replace(NO_CLEANING, **cleaning))  # type: ignore[arg-type]
    config = replace(config, preprocessing=cleaned, splits=replace(config.splits, rule="none"))
    build(config)
    return config


def served_scan(location: str, folder: Path, row: dict[str, object], **changes: object) -> ScanInput:
    """What a model reads of a scan whose bundle was made for scans like those of a set."""
    shard_set = open_set(location)
    stem = replace(cubes(shard_set.space, 2), preprocessing=shard_set.bold_preprocessing())
    stem = replace(stem, **changes)  # type: ignore[arg-type]
    config = EncoderConfig(width=8, depth=1, num_heads=2, mlp_ratio=2.0, num_frequencies=4, time_in="seconds")
    bundle.save(folder, encoder_bundle(config, {"bold": stem}, part="test"))
    return read_scan(row, bundle.load(folder).stems)


def stored_values(location: str) -> tuple[np.ndarray, np.ndarray]:
    """What the shards hold of sub-01: values in robust units, and which voxels were measured."""
    chunks = npy(open_set(location), "sub-01_task-rest_bold", schema.BOLD)
    return dequantise(np.concatenate(chunks)), measured(chunks[0])


@pytest.mark.parametrize(("filter_name", "bold_type"), [("cosine", "int8"), ("butterworth", "float16")])
def test_a_served_scan_equals_its_shard(study: Path, tmp_path: Path, filter_name: str, bold_type: str) -> None:
    low_pass_hz = 0.1 if filter_name == "butterworth" else None
    cleaning = {
        "filter": filter_name,
        "low_pass_hz": low_pass_hz,
        "high_pass_hz": 1 / 128,
        "confounds": ["motion6", "csf"],
    }
    location = written(study, tmp_path / "set", bold_type=bold_type, **cleaning).out
    scan = next((study / "sub-01").rglob("*_bold.nii.gz"))
    confounds = str(next(scan.parent.glob("*confounds*.tsv")))
    row = {"bold": str(scan), "repetition_time_s": 2.0, "confounds": confounds}
    served = served_scan(location, tmp_path / "bundle", row)
    expected, expected_measured = stored_values(location)
    assert served.values.shape[1] == NUM_FRAMES - 2
    np.testing.assert_array_equal(served.values[0].numpy(), expected)
    np.testing.assert_array_equal(served.is_measured[0].numpy(), expected_measured)
    assert (served.stem, float(served.repetition_time_s)) == ("bold", 2.0)
    quality = open_set(location).quality.set_index("scan_id").loc["sub-01_task-rest_bold"]
    assert quality.num_dropped == 2
    assert quality.num_censored == 1
    assert open_set(location).runs("bold", ["train"]).censored.tolist() == ["38"]


def test_a_scan_without_its_confounds_is_refused_where_they_mattered(study: Path, tmp_path: Path) -> None:
    scan = next((study / "sub-01").rglob("*_bold.nii.gz"))
    row: dict[str, object] = {"bold": str(scan), "repetition_time_s": 2.0}
    regressed = written(study, tmp_path / "regressed", confounds=["motion6"]).out
    with pytest.raises(ScanError, match=r"this model saw runs cleaned .*\(motion6\); add a column confounds"):
        served_scan(regressed, tmp_path / "first", row)
    dropped = written(study, tmp_path / "dropped", high_pass_hz=1 / 128).out
    with pytest.raises(ScanError, match=r"\(first frames dropped\); add a column confounds"):
        served_scan(dropped, tmp_path / "second", row)
    drifts = written(study, tmp_path / "drifts", high_pass_hz=1 / 128, non_steady_state="keep").out
    values = served_scan(drifts, tmp_path / "third", row).values
    np.testing.assert_array_equal(values[0].numpy(), stored_values(drifts)[0])
    assert not open_set(drifts).bold_preprocessing().needs_confounds
    uncleaned = served_scan(drifts, tmp_path / "fourth", row, preprocessing=None).values
    assert float((uncleaned - values).abs().max()) > 0.1
