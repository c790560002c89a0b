"""Patches, atlases and the encoder: known answers on small spaces."""

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from brain_models.atlas import Atlas, atlas_from_image, cluster_labels, no_atlas, template_parcellation
from brain_models.embedding import make_encoder
from brain_models.encoder import BrainEncoder, EncoderConfig, PatchDecoder, PositionEmbedding, Stem
from brain_models.errors import SpaceError
from brain_models.inputs import StemSpec
from brain_models.patches import PatchLayout
from brain_models.space import BrainSpace, SpaceConfig, require_mesh, space_from_mask, volume_space
from tests.bundles import cubes
from tests.scans import GRID_AFFINE

CONFIG = EncoderConfig(width=32, depth=2, num_heads=4, mlp_ratio=2.0, num_frequencies=4, time_in="seconds")


@pytest.fixture
def space() -> BrainSpace:
    in_brain = np.ones((4, 5, 4), dtype=bool)
    in_brain[0, 0, 0] = False
    in_brain[:, 4, :2] = False
    return space_from_mask(in_brain, GRID_AFFINE, name="small", template="NLin6Asym")


@pytest.fixture
def encoder(space: BrainSpace) -> BrainEncoder:
    torch.manual_seed(0)
    return make_encoder(CONFIG, stems_of(space)).eval()


def stems_of(space: BrainSpace) -> dict[str, StemSpec]:
    return {"bold": cubes(space, 2, tubelet_frames=2, window_frames=4)}


def test_every_voxel_is_in_exactly_one_patch_at_its_own_element(space: BrainSpace) -> None:
    layout = PatchLayout.from_grid(space, 2)
    used = layout.gather[layout.is_valid]
    assert sorted(used.tolist()) == list(range(space.num_voxels))
    assert (layout.gather[~layout.is_valid] == space.num_voxels).all()
    patch, element = np.argwhere(layout.is_valid).T
    np.testing.assert_array_equal(space.voxel_indices[used] % 2, np.stack(np.unravel_index(element, (2, 2, 2)), axis=1))
    # 2 x 3 x 2 cubes, of which the two below the cut row hold nothing
    assert layout.num_patches == 2 * 3 * 2 - 2
    for row in range(layout.num_patches):
        np.testing.assert_allclose(
            layout.centres_mm[row], space.positions_mm[used[patch == row]].mean(axis=0), rtol=1e-5
        )


def test_tokens_hold_the_voxels_of_their_patch_and_frames(space: BrainSpace, encoder: BrainEncoder) -> None:
    values = torch.randn(2, 4, space.num_voxels)
    is_measured = torch.ones(2, space.num_voxels, dtype=torch.bool)
    is_measured[1, 7] = False
    stem = encoder.stem("bold")
    features = stem.features(values, is_measured)
    layout = PatchLayout.from_grid(space, 2)
    num_elements = 8
    for batch, tubelet, patch in [(0, 0, 3), (1, 1, 0), (1, 0, 5)]:
        token = features[batch, tubelet * layout.num_patches + patch]
        for frame in range(2):
            for element in range(num_elements):
                voxel = layout.gather[patch, element]
                if voxel == space.num_voxels or not is_measured[batch, voxel]:
                    expected = 0.0
                else:
                    expected = float(values[batch, tubelet * 2 + frame, voxel])
                assert float(token[frame * num_elements + element]) == expected
    stem.voxel_offset.normal_()
    stem.voxel_scale.uniform_(0.5, 2)
    standardised = (values - stem.voxel_offset) / stem.voxel_scale * is_measured[:, None]
    assert torch.equal(stem.features(values, is_measured), stem.by_token(standardised))
    counted = stem.measured(is_measured)
    assert counted.shape == (2, layout.num_patches, 2 * num_elements)
    assert counted.sum(dim=(1, 2)).tolist() == [2 * space.num_voxels, 2 * (space.num_voxels - 1)]


