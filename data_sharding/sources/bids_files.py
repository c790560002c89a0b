"""The files of a BIDS tree: which are scans, which of several files of one scan is used, and its tables.

Listed by bids2table. Entities stay text, as they are written in the file's name.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from bids2table import index_dataset

from brain_models.bids import (
    DESCRIPTION,
    NOT_MAGNITUDE,
    SURFACE_ENDINGS,
    VOLUME_ENDINGS,
    ending_of,
    entities_of,
    read_json,
)
from brain_models.errors import ScanError
from brain_models.nifti import read_header
from brain_models.space import NO_TEMPLATE, BrainSpace
from brain_models.surface_scans import read_surface_header
from data_sharding.errors import SourceError
from data_sharding.scans import scan_id_of
from data_sharding.schema import Event, Refusal

SUFFIX_OF_KIND = {"bold": "bold", "parcels": "bold", "t1": "T1w"}
KIND_OF_SUFFIX = {"bold": "bold", "T1w": "t1"}
RAW_SPACES = ("", "T1w", "orig", "native", "scanner", "boldref", "individual", "func")
SAME_SCAN = ("echo", "part")  # files that differ in these, or in space, res, den, hemi, desc, are the same scan

MISSING_VALUES = ["n/a", "N/A", "NA", "", "nan", "NaN"]

logging.getLogger("bids2table").setLevel(logging.ERROR)  # warns of a folder without a description, which we read too


@dataclass(frozen=True)
class ScanFile:
    """One file, and what its name says."""

    path: Path
    entities: dict[str, str]  # with suffix

    @property
    def space(self) -> str:
        return self.entities.get("space", "")

    @property
    def ending(self) -> str:
        return ending_of(self.path)

    @property
    def described(self) -> str:
        """space-X, with res- or den- where it has one."""
        kept = [f"{name}-{self.entities[name]}" for name in ("res", "den") if name in self.entities]
        return " ".join([f"space-{self.space or 'none'}", *kept])


@dataclass(frozen=True)
class Listing:
    """The files of each scan by (suffix, name of the scan), and the files that cannot be used at all."""

    files: dict[tuple[str, str], list[ScanFile]]
    refused: list[Refusal]


def listed(root: Path, *, suffixes: Sequence[str], on_surface: bool) -> Listing:
    """Every BOLD or T1w file of the tree on volumes, or on surfaces; SourceError when there is no such folder."""
    if not root.is_dir():
        raise SourceError(f"source.root: {root} is not a folder; give the top of a BIDS tree (holding sub-*)")
    endings = SURFACE_ENDINGS if on_surface else VOLUME_ENDINGS
    files: dict[tuple[str, str], list[ScanFile]] = defaultdict(list)
    refused = [
        Refusal(scan_id_of({"sub": folder.name.removeprefix("sub-")}, "folder"), str(folder), _NO_LABEL.format(folder))
        for folder in sorted(root.glob("sub-*"))
        if folder.is_dir() and not folder.name.removeprefix("sub-").isalnum()
    ]
    for relative in sorted(index_dataset(root).column("path").to_pylist()):
        file = ScanFile(root / relative, entities_of(root / relative))
        if file.entities["suffix"] not in suffixes or file.ending not in endings:
            continue
        if file.entities.get("desc", "preproc") != "preproc":
            continue
        if file.entities.get("part") in NOT_MAGNITUDE:
            refused.append(_not_magnitude(file))
            continue
        same = {name: value for name, value in file.entities.items() if name not in SAME_SCAN}
        files[file.entities["suffix"], scan_id_of(same, KIND_OF_SUFFIX[file.entities["suffix"]])].append(file)
    return Listing(dict(sorted(files.items())), refused)


_NO_LABEL = "{}: not a BIDS subject folder (sub- and letters or digits only); rename it and its files"


def _not_magnitude(file: ScanFile) -> Refusal:
    part = file.entities["part"]
    name = scan_id_of(file.entities, f"part-{part}_{file.entities['suffix']}")
    reason = f"{file.path}: part-{part} is not a magnitude image; only those are packed, export it if it is missing"
    return Refusal(name, str(file.path), reason)


def of_one_echo(files: list[ScanFile], echo: str | None) -> tuple[list[ScanFile], str]:
    """The files that combine all echoes, or else those of the requested echo, and the choice in words."""
    combined = [file for file in files if "echo" not in file.entities]
    echoes = sorted({file.entities["echo"] for file in files if "echo" in file.entities})
    if combined:
        return combined, f", combined over echoes {', '.join(echoes)}" if echoes else ""
    if echo is None:
        raise SourceError(
            f"{files[0].path}: has echoes {', '.join(echoes)} and no combination of them; combine them (tedana, or "
            f"fMRIPrep), or choose one: source.options.echo={echoes[0]}"
        )
    if echo not in echoes:
        raise SourceError(f"{files[0].path}: has echoes {', '.join(echoes)}, not source.options.echo={echo}")
    return [file for file in files if file.entities["echo"] == echo], f", echo {echo} of {', '.join(echoes)}"


def in_space(files: list[ScanFile], space: BrainSpace, *, allow_mix: bool, accepts_raw: bool) -> list[ScanFile]:
    """The files in the space's template, or raw ones where the space has no template or registration is configured."""
    by_space: dict[str, list[ScanFile]] = defaultdict(list)
    for file in files:
        by_space[file.space].append(file)
    raw = [file for name in RAW_SPACES for file in by_space.pop(name, [])]
    wanted = space_entity(space)
    if space.template == NO_TEMPLATE:
        if not raw:
            raise SourceError(f"{files[0].path}: only in {', '.join(by_space)}; space {space.name} needs raw space")
        return raw
    if wanted in by_space:
        return by_space[wanted]
    if by_space and allow_mix and space.kind == "volume":
        return by_space[min(by_space)]
    if raw and accepts_raw and space.kind == "volume":
        return raw
    if by_space:
        mix = ", or set source.allow_template_mix=true (recorded in the manifest)" if space.kind == "volume" else ""
        raise SourceError(
            f"{files[0].path} lies in {', '.join(sorted(by_space))}, the space needs {wanted}; choose a space= of that "
            f"template{mix}"
        )
    raise SourceError(
        f"{files[0].path} is in raw space (no space- entity names a template); register it first, for example with "
        f"fMRIPrep --output-spaces {wanted}{':res-2' if space.kind == 'volume' else ''}, and give its derivatives "
        "folder as source.root; volumes can also be registered here: pip install -e '.[registration]' and "
        "registration=affine"
    )


