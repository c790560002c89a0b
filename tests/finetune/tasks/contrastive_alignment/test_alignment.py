"""Alignment end to end: T1s and region series of the same people in, a report and a registered T1 embedder out."""

from __future__ import annotations

import csv
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.entry import compose
from configs.parse import parse
from data_sharding.read.reader import open_set
from finetune.config import FinetuneConfig, OneBatchConfig, PredictConfig
from finetune.planning import plan, validate
from finetune.predict import predict
from finetune.tasks.contrastive_alignment import open_study
from finetune.tasks.contrastive_alignment.diagnosis import finding_of
from finetune.train import train
from tests.helpers_sources import AS_IT_IS, set_of, write_phantom
from training.unfreezing import checked_groups

SPLITS = ["splits.num_validation=3", "splits.num_test=3"]
NUM_TRAINED = 6
AUGMENTED_T1 = "task.structure.augmentation={scale:0.1,shift:0.1,noise:0.05,bias:0.1,bias_wavelength_mm:150}"
AUGMENTED_SERIES = "task.function.augmentation={shortest_share:0.5,dropped_regions:0.1,noise:0.1}"
SMALL = [
    "task.structure.network.width=8",
    "task.structure.network.depth=2",
    "task.structure.patch_voxels=4",
    "task.function.network.width=16",
    "task.function.network.num_heads=2",
    "task.function.num_frames=30",
    "task.projection={hidden:16,embedding:8,dropout:0.0}",
    "task.num_permutations=50",
    "train.steps=4",
    "train.schedule.warmup_steps=1",
    "train.checkpoint.every_steps=2",
    "train.evaluation.every_steps=2",
    "data.batch_size=8",
    "data.micro_batch_size=8",
    "data.num_workers=0",
    "bootstrap.num_resamples=50",
    "engine=plain",
    "cluster=inline",
]


@dataclass(frozen=True)
class Place:
    """Two sets of the same twelve people: heads in a cube, and region series."""

    folder: Path
    scans: Path

    def config(self, *overrides: str) -> FinetuneConfig:
        fixed = ["task=contrastive_alignment", f"shards={self.folder}/t1", f"task.function.shards={self.folder}/rest"]
        fixed += ["encoder=scratch", f"run.folder={self.folder}/run", f"run.scratch={self.folder}/scratch"]
        fixed += [f"tracking=sqlite:///{self.folder}/mlflow.db", *SMALL, *overrides]
        return parse(compose("finetune", fixed), FinetuneConfig)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("alignment")
    scans = write_phantom("mica_mics", folder / "scans", num_subjects=12)
    cube = ["space=t1_cube128", "space.spacing_mm=12", "space.edge_voxels=16", "atlas=null", "source.kinds=[t1]"]
    accepted = ["acceptance.max_refused_fraction=0.5"]  # the first subject's second T1w is refused
    set_of(folder / "t1", "dataset=mica_mics", "name=mica_phantom", f"source.root={scans}", *cube, *SPLITS, *accepted)
    rest = [f"source.root={scans}/derivatives/fmriprep", "space=mni12", "source.kinds=[parcels]"]
    set_of(
        folder / "rest",
        "dataset=mica_mics",
        "name=mica_phantom",
        *rest,
        f"atlas={scans}/atlas/aal116.nii.gz",
        *SPLITS,
        *AS_IT_IS,
    )
    return Place(folder, scans)