def test_an_encoded_token_depends_on_visible_tokens_only_and_not_on_their_order(
    space: BrainSpace, encoder: BrainEncoder
) -> None:
    values = torch.randn(1, 4, space.num_voxels)
    features = encoder.stem("bold").features(values, torch.ones(1, space.num_voxels, dtype=torch.bool))
    positions = encoder.positions("bold", 2, torch.tensor([2.0]))
    visible = torch.tensor([1, 4, 9, 12])
    shuffled = visible.flip(0)
    with torch.inference_mode():
        encoded = encoder(features[:, visible], positions[:, visible], "bold")
        again = encoder(features[:, shuffled], positions[:, shuffled], "bold")
    torch.testing.assert_close(encoded, again.flip(1))


def test_positions_are_millimetres_and_seconds_of_the_tubelets_centre(space: BrainSpace, encoder: BrainEncoder) -> None:
    positions = encoder.positions("bold", 2, torch.tensor([2.0, 0.5]))
    num_patches = encoder.stem("bold").num_patches
    np.testing.assert_allclose(positions[0, num_patches:, :3], PatchLayout.from_grid(space, 2).centres_mm)
    # frames 0 1 | 2 3: centres at 0.5 and 2.5 frames
    assert positions[0, 0, 3] == 1.0
    assert positions[0, -1, 3] == 5.0
    assert positions[1, -1, 3] == 1.25


def test_bf16_puts_no_token_elsewhere() -> None:
    embedding = PositionEmbedding(32, 16)
    embedding.project = nn.Identity()  # what is learned of the waves may be rounded, the waves may not
    positions = torch.tensor([[[-62.3, 41.7, 70.9, 118.4]]])
    with torch.autocast("cpu", torch.bfloat16):
        waves = embedding(positions)
    torch.testing.assert_close(waves.float(), embedding(positions), rtol=0, atol=1e-6)


def test_an_encoder_that_counts_frames_cannot_tell_repetition_times_apart(space: BrainSpace) -> None:
    in_frames = make_encoder(dataclasses.replace(CONFIG, time_in="frames"), stems_of(space))
    positions = in_frames.positions("bold", 2, torch.tensor([2.0, 0.5]))
    assert positions[0, [0, -1], 3].tolist() == [0.5, 2.5]
    assert torch.equal(positions[0], positions[1])
    in_seconds = make_encoder(CONFIG, stems_of(space)).positions("bold", 2, torch.tensor([1.0]))
    assert torch.equal(positions[:1], in_seconds)


@pytest.mark.parametrize(("patch_voxels", "tubelet_frames"), [(3, 2), (4, 1), (2, 4), (1, 1)])
def test_a_stem_resampled_to_a_finer_token_gives_an_interpolated_token_the_same_features(
    patch_voxels: int, tubelet_frames: int
) -> None:
    space = space_from_mask(np.ones((4, 4, 4), dtype=bool), GRID_AFFINE, name="cube", template="none")
    torch.manual_seed(0)
    old = Stem(PatchLayout.from_grid(space, patch_voxels), tubelet_frames, 8)
    new = Stem(PatchLayout.from_grid(space, 4), 4, 8)
    new.start_from(old)
    cube = torch.randn(1, tubelet_frames, patch_voxels, patch_voxels, patch_voxels)
    finer = cube
    for axis, size in zip(range(1, 5), (4, 4, 4, 4), strict=True):  # one axis at a time, as torch interpolates a line
        moved = finer.movedim(axis, -1)
        line = functional.interpolate(moved.reshape(1, -1, moved.shape[-1]), size=size, mode="linear")
        finer = line.reshape(*moved.shape[:-1], size).movedim(-1, axis)
    torch.testing.assert_close(
        new.project(finer.reshape(1, -1)), old.project(cube.reshape(1, -1)), rtol=1e-4, atol=1e-4
    )


