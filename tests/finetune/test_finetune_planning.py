"""Every number and rule of a fine-tuning is refused beyond its last allowed value, under its full key."""

from __future__ import annotations

from functools import cache

import pytest

from configs.entry import compose
from configs.parse import parse
from finetune.config import FinetuneConfig
from finetune.planning import number_problems, rule_problems
from finetune.tasks import parse_task
from finetune.tasks.subject_prediction.config import Config
from finetune.tasks.subject_prediction.planning import number_problems as task_number_problems
from tests.overrides import overridden


@cache
def composed() -> FinetuneConfig:
    fixed = ["shards=unused", "encoder=unused", "run.folder=unused", "cluster=inline"]
    return parse(compose("finetune", fixed), FinetuneConfig)


def problems_with(*overrides: str) -> list[str]:
    """Of numbers and rules, those of the task included; no shard set and no backbone is read."""
    config = overridden(composed(), overrides)
    return number_problems(config) + rule_problems(config) + task_number_problems(parse_task(config.task, Config))


@pytest.mark.parametrize(
    "allowed",
    [
        ["cluster.num_workers=2", "data.batch_size=2"],
        ["bootstrap.confidence=0.01", "data.micro_batch_size=1", "data.shuffle_shards=1", "bootstrap.num_resamples=1"],
        ["train.choose=last", "train.checkpoint.best_metric=null", "train.checkpoint.every_steps=7"],
        ["train.checkpoint.best_metric=validation/loss", "train.checkpoint.best_is=lowest"],
        ["train.checkpoint.every_steps=20", "train.evaluation.every_steps=5"],
        ["register=null"],
        ["task.probe=null", "task.head.dropout=0.0", "task.num_windows=1", "task.head.num_channels=1"],
    ],
)
def test_the_last_allowed_values_are_no_problem(allowed: list[str]) -> None:
    assert problems_with(*allowed) == []


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (
            ["cluster.num_workers=2", "data.batch_size=1"],
            "data.batch_size: 1 for 2 workers; give each at least one run",
        ),
        (["data.micro_batch_size=0"], "data.micro_batch_size: 0; must be above 0"),
        (["data.shuffle_shards=0"], "data.shuffle_shards: 0; must be above 0"),
        (["bootstrap.num_resamples=0"], "bootstrap.num_resamples: 0; must be above 0"),
        (["bootstrap.confidence=0.0"], "bootstrap.confidence: 0.0; must lie between 0 and 1"),
        (["bootstrap.confidence=1.0"], "bootstrap.confidence: 1.0; must lie between 0 and 1"),
        (["train.evaluation.final_splits=[validation]"], "train.evaluation.final_splits: ['validation'] lacks test;"),
        (["train.evaluation.final_splits=[]"], "train.evaluation.final_splits: [] lacks test, validation;"),
        (["train.evaluation.every_steps=20"], "train.checkpoint.every_steps: 10 is no multiple of"),
        (["train.checkpoint.best_metric=null"], "train.checkpoint.best_metric: null with train.choose=best; name one"),
        (["train.start.registered=a@b"], "train.start.registered: finetune takes its weights from encoder=...; set it"),
        (
            ["register.champion.metric=r2"],
            "register.champion.metric: r2 is not one of within_site_auroc, auroc, balanced_",
        ),
        (["task.num_windows=0"], "task.num_windows: 0; must be above 0"),
        (["task.head.num_channels=0"], "task.head.num_channels: 0; must be above 0"),
        (["task.head_learning_rate_scale=0"], "task.head_learning_rate_scale: 0.0; must be above 0"),
        (["task.head.dropout=1.0"], "task.head.dropout: 1.0; must be at least 0 and below 1"),
        (["task.head.dropout=-0.1"], "task.head.dropout: -0.1; must be at least 0 and below 1"),
        (["task.baselines.strengths=[0.0,1.0]"], "task.baselines.strengths: [0.0, 1.0]; give at least one inverse"),
        (["task.probe.strengths=[]"], "task.probe.strengths: []; give at least one inverse penalty, all above 0"),
        (["task.probe.num_folds=1"], "task.probe.num_folds: 1; give at least 2"),
    ],
)
def test_a_value_beyond_the_last_allowed_one_is_the_only_problem(refused: list[str], message: str) -> None:
    (problem,) = problems_with(*refused)
    assert problem.startswith(message)
