"""Layers open from the top, at steps or plateaus, under every engine; a run resumed in any stage is the same run."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from test_training_engines import ZERO, exported, largest_difference, report, run_launches
from torch import Tensor, nn
from training_toys import ToyLayers, ToyTask, toy_batch, toy_config

from training.config import DecayConfig, PlateauConfig
from training.engine.optimizer import learning_rate_share
from training.engine.plain import PlainEngine
from training.errors import TrainingError
from training.plateau import AtPlateau, Watch, opening_step, plateaus
from training.unfreezing import UnfreezingConfig, unfreezing_problems

AT_STEPS = {
    "first_layer_opens_at_step": 2,
    "steps_per_layer": 2,
    "plateau": None,
    "learning_rate_scale": 0.5,
    "depth_decay": 0.8,
}
TOGETHER = {**AT_STEPS, "first_layer_opens_at_step": 3, "steps_per_layer": 0}
RULE = {"metric": "validation/loss", "best_is": "lowest", "patience": 1, "min_change": 0.05}
AT_PLATEAUS = {**AT_STEPS, "first_layer_opens_at_step": None, "steps_per_layer": None, "plateau": RULE}
STAGES = {"steps": AT_STEPS, "together": TOGETHER, "plateaus": AT_PLATEAUS}
SCHEDULE = {"kind": "plateau", "warmup_steps": 0, "plateau": {**RULE, "patience": 2, "factor": 0.5}}
STEPS = 8
BREAKS = {"steps": (1, 3, 5, 7), "together": (3,), "plateaus": (3, 5)}  # a commit is made after every step
RESUMED = [("steps", "zero0"), ("steps", "zero1"), ("steps", "zero2"), ("steps", "zero3")]
RESUMED += [("together", "zero3"), ("plateaus", "zero2")]
PLAIN = [(name, "plain") for name in STAGES]
pytestmark = pytest.mark.timeout(900)  # the ranks share a busy machine with others
COMPARED = [("steps", engine) for engine in ZERO] + [("together", "zero1"), ("plateaus", "zero3")]


def job(folder: Path, engine: str, unfreezing: dict, **changes: object) -> dict:
    train = {"schedule": SCHEDULE if unfreezing["plateau"] else {}, "evaluation": {"every_steps": 1}}
    common = {"task": "layers", "steps": STEPS, "checkpoint_every": 2, "unfreezing": unfreezing, "train": train}
    return {**common, "engine": engine, "folder": str(folder), **changes}


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders <stages>-<engine>-<ranks>, whole, and <...>-resumed, broken off and resumed in every stage."""
    folder = tmp_path_factory.mktemp("layers")
    one = [job(folder / f"{name}-{engine}-1", engine, STAGES[name]) for name, engine in [*PLAIN, *COMPARED]]
    two = []
    for name, engine in RESUMED:
        whole = folder / f"{name}-{engine}-2"
        two.append(job(whole, engine, STAGES[name]))
        resumed = [job(Path(f"{whole}-resumed"), engine, STAGES[name], break_at=step) for step in BREAKS[name]]
        two += [*resumed, {**resumed[0], "break_at": None}]
    assert run_launches(folder, [(one, 1), (two, 2)], timeout_s=800) == [[0], [0, 0]]
    return folder


def rows(folder: Path, key: str) -> dict[int, float]:
    found = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["value"] for row in found if row["key"] == key}


@pytest.mark.parametrize(("stages", "engine"), COMPARED)
def test_layers_open_under_zero_as_in_plain_pytorch(launched: Path, stages: str, engine: str) -> None:
    plain = launched / f"{stages}-plain-1"
    initial = ToyLayers(UnfreezingConfig(**AT_STEPS)).state_dict()
    trained = exported(plain)
    assert not torch.equal(trained["encoder.2.0.weight"], initial["encoder.2.0.weight"])
    assert largest_difference(exported(launched / f"{stages}-{engine}-1"), trained) < 1e-5
    assert rows(launched / f"{stages}-{engine}-1", "train/learning_rate") == rows(plain, "train/learning_rate")


