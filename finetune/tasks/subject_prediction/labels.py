"""What is known of each subject: a class, a value, or nothing, and then the subject is never used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from finetune.errors import FinetuneError

MIN_VALUES = 3  # numbers that a column must hold to be predicted


@dataclass
class ClassLabel:
    """Two classes in a column of the set's subjects; a value in neither list ("pending", missing) is no label."""

    column: str
    cases: list[str]
    controls: list[str]


@dataclass
class ValueLabel:
    """Numbers in a column of the set's subjects; anything else ("n/a", missing) is no label."""

    column: str
    unit: str  # of the numbers, e.g. years


@dataclass(frozen=True)
class Labels:
    """Labelled subjects only: `truth_of` (True for a case, or the value) and `site_of` have the same keys."""

    truth_of: dict[str, bool] | dict[str, float]
    site_of: dict[str, str]
    num_unlabelled: int

    def rows(self, subjects: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(truth, site) of each of these labelled subjects."""
        truth = np.array([self.truth_of[subject] for subject in subjects])
        return truth, np.array([self.site_of[subject] for subject in subjects], dtype=str)


def read_labels(subjects: pd.DataFrame, config: ClassLabel | ValueLabel, *, location: str) -> Labels:
    """The labels in the subjects table of a shard set (its index is subject_id)."""
    if config.column not in subjects.columns:
        raise FinetuneError(
            f"{location}: its subjects have no column {config.column!r} (columns: {', '.join(subjects.columns)}); "
            "set task.label.column"
        )
    values = subjects[config.column]
    truth = _classes(values, config, location) if isinstance(config, ClassLabel) else _values(values, config, location)
    sites = subjects["site"].astype(str) if "site" in subjects.columns else pd.Series("all", index=subjects.index)
    truth_of = {str(subject): truth[subject] for subject in truth.index}
    site_of = {str(subject): str(sites[subject]) for subject in truth.index}
    return Labels(truth_of, site_of, len(subjects) - len(truth_of))


def _classes(values: pd.Series, config: ClassLabel, location: str) -> pd.Series:
    values = values.astype(str)
    is_case, is_control = values.isin(config.cases), values.isin(config.controls)
    if not is_case.any() or not is_control.any():
        found = ", ".join(sorted(values.unique())[:10])
        raise FinetuneError(
            f"{location}: column {config.column!r} has {int(is_case.sum())} cases {config.cases} and "
            f"{int(is_control.sum())} controls {config.controls}; it holds: {found}; set task.label.cases and controls"
        )
    return is_case[is_case ^ is_control].map(bool)


def _values(values: pd.Series, config: ValueLabel, location: str) -> pd.Series:
    numbers = pd.to_numeric(values, errors="coerce").astype(float)
    numbers = numbers[np.isfinite(numbers)]
    if len(numbers) < MIN_VALUES:
        found = ", ".join(sorted(values.astype(str).unique())[:10])
        raise FinetuneError(
            f"{location}: column {config.column!r} has {len(numbers)} numbers; it holds: {found}; set "
            "task.label.column to one of numbers, or give cases and controls"
        )
    return numbers.map(float)
