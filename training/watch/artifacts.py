"""Files of a finished run in MLflow, beside its metrics.

Promise: a server that fails costs a warning, never the run.
"""

from __future__ import annotations

import logging
from pathlib import Path

from training.config import TrackingConfig
from training.watch.tracking import mlflow_environment

log = logging.getLogger(__name__)


def log_folder(folder: Path, *, name: str, run_id: str | None, config: TrackingConfig) -> bool:
    """True when every file below `folder` is an artifact of the run, below `name`; False where there is no server, no
    run on it, or it did not take them."""
    if config.uri is None or run_id is None:
        return False
    mlflow_environment(config.timeout_s)
    from mlflow.tracking import MlflowClient

    try:
        MlflowClient(tracking_uri=config.uri).log_artifacts(run_id, str(folder), artifact_path=name)
    except Exception as error:  # noqa: BLE001 - whatever the server or its artifact store does, the run is finished
        log.warning(
            "tracking: %s did not take the files of %s (%s: %s); they are in the run folder below %s",
            config.uri,
            folder,
            type(error).__name__,
            str(error)[:300],
            name,
        )
        return False
    return True
