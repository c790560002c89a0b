"""A run is another one when anything changes that could change a number, and the same one when nothing else does."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
from training_toys import toy_config

from cluster.storage.stores import LocalStore
from training.errors import TrainingError
from training.identity import claim, config_hash, flatten

# Everything here changes where a run executes, what it reports or how fast it is; no weight depends on it.
FREE = {
    "cluster.num_workers",
    "data.cache_bytes",
    "data.cache_folder",
    "data.num_workers",
    "data.prefetch",
    "register",
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


def whole_config(folder: Path) -> dict:
    """The train part as it is, and a few keys of every other part."""
    train = dataclasses.asdict(dataclasses.replace(toy_config(folder), peak_tflops={"NVIDIA H100": 989.0}))
    return {
        "train": train,
        "data": {"batch_size": 8, "seed": 0, "num_workers": 1, "prefetch": 2, "cache_folder": None, "cache_bytes": 1},
        "cluster": {"num_workers": 2},
        "model": {"width": 32},
        "register": None,
        "report": {"probes": {"num_folds": 5}},
        "reports": 1,
    }


def changed(config: dict, key: str) -> dict:
    """The configuration with another value at a dotted key."""
    result = copy.deepcopy(config)
    *groups, name = key.split(".")
    group = result
    for each in groups:
        group = group[each]
    group[name] = "another value"
    return result


def test_exactly_the_free_keys_leave_a_run_the_same(tmp_path: Path) -> None:
    config = whole_config(tmp_path)
    same = {key for key in flatten(config) if config_hash(changed(config, key)) == config_hash(config)}
    assert same == FREE


def test_a_claimed_folder_keeps_its_key_and_refuses_another_configuration_naming_both_values(tmp_path: Path) -> None:
    store, config = LocalStore(str(tmp_path / "run")), whole_config(tmp_path)
    key = claim(store, config)
    assert claim(store, changed(config, "train.tracking.uri")) == key
    with pytest.raises(TrainingError, match=r"run\.json belongs to another(.|\n)*model\.width: 32 there, 'an"):
        claim(store, changed(config, "model.width"))
