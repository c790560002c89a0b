"""A run is another one when anything changes that could change a number, and the same one when nothing else does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from cluster.storage.stores import LocalStore
from configs.entry import compose
from configs.parse import flatten, parse
from finetune.config import FinetuneConfig
from pretrain.masked.config import PretrainConfig
from training.errors import TrainingError
from training.identity import claim, config_hash

# Everything here changes where a run executes, what it reports or how fast it is; no weight depends on it.
FREE = {
    "cluster.num_workers",
    "data.cache_bytes",
    "data.cache_folder",
    "data.num_workers",
    "data.prefetch",
    "register",
    "tracking",
    "report.probes.num_folds",
    "train.checkpoint.best_is",
    "train.checkpoint.best_metric",
    "train.checkpoint.every_steps",
    "train.checkpoint.keep_every_steps",
    "train.checkpoint.keep_last",
    "train.engine.activation_checkpointing",
    "train.peak_tflops.NVIDIA H100",
    "train.profile.num_steps",
    "train.profile.start_step",
    "train.spikes.threshold",
    "train.spikes.window_steps",
    "train.tracking.drain_s",
    "train.tracking.every_steps",
    "train.tracking.experiment",
    "train.tracking.group_norms",
    "train.tracking.timeout_s",
    "train.tracking.uri",
}


WHOLLY_FREE = ("cluster", "register", "report", "run")


def config_of(part: str, schema: type, *overrides: str) -> Any:
    """A part's configuration as its command composes it, registering nothing."""
    required = {"pretrain": ["kind=bold"], "finetune": ["task=adhd_classification", "encoder=models:/a@x"]}[part]
    raw = compose(part, [*required, "shards=a", "run.folder=b", "register=null", *overrides])
    raw["train"]["peak_tflops"] = {"NVIDIA H100": 989.0}
    return parse(raw, schema)


def changed(config: Any, key: str) -> Any:
    """The configuration with another value at a dotted key."""
    result = copy.deepcopy(config)
    *groups, name = key.split(".")
    group = result
    for each in groups:
        group = group[each] if isinstance(group, dict) else getattr(group, each)
    if isinstance(group, dict):
        group[name] = "another value"
    else:
        setattr(group, name, "another value")
    return result


@pytest.mark.parametrize(("part", "schema"), [("pretrain", PretrainConfig), ("finetune", FinetuneConfig)])
def test_exactly_the_free_keys_leave_a_run_the_same(part: str, schema: type) -> None:
    config = config_of(part, schema, "train.choose=last")
    own, whole = config_hash(config), flatten(config)
    same = {key for key in whole if config_hash(changed(config, key)) == own}
    assert same == {key for key in whole if key in FREE or key.partition(".")[0] in WHOLLY_FREE}
    assert FREE - same <= {"report.probes.num_folds"}  # fine-tuning has no report of its own


@pytest.mark.parametrize(("part", "schema"), [("pretrain", PretrainConfig), ("finetune", FinetuneConfig)])
def test_under_choose_best_what_chooses_the_commit_makes_another_run_and_what_is_kept_does_not(
    part: str, schema: type
) -> None:
    config = config_of(part, schema, "train.choose=best")
    rules = [key for key in flatten(config) if key.startswith("train.checkpoint.")]
    assert {key for key in rules if config_hash(changed(config, key)) != config_hash(config)} == {
        "train.checkpoint.every_steps",
        "train.checkpoint.best_metric",
        "train.checkpoint.best_is",
    }


def test_a_claimed_folder_keeps_its_key_and_refuses_another_configuration_naming_both_values(tmp_path: Path) -> None:
    store, config = LocalStore(str(tmp_path / "run")), config_of("pretrain", PretrainConfig)
    key = claim(store, config)
    assert claim(store, changed(config, "train.tracking.uri")) == key
    with pytest.raises(
        TrainingError, match=r"run\.json belongs to another(.|\n)*model\.encoder\.width: 128 there, 'an"
    ):
        claim(store, changed(config, "model.encoder.width"))