def space_entity(space: BrainSpace) -> str:
    """What BIDS calls the space's template."""
    return f"MNI152{space.template}" if space.template.startswith("NLin") else space.template


def fitting(files: list[ScanFile], space: BrainSpace) -> list[ScanFile]:
    """The one file to pack (two for the hemispheres of a GIFTI run): the resolution that fits the space best."""
    if space.kind == "surface":
        return _on_mesh(files, space)
    if len(files) == 1:
        return files
    header_kind = "t1w" if files[0].entities["suffix"] == "T1w" else "bold"
    spacings = {file.path: _spacing_mm(read_header(file.path, header_kind).affine) for file in files}  # type: ignore[arg-type]
    ranked = sorted(files, key=lambda file: (spacings[file.path], str(file.path)))
    fine_enough = [file for file in ranked if spacings[file.path] <= space.spacing_mm * 1.01]
    return fine_enough[-1:] or ranked[:1]  # the coarsest that is still as fine as the space, else the finest


def _spacing_mm(affine: np.ndarray) -> float:
    return float(np.cbrt(abs(np.linalg.det(affine[:3, :3]))))


def _on_mesh(files: list[ScanFile], space: BrainSpace) -> list[ScanFile]:
    """A CIFTI file, else both hemispheres of the density whose meshes are the space's."""
    cifti = [file for file in files if file.ending == ".dtseries.nii"]
    if cifti:
        return cifti[:1]
    assert space.mesh_sizes is not None
    pair = []
    for side, num_vertices in zip("LR", space.mesh_sizes, strict=True):
        hemisphere = [file for file in files if file.entities.get("hemi") == side]
        sizes = {file.path: read_surface_header(file.path).shape[0] for file in hemisphere}
        matching = [file for file in hemisphere if sizes[file.path] == num_vertices]
        if not matching:
            present = f"meshes of {sorted(set(sizes.values()))} vertices" if sizes else f"no hemi-{side} file"
            raise SourceError(
                f"{files[0].path}: {present}, the space {space.name} has {num_vertices} on that side; fetch the "
                "missing file, or choose the space of that mesh"
            )
        pair.append(matching[0])
    return pair


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
    folders = [folder for folder in path.parents if folder.is_relative_to(root)]
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
        durations = table.duration.where(~table.duration.isin(MISSING_VALUES), "0")
        rows = zip(table.onset, durations, names, strict=True)
        return [Event(float(onset), float(duration), str(name)) for onset, duration, name in rows]
    except ValueError as error:
        raise SourceError(f"{path}: {error}; onset and duration are times in seconds") from error


def is_by_fmriprep(path: Path, *, root: Path) -> bool:
    """True when the nearest dataset_description.json above a scan says that fMRIPrep made it."""
    folders = [folder for folder in path.parents if folder.is_relative_to(root)]
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