def test_equal_layouts_have_equal_fingerprints_and_moved_ones_do_not(space: BrainSpace) -> None:
    assert PatchLayout.from_grid(space, 2).fingerprint == PatchLayout.from_grid(space, 2).fingerprint
    assert PatchLayout.from_grid(space, 2).fingerprint != PatchLayout.from_grid(space, 3).fingerprint
    assert PatchLayout.from_grid(space, 2).fingerprint != PatchLayout.from_grid(_moved(space), 2).fingerprint


def test_patches_of_labels_hold_the_voxels_of_their_label_around_their_mean_position(
    space: BrainSpace, tmp_path: Path
) -> None:
    labels = np.random.default_rng(0).choice([7, -3, 40], size=space.num_voxels, p=[0.5, 0.3, 0.2])
    layout = PatchLayout.from_labels(space, labels)
    for patch, label in enumerate([-3, 7, 40]):
        voxels = np.flatnonzero(labels == label)
        assert layout.gather[patch][layout.is_valid[patch]].tolist() == voxels.tolist()
        np.testing.assert_allclose(layout.centres_mm[patch], space.positions_mm[voxels].mean(axis=0), rtol=1e-5)
        assert (layout.patch_of_voxel[voxels] == patch).all()
    assert layout.gather.shape == (3, np.bincount(labels + 3).max())
    layout.save(tmp_path / "layout.npz")
    loaded = PatchLayout.load(tmp_path / "layout.npz")
    assert (loaded.fingerprint, loaded.patch_voxels) == (layout.fingerprint, None)
    with pytest.raises(SpaceError, match=r"has 71 voxels, the labels have shape \(3,\)"):
        PatchLayout.from_labels(space, labels[:3])
    (tmp_path / "layout.npz").write_bytes(b"PK")
    with pytest.raises(SpaceError, match=r"layout\.npz is not a patch layout .* fetch the bundle again"):
        PatchLayout.load(tmp_path / "layout.npz")


def test_a_stem_leaves_its_projection_alone_where_patches_are_no_cubes(space: BrainSpace) -> None:
    clusters = Stem(PatchLayout.from_labels(space, cluster_labels(space, 9)), 2, 8)
    cubes = Stem(PatchLayout.from_grid(space, 2), 2, 8)
    for stem, other in ((clusters, cubes), (cubes, clusters)):
        before = stem.project.weight.detach().clone()
        stem.start_from(other)
        assert torch.equal(stem.project.weight, before)


def test_a_space_without_an_atlas_is_cut_into_pseudo_regions_of_nearly_equal_size(space: BrainSpace) -> None:
    large = space_from_mask(np.ones((11, 13, 12), dtype=bool), GRID_AFFINE, name="large", template="none")
    membership = no_atlas(large).membership(PatchLayout.from_grid(large, 1), large)
    assert not membership.is_named.any()
    sizes = membership.shares.sum(axis=0)
    assert (len(sizes), sizes.min(), sizes.max()) == (128, 13, 14)  # 1716 voxels halved seven times
    with pytest.raises(SpaceError, match=r"clusters of 0 voxels; give 1 or more"):
        cluster_labels(space, 0)


def test_a_fresh_decoder_predicts_zero_everywhere(space: BrainSpace, encoder: BrainEncoder) -> None:
    decoder = PatchDecoder(CONFIG, width=16, depth=1, num_features={"bold": encoder.stem("bold").num_features})
    predicted = decoder(torch.randn(2, 5, 32), torch.randn(2, 5, 4), torch.randn(2, 3, 4), "bold")
    assert predicted.shape == (2, 3, 16)
    assert (predicted == 0).all()


