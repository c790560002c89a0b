"""Confound tables as fMRIPrep writes them (desc-confounds_timeseries.tsv): columns by name, pattern or group.

Promise: no value is made up but a derivative's first frame, which no table can know. Needs no table library.
"""

import csv
import fnmatch
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from brain_models.errors import ScanError

MAX_TABLE_BYTES = 1 << 26  # 64 MiB: some hundred columns of ten thousand frames are a quarter of it
MISSING = ("", "n/a", "nan", "na")
NON_STEADY_STATE = "non_steady_state_outlier*"
FRAMEWISE_DISPLACEMENT = "framewise_displacement"
STD_DVARS = "std_dvars"

_MOTION = [f"{kind}_{axis}" for kind in ("trans", "rot") for axis in "xyz"]


def _expanded(columns: list[str]) -> list[str]:
    """With squares, derivatives and their squares (Friston 1996; Satterthwaite 2013)."""
    endings = ("", "_derivative1", "_power2", "_derivative1_power2")
    return [column + ending for column in columns for ending in endings]


GROUPS: dict[str, list[str]] = {
    "motion6": _MOTION,
    "motion12": _MOTION + [f"{column}_derivative1" for column in _MOTION],
    "motion24": _expanded(_MOTION),
    "wm_csf": ["white_matter", "csf"],
    "wm_csf8": _expanded(["white_matter", "csf"]),
    "global_signal": ["global_signal"],
    "global_signal4": _expanded(["global_signal"]),
    "compcor5": [f"a_comp_cor_{number:02d}" for number in range(5)],
    "36p": _expanded([*_MOTION, "white_matter", "csf", "global_signal"]),
}


@dataclass(frozen=True)
class ConfoundTable:
    """The cells of a table as text, by column."""

    path: Path
    columns: dict[str, list[str]]
    num_frames: int

    def values(self, column: str) -> Float64[np.ndarray, "time"]:
        """Returns a column, NaN where it says n/a; ScanError where it holds something else than numbers."""
        try:
            return np.array([np.nan if cell.lower() in MISSING else float(cell) for cell in self.columns[column]])
        except ValueError as error:
            raise ScanError(
                f"{self.path}: column {column} holds no numbers ({error}); write the table again"
            ) from error

    def optional(self, column: str) -> Float64[np.ndarray, "time"] | None:
        """Returns a column, or None where the table has none of this name."""
        return self.values(column) if column in self.columns else None

    def regressors(self, names: list[str]) -> tuple[list[str], Float64[np.ndarray, "time column"]]:
        """Returns the columns that groups, names and patterns stand for, and their values.

        A missing first value becomes the second, as in nilearn's load_confounds. ScanError for what is not there.
        """
        chosen = list(dict.fromkeys(column for name in names for column in self._columns_of(name)))
        values = np.stack([self.values(column) for column in chosen], axis=1)
        is_missing = ~np.isfinite(values[0])
        values[0, is_missing] = values[1, is_missing]
        if not np.isfinite(values).all():
            frame, number = np.argwhere(~np.isfinite(values))[0]
            raise ScanError(
                f"{self.path}: column {chosen[number]} has no value at frame {frame}; leave that column out of "
                "preprocessing.cleaning.confounds, or write the table again"
            )
        return chosen, values

    def num_non_steady(self) -> int:
        """Returns how many frames from the first on the table marks as not yet in steady state."""
        return num_non_steady(list(self.columns))

    def _columns_of(self, name: str) -> list[str]:
        wanted = GROUPS.get(name.lower(), [name])
        found = [column for pattern in wanted for column in fnmatch.filter(self.columns, pattern)]
        missing = [pattern for pattern in wanted if not fnmatch.filter(self.columns, pattern)]
        if missing:
            raise ScanError(
                f"{self.path} has no column {', '.join(missing[:4])} (asked for by confounds={name}); it has "
                f"{', '.join(list(self.columns)[:8])}, ...; groups: {', '.join(GROUPS)}"
            )
        return found


def num_non_steady(columns: list[str]) -> int:
    """Returns the number of non-steady-state frames from the names of a table's columns: fMRIPrep gives each its own,
    and marks only the first frames of a run."""
    return len(fnmatch.filter(columns, NON_STEADY_STATE))


def read_columns(path: Path | str) -> list[str]:
    """Returns the names of a table's columns, reading its first line only."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.readline(1 << 20).rstrip("\r\n").split("\t")
    except (OSError, UnicodeDecodeError) as error:
        raise ScanError(f"{path}: no readable confound table ({error}); write it again") from error


def read_confounds(path: Path | str, *, num_frames: int) -> ConfoundTable:
    """Returns the table of a run of `num_frames`; ScanError when it is damaged or of another run."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_TABLE_BYTES:
            raise ScanError(f"{path}: {path.stat().st_size} bytes are no confound table; check the file")
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file, delimiter="\t"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ScanError(f"{path}: no readable confound table ({error}); write it again") from error
    if not rows or any(len(row) != len(rows[0]) for row in rows):
        raise ScanError(f"{path}: rows of different lengths, or none; write the confound table again")
    if len(rows) - 1 != num_frames:
        raise ScanError(f"{path} has {len(rows) - 1} rows, its run has {num_frames} frames; pair the right files")
    columns = {name: [row[number] for row in rows[1:]] for number, name in enumerate(rows[0])}
    return ConfoundTable(path, columns, num_frames)
