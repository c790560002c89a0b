"""Every number of `train:` is refused beyond its last allowed value, under its full key, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_toys import toy_config

from tests.overrides import overridden
from training.config import DecayConfig, validate_train

POSITIVE = [
    "steps",
    "optimizer.learning_rate",
    "optimizer.epsilon",
    "optimizer.clip_norm",
    "checkpoint.keep_last",
    "evaluation.every_steps",
    "evaluation.subset",
    "tracking.every_steps",
    "tracking.timeout_s",
    "spikes.window_steps",
    "spikes.threshold",
]


def problems_with(folder: Path, *overrides: str, num_workers: int = 1) -> list[str]:
    config = toy_config(folder)
    config.schedule.plateau = DecayConfig("validation/loss", "lowest", 2, 0.1, 0.5)
    fixed = ["schedule.kind=plateau", "schedule.warmup_steps=0"]
    return validate_train(overridden(config, [*fixed, *overrides]), "train", num_workers=num_workers)


@pytest.mark.parametrize("key", POSITIVE)
def test_a_number_that_must_be_above_zero_is_refused_at_zero(key: str, tmp_path: Path) -> None:
    assert problems_with(tmp_path, f"{key}=0") == [f"train.{key}: 0; must be above 0"]
    assert problems_with(tmp_path, f"{key}=0.001") == []


@pytest.mark.parametrize(
    ("allowed", "refused", "message"),
    [
        ("checkpoint.every_steps=2", "checkpoint.every_steps=1", "checkpoint.every_steps: 1; must be 2 or more"),
        ("schedule.warmup_steps=6", "schedule.warmup_steps=7", "schedule.warmup_steps: 7; must lie in 0..train.steps"),
        ("seed=4", "schedule.warmup_steps=-1", "schedule.warmup_steps: -1; must lie in 0..train.steps"),
        ("schedule.final_share=0.0", "schedule.final_share=-0.1", "schedule.final_share: -0.1; must lie in 0..1"),
        ("schedule.final_share=1.0", "schedule.final_share=1.1", "schedule.final_share: 1.1; must lie in 0..1"),
        ("profile.start_step=0", "profile.start_step=-1", "profile: start_step and num_steps must be 0 or more"),
        ("profile.num_steps=1", "profile.num_steps=-1", "profile: start_step and num_steps must be 0 or more"),
        ("tracking.uri=http://server", "tracking.uri=server", "tracking: server; give sqlite:///<file>, http://"),
        ("schedule.plateau.patience=1", "schedule.plateau.patience=0", "schedule.plateau.patience: 0; must be 1 or"),
        ("schedule.plateau.min_change=0", "schedule.plateau.min_change=-1", "schedule.plateau.min_change: -1; must be"),
        ("schedule.plateau.factor=0.9", "schedule.plateau.factor=1.0", "schedule.plateau.factor: 1.0; must lie betw"),
        ("schedule.plateau.factor=0.1", "schedule.plateau.factor=0.0", "schedule.plateau.factor: 0.0; must lie betw"),
        (
            "schedule.plateau.metric=validation/auroc",
            "schedule.plateau.metric=test/loss",
            "schedule.plateau.metric: test/loss; evaluated while training are metrics of validation/...",
        ),
        ("schedule.kind=plateau", "schedule.kind=cosine", "schedule.plateau: is given with kind cosine; kind plateau"),
        ("schedule.kind=plateau", "schedule.plateau=null", "schedule.plateau: is null with kind plateau; kind plateau"),
    ],
)
def test_a_value_beyond_the_last_allowed_one_is_the_only_problem(
    allowed: str, refused: str, message: str, tmp_path: Path
) -> None:
    assert problems_with(tmp_path, allowed) == []
    (problem,) = problems_with(tmp_path, refused)
    assert problem.removeprefix("train.").startswith(message)


def test_values_that_are_allowed_alone_are_refused_together(tmp_path: Path) -> None:
    (problem,) = problems_with(tmp_path, num_workers=2)
    assert problem == "train.engine.kind: plain runs in one process, 2 workers asked; use engine=zero2"
    assert problems_with(tmp_path, "engine.kind=deepspeed", num_workers=2) == []
    for one, other, message in (
        ("start.checkpoint=a", "start.registered=b@candidate", "train.start: give checkpoint or registered, not both"),
        ("engine.zero_stage=3", "engine.compile=true", "train.engine.compile: true with zero_stage=3, which gathers"),
    ):
        assert problems_with(tmp_path, one) == problems_with(tmp_path, other) == []
        (problem,) = problems_with(tmp_path, one, other)
        assert problem.startswith(message)