def test_a_fresh_decoder_attends_to_visible_tokens_the_more_the_nearer_they_are() -> None:
    torch.manual_seed(0)
    config = replace(CONFIG, num_heads=1, num_frequencies=64)
    decoder = PatchDecoder(config, width=128, depth=1, num_features={"bold": 8})
    visible = torch.tensor([[[distance_mm, 0.0, 0.0, 0.0] for distance_mm in (0.0, 8.0, 16.0, 32.0)]])
    (block,) = decoder.blocks
    given: list[torch.Tensor] = []
    block.register_forward_pre_hook(lambda _, arguments: given.extend(arguments))
    with torch.inference_mode():
        decoder(torch.zeros(1, 4, 32), visible, visible[:, :1], "bold")
        tokens, context = given
        query = block.attention.query(block.norm_tokens(tokens))
        key, _ = block.attention.key_value(block.norm_context(context)).chunk(2, dim=-1)
    likeness = (query @ key.mT)[0, 0] / 128  # about 1 where they are equal: both are normalised
    assert float(likeness[0]) == pytest.approx(1, abs=0.1)
    assert (likeness.diff() < -0.05).all()


def test_membership_is_each_patchs_share_of_voxels_and_unlabelled_tissue_gets_regions_of_its_own(
    space: BrainSpace,
) -> None:
    labels = np.zeros(space.num_voxels, dtype=np.int32)
    labels[space.voxel_indices[:, 0] == 1] = 170  # numbering with gaps
    labels[space.voxel_indices[:, 0] == 2] = 3
    atlas = Atlas("gaps", labels, {3: "three", 170: "last"}, {"end": [170]})
    layout = PatchLayout.from_grid(space, 2)
    membership = atlas.membership(layout, space)
    np.testing.assert_allclose(membership.shares.sum(axis=1), 1, rtol=1e-6)
    assert membership.region_ids[membership.is_named].tolist() == [3, 170]
    column = membership.region_ids.tolist().index(170)
    for patch in range(layout.num_patches):
        voxels = layout.gather[patch][layout.is_valid[patch]]
        assert membership.shares[patch, column] == pytest.approx((labels[voxels] == 170).mean())
    sizes = membership.shares[:, ~membership.is_named] * layout.voxels_per_patch[:, None]
    assert sizes.sum() == pytest.approx((labels == 0).sum())
    assert sizes.sum(axis=0).max() <= 1.5 * np.median([(labels == 3).sum(), (labels == 170).sum()])


def test_region_means_skip_what_was_not_measured(space: BrainSpace) -> None:
    labels = np.zeros(space.num_voxels, dtype=np.int32)
    labels[:4], labels[4:6] = 5, 9
    is_measured = np.ones(space.num_voxels, dtype=bool)
    is_measured[[1, 4, 5]] = False
    values = np.random.default_rng(0).normal(size=(3, space.num_voxels)).astype(np.float32)
    means = Atlas("a", labels, {}, {}).region_means(values, is_measured)
    np.testing.assert_allclose(means[:, 0], values[:, [0, 2, 3]].mean(axis=1), rtol=1e-5)
    assert np.isnan(means[:, 1]).all()


def test_labels_beyond_127_survive_an_image_and_a_file(space: BrainSpace, tmp_path: Path) -> None:
    image = np.zeros(space.grid_shape, dtype=np.uint8)
    image[2:, 2:] = 170
    nibabel.save(nibabel.Nifti1Image(image, GRID_AFFINE), tmp_path / "labels.nii.gz")
    atlas = atlas_from_image(tmp_path / "labels.nii.gz", space)
    atlas.save(tmp_path / "atlas.npz")
    loaded = Atlas.load(tmp_path / "atlas.npz")
    np.testing.assert_array_equal(loaded.labels, image[tuple(space.voxel_indices.T)])
    assert loaded.region_ids == [170]
    with pytest.raises(SpaceError, match=r"labels\.nii\.gz: no label falls into space"):
        atlas_from_image(tmp_path / "labels.nii.gz", _moved(space))


