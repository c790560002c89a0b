"""Who is a case, who is a control, and who has no label and is therefore never used."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from finetune.errors import FinetuneError


@dataclass
class LabelConfig:
    """Values of a column of the set's subjects; a value in neither list ("pending", missing) is no label."""

    column: str
    cases: list[str]
    controls: list[str]


@dataclass(frozen=True)
class Labels:
    """Labelled subjects only: `is_case_of` and `site_of` have the same keys."""

    is_case_of: dict[str, bool]
    site_of: dict[str, str]
    num_unlabelled: int

    def rows(self, subjects: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(is_case, site) of each of these labelled subjects."""
        is_case = np.array([self.is_case_of[subject] for subject in subjects], dtype=bool)
        return is_case, np.array([self.site_of[subject] for subject in subjects], dtype=str)


def read_labels(subjects: pd.DataFrame, config: LabelConfig, *, location: str) -> Labels:
    """The labels in the subjects table of a shard set (its index is subject_id)."""
    if config.column not in subjects.columns:
        raise FinetuneError(
            f"{location}: its subjects have no column {config.column!r} (columns: {', '.join(subjects.columns)}); "
            "set task.label.column"
        )
    values = subjects[config.column].astype(str)
    is_case, is_control = values.isin(config.cases), values.isin(config.controls)
    is_labelled = is_case ^ is_control
    if not is_case.any() or not is_control.any():
        found = ", ".join(sorted(values.unique())[:10])
        raise FinetuneError(
            f"{location}: column {config.column!r} has {int(is_case.sum())} cases {config.cases} and "
            f"{int(is_control.sum())} controls {config.controls}; it holds: {found}; set task.label.cases and controls"
        )
    sites = subjects["site"].astype(str) if "site" in subjects.columns else pd.Series("all", index=subjects.index)
    return Labels(
        {str(subject): bool(is_case[subject]) for subject in subjects.index[is_labelled]},
        {str(subject): str(sites[subject]) for subject in subjects.index[is_labelled]},
        int((~is_labelled).sum()),
    )
