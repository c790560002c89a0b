"""Surface spaces: which vertices, where they are, and that a file's order never matters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from nibabel.cifti2 import BrainModelAxis

from brain_models.atlas import cluster_labels
from brain_models.errors import ScanError, SpaceError
from brain_models.patches import PatchLayout
from brain_models.preprocess import pack_t1
from brain_models.space import BrainSpace, CubeSpaceConfig, cube_space
from brain_models.surface_scans import pack_cifti, pack_gifti, read_surface_header
from brain_models.surfaces import SurfaceSpaceConfig, surface_space
from data_sharding.phantoms.fields import write_cifti_series, write_gifti_series
from tests.scans import save_scan

ALL = SurfaceSpaceConfig("fsaverage5", "fsaverage5", surfaces=[], vertices=[], labels=[])


def mask_files(folder: Path, left: np.ndarray, right: np.ndarray) -> list[str]:
    for name, values in (("left", left), ("right", right)):
        np.save(folder / f"{name}.npy", values)
    return [str(folder / "left.npy"), str(folder / "right.npy")]


def test_fsaverage5_lies_halfway_between_nilearns_white_and_pial(tmp_path: Path) -> None:
    from nilearn.datasets import fetch_surf_fsaverage

    space = surface_space(ALL)
    files = fetch_surf_fsaverage("fsaverage5")
    white, pial = (nibabel.load(files[f"{name}_right"]).darrays[0].data for name in ("white", "pial"))
    assert np.allclose(space.positions_mm[10242:], (white + pial) / 2, atol=1e-4)
    assert space.positions_mm[space.hemispheres == 0, 0].mean() < -20
    assert space.mesh_sizes == (10242, 10242)
    space.save(tmp_path / "space.npz")
    loaded = BrainSpace.load(tmp_path / "space.npz")
    assert loaded.fingerprint == space.fingerprint
    assert np.array_equal(loaded.vertices, space.vertices)
    assert np.array_equal(loaded.triangles, space.triangles)
    assert replace(space, triangles=None).fingerprint == space.fingerprint


def test_triangles_of_a_masked_mesh_join_the_vertices_that_the_mesh_joins(tmp_path: Path) -> None:
    whole = surface_space(ALL)
    is_chosen = whole.positions_mm[:, 1] > 20
    masks = mask_files(tmp_path, is_chosen[:10242], is_chosen[10242:])
    few = surface_space(replace(ALL, vertices=masks))
    expected = whole.triangles[is_chosen[whole.triangles].all(axis=1)]
    np.testing.assert_array_equal(few.positions_mm[few.triangles], whole.positions_mm[expected])
    assert 1000 < len(few.triangles) < len(whole.triangles)


def test_clusters_of_vertices_are_small_compact_and_on_one_hemisphere() -> None:
    space = surface_space(ALL)
    layout = PatchLayout.from_labels(space, cluster_labels(space, 64))
    assert layout.num_patches == 512  # 10242 vertices halved eight times, on both sides
    assert layout.gather.shape[1] == 41
    for patch in range(0, layout.num_patches, 37):
        vertices = layout.gather[patch][layout.is_valid[patch]]
        assert len(set(space.hemispheres[vertices])) == 1
        assert np.linalg.norm(space.positions_mm[vertices] - layout.centres_mm[patch], axis=1).max() < 30
    with pytest.raises(SpaceError, match=r"does not know the positions of its vertices; name its surfaces"):
        PatchLayout.from_labels(replace(space, positions_mm=space.positions_mm * np.nan), space.vertices)


def test_masks_of_every_format_choose_the_same_vertices(tmp_path: Path) -> None:
    labels = np.arange(10242) % 3
    expected = surface_space(replace(ALL, vertices=mask_files(tmp_path, labels == 2, labels == 2)))
    colours = np.array([[number, 7, 9, 0, 0] for number in range(3)])
    names = ["unknown", "one", "two"]
    nibabel.freesurfer.write_annot(tmp_path / "mask.annot", labels, colours, names, fill_ctab=True)
    array = nibabel.gifti.GiftiDataArray(labels.astype(np.int32), intent="NIFTI_INTENT_LABEL")
    nibabel.gifti.GiftiImage(darrays=[array]).to_filename(tmp_path / "mask.label.gii")
    for name in ("mask.annot", "mask.label.gii"):
        space = surface_space(replace(ALL, vertices=[str(tmp_path / name)] * 2, labels=[2]))
        assert space.fingerprint == expected.fingerprint
    assert expected.vertices.tolist()[:3] == [2, 5, 8]


def test_a_mask_of_another_mesh_or_no_vertex_is_refused(tmp_path: Path) -> None:
    few = mask_files(tmp_path, np.ones(642), np.ones(642))
    with pytest.raises(
        SpaceError, match=r"the left surface has 10242 vertices, .* is about 642; give both of one mesh"
    ):
        surface_space(replace(ALL, vertices=few))
    with pytest.raises(SpaceError, match=r"no vertex of .* has one of the labels \[7\]"):
        surface_space(replace(ALL, template="none", vertices=few, labels=[7]))
    with pytest.raises(SpaceError, match=r"nothing says how many vertices its meshes have; give space\.surfaces"):
        surface_space(replace(ALL, template="fsLR"))
    np.save(tmp_path / "pickled.npy", np.array({}, dtype=object), allow_pickle=True)
    with pytest.raises(SpaceError, match=r"pickled\.npy: not a readable vertex mask"):
        surface_space(replace(ALL, vertices=[str(tmp_path / "pickled.npy")] * 2))


def models(order: str) -> BrainModelAxis:
    parts = {"L": ("CortexLeft", [4, 1, 7]), "R": ("CortexRight", [0, 9])}
    axes = [BrainModelAxis.from_surface(vertices, 10, name=name) for name, vertices in (parts[side] for side in order)]
    return axes[0] + axes[1]


def test_a_cifti_column_is_found_by_its_vertex_whatever_its_place(tmp_path: Path) -> None:
    masks = mask_files(tmp_path, np.isin(np.arange(10), [1, 4, 5]), np.isin(np.arange(10), [9]))
    space = surface_space(SurfaceSpaceConfig("few", "fsLR", [], masks, []))
    for order, columns in (("LR", [1, 0, 4]), ("RL", [3, 2, 1])):
        series = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
        path = write_cifti_series(tmp_path / f"{order}.dtseries.nii", series, models(order), repetition_time_s=0.72)
        header = read_surface_header(path)
        assert (header.num_frames, header.repetition_time_s, header.shape) == (20, 0.72, (5, 1, 1))
        packed = pack_cifti(path, space)
        assert packed.is_measured.tolist() == [True, True, False, True], "vertex 5 of the left is not in the file"
        assert np.array_equal(packed.values[:, [0, 1, 3]], series[:, columns])
    other_masks = mask_files(tmp_path, np.ones(12), np.ones(10))
    other = surface_space(SurfaceSpaceConfig("other", "fsLR", [], other_masks, []))
    with pytest.raises(ScanError, match=r"its left mesh has 10 vertices, that of space other 12"):
        pack_cifti(path, other)


def test_gifti_files_are_read_by_hemisphere_and_hostile_ones_are_refused(tmp_path: Path) -> None:
    series = np.random.default_rng(1).normal(size=(2, 6, 10)).astype(np.float32)
    left, right = (
        write_gifti_series(tmp_path / f"{side}.func.gii", values, repetition_time_s=1.5)
        for side, values in zip("LR", series, strict=True)
    )
    masks = mask_files(tmp_path, np.arange(10) == 3, np.arange(10) == 8)
    space = surface_space(SurfaceSpaceConfig("few", "fsaverage", [], masks, []))
    packed = pack_gifti(left, right, space)
    assert np.array_equal(packed.values, np.stack([series[0, :, 3], series[1, :, 8]], axis=1))
    assert packed.header.repetition_time_s == 1.5
    short = write_gifti_series(tmp_path / "short.func.gii", series[1, :4], repetition_time_s=1.5)
    with pytest.raises(ScanError, match=r"4 frames, L\.func\.gii states 6"):
        pack_gifti(left, short, space)
    text = left.read_text()
    for old, new in (
        ("<GIFTI ", "<!ENTITY x 'y'><GIFTI "),
        ('Encoding="GZipBase64Binary"', 'Encoding="ExternalFileBinary"'),
    ):
        (tmp_path / "hostile.func.gii").write_text(text.replace(old, new, 1))
        with pytest.raises(ScanError, match=r"hostile\.func\.gii: holds .*, which points outside the file"):
            pack_gifti(tmp_path / "hostile.func.gii", right, space)
    (tmp_path / "no.func.gii").write_text("<html>")
    with pytest.raises(ScanError, match="not GIFTI"):
        read_surface_header(tmp_path / "no.func.gii")
    (tmp_path / "no.dtseries.nii").write_text("<html>")
    with pytest.raises(ScanError, match="not a readable CIFTI-2 file"):
        read_surface_header(tmp_path / "no.dtseries.nii")


def test_a_head_gives_the_same_cube_wherever_it_lies_in_the_field_of_view(tmp_path: Path) -> None:
    space = cube_space(CubeSpaceConfig("cube", "none", 8.0, 20))
    assert np.allclose(space.positions_mm.mean(axis=0), 0)
    indices = np.stack(np.meshgrid(*[np.arange(40)] * 3, indexing="ij"), axis=-1)
    cubes = []
    for shift in ((0, 0, 0), (3, -2, 4)):
        place = indices - 20 - np.array(shift)
        inside = (place**2 / np.array([10, 12, 9]) ** 2).sum(axis=-1) < 1
        values = np.where(inside, 500 + 10 * place[..., 0], 3)
        affine = np.diag([4.0, 4.0, 4.0, 1.0])
        affine[:3, 3] = (-11, 30, 5)
        packed = pack_t1(save_scan(tmp_path / f"{shift[0]}.nii.gz", values, affine), space, brain_mask=None)
        cubes.append(np.where(packed.is_measured, packed.values[0], np.nan))
    is_both = np.isfinite(cubes[0]) & np.isfinite(cubes[1])
    assert is_both.mean() > 0.7
    assert np.abs(cubes[0] - cubes[1])[is_both].max() < 1e-2


def test_a_cube_refuses_a_brain_mask_and_says_to_leave_it_out(tmp_path: Path) -> None:
    space = cube_space(CubeSpaceConfig("cube", "none", 8.0, 20))
    path = save_scan(tmp_path / "T1w.nii.gz", np.ones((8, 8, 8)), np.eye(4))
    with pytest.raises(ScanError, match=r"T1w\.nii\.gz: space cube is a cube around .*; give neither a brain mask"):
        pack_t1(path, space, brain_mask=path)
