"""`python -m training.runs <tracking uri>`: the runs and registered models a tracking server knows."""

from __future__ import annotations

import argparse

from training.tracking import mlflow_environment


def list_runs(uri: str) -> list[str]:
    """One line a run, newest first: name, state, last values."""
    mlflow_environment(timeout_s=30)
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    lines = []
    for run in client.search_runs(experiments, order_by=["attributes.start_time DESC"]):
        final = {key: value for key, value in sorted(run.data.metrics.items()) if key.startswith("final/")}
        numbers = "  ".join(f"{key.removeprefix('final/')} {value:.4g}" for key, value in final.items())
        lines.append(f"{run.info.run_name}  {run.info.status}  {numbers}  ({run.info.run_id})")
    return lines


def list_models(uri: str) -> list[str]:
    """One line a registered version: name, version, aliases, set."""
    mlflow_environment(timeout_s=30)
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    lines = []
    for model in client.search_registered_models():
        aliases = {str(version): alias for alias, version in model.aliases.items()}
        for version in client.search_model_versions(f"name='{model.name}'"):
            label = f"@{aliases[str(version.version)]}" if str(version.version) in aliases else ""
            lines.append(f"{model.name}/{version.version} {label}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.runs", description=__doc__)
    parser.add_argument("uri", help="tracking server, e.g. sqlite:///out/mlflow.db")
    uri = parser.parse_args().uri
    print("Runs:", *list_runs(uri), "Registered models:", *list_models(uri), sep="\n  ")


if __name__ == "__main__":
    main()
