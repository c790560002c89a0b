r"""Classify NIfTI files with a registered model: a table on the screen and a CSV file.

Example:

  python -m finetune.predict classifier=models:/finetune-adhd_classification@candidate \
      scans=[out/phantom/sub-0001,out/phantom/sub-0002] out=out/predictions.csv

Required: classifier=<models:/name@alias>  scans=[<files, folders or patterns>]  out=<file.csv>

The model is loaded by mlflow.pyfunc and does its own preprocessing; this command only finds files.
"""

from __future__ import annotations

import glob
import json
from pathlib import Path

import pandas as pd

from configs.entry import main
from finetune.config import PredictConfig
from finetune.errors import FinetuneError

BOLD_ENDINGS = ("_bold.nii.gz", "_bold.nii")


def find_scans(patterns: list[str]) -> list[Path]:
    """BOLD files of every pattern, sorted, each once: a file as it is, a folder searched to the bottom."""
    found: set[Path] = set()
    for pattern in patterns:
        matches = [Path(match) for match in glob.glob(pattern, recursive=True)]
        files = [path for match in matches for path in (sorted(match.rglob("*")) if match.is_dir() else [match])]
        scans = [path for path in files if path.name.endswith(BOLD_ENDINGS) or path in matches]
        scans = [path for path in scans if path.is_file()]
        if not scans:
            raise FinetuneError(f"scans: nothing matches {pattern}; give files, folders or patterns")
        found.update(scans)
    return sorted(found)


def scan_table(scans: list[Path], *, brain_masks: bool) -> pd.DataFrame:
    """One row a scan as the served model wants it: bold, repetition_time_s of the sidecar, brain_mask, confounds."""
    rows = []
    for scan in scans:
        row = {"bold": str(scan), "repetition_time_s": _repetition_time_s(scan), "confounds": _confounds(scan)}
        if brain_masks:
            row["brain_mask"] = str(_brain_mask(scan))
        rows.append(row)
    return pd.DataFrame(rows)


def _stem(scan: Path) -> str:
    return scan.name.removesuffix(".gz").removesuffix(".nii")


def _repetition_time_s(scan: Path) -> float | None:
    """The sidecar's RepetitionTime; None leaves it to the header."""
    sidecar = scan.with_name(f"{_stem(scan)}.json")
    if not sidecar.exists():
        return None
    value = json.loads(sidecar.read_text(encoding="utf-8")).get("RepetitionTime")
    return None if value is None else float(value)


def _confounds(scan: Path) -> str | None:
    """The run's confound table as fMRIPrep names it; None where there is none, which only some models mind."""
    of_files = ("space-", "res-", "den-", "desc-")
    kept = [part for part in _stem(scan).removesuffix("_bold").split("_") if not part.startswith(of_files)]
    path = scan.with_name("_".join([*kept, "desc-confounds_timeseries.tsv"]))
    return str(path) if path.exists() else None


def _brain_mask(scan: Path) -> Path:
    base = _stem(scan).removesuffix("_bold").rpartition("_desc-")[0] or _stem(scan).removesuffix("_bold")
    for ending in (".nii.gz", ".nii"):
        path = scan.with_name(f"{base}_desc-brain_mask{ending}")
        if path.exists():
            return path
    raise FinetuneError(f"{scan}: no brain mask {base}_desc-brain_mask.nii.gz beside it; add one, or brain_masks=false")


def predict(config: PredictConfig) -> pd.DataFrame:
    """The model's table, one row a scan; also written to config.out."""
    import mlflow

    from training.watch.tracking import known_server, mlflow_environment

    table = scan_table(find_scans(config.scans), brain_masks=config.brain_masks)
    mlflow_environment(timeout_s=60)
    mlflow.set_tracking_uri(known_server(config.uri))
    mlflow.set_registry_uri(config.uri)
    location = config.classifier if config.classifier.startswith("models:/") else f"models:/{config.classifier}"
    try:
        model = mlflow.pyfunc.load_model(location)
    except mlflow.exceptions.MlflowException as error:
        raise FinetuneError(
            f"classifier={config.classifier}: cannot be loaded from {config.uri} ({error}); "
            f"'python -m training.runs {config.uri}' lists what is registered"
        ) from error
    answers = pd.concat([table[["bold"]], model.predict(table)], axis=1)
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    answers.to_csv(config.out, index=False)
    return answers


def validate(config: PredictConfig) -> list[str]:
    """All problems that need no model."""
    problems = []
    try:
        scan_table(find_scans(config.scans), brain_masks=config.brain_masks)
    except FinetuneError as error:
        problems.append(str(error))
    if not config.out.endswith(".csv"):
        problems.append(f"out: {config.out}; give the name of a .csv file")
    nearest = next(folder for folder in Path(config.out).absolute().parents if folder.exists())
    if not nearest.is_dir() or Path(config.out).is_dir():
        problems.append(f"out: {config.out} cannot be a file there; give another place")
    return problems


def plan(config: PredictConfig) -> str:
    """Which files would be classified."""
    scans = find_scans(config.scans)
    return "\n".join([f"{len(scans)} scans by {config.classifier} into {config.out}", *(f"  {scan}" for scan in scans)])


def run(config: PredictConfig) -> None:
    answers = predict(config)
    shown = answers.assign(bold=[Path(path).name for path in answers["bold"]])
    print(shown.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    print(f"{len(answers)} scans -> {config.out}")


if __name__ == "__main__":
    main(part="finetune.predict", schema=PredictConfig, help_text=__doc__ or "", run=run, validate=validate, plan=plan)
