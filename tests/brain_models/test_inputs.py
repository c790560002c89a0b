"""A scan is read as the shards were written, or refused with what is missing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from brain_models.errors import ScanError
from brain_models.inputs import StemSpec, read_scan
from brain_models.preprocess import dequantise, pack_bold, standardise_bold
from brain_models.space import BrainSpace, space_from_mask
from brain_models.surfaces import SurfaceSpaceConfig, surface_space
from data_sharding.phantoms.fields import write_gifti_series
from tests.bundles import clusters, cubes
from tests.scans import GRID_AFFINE, GRID_SHAPE, bold_values, grid_positions_mm, save_scan


@pytest.fixture
def space() -> BrainSpace:
    in_brain = np.zeros(GRID_SHAPE, dtype=bool)
    in_brain[4:9, 5:11, 4:8] = True
    return space_from_mask(in_brain, GRID_AFFINE, name="box", template="NLin6Asym")


@pytest.fixture
def stem(space: BrainSpace) -> StemSpec:
    return cubes(space, 2)


def bold(tmp_path: Path, repetition_time_s: float | None = 2.0) -> str:
    values = bold_values(grid_positions_mm(GRID_AFFINE, GRID_SHAPE))
    return str(save_scan(tmp_path / "scan_bold.nii.gz", values, GRID_AFFINE, repetition_time_s=repetition_time_s))


def test_a_repetition_time_comes_from_the_row_else_from_the_header_else_nowhere(stem: StemSpec, tmp_path: Path) -> None:
    row: dict[str, Any] = {"bold": bold(tmp_path)}
    assert read_scan(row, {"bold": stem}).repetition_time_s.tolist() == [2.0]
    assert read_scan(row | {"repetition_time_s": 0.5}, {"bold": stem}).repetition_time_s.tolist() == [0.5]
    row = {"bold": bold(tmp_path, repetition_time_s=None)}
    with pytest.raises(ScanError, match=r"no repetition time in the header; add a column repetition_time_s"):
        read_scan(row, {"bold": stem})
    assert read_scan(row | {"repetition_time_s": 0.5}, {"bold": stem}).repetition_time_s.tolist() == [0.5]


def test_a_brain_mask_is_used_when_given_and_required_when_the_stem_learned_through_masks(
    space: BrainSpace, stem: StemSpec, tmp_path: Path
) -> None:
    row: dict[str, Any] = {"bold": bold(tmp_path)}
    masked = {"bold": replace(stem, needs_brain_mask=True)}
    with pytest.raises(ScanError, match=r"this model saw scans through brain masks; add a column brain_mask"):
        read_scan(row, masked)
    inside = np.zeros(GRID_SHAPE)
    inside[:, :, :6] = 1
    row["brain_mask"] = str(save_scan(tmp_path / "mask.nii.gz", inside, GRID_AFFINE))
    scan = read_scan(row, masked)
    np.testing.assert_array_equal(scan.is_measured[0].numpy(), space.voxel_indices[:, 2] < 6)
    stored = standardise_bold(pack_bold(row["bold"], space, brain_mask=Path(row["brain_mask"])))
    np.testing.assert_array_equal(scan.values[0].numpy(), dequantise(stored.quantised))


def test_a_packed_array_is_read_by_the_stem_of_its_size_and_what_was_not_measured_stays_so(space: BrainSpace) -> None:
    finer = space_from_mask(np.ones((6, 6, 6), dtype=bool), GRID_AFFINE, name="finer", template="NLin6Asym")
    stems = {
        "bold": cubes(space, 2),
        "bold_0f": cubes(finer, 3, window_frames=8),
        "t1": cubes(space, 2, tubelet_frames=1, window_frames=1),
    }
    run = np.full((8, 216), 42, dtype=np.int8)
    run[:, 7] = -128
    scan = read_scan({"bold": run, "repetition_time_s": 2.0}, stems)
    assert (scan.stem, scan.window_frames) == ("bold_0f", 8)
    assert (scan.values[0, 0, :2].tolist(), scan.values[0, 0, 7]) == ([2.0, 2.0], 0)
    assert (~scan.is_measured[0]).nonzero().flatten().tolist() == [7]
    image = np.ones(space.num_voxels, dtype=np.float16)
    image[3] = np.nan
    scan = read_scan({"t1w": image}, stems)
    assert (scan.stem, scan.values.shape, scan.values[0, 0, 3]) == ("t1", (1, 1, space.num_voxels), 0)
    assert (~scan.is_measured[0]).nonzero().flatten().tolist() == [3]
    sizes = r"\{'bold': 120, 'bold_0f': 216\}"
    with pytest.raises(ScanError, match=rf"5 voxels in bold; this model reads {sizes}"):
        read_scan({"bold": run[:, :5], "repetition_time_s": 2.0}, stems)
    with pytest.raises(ScanError, match=r"columns \['t2w'\]; this model needs a column bold or t1w"):
        read_scan({"t2w": image}, stems)


def test_a_surface_run_is_read_from_the_file_of_its_left_hemisphere_and_its_sibling(tmp_path: Path) -> None:
    surfaces = SurfaceSpaceConfig("fsaverage5", "fsaverage5", surfaces=[], vertices=[], labels=[])
    space = surface_space(surfaces)
    series = np.random.default_rng(0).normal(size=(2, 6, 10242)).astype(np.float32)
    for side, values in zip("LR", series, strict=True):
        path = tmp_path / f"sub-01_task-rest_hemi-{side}_space-fsaverage5_bold.func.gii"
        write_gifti_series(path, values, repetition_time_s=1.5)
    left = tmp_path / "sub-01_task-rest_hemi-L_space-fsaverage5_bold.func.gii"
    scan = read_scan({"bold": str(left)}, {"bold": clusters(space, 64)})
    assert scan.repetition_time_s.tolist() == [1.5]
    correlation = np.corrcoef(scan.values[0, :, 10242 + 5].numpy(), series[1, :, 5])[0, 1]
    assert correlation > 0.98  # clipped at 6 and rounded to 1/21 of the scale
    assert torch.isfinite(scan.values).all()
