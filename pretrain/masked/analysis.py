"""The report on a finished run, made again as the configuration now asks."""

import json
import tempfile
from pathlib import Path

from cluster.storage.stores import Store, store_for
from pretrain.errors import PretrainError
from pretrain.masked.config import PretrainConfig
from pretrain.masked.run_report import FOLDER, report_run
from pretrain.masked.sets import open_sets, open_source
from pretrain.masked.study import WEIGHTS
from training.collectives import this_process
from training.identity import RECORD, differences


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
            f"{source.fingerprint[:12]}; restore the set that it was trained on"
        )
    Path(config.run.scratch).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.run.scratch) as scratch:
        weights = Path(scratch) / WEIGHTS
        store.get_file(WEIGHTS, weights)
        run_id = summary["mlflow_run_id"]
        found, _ = report_run(config, sets, weights=weights, tables={}, mlflow_run_id=run_id)
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
                f"run.folder={config.run.folder} holds no {name}: not a finished run; finish it with 'python -m "
                "pretrain' and the same run.folder"
            )
    if differing := differences(store, config):
        raise PretrainError(
            f"{store.join(RECORD)} belongs to another configuration; repeat the run's own command and change "
            "only report.*:\n" + "\n".join(f"  - {line}" for line in differing)
        )


def plan(config: PretrainConfig) -> str:
    """What the analysis would cost, in forward passes per window."""
    report = config.report
    contribution, probes = report.contribution, report.probes
    splits = config.train.evaluation.final_splits
    passes = contribution.num_contexts * contribution.num_null_sets
    return "\n".join(
        [
            f"maps          {report.maps.num_samples} windows of each of {', '.join(splits)} of every set",
            f"contribution  {contribution.num_samples} windows of {', '.join(splits[:1])}, each encoded about "
            f"{passes:,} times per region size (in patches)",
            f"probes        {probes.num_samples} windows of train and of validation each, by the trained and "
            "by an untrained encoder",
        ]
    )
