"""Algonauts 2023 on its phantom: images with their responses, split by image, regions named without unpickling."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from data_sharding import schema
from data_sharding.errors import SourceError
from data_sharding.phantoms import algonauts2023 as phantom
from data_sharding.read.shard_set import ShardSet
from data_sharding.sources.algonauts2023 import read_mapping
from data_sharding.write.prepare import prepare
from tests.helpers_sources import array, config_of, found_by, member, set_of, write_phantom


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom("algonauts2023", tmp_path_factory.mktemp("algonauts"), num_subjects=2)


def algonauts(root: Path, subject: str) -> list[str]:
    fractions = ["splits.validation_fraction=0.3", "splits.test_fraction=0.3"]
    return ["dataset=algonauts2023", f"source.root={root}", f"source.options.subject={subject}", *fractions]


@pytest.fixture(scope="module")
def first(root: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return set_of(tmp_path_factory.mktemp("sets") / "subj01", *algonauts(root, "subj01"))


def test_every_image_has_the_response_of_its_own_row(root: Path, first: ShardSet) -> None:
    assert prepare(config_of("out=unused", *algonauts(root, "subj01"))).plan.num_bytes == first.manifest.counts["bytes"]
    table = first.runs("response", ["train", "validation", "test"])
    assert len(table) == phantom.NUM_IMAGES
    truth = np.concatenate([phantom.responses(1, side, phantom.NUM_IMAGES, 0) for side in phantom.SIDES], axis=1)
    folder = root / "subj01" / "training_split" / "training_images"
    for row, stimulus in ((0, "00013"), (4, "00104"), (11, "00111")):
        scan_id = f"sub-subj01_acq-nsd{stimulus}_response"
        (betas,) = array(first, scan_id, schema.BETAS)
        assert np.abs(betas.astype(np.float32) - truth[row]).max() <= 2.0**-11 * np.abs(truth[row]).max()
        image = folder / f"train-{row + 1:04d}_nsd-{stimulus}.png"
        assert member(first, scan_id, schema.IMAGE) == image.read_bytes()


def test_responses_are_split_by_image_alike_in_every_subjects_set(root: Path, first: ShardSet, tmp_path: Path) -> None:
    second = set_of(tmp_path / "subj02", *algonauts(root, "subj02"))
    assert first.stimuli is not None
    assert second.stimuli is not None
    assert first.stimuli.index.name == "stimulus_id"
    assert len(set(first.stimuli.split)) > 1
    shared = sorted(set(first.stimuli.index) & set(second.stimuli.index))
    assert shared == ["nsd-00013"]
    assert first.stimuli.at[shared[0], "split"] == second.stimuli.at[shared[0], "split"]
    split_of_stimulus = dict(zip(first.index.stimulus, first.index.split, strict=True))
    assert split_of_stimulus == dict(zip(first.stimuli.index, first.stimuli.split, strict=True))
    assert first.space.fingerprint != second.space.fingerprint
    assert pd.isna(first.subjects.at["subj01", "split"])


def test_regions_of_interest_become_an_atlas_with_the_mappings_names(first: ShardSet) -> None:
    atlas = first.atlases["prf-visualrois"]
    expected = [label for size in phantom.SIDES.values() for label in np.arange(size) % 4]
    assert atlas.labels.tolist() == expected
    assert atlas.names == {1: "V1v", 2: "V1d", 3: "V2v"}


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_a_mapping_that_would_run_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    np.save(tmp_path / "mapping.npy", np.array({0: Hostile(marker)}, dtype=object), allow_pickle=True)
    with pytest.raises(
        SourceError, match=r"mapping\.npy: not a dictionary of numbers and names \(it names posix\.system\)"
    ):
        read_mapping(tmp_path / "mapping.npy")
    assert not marker.exists()
    with (tmp_path / "mapping.npy").open("rb") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        pickle.load(file)
    assert marker.exists(), "the file does run code where pickle is trusted"


@pytest.mark.parametrize("content", [{0: 3}, [1, 2], {"one": "V1"}, np.arange(3)])
def test_a_mapping_of_anything_else_is_refused(tmp_path: Path, content: object) -> None:
    np.save(tmp_path / "mapping.npy", np.array(content, dtype=object), allow_pickle=True)
    with pytest.raises(SourceError, match="not a dictionary of numbers and names"):
        read_mapping(tmp_path / "mapping.npy")


def test_images_and_responses_that_do_not_belong_together_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=r"no folder of source\.options\.subject='subj09'; give one of subj01, subj02"
    ):
        found_by(*algonauts(root, "subj09")[:2], "source.options.subject=subj09", "space=mni12")
    broken = write_phantom("algonauts2023", tmp_path / "broken", num_subjects=1)
    images = broken / "subj01" / "training_split" / "training_images"
    (images / "train-0012_nsd-00111.png").unlink()
    with pytest.raises(SourceError, match=r"lh_training_fmri\.npy: 12 responses, .* has 11 images"):
        found_by(*algonauts(broken, "subj01"))
    (images / "train-0005_nsd-00104.png").unlink()
    with pytest.raises(SourceError, match=r"image train-0005 is missing or duplicated"):
        found_by(*algonauts(broken, "subj01"))
    other = f"{root}/subj02/roi_masks"
    masks = f"space.vertices=[{other}/lh.all-vertices_fsaverage_space.npy,{other}/rh.all-vertices_fsaverage_space.npy]"
    with pytest.raises(SourceError, match=r"40 vertices, space algonauts2023 has 41 on that side"):
        found_by(*algonauts(root, "subj01"), masks)


def test_damaged_images_and_raw_responses_leave_a_hole_with_the_reason(tmp_path: Path) -> None:
    root = write_phantom("algonauts2023", tmp_path / "broken", num_subjects=1)
    split = root / "subj01" / "training_split"
    image = split / "training_images" / "train-0002_nsd-00101.png"
    image.write_bytes(image.read_bytes()[:100])
    for side in phantom.SIDES:
        path = split / "training_fmri" / f"{side}_training_fmri.npy"
        values = np.load(path)
        values[2] *= 1000
        np.save(path, values)
    shard_set = set_of(tmp_path / "set", *algonauts(root, "subj01"))
    reasons = {refusal.scan_id: refusal.reason for refusal in shard_set.manifest.refused}
    assert set(reasons) == {"sub-subj01_acq-nsd00101_response", "sub-subj01_acq-nsd00102_response"}
    assert "not a readable PNG image" in reasons["sub-subj01_acq-nsd00101_response"]
    assert "must be standardised" in reasons["sub-subj01_acq-nsd00102_response"]
    assert not set(reasons) & set(shard_set.index.scan_id)


def test_the_phantoms_truth_is_that_responses_follow_from_the_pixels_up_to_a_ceiling(tmp_path: Path) -> None:
    phantom.write(tmp_path, 2, 0, num_images=60)
    truth = json.loads((tmp_path / "truth.json").read_text())
    weights = np.array(truth["extractor"]["weights"])
    split = tmp_path / "subj01/training_split"
    files = sorted((split / "training_images").iterdir())
    assert len(files) == 60
    features = []
    for file in files:
        gray = np.asarray(Image.open(file)).mean(axis=2).reshape(4, 4, 4, 4).mean(axis=(1, 3)).ravel()
        features.append(np.tanh(weights @ (gray / 255 - 0.5)))
    measured = np.load(split / "training_fmri/lh_training_fmri.npy")
    explained = {}
    for region, label in (("V1", 1), ("V2", 3)):
        of_region = measured[:, np.arange(40) % 4 == label]
        for name, used in truth["features_of"].items():
            predictors = np.column_stack([np.array(features)[:, used], np.ones(60)])
            residual = of_region - predictors @ np.linalg.lstsq(predictors, of_region, rcond=None)[0]
            explained[region, name] = 1 - residual.var() / of_region.var()
    signal = 1 / (1 + truth["noise"] ** 2)
    for region, other in (("V1", "V2"), ("V2", "V1")):
        assert explained[region, region] == pytest.approx(signal + (1 - signal) * 6 / 60, abs=0.06)
        assert explained[region, other] < explained[region, region] - 0.1
    assert all(0.4 < value < 0.65 for of in truth["ceilings"].values() for value in of.values())
    names = [{path.name.split("_")[1] for path in (tmp_path / f"subj0{one}").rglob("*.png")} for one in (1, 2)]
    assert len(names[0] & names[1]) == 5
