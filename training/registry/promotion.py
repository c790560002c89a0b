"""Which model may carry the alias champion: one that beat chance on test subjects its backbone had never seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from training.statistics import Interval
from training.watch.tracking import mlflow_environment

ALIAS = "champion"


@dataclass
class ChampionConfig:
    """A champion's interval of `metric` on the test split lies above `above`."""

    metric: str
    above: float


def reasons_against(
    config: ChampionConfig | None, intervals: Mapping[str, Interval], overlap: Sequence[str] | None
) -> list[str]:
    """Why a model may not become champion; empty when it may. `overlap` is None where its backbone does not say."""
    reasons = []
    if config is None:
        reasons.append("register.champion is null")
    elif math.isnan(low := intervals[config.metric].low):
        reasons.append(f"{config.metric} has no interval: too few test subjects of one class")
    elif not low > config.above:
        reasons.append(f"the lower end of {config.metric}, {low:.3f}, is not above {config.above}")
    if overlap is None:
        reasons.append("the backbone does not say which subjects it saw")
    elif overlap:
        reasons.append(f"the backbone saw {len(overlap)} of the test subjects")
    return reasons


def promote(registered: str, *, uri: str) -> str:
    """'name@champion': the version that 'name@alias' names now carries the alias champion too."""
    mlflow_environment(timeout_s=60)
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    name, _, alias = registered.partition("@")
    version = client.get_model_version_by_alias(name, alias).version
    client.set_registered_model_alias(name, ALIAS, version)
    return f"{name}@{ALIAS}"
