"""Every number of a pretraining is refused beyond its last allowed value, under its full key; no shard set is read."""

from __future__ import annotations

from functools import cache

import pytest

from configs.entry import compose
from configs.parse import parse
from pretrain.masked.config import PretrainConfig
from pretrain.masked.validation import naming_problems, number_problems, registration_problems, window_problems
from tests.overrides import overridden


@cache
def composed() -> PretrainConfig:
    fixed = ["kind=bold", "shards=unused", "run.folder=unused", "cluster=inline"]
    return parse(compose("pretrain", fixed), PretrainConfig)


def problems_with(*overrides: str) -> list[str]:
    config = overridden(composed(), overrides)
    if problems := number_problems(config) + naming_problems(config):
        return problems
    windows = [problem for name in config.named_sets for problem in window_problems(config, name)]
    return windows + registration_problems(config)


@pytest.mark.parametrize(
    "allowed",
    [
        ["cluster.num_workers=2", "data.batch_size=2"],
        ["data.micro_batch_size=1", "data.shuffle_shards=1", "model.encoder.depth=1", "model.decoder.depth=1"],
        ["baselines.num_neighbours=1", "baselines.fit_samples=1", "baselines.ridge_penalties=[0.01]"],
        ["baselines.choice_share=0.01", "loss.smallest_region=1.0", "weight_decay=0.0", "deviation_floor=0.01"],
        ["report.contribution.num_samples=0", "train.evaluation.final_splits=[]"],
        ["kind=t1", "windows.t1.window_frames=1"],
        ["register=null"],
    ],
)
def test_the_last_allowed_values_are_no_problem(allowed: list[str]) -> None:
    assert problems_with(*allowed) == []


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (["cluster.num_workers=2", "data.batch_size=1"], "data.batch_size: 1 for 2 workers; give each one or more"),
        (["data.micro_batch_size=0"], "data.micro_batch_size: 0; must be above 0"),
        (["data.shuffle_shards=0"], "data.shuffle_shards: 0; must be above 0"),
        (["model.encoder.depth=0"], "model.encoder.depth: 0; must be above 0"),
        (["model.decoder.depth=0"], "model.decoder.depth: 0; must be above 0"),
        (["baselines.num_neighbours=0"], "baselines.num_neighbours: 0; must be above 0"),
        (["baselines.fit_samples=0"], "baselines.fit_samples: 0; must be above 0"),
        (["deviation_floor=0.0"], "deviation_floor: 0.0; must be above 0"),
        (["baselines.ridge_penalties=[]"], "baselines.ridge_penalties: []; give at least one, all above 0"),
        (
            ["baselines.ridge_penalties=[1.0,0.0]"],
            "baselines.ridge_penalties: [1.0, 0.0]; give at least one, all above",
        ),
        (["baselines.choice_share=0.0"], "baselines.choice_share: 0.0; give a share between 0 and 1"),
        (["baselines.choice_share=1.0"], "baselines.choice_share: 1.0; give a share between 0 and 1"),
        (["loss.smallest_region=0.0"], "loss.smallest_region: 0.0; must lie above 0 and up to 1"),
        (["loss.smallest_region=1.1"], "loss.smallest_region: 1.1; must lie above 0 and up to 1"),
        (["weight_decay=-0.1"], "weight_decay: -0.1; must not be negative"),
        (["windows.bold.tubelet_frames=0"], "windows.bold.tubelet_frames: 0; must be above 0"),
        (["windows.bold.window_frames=6", "windows.bold.tubelet_frames=4"], "windows.bold.window_frames: 6 is no mult"),
        (["kind=t1", "windows.t1.window_frames=2"], "windows.t1.window_frames: 2, but a T1 is one frame; set it to 1"),
        (["kind=null"], "kind: required; add kind=<bold|t1>, or give sets=... for a joint run"),
        (["sets={}"], "sets: kind or shards are given as well; a joint run names both in each set"),
    ],
)
def test_a_value_beyond_the_last_allowed_one_is_the_first_problem(refused: list[str], message: str) -> None:
    assert problems_with(*refused)[0].startswith(message)


def test_a_backbone_without_a_name_for_its_kind_is_refused() -> None:
    config = overridden(composed(), ["register.names={t1: a}"])
    assert registration_problems(config) == ["register.names: no name for bold; add register.names.bold=<name>"]
