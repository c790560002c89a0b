"""Images and responses: what belongs together is read, what does not is refused, and pairs stay inside splits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_sharding.read.shard_set import ShardSet
from data_sharding.splits import SPLITS, ReadingSplit
from finetune.errors import FinetuneError
from finetune.tasks.rdm_prediction.metrics import upper_triangle
from finetune.tasks.rdm_prediction.pairs import SplitBy, make_pairs, num_pairs
from finetune.tasks.rdm_prediction.stimuli import (
    Stimuli,
    open_stimuli,
    split_warnings,
    with_fewer_training_images,
)
from tests.data_sharding.read.test_reader import DATA
from tests.helpers_sources import set_of, write_phantom

FOLDS = ReadingSplit("fold", 0, None, None, None, None, None, [], None, 3, 0, None)
DATA_OF_FOLDS = replace(DATA, split=FOLDS)


def folder_of(folder: Path, *, num_images: int = 18, **arrays: np.ndarray) -> Path:
    """Images of noise, with arrays beside them."""
    (folder / "images").mkdir(parents=True)
    numbers = np.random.default_rng(0)
    for number in range(num_images):
        pixels = numbers.integers(0, 256, size=(8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"image{number:02d}.png")
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
    return folder


def responses(num_images: int = 18) -> np.ndarray:
    return np.random.default_rng(1).normal(3, 2, size=(num_images, 12)).astype(np.float32)


def opened(folder: Path, **changes: object) -> Stimuli:
    split = replace(FOLDS, **changes)  # type: ignore[arg-type]
    return open_stimuli(str(folder), replace(DATA, split=split), region="all")


def test_vertices_are_standardised_by_the_training_images_alone(tmp_path: Path) -> None:
    given = responses()
    given[:, 4] = 7.0
    stimuli = opened(folder_of(tmp_path / "set", responses=given))
    training = stimuli.rows("train")
    assert len(training) == 6
    assert stimuli.patterns is not None
    mean, scale = given[training].mean(axis=0), given[training].std(axis=0)
    expected = np.divide(given - mean, scale, out=np.zeros_like(given), where=scale > 0)
    np.testing.assert_allclose(stimuli.patterns, expected, atol=1e-5)
    assert not np.allclose(stimuli.patterns.mean(axis=0)[:4], 0, atol=1e-3)
    changed = given.copy()
    changed[stimuli.rows("test")] *= 100
    again = opened(folder_of(tmp_path / "changed", responses=changed))
    assert again.patterns is not None
    np.testing.assert_array_equal(again.patterns[training], stimuli.patterns[training])


@pytest.mark.parametrize("seed", range(8))
def test_no_image_is_in_two_splits_and_every_pair_is_inside_one(tmp_path: Path, seed: int) -> None:
    stimuli = opened(folder_of(tmp_path / "set", responses=responses()), seed=seed)
    pairs = make_pairs(stimuli, "pearson", "images", seed=seed)
    everything, counted = np.arange(18), np.zeros((18, 18), dtype=int)
    for split in SPLITS:
        found = pairs.are_in(everything, split)
        assert found.sum() == num_pairs(len(stimuli.rows(split)))
        rows, columns = np.nonzero(found)
        assert {stimuli.splits[row] for row in (*rows, *columns)} == {split}
        counted += found
    assert counted.max() == 1
    assert sorted(np.concatenate([stimuli.rows(split) for split in SPLITS])) == list(range(18))


def test_leaky_pairs_are_as_many_share_images_and_no_pair(tmp_path: Path) -> None:
    stimuli = opened(folder_of(tmp_path / "set", num_images=60, responses=responses(60)))
    honest = make_pairs(stimuli, "pearson", "images", seed=0)
    leaky = make_pairs(stimuli, "pearson", "leaky_pairs", seed=0)
    everything = np.arange(60)
    of_split = {split: leaky.are_in(everything, split) for split in SPLITS}
    for split, found in of_split.items():
        assert found.sum() == honest.are_in(everything, split).sum() == 190
        assert not (found & ~upper_triangle(60)).any()
    assert sum(found.astype(int) for found in of_split.values()).max() == 1
    trained, tested = (set(np.concatenate(np.nonzero(of_split[split]))) for split in ("train", "test"))
    assert len(tested & trained) > 55


@pytest.mark.parametrize("split_by", ["images", "leaky_pairs"])
def test_fewer_training_images_leave_no_pair_of_the_others(tmp_path: Path, split_by: SplitBy) -> None:
    whole = opened(folder_of(tmp_path / "set", num_images=60, responses=responses(60)))
    fewer = with_fewer_training_images(whole, 8, seed=0)
    left_out = sorted(set(whole.rows("train")) - set(fewer.rows("train")))
    assert len(left_out) == 12
    assert set(fewer.rows("train")) < set(with_fewer_training_images(whole, 12, seed=0).rows("train"))
    pairs = make_pairs(fewer, "pearson", split_by, seed=0)
    assert not set(pairs.images("train")) & set(left_out)
    sizes = [int(pairs.are_in(np.arange(60), split).sum()) for split in SPLITS]
    assert sizes == [num_pairs(8), num_pairs(20), num_pairs(20)]
    assert not pairs.are_in(np.arange(60), "train")[left_out].any()


def test_a_ready_matrix_is_taken_as_it_is(tmp_path: Path) -> None:
    points = np.random.default_rng(0).normal(size=(18, 2))
    matrix = np.linalg.norm(points[:, None] - points, axis=2)
    stimuli = opened(folder_of(tmp_path / "set", rdm=matrix))
    pairs = make_pairs(stimuli, "euclidean", "images", seed=0)
    rows = np.array([3, 11, 5])
    np.testing.assert_allclose(pairs.true(rows).numpy(), matrix[np.ix_(rows, rows)], rtol=1e-6)
    np.testing.assert_allclose(stimuli.true_rdm(rows, "pearson"), matrix[np.ix_(rows, rows)], rtol=1e-6)


def test_what_does_not_belong_together_is_refused_with_what_to_do(tmp_path: Path) -> None:
    lopsided = np.zeros((18, 18))
    lopsided[2, 5] = 0.5
    for number, (arrays, told) in enumerate(
        [
            ({"responses": responses(17)}, r"responses.npy: 17 rows, .*images holds 18 images; give one row for every"),
            ({"rdm": np.zeros((18, 17))}, r"rdm.npy: 18 x 17 values, .* 18 images; give a square matrix"),
            ({"rdm": np.zeros((17, 17))}, r"rdm.npy: 17 x 17 values, .* 18 images"),
            ({"rdm": lopsided}, r"rdm.npy: not symmetric: \[2, 5\] and \[5, 2\] differ by 0.5; store \(matrix \+"),
            ({"rdm": np.full((18, 18), np.nan)}, r"rdm.npy: float64 of shape \(18, 18\); give finite numbers"),
            ({}, r"neither responses.npy nor rdm.npy; put one beside images/"),
        ]
    ):
        with pytest.raises(FinetuneError, match=told):
            opened(folder_of(tmp_path / str(number), **arrays))
    with pytest.raises(FinetuneError, match=r"shards=.*neither a shard set .*python -m data_sharding dataset="):
        opened(tmp_path)
    with pytest.raises(FinetuneError, match=r"data.split.rule=set: .* set data.split.rule=fold"):
        opened(folder_of(tmp_path / "unsplit", responses=responses()), rule="set")


def test_a_split_of_four_images_is_refused_and_one_of_nineteen_is_warned_about(tmp_path: Path) -> None:
    stimuli = opened(folder_of(tmp_path / "set", num_images=12, responses=responses(12)))
    problems, warnings = split_warnings(stimuli)
    assert len(problems) == 3
    assert "split 'test' of" in problems[2]
    assert problems[2].endswith("has 4 images; at least 5 are needed: choose other splits (data.split)")
    stimuli.splits = ["train"] * 20 + ["validation"] * 19 + ["test"] * 40
    problems, warnings = split_warnings(stimuli)
    assert problems == []
    assert [said.rpartition(" has ")[2] for said in warnings] == [
        "19 images: below 20, its numbers hardly mean anything"
    ]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    root = write_phantom("algonauts2023", tmp_path_factory.mktemp("algonauts"), num_subjects=1)
    splits = ["splits.validation_fraction=0.3", "splits.test_fraction=0.3"]
    overrides = ["dataset=algonauts2023", f"source.root={root}", "source.options.subject=subj01", *splits]
    return set_of(tmp_path_factory.mktemp("sets") / "subj01", *overrides)


def test_a_set_of_responses_gives_each_image_its_region_of_both_hemispheres(subject: ShardSet) -> None:
    whole = open_stimuli(subject.location, DATA, region="all")
    atlas = subject.atlases["prf-visualrois"]
    for region, labels in (("V1", [1, 2]), ("V2v", [3]), ("prf-visualrois", [1, 2, 3])):
        part = open_stimuli(subject.location, DATA, region=region)
        is_inside = np.isin(atlas.labels, labels)
        assert part.patterns is not None
        assert whole.patterns is not None
        np.testing.assert_array_equal(part.patterns, whole.patterns[:, is_inside])
    image = next(iter(whole.images([whole.names.index("nsd-00013")])))
    table = subject.scans("response")
    assert whole.names == sorted(table.stimulus)
    assert image.shape[2] == 3
    with pytest.raises(FinetuneError, match=r"task.region=V4: .* holds no vertex of it; choose one of all, prf-visual"):
        open_stimuli(subject.location, DATA, region="V4")
