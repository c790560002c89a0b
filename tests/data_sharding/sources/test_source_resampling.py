"""Every source of volumes, on its phantom and a finer grid than its own: stored voxels are nilearn's linear ones."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from nilearn.image import resample_img

from tests.helpers_sources import AS_IT_IS, found_by, run_values, set_of, write_phantom

OPTIONS = {
    "bids": ["dataset=bids", "acceptance.max_refused_fraction=1"],
    "adhd200": ["dataset=adhd200"],
    "mica_mics": ["dataset=mica_mics", "source.kinds=[bold]"],
}
FOLDER = {"mica_mics": "derivatives/fmriprep"}


@pytest.mark.parametrize("layout", OPTIONS)
def test_a_sources_resampled_voxels_are_nilearns_within_half_a_stored_unit(layout: str, tmp_path: Path) -> None:
    root = write_phantom(layout, tmp_path / "phantom") / FOLDER.get(layout, "")
    options = [*OPTIONS[layout], f"source.root={root}", "space=mni6", "splits.rule=none"]
    found, space = found_by(*options)
    scan = next(scan for scan in found.scans if scan.kind == "bold")
    image = nibabel.load(scan.path)
    assert np.linalg.norm(image.affine[:3, 0]) > 6, "a coarser grid would be smoothed too"
    values, half_unit = run_values(set_of(tmp_path / "set", *options, "atlas=null", *AS_IT_IS), scan.scan_id)
    grid = {"target_affine": space.affine, "target_shape": space.grid_shape}
    resampled = resample_img(image, **grid, interpolation="linear", force_resample=True, copy_header=True)
    expected = np.asarray(resampled.dataobj)[tuple(space.voxel_indices.T)].T
    places = nibabel.affines.apply_affine(np.linalg.inv(image.affine), space.positions_mm)
    is_interior = ((places >= 0) & (places <= np.array(image.shape[:3]) - 1)).all(axis=1)
    is_interior &= np.isfinite(values).all(axis=0) & (expected != 0).all(axis=0)
    assert is_interior.mean() > 0.5
    off = np.abs(values - expected)[:, is_interior] - half_unit[is_interior]
    from_mean = np.abs(expected - expected.mean(axis=0))[:, is_interior]
    is_clipped = from_mean > 5.8 * 42 * half_unit[is_interior]  # a stored value ends at 6 scales, a scale is 21 units
    assert is_clipped.mean() < 0.01
    assert off[~is_clipped].max() < 1e-5 * float(np.abs(expected).max())
