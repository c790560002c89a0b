"""A new question needs no code beyond its own: a value column is a YAML file, another kind of task is one module."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from finetune import tasks
from finetune.config import PredictConfig
from finetune.planning import plan, validate
from finetune.predict import predict
from finetune.train import train
from tests.finetune.test_finetune import Place, place  # noqa: F401  (a fixture)
from training.registry.card import About
from training.statistics import BootstrapConfig, Metric
from training.study import Conclusion, Model, summary
from training.task import Cost, ParameterGroup, Task

AGE = [
    "task.name=age",
    "~task.label",
    "+task.label={column: age, unit: years}",
    "task.champion.metric=r2",
    "task.champion.above=0",
    "train.checkpoint.best_metric=validation/r2",
]


def test_age_is_predicted_from_command_line_to_registered_model(place: Place) -> None:  # noqa: F811
    config = place.config(*AGE, f"run.folder={place.folder}/age", "task.probe.num_folds=3")
    assert validate(config) == []
    assert "labelled" in plan(config)
    numbers = train(config)
    assert list(numbers["models"]) == ["fine-tuned model", "connectivity + ridge", "site alone"]
    assert numbers["registered"][0] == "finetune-age@candidate"
    assert numbers["verdict"].startswith("The fine-tuned model is ")
    assert " connectivity + ridge: difference " in numbers["verdict"]
    assert "R² about the training mean" in summary(numbers, folder="age", following="next: rest")
    with (place.folder / "age/scores.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == "fine-tuned model"]
    ages = pd.read_csv(place.scans / "participants.tsv", sep="\t", dtype={"participant_id": str})
    age_of = {name.removeprefix("sub-"): age for name, age in zip(ages["participant_id"], ages["age"], strict=True)}
    assert [float(row["truth"]) for row in rows] == pytest.approx([age_of[row["subject"]] for row in rows])
    truth, values = (np.array([float(row[key]) for row in rows]) for key in ("truth", "score"))
    model = numbers["models"]["fine-tuned model"]
    assert model["mean_absolute_error"]["value"] == pytest.approx(np.abs(truth - values).mean(), rel=1e-6)
    assert "years" in (place.folder / "age/report.html").read_text(encoding="utf-8")
    asked = PredictConfig(
        registered_model=numbers["registered"][0],
        scans=[str(place.scans / f"sub-{row['subject']}/func") for row in rows[:2]],
        brain_masks=True,
        tracking=place.uri,
        out=str(place.folder / "ages.csv"),
    )
    np.testing.assert_allclose(predict(asked)["prediction"], values[:2], rtol=1e-4)


class Guess(Task):
    """One number, fitted to the rows' own: the smallest task with data of another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.zeros(1))

    def forward(self, batch: Toy) -> dict[str, Tensor]:
        return {"loss": ((self.value - batch.rows).square() * batch.weight).sum() / 4}

    def predict(self, batch: Toy) -> dict[str, Tensor]:
        return {"error": (self.value - batch.rows).detach()}

    def metrics(self, predictions: Mapping[str, Tensor]) -> dict[str, float]:
        return {"error": float(predictions["error"].square().mean())}

    def parameter_groups(self) -> list[ParameterGroup]:
        return [ParameterGroup("value", [self.value], 1.0, 0.0, 0)]

    def cost(self, batch: Toy) -> Cost:
        return Cost(tokens=len(batch.rows), flops=6.0 * len(batch.rows))


class Toy:
    """A batch of four rows."""

    def __init__(self) -> None:
        self.rows, self.weight = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.ones(4)
        self.scan_ids = ["a", "b", "c", "d"]

    def to(self, device: torch.device) -> Toy:
        return self


class ToySource:
    fingerprint, num_micro_batches = "toy", 1

    def initial_state(self) -> dict[str, object]:
        return {}

    def steps(self, state: Mapping[str, object]) -> Iterator[tuple[list[Toy], dict[str, object]]]:
        while True:
            yield [Toy()], {}

    def merge_states(self, states: list[Mapping[str, object]]) -> dict[str, object]:
        return {}

    def evaluation(self, split: str, *, limit: int | None) -> Iterator[Toy]:
        yield Toy()

    def close(self) -> None: ...


class ToyStudy:
    title, tags, starts_from, trained_subjects = "toy", {"callosum.part": "toy"}, (), {"a"}
    make_task, make_source = staticmethod(Guess), staticmethod(lambda task: ToySource())

    def prepare(self, task: Task, is_resuming: bool) -> None: ...

    def write_bundle(self, task: Task, evaluations: object, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "value.txt").write_text(str(task.value.item()))

    def conclude(self, task: Task, result: object) -> Conclusion:
        scores = result.evaluations["test"].predictions["error"].numpy()
        models = {"the guess": Model({"error": toy_metric().interval(Errors(scores), BootstrapConfig(20, 0.95, 0))})}
        return Conclusion("It guesses.", {"error": "squared error"}, models, ["x"], About("A guess.", "", "", ()))


class Errors:
    def __init__(self, values: np.ndarray) -> None:
        self.values = values


def toy_metric() -> Metric:
    return Metric(
        "error",
        "squared error",
        "lowest",
        None,
        lambda errors, weights: weights @ np.square(errors.values) / weights.sum(axis=1),
        lambda errors: np.zeros(len(errors.values)),
    )


def test_a_task_of_another_shape_is_one_module(
    place: Place,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = ModuleType("finetune.tasks.toy")
    module.metrics = lambda config: [toy_metric()]
    module.validate, module.plan = lambda config: [], lambda config: {"guesses": "one"}
    module.open_study = lambda config: ToyStudy()
    (tmp_path / "found").mkdir()
    (tmp_path / "found/toy.py").write_text("")
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path / "found")])
    monkeypatch.setitem(sys.modules, "finetune.tasks.toy", module)
    config = place.config(f"run.folder={tmp_path}/run", f"run.scratch={tmp_path}", "tracking=null")
    config = replace(config, task={"name": "toy", "module": "toy"}, register=None)
    config.train.checkpoint.best_metric, config.train.checkpoint.best_is = "validation/error", "lowest"
    assert validate(config) == []
    assert plan(config) == "guesses  one"
    numbers = train(config)
    written = json.loads((tmp_path / "run/metrics.json").read_text())
    assert (written["verdict"], written["step"], numbers["registered"]) == ("It guesses.", 4, [])
    value = float((tmp_path / "run/bundle/value.txt").read_text())
    expected = np.square(value - np.array([1.0, 2.0, 3.0, 4.0])).mean()
    assert written["models"]["the guess"]["error"]["value"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(tasks.FinetuneError, match=r"task\.module: 'tou' is not one of .*subject_prediction"):
        tasks.task_module({"module": "tou"})
