"""HCP motor task: surface runs and the EV files with the times of the movements.

`<subject>/MNINonLinear/Results/tfMRI_MOTOR_<LR|RL>/` with a CIFTI series or one GIFTI file per hemisphere, and `EVs/`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from brain_models.errors import ScanError
from brain_models.space import BrainSpace
from brain_models.surface_scans import read_surface_header
from data_sharding.errors import SourceError
from data_sharding.scans import Scan, SourceContents, scan_id_of
from data_sharding.schema import Event, Refusal
from data_sharding.sources import SourceConfig, bids, parse_options

RUNS = "*/MNINonLinear/Results/tfMRI_MOTOR_*"
MOVEMENTS = {"cue": "cue", "lf": "left_foot", "lh": "left_hand", "rf": "right_foot", "rh": "right_hand", "t": "tongue"}


@dataclass
class Options:
    """Which files of a run to use, and the table of subjects."""

    files: str  # msmall, msmsulc (CIFTI series) or gifti (one file a hemisphere)
    subjects_table: str | None  # a CSV with the column Subject: Gender, Age, Family_ID ...


def find(config: SourceConfig, space: BrainSpace, *, accepts_raw: bool) -> SourceContents:
    """Every motor run on the surface, with its events; a run without all EV files is refused."""
    options = parse_options(config, Options)
    root = Path(config.root)
    if space.kind != "surface":
        raise SourceError(
            f"space {space.name} is a {space.kind}: HCP motor runs are read on their surface; set space=fslr32k with "
            "space.vertices=[<any .dtseries.nii or .dlabel.nii of it>]"
        )
    if options.files not in ("msmall", "msmsulc", "gifti"):
        raise SourceError(f"source.options.files: {options.files!r}; give msmall, msmsulc or gifti")
    folders = [folder for folder in sorted(root.glob(RUNS)) if folder.is_dir()]
    if not folders:
        raise SourceError(f"{root}: no {RUNS}; give the folder that holds the subjects' folders as source.root")
    contents = SourceContents(scans=[], subjects=_subjects_table(options))
    for folder in folders:
        subject, direction = folder.parents[2].name, folder.name.rpartition("_")[2]
        if config.subjects is not None and subject not in config.subjects:
            continue
        entities = {"sub": subject, "task": "motor", "dir": direction, "suffix": "bold"}
        try:
            contents.scans.append(_scan(folder, entities, options))
        except (ScanError, SourceError) as error:
            contents.refused.append(Refusal(scan_id_of(entities, "bold"), str(folder), str(error)))
    contents.subjects = contents.subjects.reindex(sorted({scan.subject for scan in contents.scans}))
    contents.notes = [f"{len(contents.scans)} scans: HCP motor runs, {options.files}"]
    return contents


def read_ev(path: Path, name: str) -> list[Event]:
    """The events of one EV file: lines of onset and duration in seconds, and a weight."""
    try:
        rows = [[float(text) for text in line.split()] for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror}); fetch the run's EVs folder") from error
    except ValueError as error:
        raise SourceError(f"{path}: {error}; a line is onset, duration and 1") from error
    bad = [row for row in rows if len(row) != 3 or not all(map(math.isfinite, row)) or row[1] < 0]
    if bad:
        raise SourceError(f"{path}: line {bad[0]} is not onset, duration and 1; fetch the file again")
    return [Event(onset_s, duration_s, name) for onset_s, duration_s, _ in rows]


def _scan(folder: Path, entities: dict[str, str], options: Options) -> Scan:
    path, files = _files(folder, options)
    header = read_surface_header(path)
    events = [event for file, name in MOVEMENTS.items() for event in read_ev(folder / "EVs" / f"{file}.txt", name)]
    return Scan(
        scan_id=scan_id_of(entities, "bold"),
        kind="bold",
        path=str(path),
        repetition_time_s=bids.repetition_time_s(path, header, {}),
        num_frames=header.num_frames,
        entities=entities,
        subject=entities["sub"],
        task="motor",
        run=entities["dir"],
        files=files,
        events=sorted(events, key=lambda event: (event.onset_s, event.name)),
    )


def _files(folder: Path, options: Options) -> tuple[Path, dict[str, str]]:
    """The run's file, and the right hemisphere's where it has one of its own."""
    if options.files != "gifti":
        ending = "_Atlas_MSMAll.dtseries.nii" if options.files == "msmall" else "_Atlas.dtseries.nii"
        path = folder / f"{folder.name}{ending}"
        if not path.is_file():
            raise SourceError(f"{path}: no such file; fetch it, or choose others by source.options.files")
        return path, {}
    sides = [sorted(folder.glob(f"{folder.name}.{side}.*func.gii*")) for side in "LR"]
    if any(len(paths) != 1 for paths in sides):
        raise SourceError(
            f"{folder}: {len(sides[0])} files {folder.name}.L.*func.gii and {len(sides[1])} of R, expected one of each"
        )
    return sides[0][0], {"right": str(sides[1][0])}


def _subjects_table(options: Options) -> pd.DataFrame:
    if options.subjects_table is None:
        return pd.DataFrame(index=pd.Index([], name="subject_id", dtype="str"))
    path = Path(options.subjects_table)
    if not path.is_file():
        raise SourceError(f"source.options.subjects_table: {path} does not exist; give a CSV with the column Subject")
    table = pd.read_csv(path, dtype={"Subject": str})
    if "Subject" not in table.columns or not table["Subject"].is_unique:
        raise SourceError(f"{path}: needs a column Subject with one row per subject (found {list(table.columns)[:8]})")
    return table.set_index("Subject").rename_axis("subject_id")
