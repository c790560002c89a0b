"""What a finished run shows on the tracking server: description, scores, data and files. Its numbers are in the run
folder whatever the server does."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from training.config import TrackingConfig
from training.registry.card import TrainingSet
from training.watch.tracking import mlflow_environment

log = logging.getLogger(__name__)

DESCRIPTION_TAG = "mlflow.note.content"
DIGEST_LENGTH = 36  # MLflow's limit


def log_results(
    run_id: str | None,
    config: TrackingConfig,
    *,
    description: str,
    tags: Mapping[str, str],
    sets: Sequence[TrainingSet],
    files: Sequence[Path],
) -> bool:
    """True when the run has its description, tags, data inputs, and `files` as artifacts; False
    where there is no server, no run on it, or it did not take them."""
    if config.uri is None or run_id is None:
        return False
    mlflow_environment(config.timeout_s)
    from mlflow.entities import Dataset, DatasetInput, InputTag, RunTag
    from mlflow.tracking import MlflowClient

    inputs = [
        DatasetInput(
            Dataset(
                name=each.name,
                digest=each.fingerprint[:DIGEST_LENGTH],
                source_type="callosum shards",
                source=json.dumps({"uri": each.location}),
                profile=json.dumps({"fingerprint": each.fingerprint, **each.facts}),
            ),
            [InputTag("mlflow.data.context", "training")],
        )
        for each in sets
    ]
    client = MlflowClient(tracking_uri=config.uri)
    try:
        client.log_inputs(run_id, inputs)
        described = {DESCRIPTION_TAG: description, **tags}
        client.log_batch(run_id, tags=[RunTag(key, value) for key, value in described.items()])
        for path in files:
            client.log_artifact(run_id, str(path))
    except Exception as error:  # noqa: BLE001 - whatever the server does, the run is finished
        log.warning("tracking: %s did not take the results (%s); they are in the run folder", config.uri, error)
        return False
    return True
