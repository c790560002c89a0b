"""Fine-tuning end to end: shards and a registered backbone in, a registered classifier and its report out."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from brain_models import bundle
from brain_models.bundle import code_commit
from brain_models.encoder import EncoderConfig
from configs.entry import compose
from configs.parse import parse
from data_sharding import schema
from data_sharding.config import ShardingConfig
from data_sharding.errors import ShardError
from data_sharding.phantoms.study.config import PhantomConfig
from data_sharding.phantoms.study.write import write_phantom
from data_sharding.read.reader import ShardSet, open_set
from data_sharding.write.build import build
from finetune.backbone import fetch_backbone
from finetune.compare import planning as compare
from finetune.config import CompareConfig, FinetuneConfig, PredictConfig
from finetune.errors import FinetuneError
from finetune.planning import plan, validate
from finetune.predict import find_scans, predict, scan_rows
from finetune.predict import validate as predict_problems
from finetune.tasks.subject_prediction import open_study
from finetune.tasks.subject_prediction.connectomes import read_connectomes
from finetune.tasks.subject_prediction.scores import Scores
from finetune.train import train
from tests.bundles import cubes, encoder_bundle
from tests.data_sharding.test_shards import copy_set, flip
from training.errors import TrainingError
from training.registry import models as registry
from training.registry.card import PHANTOM
from training.registry.promotion import SCORES, champion_scores, promote
from training.registry.seen_subjects import FILE as SEEN
from training.registry.seen_subjects import hash_subject, overlap, read_seen, write_seen
from training.runs import list_models
from training.study import summary

ENCODER = EncoderConfig(16, 1, 2, 2.0, 4, "seconds")

NUM_SUBJECTS = 32
TWINS = "{one:[models:/tiny@candidate],other:[models:/twin@candidate]}"


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
            f"tracking={self.uri}",
            "engine=plain",
            "cluster=inline",
            "train.steps=4",
            "train.checkpoint.every_steps=2",
            "train.evaluation.every_steps=2",
            "data.batch_size=4",
            "data.num_workers=0",
            "task.unfreezing.first_layer_opens_at_step=2",
            "task.head.num_channels=2",
            "task.num_windows=8",
            "bootstrap.num_resamples=100",
        ]
        return parse(compose("finetune", fixed + list(overrides)), FinetuneConfig)

    def comparison(self, *overrides: str, encoders: str = TWINS) -> CompareConfig:
        fixed = [f"shards={self.shards}", f"run.folder={self.folder}/compare", f"run.scratch={self.folder}/scratch"]
        fixed += [f"tracking={self.uri}", "engine=plain", "cluster=inline", "bootstrap.num_resamples=100"]
        fixed += ["train.steps=2", "train.schedule.warmup_steps=1", "train.checkpoint.every_steps=2"]
        fixed += ["train.evaluation.every_steps=2"]
        fixed += ["data.batch_size=4", "data.num_workers=0", "task.head.num_channels=2", "task.num_windows=8"]
        fixed += [f"encoders={encoders}", "seeds=[0,1]"]
        return parse(compose("finetune.compare", fixed + list(overrides)), CompareConfig)


def write_backbone(folder: Path, shard_set: ShardSet) -> Path:
    torch.manual_seed(0)
    stem = replace(cubes(shard_set.space, 3), needs_brain_mask=True)
    bundle.save(folder, encoder_bundle(ENCODER, {"bold": stem}, part="test"))
    write_seen(folder, set(shard_set.runs("bold", ["train"])["subject"]))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("finetune")
    scans, shards = folder / "phantom", folder / "shards"
    small = [f"num_subjects={NUM_SUBJECTS}", "num_frames=32", "spacing_mm=12", "t1_spacing_mm=12", "seed=5"]
    write_phantom(parse(compose("data_sharding.phantom", [f"out={scans}", *small]), PhantomConfig))
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
    assert list(numbers["models"]) == ["fine-tuned model", "connectivity + logistic", "site alone"]
    for row in numbers["models"].values():
        assert row["num_subjects"] == 10
        assert 0 <= row["within_site_auroc"]["low"] <= row["within_site_auroc"]["high"] <= 1
    page = (place.folder / "run" / "report.html").read_text(encoding="utf-8")
    assert "Phantom data" in page
    assert "None of the 10 held-out subjects was seen" in page
    assert open_set(str(place.shards)).fingerprint in page
    assert f"by <code>Python</code> with code commit <code>{code_commit()}</code>" in page
    assert "4 steps of 4 samples with AdamW" in page
    assert "read 8 consecutive windows of each BOLD run (32 frames)" in page
    written = json.loads((place.folder / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(numbers))
    lines = summary(numbers, folder="run", following="next: rest").splitlines()
    assert lines[0] == numbers["verdict"]
    assert lines[2].startswith("fine-tuned model ")
    assert lines[-2:] == ["report: run/report.html", "next: rest"]


def test_registered_classifier_gives_the_original_files_the_scores_of_the_report(place: Place, numbers: dict) -> None:
    with (place.folder / "run" / "scores.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == "fine-tuned model"]
    config = PredictConfig(
        registered_model=numbers["registered"][0],
        scans=[str(place.scans / f"sub-{row['subject']}") for row in rows],
        brain_masks=True,
        tracking=place.uri,
        out=str(place.folder / "predictions.csv"),
    )
    taken = replace(config, out=f"{place.folder}/run/scores.csv/x.csv")
    assert predict_problems(taken) == [f"out: {Path(taken.out).parent} is a file; give another location"]
    assert predict_problems(config) == []
    answers = predict(config)
    expected = 1 / (1 + np.exp(-np.array([float(row["score"]) for row in rows])))
    np.testing.assert_allclose(answers["probability_of_ADHD"], expected, atol=1e-4)
    assert list(answers["subject"]) == [row["subject"] for row in rows]
    assert len((place.folder / "predictions.csv").read_text(encoding="utf-8").splitlines()) == 11


def test_rerunning_a_finished_run_changes_nothing(place: Place, numbers: dict) -> None:
    again = train(place.config())
    assert again["models"] == numbers["models"]
    assert again["registered"] == numbers["registered"]
    scratch = Path(place.config().run.scratch)
    assert not [*scratch.glob("*-results-*"), *scratch.glob("*-chosen-*")]
    assert [line.split()[0] for line in list_models(place.uri) if "adhd" in line] == ["finetune-adhd_classification/1"]
    with pytest.raises(TrainingError, match="belongs to another configuration"):
        train(place.config("train.optimizer.learning_rate=1.0"))


def test_the_new_bundle_has_seen_its_training_subjects_and_those_of_its_backbone(place: Place, numbers: dict) -> None:
    seen = read_seen(place.folder / "run" / "bundle")
    assert seen is not None
    train_subjects = set(open_set(str(place.shards)).runs("bold", ["train"])["subject"])
    assert seen == {hash_subject(subject) for subject in train_subjects}
    assert overlap(["0001", "sub-0001", "unknown"], {hash_subject("0001")}) == ["0001", "sub-0001"]


def test_a_backbone_that_does_not_say_whom_it_saw_is_followed_by_a_bundle_that_does_not_either(
    place: Place, tmp_path: Path
) -> None:
    silent = write_backbone(tmp_path / "silent", open_set(str(place.shards)))
    (silent / SEEN).unlink()
    few = [f"encoder={silent}", f"run.folder={tmp_path}/run", f"run.scratch={tmp_path}", "train.steps=2"]
    config = place.config(*few, "task.probe=null", "tracking=null", "train.schedule.warmup_steps=1")
    assert train(config)["overlap"] is None
    assert read_seen(tmp_path / "run" / "bundle") is None
    # Said later, by whatever the same name means then, it is not of the weights that the run started from.
    write_seen(silent, ["0001"])
    assert train(config)["overlap"] is None


def test_baselines_are_scored_on_the_subjects_that_the_model_was_scored_on(place: Place) -> None:
    study = open_study(place.config())
    scores = {}
    for split in ("validation", "test"):
        names = sorted(study.shard_set.runs("bold", [split])["subject"])[1:]  # as if the first one's run were too short
        is_case, sites = study.labels.rows(names)
        scores[split] = Scores(tuple(names), np.arange(len(names), dtype=float), is_case, sites)
    for row, _ in study.baselines(scores).values():
        assert row.subjects == scores["test"].subjects


def test_tags_name_set_backbone_and_why_a_model_is_no_champion(place: Place, numbers: dict) -> None:
    tags = registry.version_tags(numbers["registered"][0], uri=place.uri)
    assert tags["callosum.set_fingerprint"] == open_set(str(place.shards)).fingerprint
    assert tags["callosum.backbone"] == "models:/tiny@candidate"
    assert tags["callosum.backbone_masking"] == "region 0.5"
    assert tags["callosum.overlap"] == "0"


def test_the_registered_version_is_described_by_its_card(place: Place, numbers: dict) -> None:
    card = (place.folder / "run" / "bundle" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert card.splitlines()[0] == PHANTOM
    assert numbers["verdict"] in card
    assert "The weights have seen 14 subjects" in card
    assert "| subjects | test 10, train 14, validation 8 |" in card
    client = MlflowClient(tracking_uri=place.uri, registry_uri=place.uri)
    version = client.get_model_version_by_alias("finetune-adhd_classification", "candidate")
    assert numbers["verdict"] in version.description
    assert version.description == client.get_registered_model("finetune-adhd_classification").description


def test_the_mlflow_run_shows_description_data_scores_and_files(place: Place, numbers: dict) -> None:
    client = MlflowClient(tracking_uri=place.uri)
    run = client.get_run(numbers["lineage"]["MLflow run"])
    assert run.data.tags["mlflow.note.content"] == numbers["verdict"]
    assert run.data.tags["mlflow.source.git.commit"] == code_commit()
    auroc = numbers["models"]["fine-tuned model"]["auroc"]
    assert run.data.tags["callosum.test_auroc"].startswith(f"{auroc['value']:.3f} [")
    assert run.data.metrics["test/auroc.final"] == pytest.approx(auroc["value"])
    version = client.get_model_version_by_alias("finetune-adhd_classification", "candidate")
    assert version.tags["callosum.validation_auroc"] == f"{run.data.metrics['validation/auroc.final']:.4f}"
    (data,) = run.inputs.dataset_inputs
    assert json.loads(data.dataset.source) == {"uri": str(place.shards)}
    assert {"report.html", "scores.csv"} <= {file.path for file in client.list_artifacts(run.info.run_id)}


def test_a_champion_is_compared_by_the_scores_kept_with_it(place: Place, numbers: dict) -> None:
    assert [reason for reason in numbers["not_champion"] if "connectivity" in reason or "site alone" in reason]
    name = "finetune-adhd_classification"
    assert champion_scores(name, uri=place.uri, checkpoint_hash="another") is None
    promote(f"{name}@candidate", uri=place.uri)
    kept = champion_scores(name, uri=place.uri, checkpoint_hash="another")
    assert kept == (place.folder / "run" / "bundle" / SCORES).read_text(encoding="utf-8")
    own = registry.version_tags(f"{name}@champion", uri=place.uri)[registry.CHECKPOINT_HASH_TAG]
    assert champion_scores(name, uri=place.uri, checkpoint_hash=own) is None


def test_connectivity_of_the_shards_is_that_of_the_runs_region_means(place: Place) -> None:
    shard_set = open_set(str(place.shards))
    table = read_connectomes(shard_set, "template", ["test"], data=place.config().data)
    assert len(table.subjects_of("test")) == 10
    num_pairs = table.num_regions * (table.num_regions - 1) // 2
    assert table.rows(table.subjects_of("test")).shape == (10, num_pairs)
    assert np.isfinite(table.rows(table.subjects_of("test"))).mean() > 0.5


def test_connectomes_tolerate_as_much_damage_as_the_run(place: Place, tmp_path: Path) -> None:
    shard_set = open_set(str(copy_set(place.shards, tmp_path / "damaged")))
    row = shard_set.index[(shard_set.index.kind == schema.BOLD) & (shard_set.index.split == "test")].iloc[0]
    for frame in range(8, 24):  # two windows: some frames may be censored
        at = schema.NPY_HEADER_BYTES + frame * shard_set.space.num_voxels
        flip(tmp_path / "damaged" / row.shard, row.offset + at)
    with pytest.raises(ShardError, match="damaged samples"):
        read_connectomes(shard_set, "template", ["test"], data=place.config().data)
    tolerant = place.config("data.max_bad_fraction=1", "data.reader=stream").data
    table = read_connectomes(shard_set, "template", ["test"], data=tolerant)
    assert len(table.subjects_of("test")) == 10


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
        (["train.checkpoint.every_steps=3"], "commits have no score and train.choose=best cannot choose"),
        (["train.checkpoint.best_metric=validation/f1"], "validation/f1 is no metric of this task"),
        (
            ["train.checkpoint.best_metric=validation/loss"],
            "best_is: highest, but the best validation/loss is the lowest",
        ),
        (["encoder=models:/nobody@candidate"], "lists what is registered"),
        (
            ["encoder=out/nowhere"],
            "encoder=out/nowhere: no folder with a model.yaml, and models:/out/nowhere cannot be",
        ),
        (["shards=nowhere"], "nowhere holds no shard set"),
        (["data.batch_size=0"], "data.batch_size: 0; must be above 0"),
        (["task.baselines.strengths=[]"], "task.baselines.strengths: []; give at least one"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_with_what_to_do(
    place: Place, overrides: list[str], message: str
) -> None:
    assert message in "\n".join(validate(place.config(*overrides)))


def test_a_backbone_of_another_space_is_refused_with_both_spaces_and_of_several_the_right_one_is_taken(
    place: Place, tmp_path: Path
) -> None:
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
    elsewhere = cubes(other, 3)
    bundle.save(tmp_path / "other", encoder_bundle(ENCODER, {"bold": elsewhere}))
    bundle.save(tmp_path / "both", encoder_bundle(ENCODER, {"bold": elsewhere, "bold_2": cubes(space, 3)}))
    assert validate(place.config(f"encoder={tmp_path}/both")) == []
    assert fetch_backbone(place.config(f"encoder={tmp_path}/both")).load(space).stems["bold"].space.name == space.name

    problems = "\n".join(validate(place.config(f"encoder={tmp_path}/other")))
    assert "was trained on space elsewhere" in problems
    assert "shard the scans in the backbone's space, or pretrain on this one" in problems
    assert fetch_backbone(place.config(f"encoder={tmp_path}/other")).seen is None


def test_scans_are_found_in_folders_and_patterns_and_nothing_found_is_an_error(place: Place) -> None:
    anatomy, *one = find_scans([str(place.scans / "sub-0001")])
    assert anatomy.name == "sub-0001_space-MNI152NLin6Asym_res-12_desc-preproc_T1w.nii.gz"
    assert [path.name for path in one] == ["sub-0001_task-rest_space-MNI152NLin6Asym_res-12_desc-preproc_bold.nii.gz"]
    assert find_scans([f"{place.scans}/sub-*/func/*_bold.nii.gz", str(one[0])])[0] == one[0]
    assert len(find_scans([f"{place.scans}/sub-*/func"])) == NUM_SUBJECTS
    (row,) = scan_rows(one, ["bold"], brain_masks=True)
    assert row["repetition_time_s"] == 2.0
    assert str(row["brain_mask"]).endswith("_desc-brain_mask.nii.gz")
    with pytest.raises(FinetuneError, match=r"nothing matches .*/nobody; give files"):
        find_scans([f"{place.scans}/nobody"])


@pytest.fixture(scope="module")
def compared(place: Place) -> CompareConfig:
    """A comparison of one encoder under two names, made."""
    backbone, tags = place.folder / "backbone", {"callosum.masking": "region 0.5"}
    registry.register(
        backbone, name="twin", tags=tags, alias="candidate", uri=place.uri, run_id=None, experiment="test"
    )
    config = place.comparison()
    assert compare.validate(config) == []
    compare.run(config)
    return config


def test_one_encoder_under_two_names_shows_no_difference_in_any_mode(place: Place, compared: CompareConfig) -> None:
    folder = place.folder / "compare"
    rows = list(csv.DictReader((folder / "comparison.csv").read_text(encoding="utf-8").splitlines()))
    assert [(row["kind"], row["mode"], row["arm"]) for row in rows] == [
        ("arm", "probe", "one"),
        ("arm", "probe", "other"),
        ("arm", "full", "one"),
        ("arm", "full", "other"),
        ("arm", "baseline", "connectivity + logistic"),
        ("arm", "baseline", "site alone"),
        ("difference", "probe", "other"),
        ("difference", "full", "other"),
    ]
    for row in rows[-2:]:
        assert [float(row[end]) for end in ("value", "low", "high", "p_corrected")] == [0, 0, 0, 1]
        assert row["verdict"].startswith("no difference shown")
    page = (folder / "comparison.md").read_text(encoding="utf-8")
    assert "One pretraining seed an arm" in page
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_every_cell_is_scored_on_the_test_split_once_with_its_own_seed_and_mode(
    place: Place, compared: CompareConfig
) -> None:
    cells = (place.folder / "compare/cells.csv").read_text(encoding="utf-8").splitlines()[1:]
    assert len(cells) == 2 * 2 * 2
    for mode, opens_at_step in (("probe", 2), ("full", 0)):
        for seed in (0, 1):
            record = json.loads((place.folder / f"compare/cells/one-0-{mode}-seed{seed}/run.json").read_text())[
                "config"
            ]
            assert record["task.unfreezing.first_layer_opens_at_step"] == opens_at_step
            assert record["task.probe.seed"] == record["data.seed"] == record["train.seed"] == seed
            assert record["encoder"] == "models:/tiny/1"


def test_a_comparison_runs_only_the_cells_that_are_missing(
    place: Place, compared: CompareConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = place.folder / "compare"
    before = (folder / "cells.csv").read_bytes()
    (folder / "cells/other-0-full-seed1/metrics.json").unlink()
    assert "8: 2 arms x 1 encoders x 2 modes x 2 seeds; 7 finished" in compare.plan(compared)
    compare.run(compared)
    printed = [line for line in capsys.readouterr().out.splitlines() if "finished" in line]
    assert printed == ["8 runs, 7 finished", f"run 1/1  {folder}/cells/other-0-full-seed1  finished"]
    assert (folder / "cells.csv").read_bytes() == before


def test_an_encoder_that_saw_test_subjects_is_refused(place: Place, tmp_path: Path) -> None:
    shard_set = open_set(str(place.shards))
    write_backbone(tmp_path / "seen", shard_set)
    write_seen(tmp_path / "seen", set(shard_set.runs("bold", ["test"])["subject"]))
    problems = compare.validate(place.comparison(encoders=f"[models:/tiny@candidate,{tmp_path}/seen]"))
    assert len(problems) == 1
    assert "was pretrained on 10 of 10 test subjects" in problems[0]


@pytest.mark.parametrize(
    ("encoders", "overrides", "message"),
    [
        ("[models:/tiny@candidate]", [], "encoders: 1 arm; give at least two"),
        ("[a@x,a@x]", [], "a@x is there twice; name arms"),
        ("{one:[a@x,b@x],two:[c@x]}", [], "one 2, two 1; give every arm equally many"),
        (TWINS, ["encoder=three"], "three is none of the arms one, other"),
        (TWINS, ["seeds=[1,1]"], "seeds: [1, 1]; give at least one, each once"),
    ],
)
def test_what_is_no_comparison_is_refused_with_what_to_do(
    place: Place, encoders: str, overrides: list[str], message: str
) -> None:
    assert message in "\n".join(compare.validate(place.comparison(*overrides, encoders=encoders)))


@pytest.mark.parametrize(("chosen", "is_frozen"), [(6, True), (7, False)])
def test_results_say_whether_the_encoder_had_opened_at_the_chosen_commit(
    place: Place, chosen: int, is_frozen: bool
) -> None:
    opened = ["task.unfreezing.first_layer_opens_at_step=6", "task.probe=null"]
    said = open_study(place.config(*opened)).what_was_trained(chosen)
    frozen = "; only the head was trained: the encoder is as registered" if is_frozen else ""
    assert said == f"commit of step {chosen} (best){frozen}"
