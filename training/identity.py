"""What makes two commands the same run: a run folder remembers its configuration and refuses any other."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping

from cluster.storage.stores import Store
from training.errors import TrainingError

RECORD = "run.json"

# Keys that cannot change a number of the run.
FREE_KEYS = (
    "cluster",
    "run",
    "train.tracking",
    "train.checkpoint",
    "train.spikes",
    "train.profile",
    "train.peak_tflops",
    "train.engine.activation_checkpointing",
    "data.num_workers",
    "data.prefetch",
    "data.cache_folder",
    "data.cache_bytes",
    "register",
    "report",
)


def flatten(config: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested mappings as one level with dotted keys; lists stay values."""
    flat: dict[str, object] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = list(value) if isinstance(value, tuple) else value
    return flat


def decisive(config: Mapping[str, object]) -> dict[str, object]:
    """The flattened configuration without the keys that cannot change a number."""
    return {
        key: value
        for key, value in flatten(config).items()
        if not any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)
    }


def config_hash(config: Mapping[str, object]) -> str:
    """Hex sha256 of the decisive configuration."""
    return hashlib.sha256(json.dumps(decisive(config), sort_keys=True).encode()).hexdigest()


def claim(store: Store, config: Mapping[str, object]) -> str:
    """The run folder's id, by which its MLflow run is found again; an unclaimed folder becomes this configuration's.

    Every rank may call it: the first one writes. TrainingError when the folder belongs to another configuration.
    """
    record = {"config": decisive(config), "config_hash": config_hash(config), "run_key": uuid.uuid4().hex}
    if not store.exists(RECORD):
        store.put_if_absent(RECORD, json.dumps(record, indent=1, sort_keys=True).encode())
    if differing := differences(store, config):
        raise TrainingError(
            f"{store.join(RECORD)} belongs to another configuration; choose another run.folder, delete this one, "
            "or go back to:\n" + "\n".join(f"  - {line}" for line in differing)
        )
    return json.loads(store.read(RECORD))["run_key"]


def differences(store: Store, config: Mapping[str, object]) -> list[str]:
    """The decisive keys in which this configuration differs from the one that claimed the folder, with both values."""
    stored = json.loads(store.read(RECORD))["config"]
    mine = json.loads(json.dumps(decisive(config)))
    return [
        f"{key}: {stored.get(key, 'absent')!r} there, {mine.get(key, 'absent')!r} here"
        for key in sorted(stored.keys() | mine.keys())
        if stored.get(key, "absent") != mine.get(key, "absent")
    ]
