"""What makes two commands the same run: a run folder remembers its configuration and refuses any other."""

from __future__ import annotations

import hashlib
import json
import uuid

from cluster.storage.stores import Store
from configs.parse import flatten
from training.errors import TrainingError

RECORD = "run.json"
METRICS = "metrics.json"  # uploaded last: a run folder that holds it is finished
CHOOSES = ("every_steps", "best_metric", "best_is")  # of train.checkpoint


def decisive(config: object) -> dict[str, object]:
    """The flattened configuration without what cannot change a number. When commits are saved and scored changes no
    number of a training, but under train.choose=best it decides which of them is chosen."""
    values = flatten(config, with_free=False)
    if values.get("train.choose") == "best":
        whole = flatten(config)
        values |= {f"chosen_by.{name}": whole[f"train.checkpoint.{name}"] for name in CHOOSES}
    return values


def config_hash(config: object) -> str:
    """Hex sha256 of the decisive configuration."""
    return hashlib.sha256(json.dumps(decisive(config), sort_keys=True).encode()).hexdigest()


def claim(store: Store, config: object) -> str:
    """The run folder's id, by which its MLflow run is found again; an unclaimed folder becomes this configuration's.

    Every rank may call it: the first one writes. TrainingError when the folder belongs to another configuration.
    """
    record = {"config": decisive(config), "config_hash": config_hash(config), "run_key": uuid.uuid4().hex}
    if not store.exists(RECORD):
        store.put_if_absent(RECORD, json.dumps(record, indent=1, sort_keys=True).encode())
    check_claim(store, config)
    return json.loads(store.read(RECORD))["run_key"]


def check_claim(store: Store, config: object) -> None:
    """TrainingError when the folder, which has been claimed, belongs to another configuration."""
    if differing := differences(store, config):
        raise TrainingError(
            f"{store.join(RECORD)} belongs to another configuration; choose another run.folder, delete this one, "
            "or go back to:\n" + "\n".join(f"  - {line}" for line in differing)
        )


def differences(store: Store, config: object) -> list[str]:
    """The decisive keys in which this configuration differs from the one that claimed the folder, with both values."""
    stored = json.loads(store.read(RECORD))["config"]
    mine = json.loads(json.dumps(decisive(config)))
    return [
        f"{key}: {stored.get(key, 'absent')!r} there, {mine.get(key, 'absent')!r} here"
        for key in sorted(stored.keys() | mine.keys())
        if stored.get(key, "absent") != mine.get(key, "absent")
    ]
