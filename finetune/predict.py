r"""Ask a registered model about NIfTI files, or about images.

The answers are a table on the screen and a CSV file.

Example:

  python -m finetune.predict registered_model=models:/finetune-adhd_classification@candidate \
      scans=[out/phantom/sub-0001,out/phantom/sub-0002] out=out/predictions.csv

Required: registered_model=<models:/name@alias>  scans=[<files, folders or patterns>]  out=<file.csv>

The model is loaded by mlflow.pyfunc and does its own preprocessing; this command finds files by the rules of BIDS that
the shards were written by.
"""

from __future__ import annotations

import glob
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from brain_models import bids
from brain_models.errors import ScanError
from brain_models.images import SUFFIXES as PICTURES
from cluster.storage.files import folder_problems
from configs.entry import Command, main
from configs.words import aligned, counted
from finetune.errors import FinetuneError

if TYPE_CHECKING:
    import pandas as pd

    from finetune.config import PredictConfig

COLUMN_OF_SUFFIX = {"bold": "bold", "T1w": "t1w"}
IMAGE = "image"
COLUMNS = (*COLUMN_OF_SUFFIX.values(), IMAGE)


def find_scans(patterns: list[str]) -> list[Path]:
    """BOLD, T1w and picture files of every pattern, sorted, each once: a file as it is, a folder searched to the
    bottom."""
    scans: set[Path] = set()
    for pattern in patterns:
        matches = [Path(match) for match in glob.glob(pattern, recursive=True)]
        in_folders = [path for match in matches if match.is_dir() for path in match.rglob("*")]
        images = [path for path in in_folders if is_picture(path) or bids.is_image(path, tuple(COLUMN_OF_SUFFIX))]
        images = [path for path in (*images, *matches) if path.is_file()]
        if not images:
            raise FinetuneError(f"scans: nothing matches {pattern}; give files, folders or patterns")
        scans.update(images)
    return sorted(scans)


def is_picture(path: Path) -> bool:
    """True for the file of an image of the eye's world."""
    return path.suffix.lower() in PICTURES


def column_of(scan: Path) -> str:
    """The column of the served table that a file belongs in: BOLD where its name has no BIDS suffix."""
    return IMAGE if is_picture(scan) else COLUMN_OF_SUFFIX.get(bids.entities_of(scan)["suffix"], "bold")


def scan_rows(scans: list[Path], columns: Collection[str], *, brain_masks: bool) -> list[dict[str, object]]:
    """One row for each scan that a model with these columns reads, with what BIDS says belongs to it.

    FinetuneError when the model reads none of the scans.
    """
    rows = [
        {column: str(scan)} | ({} if column == IMAGE else _beside(scan, brain_masks=brain_masks))
        for scan, column in ((scan, column_of(scan)) for scan in scans)
        if column in columns
    ]
    if not rows:
        wanted = sorted(set(columns) & set(COLUMNS))
        raise FinetuneError(f"scans: the model reads {' or '.join(wanted)}, none of the {len(scans)} scans is one")
    return rows


def _beside(scan: Path, *, brain_masks: bool) -> dict[str, object]:
    """Repetition time, confounds and brain mask of a scan; None where there is none, which only some models need."""
    try:
        sidecar = bids.inherited_sidecar(scan, root=bids.dataset_of(scan))
        row: dict[str, object] = {"repetition_time_s": bids.repetition_time_s(scan, sidecar)}
    except ScanError as error:
        raise FinetuneError(str(error)) from error
    row["confounds"] = _text(bids.confounds_of(scan))
    row["brain_mask"] = _text(bids.brain_mask_of(scan)) if brain_masks else None
    return row


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def predict(config: PredictConfig) -> pd.DataFrame:
    """The model's answers, one row per scan; also written to config.out."""
    import mlflow
    import pandas as pd

    from training.watch.tracking import known_server, mlflow_environment

    scans = find_scans(config.scans)
    mlflow_environment(timeout_s=60)
    mlflow.set_tracking_uri(known_server(config.tracking))
    mlflow.set_registry_uri(config.tracking)
    name = config.registered_model
    location = name if name.startswith("models:/") else f"models:/{name}"
    try:
        model = mlflow.pyfunc.load_model(location)
    except mlflow.exceptions.MlflowException as error:
        raise FinetuneError(
            f"registered_model={name}: cannot be loaded from {config.tracking} ({error}); "
            f"'python -m training.runs {config.tracking}' lists what is registered"
        ) from error
    columns = model.metadata.get_input_schema().input_names()
    table = pd.DataFrame(scan_rows(scans, columns, brain_masks=config.brain_masks))
    answers = pd.concat([model.predict(table), table[scan_columns(table)]], axis=1)
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    answers.to_csv(config.out, index=False)
    return answers


def scan_columns(table: pd.DataFrame) -> list[str]:
    """The columns of a table that hold the paths of scans."""
    return [column for column in COLUMNS if column in table]


def validate(config: PredictConfig) -> list[str]:
    """All problems that need no model."""
    problems = []
    try:
        scan_rows(find_scans(config.scans), COLUMNS, brain_masks=config.brain_masks)
    except FinetuneError as error:
        problems.append(str(error))
    model = config.registered_model
    if "@" not in model and "/" not in model.removeprefix("models:/"):
        name = model.removeprefix("models:/")
        problems.append(f"registered_model={model}: names no version; give models:/{name}@<alias>, or /<version>")
    if not config.out.endswith(".csv"):
        problems.append(f"out: {config.out}; give the name of a .csv file")
    if Path(config.out).is_dir():
        problems.append(f"out: {config.out} is a folder; give the name of a .csv file")
    problems += folder_problems(str(Path(config.out).parent), "out")
    return problems


def plan(config: PredictConfig) -> str:
    """Which files the model would be asked about."""
    scans = find_scans(config.scans)
    asked = f"{counted(len(scans), 'scan')} by {config.registered_model} into {config.out}"
    return "\n".join([f"{asked}; a kind it does not read is left out", *(f"  {scan}" for scan in scans)])


def run(config: PredictConfig) -> None:
    answers = predict(config)
    print(shown(answers))
    print(f"{counted(len(answers), 'scan')} -> {config.out}")


def shown(answers: pd.DataFrame) -> str:
    """The answers as a table without the columns that nobody has, scans by their file names."""
    known = answers.dropna(axis="columns", how="all")
    columns = scan_columns(known)
    known = known.assign(**known[columns].map(lambda path: Path(path).name, na_action="ignore"))

    def cell(value: object) -> str:
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    return aligned([list(known), *([cell(value) for value in row] for row in known.itertuples(index=False))])


def command() -> Command:
    from cluster.config import Needs
    from finetune.config import PredictConfig

    return Command(
        PredictConfig, run, plan, validate, lambda config: Needs(results=config.out, tracking=config.tracking)
    )


if __name__ == "__main__":
    main("finetune.predict", __doc__, command)
