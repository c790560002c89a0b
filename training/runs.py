"""`python -m training.runs <tracking uri>`: the runs and registered models a tracking server knows.

Of every run: state, last step, the newest commit it would resume from, a link, its final numbers.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from cluster.errors import StorageError
from cluster.storage.stores import store_for
from training.checkpoint import committed_folders
from training.errors import RegistryError
from training.watch.tracking import known_server, last_steps, mlflow_environment

if TYPE_CHECKING:
    from mlflow.entities import Run

STEP_KEYS = (
    "train/loss",
    "validation/loss",
    "train_split/loss",
)  # the first one tracked gives the last step
MAX_DEPTH = 2  # of the final numbers shown: final/<split>/<metric>, not those of every group


def list_runs(uri: str) -> list[str]:
    """A few lines per run, newest run first: name, state, last step; commit; link; final values."""
    mlflow_environment(timeout_s=30)
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, order_by=["attributes.start_time DESC"])
    return [line for run in runs for line in describe(run, uri)]


def describe(run: Run, uri: str) -> list[str]:
    """One run's lines."""
    steps = last_steps(run)
    step = next((steps[key] for key in STEP_KEYS if key in steps), None)
    lines = [f"{run.info.run_name}  {run.info.status}" + (f"  step {step}" if step is not None else "")]
    if folder := run.data.params.get("run.folder"):
        lines.append(f"  commit {newest_commit(folder)}")
    lines.append(f"  at {link(run, uri)}")
    numbers = {
        name.removeprefix("final/"): value
        for name, value in sorted(run.data.metrics.items())
        if name.startswith("final/") and name.count("/") <= MAX_DEPTH
    }
    if numbers:
        lines.append("  " + "  ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
    return lines


def newest_commit(folder: str) -> str:
    """The commit the run would resume from, or why it cannot be seen from here."""
    try:
        store = store_for(folder)
        folders = committed_folders(store)
    except StorageError as error:
        return f"not visible from here: {error}"
    return store.join(folders[-1]) if folders else f"none in {folder}"


def link(run: Run, uri: str) -> str:
    """The run's page on a tracking server, or its id in a database file."""
    if uri.startswith(("http://", "https://")):
        return f"{uri.rstrip('/')}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    return f"{uri} run {run.info.run_id}"


def list_models(uri: str) -> list[str]:
    """One line per registered version: name, version, aliases."""
    mlflow_environment(timeout_s=30)
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    lines = []
    for model in client.search_registered_models():
        for version in client.search_model_versions(f"name='{model.name}'"):
            aliases = [alias for alias, aliased in model.aliases.items() if str(aliased) == str(version.version)]
            lines.append(" ".join([f"{model.name}/{version.version}", *(f"@{alias}" for alias in sorted(aliases))]))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.runs", description=__doc__)
    parser.add_argument("uri", help="tracking server, e.g. sqlite:///out/mlflow.db")
    uri = parser.parse_args().uri
    mlflow_environment(timeout_s=30)
    from mlflow.exceptions import MlflowException

    try:
        print("Runs:", *(f"  {line}" for line in list_runs(known_server(uri))), sep="\n")
        print("Registered models:", *(f"  {line}" for line in list_models(uri)), sep="\n")
    except MlflowException as error:
        advice = "check the address, and MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        print(f"RegistryError: {uri} cannot be read ({error}); {advice}", file=sys.stderr)
        sys.exit(2)
    except RegistryError as error:
        print(f"RegistryError: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
