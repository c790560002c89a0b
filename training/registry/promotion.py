"""Which model may carry the alias champion: one that beat chance, its baselines and the champion before it on test
subjects its backbone had never seen."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from training.registry.models import CHECKPOINT_HASH_TAG, server_errors_named
from training.statistics import Interval
from training.watch.tracking import mlflow_environment

ALIAS = "champion"
SCORES = "test_scores.csv"  # in a bundle: what the next champion is compared with


@dataclass
class ChampionConfig:
    """A champion's interval of `metric` on the test split lies above `above` and below `below`, where chance is (null:
    no bound)."""

    metric: str
    above: float | None
    below: float | None


def reasons_against(
    config: ChampionConfig | None, intervals: Mapping[str, Interval], overlap: Sequence[str] | None
) -> list[str]:
    """Why a model may not become champion; empty when it may. `overlap` is None where its backbone does not say."""
    reasons = []
    if config is None:
        reasons.append("register.champion is null")
    elif math.isnan((found := intervals[config.metric]).low):
        reasons.append(f"{config.metric} has no interval: too few test subjects of one class")
    elif config.above is not None and found.low <= config.above:
        reasons.append(f"the lower end of {config.metric}, {found.low:.3f}, is not above {config.above}")
    elif config.below is not None and found.high >= config.below:
        reasons.append(f"the upper end of {config.metric}, {found.high:.3f}, is not below {config.below}")
    if overlap is None:
        reasons.append("the backbone does not say which subjects it saw")
    elif overlap:
        reasons.append(f"the backbone saw {len(overlap)} of the test subjects")
    return reasons


def champion_scores(name: str, *, uri: str, checkpoint_hash: str) -> str | None:
    """The scores kept with the champion of a registered model; None without one, or when it is this checkpoint.

    RegistryError when they cannot be read.
    """
    mlflow_environment(timeout_s=60)
    import mlflow

    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    then = "run the same command again to compare"
    with server_errors_named(f"the scores of {name}@{ALIAS} cannot be read from {uri}", then):
        found = client.search_registered_models(f"name='{name}'")
        number = found[0].aliases.get(ALIAS) if found else None
        if number is None or client.get_model_version(name, number).tags.get(CHECKPOINT_HASH_TAG) == checkpoint_hash:
            return None
        address = f"models:/{name}/{number}/artifacts/bundle/{SCORES}"
        with tempfile.TemporaryDirectory() as folder:
            return Path(mlflow.artifacts.download_artifacts(artifact_uri=address, dst_path=folder)).read_text("utf-8")


def promote(registered: str, *, uri: str) -> str:
    """'name@champion': the version that 'name@alias' names now carries the alias champion too."""
    mlflow_environment(timeout_s=60)
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    name, _, alias = registered.partition("@")
    version = client.get_model_version_by_alias(name, alias).version
    client.set_registered_model_alias(name, ALIAS, version)
    return f"{name}@{ALIAS}"