@pytest.mark.parametrize(("stages", "engine"), RESUMED)
def test_a_run_resumed_in_every_stage_equals_the_undisturbed_one(launched: Path, stages: str, engine: str) -> None:
    whole, resumed = (launched / f"{stages}-{engine}-2{ending}" for ending in ("", "-resumed"))
    assert report(resumed)["start"] == "own"
    assert largest_difference(exported(resumed), exported(whole)) == 0.0
    for key in ("train/loss", "train/learning_rate", "validation/loss"):
        assert rows(resumed, key) == rows(whole, key)


def test_plateaus_are_reached_in_the_middle_of_the_toy_run(launched: Path) -> None:
    """Otherwise the tests above would say nothing of them."""
    folder = launched / "plateaus-plain-1"
    watched = {"validation/loss": sorted(rows(folder, "validation/loss").items())}
    assert 0 < len(plateaus(PlateauConfig(**RULE), watched)) <= STEPS
    assert plateaus(PlateauConfig(**RULE), watched)[0] in range(1, STEPS - 1)
    assert len(set(rows(folder, "train/learning_rate").values())) > 1


@pytest.mark.parametrize("best_is", ["lowest", "highest"])
@pytest.mark.parametrize("patience", [1, 2, 4])
def test_plateaus_are_those_of_pytorch(best_is: str, patience: int) -> None:
    values = torch.randn(60, generator=torch.Generator().manual_seed(patience)).tolist()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer,
        "min" if best_is == "lowest" else "max",
        factor=0.5,
        patience=patience - 1,
        threshold=0.1,
        threshold_mode="abs",
        eps=0.0,
    )
    rule = DecayConfig("validation/x", best_is, patience, 0.1, 0.5)  # type: ignore[arg-type]
    schedule = dataclasses.replace(toy_config(Path()).schedule, kind="plateau", warmup_steps=0, final_share=1e-3)
    schedule.plateau = rule
    for num in range(1, len(values) + 1):
        reference.step(values[num - 1])
        watched = {"validation/x": list(enumerate(values[:num]))}
        share = learning_rate_share(schedule, step=num, num_steps=100, watched=watched)
        assert share == max(1e-3, optimizer.param_groups[0]["lr"])


def test_a_value_that_is_not_a_number_is_no_new_best_and_the_second_plateau_opens_the_second_layer() -> None:
    rule = PlateauConfig("validation/loss", "lowest", patience=2, min_change=0.0)
    values = [(0, 3.0), (10, 2.0), (20, math.nan), (30, 2.0), (40, 1.0), (50, 1.5)]
    assert plateaus(rule, {"validation/loss": values}) == [30]
    assert opening_step(AtPlateau(rule, 1), {"validation/loss": values}) == 30
    assert opening_step(AtPlateau(rule, 2), {"validation/loss": values}) is None
    assert opening_step(AtPlateau(rule, 2), {"validation/loss": [*values, (60, 1.2)]}) == 60
    assert opening_step(7, {}) == 7


def test_a_watched_metric_that_is_not_evaluated_is_an_error_and_a_commit_keeps_what_was_seen_until_then() -> None:
    watch = Watch([PlateauConfig("validation/loss", "lowest", 2, 0.0)], start={"validation/loss": [(0, 3.0)]})
    watch.add(5, {"validation/loss": 2.0, "validation/auroc": 0.5})
    committed = watch.so_far()
    watch.add(10, {"validation/loss": 1.0})
    assert committed == {"validation/loss": [(0, 3.0), (5, 2.0)]}
    with pytest.raises(
        TrainingError, match=r"^step 15: a plateau of validation/loss .* gave validation/auroc; name one"
    ):
        watch.add(15, {"validation/auroc": 0.5})


