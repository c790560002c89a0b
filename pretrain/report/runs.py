"""Reports on a run: at its end on rank 0, or later from the weights in its folder."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from cluster.storage.stores import Store, store_for
from pretrain.errors import PretrainError
from pretrain.masked.analysis import FOLDER, analyse
from pretrain.masked.config import PretrainConfig
from pretrain.masked.examined import WEIGHTS, Examined, load_weights
from pretrain.masked.sets import OpenedSet, open_sets, open_source
from pretrain.masked.study import build_task, identity
from pretrain.report.tables import Table, as_csv
from training.collectives import this_process
from training.engine.base import own_device
from training.identity import RECORD, differences
from training.watch.artifacts import log_folder

RECONSTRUCTION = "reconstruction.csv"


def report_run(
    config: PretrainConfig,
    sets: Mapping[str, OpenedSet],
    *,
    weights: Path,
    tables: Mapping[str, Table],
    mlflow_run_id: str | None,
) -> dict[str, object]:
    """The numbers of the report on weights in a local file; its files are in the run folder and in MLflow."""
    task = load_weights(build_task(config, sets), weights)
    examined = Examined(task.to(own_device()).eval(), config, sets, own_device())
    with tempfile.TemporaryDirectory(dir=made(Path(config.run.scratch))) as scratch:
        folder = Path(scratch)
        numbers = analyse(examined, folder)
        if tables:
            alignments = {name: opened.alignment for name, opened in sets.items()}
            (folder / RECONSTRUCTION).write_text(as_csv(tables, alignments))
        put(store_for(config.run.folder), folder)
        log_folder(folder, name=FOLDER, run_id=mlflow_run_id, config=config.train.tracking)
    return numbers


def analyse_again(config: PretrainConfig) -> None:
    """Report on a finished run as the configuration now asks, and put the numbers into its metrics.json."""
    store = store_for(config.run.folder)
    check_is_of_run(store, config)
    summary, sets = json.loads(store.read("metrics.json")), open_sets(config)
    source = open_source(config, sets, this_process())
    source.close()
    if source.fingerprint != summary["fingerprint"]:
        raise PretrainError(
            f"{config.run.folder} was trained on the set {summary['fingerprint'][:12]}, what is there now is "
            f"{source.fingerprint[:12]}; bring the set back that it was trained on"
        )
    with tempfile.TemporaryDirectory(dir=made(Path(config.run.scratch))) as scratch:
        weights = Path(scratch) / WEIGHTS
        store.get_file(WEIGHTS, weights)
        run_id = summary["mlflow_run_id"]
        found = report_run(config, sets, weights=weights, tables={}, mlflow_run_id=run_id)
    known = summary.get("report", {})
    summary["report"] = {name: known.get(name, {}) | numbers for name, numbers in found.items()}
    store.put("metrics.json", json.dumps(summary, indent=1, sort_keys=True).encode())
    print(json.dumps(summary["report"], indent=1))
    print(f"wrote {store.join(FOLDER)}")


def check_is_of_run(store: Store, config: PretrainConfig) -> None:
    """PretrainError unless the folder holds a finished run of this configuration, what cannot change a number left out:
    other masks or another set would put numbers into metrics.json that are not the run's."""
    for name in ("metrics.json", WEIGHTS, RECORD):
        if not store.exists(name):
            raise PretrainError(
                f"run.folder={config.run.folder} holds no {name}: not a finished run; let 'python -m pretrain' finish "
                "with the same run.folder"
            )
    if differing := differences(store, identity(config)):
        raise PretrainError(
            f"{store.join(RECORD)} is of another command; give the run's own, with nothing but report.* changed:\n"
            + "\n".join(f"  - {line}" for line in differing)
        )


def plan(config: PretrainConfig) -> str:
    """What looking at the run would cost, in forward passes a window."""
    report = config.report
    contribution, probes = report.contribution, report.probes
    splits = config.train.evaluation.final_splits
    passes = contribution.num_contexts * contribution.num_null_sets
    return "\n".join(
        [
            f"maps          {report.maps.num_samples} windows of each of {', '.join(splits)} of every set",
            f"contribution  {contribution.num_samples} windows of {', '.join(splits[:1])}, each encoded about "
            f"{passes:,} times for every different size of a region, in patches",
            f"probes        {probes.num_samples} windows each of train and validation, trained and untrained",
        ]
    )


def put(store: Store, folder: Path) -> None:
    """Every file of a folder into the run's report."""
    for path in sorted(folder.iterdir()):
        store.put(f"{FOLDER}/{path.name}", path)


def made(folder: Path) -> Path:
    """The folder, which exists then."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder
