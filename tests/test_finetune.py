"""Fine-tuning end to end: shards and a registered backbone in, a registered classifier and its report out."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from brain_models import bundle
from brain_models.bundle import Bundle, StemSpec, make_encoder
from brain_models.encoder import EncoderConfig
from configs.entry import compose
from configs.parse import parse
from data_sharding.build import build
from data_sharding.config import ShardingConfig
from data_sharding.phantom import PhantomConfig, write_phantom
from data_sharding.reader import ShardSet, open_set
from finetune.config import FinetuneConfig, PredictConfig
from finetune.connectomes import read_connectomes
from finetune.errors import FinetuneError
from finetune.evaluation import BootstrapConfig, Scores, evaluate
from finetune.planning import plan, validate
from finetune.predict import find_scans, predict, scan_table
from finetune.promotion import refusals
from finetune.summary import show
from finetune.train import fetch_backbone, train
from training import registry
from training.errors import TrainingError
from training.seen_subjects import hash_subject, overlap, read_seen, write_seen

NUM_SUBJECTS = 32


@dataclass(frozen=True)
class Place:
    """A folder with scans, shards of them and a registered backbone that has seen the training subjects."""

    folder: Path
    scans: Path
    shards: Path
    uri: str

    def config(self, *overrides: str) -> FinetuneConfig:
        fixed = [
            f"shards={self.shards}",
            "encoder=models:/tiny@candidate",
            f"run.folder={self.folder}/run",
            f"run.scratch={self.folder}/scratch",
            f"train.tracking.uri={self.uri}",
            "engine=plain",
            "cluster=inline",
            "train.steps=4",
            "train.checkpoint.every_steps=2",
            "train.evaluation.every_steps=2",
            "data.batch_size=4",
            "data.num_workers=0",
            "task.unfreezing.first_block_opens_at_step=2",
            "task.head.num_channels=2",
            "task.num_windows=8",
            "bootstrap.num_resamples=100",
        ]
        return parse(compose("finetune", fixed + list(overrides)), FinetuneConfig)


def write_backbone(folder: Path, shard_set: ShardSet) -> Path:
    torch.manual_seed(0)
    stem = StemSpec(patch_voxels=3, tubelet_frames=4, window_frames=4, needs_brain_mask=True)
    spaces, stems = {"bold": shard_set.space}, {"bold": stem}
    encoder = make_encoder(EncoderConfig(16, 1, 2, 2.0, 4, "seconds"), spaces, stems)
    bundle.save(folder, Bundle(encoder, spaces, stems, None, None, {"part": "test"}))
    write_seen(folder, set(shard_set.runs("bold", ["train"])["subject"]))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("finetune")
    scans, shards = folder / "phantom", folder / "shards"
    small = [f"num_subjects={NUM_SUBJECTS}", "num_frames=32", "spacing_mm=12", "t1_spacing_mm=12", "seed=5"]
    write_phantom(parse(compose("phantom", [f"out={scans}", *small]), PhantomConfig))
    overrides = [f"source.root={scans}", f"out={shards}", "dataset=phantom", "space=mni12", "source.kinds=[bold]"]
    overrides += ["splits.num_validation=8", "splits.num_test=10", "acceptance.min_coverage=0.2", "cluster=inline"]
    build(parse(compose("data_sharding", overrides), ShardingConfig))
    uri = f"sqlite:///{folder}/mlflow.db"
    registry.register(
        write_backbone(folder / "backbone", open_set(str(shards))),
        name="tiny",
        tags={"callosum.masking": "region 0.5"},
        alias="candidate",
        uri=uri,
        run_id=None,
        experiment="test",
    )
    return Place(folder, scans, shards, uri)


@pytest.fixture(scope="module")
def numbers(place: Place) -> dict:
    return train(place.config())


def test_every_number_of_the_report_is_there_beside_its_baselines(place: Place, numbers: dict) -> None:
    assert list(numbers["classifiers"]) == ["fine-tuned model", "connectivity + logistic", "site alone"]
    for row in numbers["classifiers"].values():
        assert row["num_subjects"] == 10
        assert 0 <= row["within_site_auroc"]["low"] <= row["within_site_auroc"]["high"] <= 1
    page = (place.folder / "run" / "report.html").read_text(encoding="utf-8")
    assert "Phantom data" in page
    assert "None of the 10 test subjects was seen" in page
    assert open_set(str(place.shards)).fingerprint in page
    written = json.loads((place.folder / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(numbers))
    assert "fine-tuned model" in show(numbers, folder="run")


def test_registered_classifier_gives_the_original_files_the_scores_of_the_report(place: Place, numbers: dict) -> None:
    with (place.folder / "run" / "scores.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["classifier"] == "fine-tuned model"]
    config = PredictConfig(
        classifier=numbers["registered"][0],
        scans=[str(place.scans / f"sub-{row['subject']}") for row in rows],
        brain_masks=True,
        uri=place.uri,
        out=str(place.folder / "predictions.csv"),
    )
    answers = predict(config)
    expected = 1 / (1 + np.exp(-np.array([float(row["score"]) for row in rows])))
    np.testing.assert_allclose(answers["probability"], expected, atol=1e-4)
    assert len((place.folder / "predictions.csv").read_text(encoding="utf-8").splitlines()) == 11


def test_rerunning_a_finished_run_changes_nothing(place: Place, numbers: dict) -> None:
    again = train(place.config())
    assert again["classifiers"] == numbers["classifiers"]
    with pytest.raises(TrainingError, match="belongs to another configuration"):
        train(place.config("train.optimizer.learning_rate=1.0"))


def test_the_new_bundle_has_seen_its_training_subjects_and_those_of_its_backbone(place: Place, numbers: dict) -> None:
    seen = read_seen(place.folder / "run" / "bundle")
    assert seen is not None
    train_subjects = set(open_set(str(place.shards)).runs("bold", ["train"])["subject"])
    assert seen == {hash_subject(subject) for subject in train_subjects}
    assert overlap(["0001", "sub-0001", "unknown"], {hash_subject("0001")}) == ["0001", "sub-0001"]


def test_tags_name_set_backbone_and_why_a_model_is_no_champion(place: Place, numbers: dict) -> None:
    tags = registry.version_tags(numbers["registered"][0], uri=place.uri)
    assert tags["callosum.set_fingerprint"] == open_set(str(place.shards)).fingerprint
    assert tags["callosum.backbone"] == "models:/tiny@candidate"
    assert tags["callosum.backbone_masking"] == "region 0.5"
    assert tags["callosum.overlap"] == "0"


def test_champion_is_refused_for_overlap_for_ignorance_and_for_chance() -> None:
    is_case = np.arange(40) % 2 == 0
    sites = np.full(40, "a")
    config = BootstrapConfig(num_resamples=50, confidence=0.95, seed=0)
    names = tuple(f"s{index:02d}" for index in range(40))
    good = evaluate(Scores(names, is_case + 0.1 * np.arange(40) % 1, is_case, sites), threshold=0.5, config=config)
    flat = evaluate(Scores(names, np.zeros(40), is_case, sites), threshold=0.5, config=config)
    assert refusals(good, [], needed_low=0.5) == []
    assert refusals(good, ["s01"], needed_low=0.5) == ["the backbone saw 1 of the test subjects"]
    assert refusals(good, None, needed_low=0.5) == ["the backbone does not say which subjects it saw"]
    assert refusals(flat, [], needed_low=0.5) == ["within-site AUROC's lower end 0.500 is not above 0.5"]


def test_connectivity_of_the_shards_is_that_of_the_runs_region_means(place: Place) -> None:
    shard_set = open_set(str(place.shards))
    table = read_connectomes(shard_set, "template", splits=["test"])
    assert len(table.subjects_of("test")) == 10
    num_pairs = table.num_regions * (table.num_regions - 1) // 2
    assert table.rows(table.subjects_of("test")).shape == (10, num_pairs)
    assert np.isfinite(table.rows(table.subjects_of("test"))).mean() > 0.5


def test_plan_says_what_happens_and_when_layers_open(place: Place) -> None:
    text = plan(place.config())
    assert "14 of 32 frames (8 windows)" in text
    openings = [line.split("  ", 1)[1].split()[0] for line in text.splitlines() if line.startswith("opens at step")]
    assert openings == ["head", "encoder.0", "encoder.stem"]
    assert "never, the run ends before" in text
    assert validate(place.config()) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.num_windows=9"], "9 windows of 4 frames are 36; the longest run of 'train' has 32: use at most 8"),
        (["task.label.column=DX"], "no column 'DX'"),
        (["task.atlas=aal3"], "holds ['template']"),
        (["train.evaluation.split=test"], "the test split is looked at once, at the end"),
        (["train.checkpoint.every_steps=3"], "commits have no score and choose=best cannot choose"),
        (["encoder=models:/nobody@candidate"], "lists what is registered"),
        (["shards=nowhere"], "nowhere holds no shard set"),
        (["data.batch_size=0"], "data.batch_size: 0; must be above 0"),
        (["baselines.strengths=[]"], "baselines.strengths: []; give at least one"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_with_what_to_do(
    place: Place, overrides: list[str], message: str
) -> None:
    assert message in "\n".join(validate(place.config(*overrides)))


def test_a_backbone_of_another_space_is_refused_with_both_spaces(place: Place, tmp_path: Path) -> None:
    shard_set = open_set(str(place.shards))
    space = shard_set.space
    other = type(space)(
        "elsewhere",
        space.kind,
        space.template,
        space.positions_mm[:-9],
        space.grid_shape,
        space.affine,
        space.voxel_indices[:-9],
    )
    stem = StemSpec(patch_voxels=3, tubelet_frames=4, window_frames=4, needs_brain_mask=True)
    encoder = make_encoder(EncoderConfig(16, 1, 2, 2.0, 4, "seconds"), {"bold": other}, {"bold": stem})
    bundle.save(tmp_path / "other", Bundle(encoder, {"bold": other}, {"bold": stem}, None, None, {}))
    problems = "\n".join(validate(place.config(f"encoder={tmp_path}/other")))
    assert "was trained on space elsewhere" in problems
    assert "shard the scans in the backbone's space, or pretrain on this one" in problems
    assert fetch_backbone(place.config(f"encoder={tmp_path}/other")).seen is None


def test_scans_are_found_in_folders_and_patterns_and_nothing_found_is_an_error(place: Place) -> None:
    one = find_scans([str(place.scans / "sub-0001")])
    assert [path.name for path in one] == ["sub-0001_task-rest_space-MNI152NLin6Asym_res-12_desc-preproc_bold.nii.gz"]
    assert find_scans([f"{place.scans}/sub-*/func/*_bold.nii.gz", str(one[0])])[0] == one[0]
    assert len(find_scans([f"{place.scans}/sub-*"])) == NUM_SUBJECTS
    table = scan_table(one, brain_masks=True)
    assert table["repetition_time_s"][0] == 2.0
    assert table["brain_mask"][0].endswith("_desc-brain_mask.nii.gz")
    with pytest.raises(FinetuneError, match=r"nothing matches .*/nobody; give files"):
        find_scans([f"{place.scans}/nobody"])