def layers_at(tmp_path: Path, step: int) -> ToyLayers:
    """The task as it is in the update of that step."""
    task = ToyLayers(UnfreezingConfig(**AT_STEPS))
    task.train()
    PlainEngine(task, toy_config(tmp_path)).begin(step)
    return task


@pytest.mark.parametrize(("step", "num_closed"), [(0, 3), (2, 2), (4, 1), (6, 0)])
def test_closed_layers_draw_no_dropout_and_keep_nothing_for_the_backward_pass(
    tmp_path: Path, step: int, num_closed: int
) -> None:
    task = layers_at(tmp_path, step)
    assert [layer[2].training for layer in task.encoder] == [index >= num_closed for index in range(3)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        closed = task.encoder[:num_closed](toy_batch([1, 2, 3], 3).features)
    assert kept == []
    assert not closed.requires_grad
    task.head(task.encoder[num_closed:](closed)).sum().backward()
    has_gradient = [layer[0].weight.grad is not None for layer in task.encoder]
    assert has_gradient == [index >= num_closed for index in range(3)]


def test_an_evaluation_in_between_does_not_wake_closed_layers(tmp_path: Path) -> None:
    task = ToyLayers(UnfreezingConfig(**AT_STEPS))
    engine = PlainEngine(task, toy_config(tmp_path))
    engine.begin(0)
    task.eval()
    task.train()
    engine.begin(1)
    assert not any(layer.training for layer in task.encoder)
    assert task.head.training


def test_adam_adds_weight_decay_to_the_gradient_and_adamw_to_the_weight(tmp_path: Path) -> None:
    config, batch = toy_config(tmp_path), toy_batch([1, 2, 3, 4], 4)
    for kind, reference_class in (("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)):
        settings = dataclasses.replace(config.optimizer, kind=kind, clip_norm=1e9)  # type: ignore[arg-type]
        engine = PlainEngine(ToyTask(), dataclasses.replace(config, optimizer=settings))
        reference = ToyTask()
        optimizer = reference_class(
            [
                {"params": group.parameters, "weight_decay": group.weight_decay, "lr": group.learning_rate_scale}
                for group in reference.parameter_groups()
            ],
            betas=(0.9, 0.95),
            eps=1e-8,
        )
        scales = [group["lr"] for group in optimizer.param_groups]
        for step in range(3):
            rate = engine.begin(step)
            engine.backward(engine.losses(batch)["loss"])
            engine.step()
            for group, scale in zip(optimizer.param_groups, scales, strict=True):
                group["lr"] = rate * scale
            optimizer.zero_grad()
            reference(batch)["loss"].backward()
            optimizer.step()
        assert largest_difference(engine.task.state_dict(), reference.state_dict()) < 1e-7


def test_a_wrong_unfreezing_is_refused_by_its_full_key(tmp_path: Path) -> None:
    config = toy_config(tmp_path)
    both = UnfreezingConfig(**{**AT_STEPS, "plateau": PlateauConfig(**RULE)})
    problems = unfreezing_problems(both, "task.unfreezing", config.evaluation)
    assert len(problems) == 1
    assert problems[0].startswith("task.unfreezing: give first_layer_opens_at_step and steps_per_layer, or plateau")
    negative = UnfreezingConfig(**{**AT_STEPS, "steps_per_layer": -1, "depth_decay": 0.0})
    assert [problem.partition(":")[0] for problem in unfreezing_problems(negative, "u", config.evaluation)] == [
        "u.steps_per_layer",
        "u.depth_decay",
    ]


def test_groups_of_layers_are_named_by_side_and_fall_in_learning_rate() -> None:
    groups = [each for each in ToyLayers(UnfreezingConfig(**AT_STEPS)).parameter_groups() if "/" not in each.name]
    assert [group.name for group in groups] == ["head", "encoder.2", "encoder.1", "encoder.0"]
    assert [group.opens_at for group in groups] == [0, 2, 4, 6]
    assert [group.learning_rate_scale for group in groups] == pytest.approx([1.0, 0.5, 0.4, 0.32])
