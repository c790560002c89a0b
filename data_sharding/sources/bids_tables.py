"""The tables and sidecars of a BIDS tree: participants.tsv, and JSON by the inheritance principle."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd

from data_sharding.errors import SourceError

MISSING_VALUES = ["n/a", "N/A", "NA", "", "nan", "NaN"]


def read_participants(root: Path) -> pd.DataFrame:
    """participants.tsv by subject_id (without sub-), numbers as numbers, missing as missing; empty without it."""
    path = root / "participants.tsv"
    if not path.is_file():
        return pd.DataFrame(index=pd.Index([], name="subject_id", dtype="str"))
    text = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False, na_values=MISSING_VALUES)
    if "participant_id" not in text.columns:
        raise SourceError(f"{path} has no column participant_id (found {list(text.columns)}); add it")
    table = text.apply(_typed)
    table.index = pd.Index(text["participant_id"].str.removeprefix("sub-").astype(str), name="subject_id")
    if not table.index.is_unique:
        twice = sorted(table.index[table.index.duplicated()].unique())
        raise SourceError(f"{path} has several rows for {', '.join(twice[:5])}; keep one row a subject")
    return table


def _typed(column: pd.Series) -> pd.Series:
    """Numbers where every present value is one; text with zeros in front (site codes, ids) stays text."""
    present = column.dropna()
    if present.empty or present.str.match(r"0\d").any():
        return column
    numbers = pd.to_numeric(column, errors="coerce")
    return column if numbers[column.notna()].isna().any() else numbers


def inherited_sidecar(path: Path, *, root: Path, entities_of: Callable[[Path], Mapping[str, str]]) -> dict[str, object]:
    """All JSON fields that apply to a scan, from the root down to its folder: nearer files and longer names win."""
    scan = entities_of(path)
    folders = [folder for folder in reversed([path.parent, *path.parent.parents]) if folder.is_relative_to(root)]
    fields: dict[str, object] = {}
    for folder in folders:
        applying = []
        for candidate in sorted(folder.glob(f"*{scan['suffix']}.json")):
            entities = entities_of(candidate)
            if all(scan.get(name) == value for name, value in entities.items()):
                applying.append((len(entities), candidate))
        for _, candidate in sorted(applying):
            fields |= _read_json(candidate)
    return fields


def _read_json(path: Path) -> dict[str, object]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise SourceError(f"{path} is not JSON ({error}); correct the sidecar") from error
    if not isinstance(fields, dict):
        raise SourceError(f"{path} holds a {type(fields).__name__}, not an object of fields; correct the sidecar")
    return fields