def test_an_alignment_runs_from_command_line_to_served_embeddings(place: Place) -> None:
    config = place.config()
    assert validate(config) == []
    assert "R@1 0.333, median rank 2 among 3 test subjects" in plan(config)
    numbers = train(config)
    assert numbers["verdict"].startswith("T1 and fMRI of 3 held-out subjects ")
    assert list(numbers["models"]) == ["aligned model", "chance"]
    assert numbers["models"]["chance"]["recall_1"]["value"] == pytest.approx(1 / 3)
    model = numbers["models"]["aligned model"]
    assert model["constant_level"] == pytest.approx(np.log(3), abs=1e-5)
    with (place.folder / "run/similarities_test.csv").open(encoding="utf-8") as file:
        rows = [(row["t1_subject"], row["fmri_subject"], float(row["cosine"])) for row in csv.DictReader(file)]
    cosines = np.array([cosine for _, _, cosine in rows]).reshape(3, 3)
    expected = np.mean([row.argmax() == own for side in (cosines, cosines.T) for own, row in enumerate(side)])
    assert model["recall_1"]["value"] == pytest.approx(expected)
    page = (place.folder / "run/report.html").read_text(encoding="utf-8")
    assert numbers["connectivity"]["group mean"]["identified"] == pytest.approx(1 / 3)
    for text in (
        "Phantom data",
        "Connectivity from a T1 alone",
        "How the embeddings lie",
        "that of a constant similarity",
    ):
        assert text in page
    tracked = [json.loads(line) for line in (place.folder / "run/metrics.jsonl").read_text().splitlines()]
    levels = [row["value"] for row in tracked if row["key"] == "train/constant_level"]
    assert levels == pytest.approx(levels_of_steps(place), abs=1e-5)

    subject = rows[0][0]
    asked = PredictConfig(
        registered_model=numbers["registered"][0],
        scans=[str(place.scans / f"rawdata/sub-{subject}/ses-01/anat/sub-{subject}_ses-01_T1w.nii.gz")],
        brain_masks=False,
        tracking=config.train.tracking.uri,
        out=str(place.folder / "embeddings.csv"),
    )
    table = predict(asked)
    embedding = table[[f"embedding_{index}" for index in range(8)]].to_numpy()[0]
    assert np.linalg.norm(embedding) == pytest.approx(1.0, abs=1e-5)


def levels_of_steps(place: Place) -> list[float]:
    """The levels of a constant similarity for the subjects that four steps of eight held: six, two of them twice."""
    study = open_study(place.config())
    source = study.make_source(study.make_task())
    steps = source.steps(source.initial_state())
    levels = []
    for _ in range(4):
        subjects = next(steps)[0][0].subjects
        counts = [1 + sum(other != subject for other in subjects) for subject in subjects]
        levels.append(float(np.mean(np.log(counts))))
    source.close()
    return levels


@pytest.mark.parametrize(
    "overrides",
    [
        ["task.function.network.kind=cnn", AUGMENTED_T1, AUGMENTED_SERIES],
        ["task.function.network.kind=connectivity", "task.loss.learns_temperature=true"],
        [
            "~task.structure.network",
            "+task.structure.network={width:16,depth:1,num_heads:2,mlp_ratio:2.0,num_frequencies:4,time_in:seconds}",
        ],
    ],
)
def test_any_pair_of_networks_learns_all_its_parameters(place: Place, overrides: list[str]) -> None:
    config = place.config(*overrides)
    assert validate(config) == []
    study = open_study(config)
    task = study.make_task()
    groups = checked_groups(task)
    source = study.make_source(task)
    (batch,), _ = next(source.steps(source.initial_state()))
    source.close()
    task.train()
    losses = task(batch.to("cpu"))
    losses["loss"].backward()
    silent = [group.name for group in groups for each in group.parameters if each.grad is None or not each.grad.any()]
    assert silent == []
    assert float(losses["constant_level"]) < float(losses["random_level"])


def test_chunks_give_the_loss_and_gradient_of_the_plain_batch(place: Place) -> None:
    study = open_study(place.config())
    source = study.make_source(study.make_task())
    (batch,), _ = next(source.steps(source.initial_state()))
    source.close()
    found = []
    for rows in (1, 8):
        task = study.make_task()
        task.config = dataclasses.replace(task.config, rows_per_chunk=rows)
        loss = task(batch.to("cpu"))["loss"]
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in task.parameters())])
    for chunked, plain in zip(*found, strict=True):
        torch.testing.assert_close(chunked, plain, rtol=1e-4, atol=1e-6)


