"""From a folder of images and a ready matrix to a registered model that answers with a matrix."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from configs.entry import compose
from configs.parse import parse
from finetune.config import FinetuneConfig, PairsConfig, PredictConfig
from finetune.planning import needs, plan, validate
from finetune.predict import predict
from finetune.rdm_pairs import run as write_pairs
from finetune.rdm_pairs import validate as pair_problems
from finetune.tasks.rdm_prediction.source import ImageBatch
from finetune.tasks.rdm_prediction.task import RdmPrediction
from finetune.train import train
from training.grid import GridRun, is_finished

NUM_IMAGES = 36


@dataclass(frozen=True)
class Place:
    """A folder with a set and room for runs."""

    folder: Path

    def config(self, *overrides: str) -> FinetuneConfig:
        fixed = [
            *("task=rdm_prediction", "engine=plain", "cluster=inline", "cluster.num_workers=1"),
            *(f"shards={self.folder}/set", "encoder=pixels", "task.image.size=6"),
            *(f"run.folder={self.folder}/run", f"run.scratch={self.folder}/scratch"),
            f"tracking=sqlite:///{self.folder}/mlflow.db",
            *("data.split.rule=fold", "data.split.num_folds=3", "data.batch_size=12", "data.micro_batch_size=12"),
            *("train.steps=6", "train.schedule.warmup_steps=1", "train.checkpoint.every_steps=2"),
            *("train.evaluation.every_steps=2", "bootstrap.num_resamples=50", "task.num_permutations=20"),
            *("task.baselines.svr_pairs=50", "task.baselines.penalties=[0.01,1.0]"),
        ]
        return parse(compose("finetune", [*fixed, *overrides]), FinetuneConfig)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Gray squares of two brightnesses, whose matrix is how far their brightness differs."""
    folder = tmp_path_factory.mktemp("rdm")
    (folder / "set/images").mkdir(parents=True)
    numbers = np.random.default_rng(0)
    levels = numbers.uniform(0, 1, size=NUM_IMAGES)
    for number, level in enumerate(levels):
        pixels = np.clip(255 * level + numbers.normal(0, 10, size=(12, 12)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).convert("RGB").save(folder / f"set/images/image{number:02d}.png")
    np.save(folder / "set/rdm.npy", np.abs(levels[:, None] - levels))
    rows = "".join(f"image{number:02d},{'bright' if level > 0.5 else 'dark'}\n" for number, level in enumerate(levels))
    (folder / "set/categories.csv").write_text(f"image,category\n{rows}")
    return Place(folder)


def test_a_matrix_is_learned_registered_and_asked_about_new_images(place: Place) -> None:
    config = place.config("task.leak.steps=5")
    assert validate(config) == []
    assert "train 66, validation 66, test 66" in plan(config)
    numbers = train(config)
    assert numbers["models"]["trained model"]["spearman"]["value"] > 0.6
    assert numbers["models"]["trained model"]["permutation_p"] < 0.06
    assert set(numbers["leak"]) == {"split by image", "pairs dealt out (leaky)"}
    assert "when pairs are dealt out before the split" in numbers["verdict"]
    page = (place.folder / "run/report.html").read_text()
    for said in ("Results on held-out images", "Matrices", "Multidimensional scaling", "Learning curve", "bright"):
        assert said in page
    assert "None of the 12 held-out images was seen in pretraining." in numbers["notices"]
    table = (place.folder / "run/rdm_test.csv").read_text().splitlines()
    assert len(table) == 1 + 66
    is_done = GridRun("finetune", config)
    assert is_finished(is_done)
    assert needs(config).inputs == {config.shards: None}
    asked = PredictConfig(
        registered_model=numbers["registered"][0],
        scans=[str(place.folder / "set/images")],
        brain_masks=False,
        tracking=str(config.train.tracking.uri),
        out=str(place.folder / "matrix.csv"),
    )
    answers = predict(asked)
    matrix = answers[[f"dissimilarity_{number}" for number in range(NUM_IMAGES)]].to_numpy()
    np.testing.assert_array_equal(matrix, matrix.T)
    first, second, _, predicted = table[1].split(",")
    names = [Path(path).stem for path in answers["image"]]
    assert matrix[names.index(first), names.index(second)] == pytest.approx(float(predicted), abs=1e-4)
    assert len(list((place.folder / "set/features").iterdir())) == 1


def test_leaky_pairs_are_a_demonstration_that_is_never_registered(place: Place) -> None:
    told = validate(place.config("task.split_by=leaky_pairs"))
    assert told == [
        "task.split_by: leaky_pairs tests pairs whose images were trained on; it is a demonstration and its model is "
        "not registered: set register=null, or task.split_by=images"
    ]
    numbers = train(
        place.config("task.split_by=leaky_pairs", "register=null", f"run.folder={place.folder}/leaky", "train.steps=2")
    )
    assert numbers["verdict"].startswith("A demonstration of a leak, no result: pairs were dealt out before the split.")
    assert numbers["registered"] == []


def test_an_encoder_that_opens_is_trained_on_the_images_themselves(place: Place) -> None:
    config = place.config(
        *("encoder=cnn", "task.image.size=16", "task.unfreezing.first_layer_opens_at_step=0", "register=null"),
        *(
            "task.unfreezing.learning_rate_scale=1.0",
            f"run.folder={place.folder}/cnn",
            "train.steps=2",
            "task.leak=null",
        ),
        "task.baselines.svr_pairs=0",
    )
    assert validate(config) == []
    assert "trained too" in plan(config)
    train(config)
    written = json.loads((place.folder / "cnn/metrics.json").read_text())
    assert written["step"] == 2 or written["step"] == 0
    assert written["leak"] == {}


def test_values_that_do_not_go_together_are_all_told(place: Place) -> None:
    told = "\n".join(
        validate(
            place.config(
                *("encoder=cnn", "task.head.output=sigmoid", "task.measure=euclidean", "task.head.num_hidden=4"),
                *("data.micro_batch_size=4", "task.loss.kind=contrastive", "task.region=V1", "task.loss.alpha=2"),
            )
        )
    )
    for said in (
        "encoder: cnn has no weights yet; set task.unfreezing.first_layer_opens_at_step=0",
        "task.head.output: sigmoid lies in 0..2",
        "task.head.num_hidden: 4; must lie in 0..3",
        "task.loss.alpha: 2.0; must lie in 0..1",
        "a step is all pairs of its images, so give each worker one batch: at least 12",
        "names no regions; set task.region=all",
    ):
        assert said in told


def test_the_table_of_pairs_holds_every_pair_inside_a_split_with_its_value(place: Place) -> None:
    words = [f"shards={place.folder}/set", f"out={place.folder}/pairs.csv", "measure=euclidean"]
    folds = ["data.split.rule=fold", "data.split.num_folds=3"]
    config = parse(compose("finetune.rdm_pairs", [*words, *folds]), PairsConfig)
    assert pair_problems(config) == []
    write_pairs(config)
    rows = (place.folder / "pairs.csv").read_text().splitlines()
    assert len(rows) == 1 + 3 * 66
    matrix = np.load(place.folder / "set/rdm.npy")
    for row in rows[1:]:
        _, image, other, value = row.split(",")
        assert float(value) == pytest.approx(matrix[int(image[-2:]), int(other[-2:])], rel=1e-5)
    told = pair_problems(parse(compose("finetune.rdm_pairs", words), PairsConfig))
    assert "data.split.rule=set:" in told[0]


@pytest.mark.parametrize("experiment", ["rdm_siamese", "rdm_grid", "rdm_best", "rdm_rois", "rdm_subjects"])
def test_every_experiment_is_valid_on_a_small_set(place: Place, experiment: str) -> None:
    small = ["task.region=all", "task.image.size=16", "data.split.rule=fold", "data.split.num_folds=3"]
    config = place.config(f"experiment={experiment}", *small, "train.steps=200", "encoder=pixels")
    if experiment == "rdm_siamese":
        config.encoder = "cnn"
    config.train.checkpoint.every_steps = config.train.evaluation.every_steps
    assert validate(config) == []
    assert "200 of 12 images, 66 pairs each" in plan(config)


def test_a_run_that_dies_and_is_run_again_ends_as_one_that_was_left_alone(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = ["register=null", "tracking=null", "task.leak=null", "task.baselines.svr_pairs=0"]
    undisturbed = train(place.config(*short, f"run.folder={place.folder}/undisturbed"))
    killed = place.config(*short, f"run.folder={place.folder}/killed")
    learn, steps = RdmPrediction.forward, []

    def until_the_fifth_step(self: RdmPrediction, batch: ImageBatch) -> dict[str, Tensor]:
        steps.append(batch)
        if len(steps) == 5:
            raise RuntimeError("pulled the plug")
        return learn(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(RdmPrediction, "forward", until_the_fifth_step)
        with pytest.raises(RuntimeError, match="pulled the plug"):
            train(killed)
    resumed = train(killed)
    assert resumed["models"] == undisturbed["models"]
    pairs = [(place.folder / name / "rdm_test.csv").read_text() for name in ("undisturbed", "killed")]
    assert pairs[0] == pairs[1]