def test_an_image_of_exactly_aal3s_labels_gets_its_groups(tmp_path: Path) -> None:
    cube = space_from_mask(np.ones((6, 6, 6), dtype=bool), GRID_AFFINE, name="cube", template="none")
    labels = np.array([label for label in range(1, 171) if label not in (35, 36, 81, 82)])
    image = np.zeros(216, dtype=np.uint8)
    image[:166] = labels

    def read(image: np.ndarray) -> Atlas:
        nibabel.save(nibabel.Nifti1Image(image.reshape(6, 6, 6), GRID_AFFINE), tmp_path / "AAL3.nii.gz")
        return atlas_from_image(tmp_path / "AAL3.nii.gz", cube)

    atlas = read(image)
    assert [atlas.names[label] for label in (1, 2, 170)] == ["region 1", "region 2", "region 170"]
    assert set(labels) == {label for group in atlas.groups.values() for label in group}
    assert atlas.groups["limbic"] == [*range(37, 47), *range(151, 157)]
    assert atlas.groups["basal_ganglia"] == [75, 76, 77, 78, 79, 80, 157, 158]
    fewer, more = np.where(image == 170, 0, image).astype(np.uint8), image.copy()
    more[200] = 171
    assert read(fewer).groups == read(more).groups == {}


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (lambda space, _: Atlas("a", np.ones(3, np.int32), {}, {}).membership(PatchLayout.from_grid(space, 2), space),
         r"atlas a labels 3 voxels, the data have 71"),
        (lambda space, _: PatchLayout.from_grid(space, 9), r"patch_voxels 9 does not fit the \(4, 5, 4\) grid"),
        (lambda space, _: PatchLayout.from_grid(replace(space, affine=None), 2), r"without a voxel grid; use a volume"),
        (lambda space, _: require_mesh(space), r"is a volume without a mesh; use a surface space here"),
        (lambda space, path: BrainSpace.load(path / "text"), r"text is not a space\.npz .* write the shard set"),
        (lambda space, path: atlas_from_image(path / "shares.nii.gz", space), r"holds whole numbers >= 0; give"),
        (lambda space, path: atlas_from_image(path / "text", space), r"text: not a readable NIfTI volume"),
        (lambda space, path: volume_space(SpaceConfig("x", "t", 0.0, "mni152", 0.0)), r"spacing_mm is 0\.0; give"),
        (lambda space, path: volume_space(SpaceConfig("x", "t", 12.0, str(path / "empty.nii.gz"), 0.0)),
         r"mask .*empty\.nii\.gz has no voxel on the 12\.0 mm grid"),
    ],
)  # fmt: skip
def test_a_space_an_atlas_or_a_layout_that_cannot_be_made_is_refused_with_what_to_do(
    refused: Callable[[BrainSpace, Path], object], words: str, space: BrainSpace, tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("no,numbers\n1,2\n")
    shares = np.full(space.grid_shape, 0.5, dtype=np.float32)
    for name, values in {"shares": shares, "empty": shares * 0}.items():
        nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), GRID_AFFINE), tmp_path / f"{name}.nii.gz")
    with pytest.raises(SpaceError, match=words):
        refused(space, tmp_path)


def test_the_template_parcellation_knows_left_from_right_and_has_every_group() -> None:
    space = volume_space(SpaceConfig("mni12", "NLin6Asym", 12.0, "mni152", 4.0))
    atlas = template_parcellation(space)
    for label, name in atlas.names.items():
        x_mm = space.positions_mm[atlas.labels == label, 0]
        if name.endswith("_L"):
            assert (x_mm <= 0).all(), name
        if name.endswith("_R"):
            assert (x_mm >= 0).all(), name
    assert {"limbic", "cerebellum", "frontal", "occipital"} <= atlas.groups.keys()
    assert all(np.isin(atlas.labels, ids).any() for ids in atlas.groups.values())


def _moved(space: BrainSpace) -> BrainSpace:
    affine = space.affine.copy()
    affine[0, 3] += 3000
    in_brain = np.zeros(space.grid_shape, dtype=bool)
    in_brain[tuple(space.voxel_indices.T)] = True
    return space_from_mask(in_brain, affine, name="moved", template="NLin6Asym")
