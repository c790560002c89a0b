"""List the runs and registered models of a tracking server.

Example:
  python -m training.runs sqlite:///out/mlflow.db

Required: the server's address

Of every run: its state, its last step, the commit it would resume from, where to look at it, and its final numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.errors import StorageError
from configs.entry import Command, main
from training.errors import RegistryError
from training.watch.tracking import FINAL, known_server, last_steps, mlflow_environment

if TYPE_CHECKING:
    from mlflow.entities import Run

STEP_KEYS = (
    "train/loss",
    "validation/loss",
    "train_split/loss",
)  # the first one tracked gives the last step


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
        name.removesuffix(FINAL): value for name, value in sorted(run.data.metrics.items()) if name.endswith(FINAL)
    }
    if numbers:
        lines.append("  " + "  ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
    return lines


def newest_commit(folder: str) -> str:
    """The commit the run would resume from, or why it cannot be seen from here."""
    from cluster.storage.stores import store_for
    from training.checkpoint import committed_folders

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


@dataclass
class RunsConfig:
    """Which tracking server."""

    tracking: str


def run(config: RunsConfig) -> None:
    uri = config.tracking
    mlflow_environment(timeout_s=30)
    from mlflow.exceptions import MlflowException

    try:
        print("Runs:", *(f"  {line}" for line in list_runs(known_server(uri))), sep="\n")
        print("Registered models:", *(f"  {line}" for line in list_models(uri)), sep="\n")
    except MlflowException as error:
        advice = "check the address, and MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        raise RegistryError(f"{uri} cannot be read ({error}); {advice}") from error


def command() -> Command:
    return Command(RunsConfig, run, lambda config: f"list the runs and registered models of {config.tracking}")


if __name__ == "__main__":
    main("training.runs", __doc__, command, positional=("tracking",))
