"""The tables of a BIDS tree: participants.tsv, events.tsv, and who made a scan by dataset_description.json."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from brain_models.bids import DESCRIPTION, entities_of, read_json
from brain_models.errors import ScanError
from data_sharding.errors import SourceError
from data_sharding.schema import Event

MISSING_VALUES = ["n/a", "N/A", "NA", "", "nan", "NaN"]


def read_participants(root: Path) -> pd.DataFrame:
    """participants.tsv by subject_id (without sub-), numbers as numbers, missing as missing; empty without it."""
    path = root / "participants.tsv"
    if not path.is_file():
        return pd.DataFrame(index=pd.Index([], name="subject_id", dtype="str"))
    text = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False, na_values=MISSING_VALUES)
    if "participant_id" not in text.columns:
        raise SourceError(f"{path} has no column participant_id (found {list(text.columns)}); add it")
    table = with_levels(text, root / "participants.json").apply(_typed)
    table.index = pd.Index(text["participant_id"].str.removeprefix("sub-").astype(str), name="subject_id")
    if not table.index.is_unique:
        twice = sorted(table.index[table.index.duplicated()].unique())
        raise SourceError(f"{path} has several rows for {', '.join(twice[:5])}; keep one row per subject")
    return table


def with_levels(table: pd.DataFrame, dictionary: Path) -> pd.DataFrame:
    """The table with coded values replaced by the names of their Levels in the data dictionary beside it.

    A column keeps its codes when one of them has no level, or the name of a level is not plain text.
    """
    described = _read_json(dictionary) if dictionary.is_file() else {}
    named = {}
    for column in table.columns:
        about = described.get(column)
        levels = about.get("Levels") if isinstance(about, dict) else None
        if isinstance(levels, dict) and set(table[column].dropna()) <= {
            code for code, name in levels.items() if isinstance(name, str)
        }:
            named[column] = table[column].map(levels)
    return table.assign(**named)


def _typed(column: pd.Series) -> pd.Series:
    """Numbers where every present value is one; text with zeros in front (site codes, ids) stays text."""
    present = column.dropna()
    if present.empty or present.str.match(r"0\d").any():
        return column
    numbers = pd.to_numeric(column, errors="coerce")
    return column if numbers[column.notna()].isna().any() else numbers


def read_events(path: Path, *, root: Path) -> list[Event]:
    """The events of a run: those of the nearest events.tsv that applies to it, in the file's order."""
    scan = entities_of(path)
    folders = [folder for folder in (path.parent, *path.parent.parents) if folder.is_relative_to(root)]
    for folder in folders:
        for candidate in sorted(folder.glob("*events.tsv")):
            entities = {name: value for name, value in entities_of(candidate).items() if name != "suffix"}
            if all(scan.get(name) == value for name, value in entities.items()):
                return events_of_table(candidate)
    return []


def events_of_table(path: Path) -> list[Event]:
    """The rows of an events.tsv; rows without an onset are left out, as BIDS says they may be n/a."""
    table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    if not {"onset", "duration"} <= set(table.columns):
        raise SourceError(f"{path} has the columns {list(table.columns)}; it needs onset and duration, in seconds")
    table = table[~table.onset.isin(MISSING_VALUES)]
    names = table["trial_type"] if "trial_type" in table.columns else [""] * len(table)
    try:
        rows = zip(table.onset, table.duration, names, strict=True)
        return [Event(float(onset), _duration_s(duration), str(name)) for onset, duration, name in rows]
    except ValueError as error:
        raise SourceError(f"{path}: {error}; onset and duration are times in seconds") from error


def _duration_s(text: str) -> float:
    return 0.0 if text in MISSING_VALUES else float(text)


def is_by_fmriprep(path: Path, *, root: Path) -> bool:
    """True when the nearest dataset_description.json above a scan says that fMRIPrep made it."""
    folders = [folder for folder in (path.parent, *path.parent.parents) if folder.is_relative_to(root)]
    nearest = next((file for folder in folders if (file := folder / DESCRIPTION).is_file()), None)
    if nearest is None:
        return False
    described = _read_json(nearest)
    makers = described.get("GeneratedBy", described.get("PipelineDescription"))  # the second until fMRIPrep 20.1
    makers = makers if isinstance(makers, list) else [makers]
    names = {str(maker.get("Name")).lower() for maker in makers if isinstance(maker, dict)}
    return described.get("DatasetType", "derivative") == "derivative" and "fmriprep" in names


def _read_json(path: Path) -> dict[str, object]:
    try:
        return read_json(path)
    except ScanError as error:
        raise SourceError(str(error)) from error
