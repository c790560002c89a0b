"""MICA-MICs on its phantom: the cube around a head, region series beside the voxels, one T1w a session."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_sharding import schema
from data_sharding.errors import ShardError, SourceError
from data_sharding.phantoms import mica_mics as phantom
from data_sharding.phantoms.fields import bold_values
from data_sharding.read.shard_set import ShardSet
from data_sharding.write.prepare import prepare
from tests.helpers_sources import AS_IT_IS, array, config_of, document, found_by, run_values, set_of, write_phantom


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom("mica_mics", tmp_path_factory.mktemp("mica"), num_subjects=2)


@pytest.fixture(scope="module")
def rest(root: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    overrides = ["dataset=mica_mics", f"source.root={root}/derivatives/fmriprep", "space=mni12", "splits.rule=none"]
    atlas = f"atlas={root}/atlas/aal116.nii.gz"
    return set_of(tmp_path_factory.mktemp("sets") / "rest", *overrides, atlas, *AS_IT_IS)


def test_region_series_are_the_means_of_the_regions_voxels(rest: ShardSet) -> None:
    scan_id = "sub-HC001_ses-01_task-rest_acq-AP_parcels"
    series, mean, scale = (
        array(rest, scan_id, kind) for kind in (schema.PARCELS, schema.REGION_MEAN, schema.REGION_SCALE)
    )
    series = series.astype(np.float32)
    positions = rest.space.positions_mm.astype(np.float64)
    field = bold_values(positions, phantom.NUM_FRAMES, (0, "HC001")).T.astype(np.float64)
    labels = phantom.labels(positions)
    region_ids = document(rest, scan_id)["region_ids"]
    assert region_ids == sorted(set(labels.tolist()) - {0})
    truth = np.stack([field[:, labels == region].mean(axis=1) for region in region_ids], axis=1)
    robust_range = np.percentile(truth, 99, axis=0) - np.percentile(truth, 1, axis=0)
    assert (np.abs(mean - truth.mean(axis=0)) < 1e-4 * robust_range).all()
    assert (np.abs(scale - truth.std(axis=0)) < 1e-4 * robust_range).all()
    restored = mean + scale * series
    float16_error = 2.0**-11 * np.abs(series).max() * scale  # of the largest stored value
    assert (np.abs(restored - truth) < 1e-4 * robust_range + float16_error).all()
    assert document(rest, scan_id)["atlas"] == "aal116"


def test_the_plan_knows_the_bytes_of_series_exactly(root: Path, rest: ShardSet) -> None:
    overrides = ["dataset=mica_mics", f"source.root={root}/derivatives/fmriprep", "space=mni12", "splits.rule=none"]
    config = config_of("out=unused", *overrides, f"atlas={root}/atlas/aal116.nii.gz", *AS_IT_IS)
    assert prepare(config).plan.num_bytes == rest.manifest.counts["bytes"]


def test_series_are_those_of_the_first_configured_atlas_whatever_the_names(root: Path, tmp_path: Path) -> None:
    atlases = f"atlas=[template,{root}/atlas/aal116.nii.gz]"
    overrides = ["dataset=mica_mics", f"source.root={root}/derivatives/fmriprep", "space=mni12", "splits.rule=none"]
    shard_set = set_of(tmp_path / "set", *overrides, atlases, *AS_IT_IS)
    assert list(shard_set.atlases) == ["template", "aal116"]
    scan_id = shard_set.runs("parcels", ["train"]).scan_id[0]
    assert document(shard_set, scan_id)["region_ids"] == shard_set.atlases["template"].region_ids
    planned = prepare(config_of("out=unused", *overrides, atlases, *AS_IT_IS)).plan.num_bytes
    assert planned == shard_set.manifest.counts["bytes"]


def test_the_set_says_that_fmriprep_aligned_its_scans(rest: ShardSet) -> None:
    assert rest.manifest.preprocessing["alignment"] == "fmriprep"


def test_series_lie_beside_the_voxels(rest: ShardSet) -> None:
    runs, parcels = rest.runs("bold", ["train"]), rest.runs("parcels", ["train"])
    assert len(runs) == len(parcels) == 2
    assert parcels.num_frames.tolist() == [phantom.NUM_FRAMES] * 2
    assert parcels.repetition_time_s.tolist() == [phantom.REPETITION_TIME_S] * 2
    assert array(rest, parcels.scan_id[0], schema.PARCELS).dtype == np.float16
    assert np.isfinite(run_values(rest, runs.scan_id[0])[0]).any()


def test_a_series_over_another_units_space_is_refused_without_an_atlas(root: Path, tmp_path: Path) -> None:
    overrides = ["dataset=mica_mics", f"source.root={root}/derivatives/fmriprep", "space=mni12", "splits.rule=none"]
    with pytest.raises((ShardError, SourceError), match="region series need an atlas"):
        set_of(tmp_path / "set", *overrides, "source.kinds=[parcels]", "atlas=null")


def test_the_t1_cube_is_centred_on_the_head(root: Path, tmp_path: Path) -> None:
    overrides = ["dataset=mica_mics", f"source.root={root}", "source.kinds=[t1]", "space=t1_cube128", "atlas=null"]
    few = ["source.subjects=[HC001]", "splits.rule=none", "acceptance.max_refused_fraction=0.5"]
    shard_set = set_of(tmp_path / "set", *overrides, *few)
    assert shard_set.space.grid_shape == (128, 128, 128)
    assert np.array_equal(shard_set.space.affine[:3, :3], np.diag([2.0, 2.0, 2.0]))
    assert [refusal.scan_id for refusal in shard_set.manifest.refused] == ["sub-HC001_ses-01_run-2_t1"]
    t1 = array(shard_set, "sub-HC001_ses-01_t1", schema.T1).astype(np.float64)
    is_head = t1 > np.nanmean(t1)
    ball_mm3 = 4 / 3 * np.pi * 70**3
    assert 0.8 < is_head.sum() * 8 / ball_mm3 < 1.3, "the head of the phantom is a ball of 70 mm, on a grid of 12 mm"
    centre_mm = shard_set.space.positions_mm[is_head].mean(axis=0)
    assert np.abs(centre_mm).max() < 4, "the head lay 11, -17, 23 mm off"


def test_rest_in_raw_space_and_bold_in_a_cube_are_refused(root: Path) -> None:
    overrides = ["dataset=mica_mics", f"source.root={root}"]
    with pytest.raises(SourceError, match=r"raw space"):
        found_by(*overrides, "space=mni12", "source.kinds=[bold]")
    with pytest.raises(
        SourceError, match=r"space t1_cube128 has no template, BOLD needs one; set source\.kinds=\[t1\]"
    ):
        found_by(*overrides, "space=t1_cube128", "source.kinds=[bold]")