def test_a_published_table_is_read_with_the_numbers_of_its_own_study(place: Place) -> None:
    table = place.folder / "study.csv"
    table.write_text("train,validation\n2.9,1.7\n2.773,1.609\n")
    asked = OneBatchConfig(1, 1e-3, str(table), num_train=40, num_validation=5)
    finding = finding_of(asked, open_study(place.config("task.projection.embedding=512")))
    assert finding.name == "collapse"
    assert finding.evidence[1] == "the validation loss ends at 1.609, at 1.609 of batches of 1 x 5"


def test_training_is_augmented_and_evaluation_is_not(place: Place) -> None:
    study = open_study(place.config(AUGMENTED_T1, AUGMENTED_SERIES))
    task = study.make_task()
    source = study.make_source(task)
    (batch,), _ = next(source.steps(source.initial_state()))
    source.close()
    for side in ("structure", "function"):
        seen = {is_training: task.train(is_training).columns(batch.to("cpu"), side)[0] for is_training in (True, False)}
        assert torch.equal(seen[False], batch.sides[side].values)
        assert not torch.equal(seen[True], seen[False])
        assert torch.equal(seen[True], task.train().columns(batch.to("cpu"), side)[0])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.batch_size=1", "data.micro_batch_size=1"], "data.batch_size: 1; a subject is told from the others"),
        (["data.micro_batch_size=4"], "in one batch, a few rows at a time (task.rows_per_chunk): set it to 8"),
        (
            ["task.order=epoch_batches", "data.batch_size=5", "data.micro_batch_size=5"],
            "data.batch_size: 5 cuts 6 training subjects so that an epoch's last step holds one; choose another batch",
        ),
        (["task.function.shards={folder}/t1"], "t1 holds no parcels scan; write it with source.kinds=[parcels], or na"),
        (
            ["shards={folder}/rest"],
            "rest holds no t1 scan; write it with source.kinds=[t1], or name another set in sha",
        ),
        (["task.structure.network=null"], "task.structure.network: null with encoder=scratch; say what the network is"),
        (["encoder=models:/a@b"], "given with encoder=models:/a@b, which brings its own; set it to null, or encoder=s"),
        (
            ["task.loss.temperature=0.9"],
            "task.loss.temperature: 0.9; must lie between task.loss.lowest_temperature 0.01",
        ),
        (
            ["data.split.rule=ranked", "data.split.num_validation=1", "data.split.num_test=3"],
            "split 'validation' has one subject with both sides; retrieval needs two: choose other splits (data.split)",
        ),
    ],
)
def test_bad_input_is_answered_by_what_to_do(place: Place, overrides: list[str], message: str) -> None:
    problems = validate(place.config(*(each.format(folder=place.folder) for each in overrides)))
    assert any(message in problem for problem in problems), problems


def test_the_control_trains_on_another_subjects_run_and_tests_on_the_own_one(place: Place) -> None:
    pairs = {pairing: open_study(place.config(f"task.pairing={pairing}")).pairs for pairing in ("own", "shuffled")}
    assert pairs["own"].fingerprint != pairs["shuffled"].fingerprint
    own, dealt = (each.runs_of("train", "function") for each in pairs.values())
    assert sorted(own) == sorted(dealt)
    assert len(own) == NUM_TRAINED
    assert all(own[subject].tolist() != dealt[subject].tolist() for subject in own)
    assert sorted(map(tuple, own.values())) == sorted(map(tuple, dealt.values()))
    for split in ("validation", "test"):
        assert str(pairs["own"].runs_of(split, "function")) == str(pairs["shuffled"].runs_of(split, "function"))
    assert set(open_set(f"{place.folder}/t1").runs("t1", ["train"]).subject) == set(own)
