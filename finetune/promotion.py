"""Who may be called champion: a model that beat chance within sites on test subjects its backbone had never seen."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.tasks.subject_prediction.evaluation import Evaluation
from training.watch.tracking import mlflow_environment

ALIAS = "champion"


def refusals(found: Evaluation, overlap: Sequence[str] | None, *, needed_low: float | None) -> list[str]:
    """Why a model may not become champion; empty when it may. `overlap` None: the backbone does not say whom it saw."""
    reasons = []
    if needed_low is None:
        reasons.append("register.champion_within_site_low is null")
    elif not found.within_site_auroc.low > needed_low:
        reasons.append(f"within-site AUROC's lower end {found.within_site_auroc.low:.3f} is not above {needed_low}")
    if overlap is None:
        reasons.append("the backbone does not say which subjects it saw")
    elif overlap:
        reasons.append(f"the backbone saw {len(overlap)} of the test subjects")
    return reasons


def promote(registered: str, *, uri: str) -> str:
    """'name@champion': the version that 'name@alias' points to now carries the alias champion too."""
    mlflow_environment(timeout_s=60)
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    name, _, alias = registered.partition("@")
    version = client.get_model_version_by_alias(name, alias).version
    client.set_registered_model_alias(name, ALIAS, version)
    return f"{name}@{ALIAS}"
