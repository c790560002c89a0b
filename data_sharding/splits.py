"""Which split each subject belongs to: pure functions of names, so a rerun and another set agree.

A unit (a family, or a lone subject) is never divided.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from data_sharding.errors import SplitError
from data_sharding.hashing import hash_name, unit_interval

SplitRule = Literal["threshold", "ranked", "stratified", "file", "none"]
SPLITS = ("train", "validation", "test")


@dataclass
class SplitConfig:
    """Which subjects go to train, validation and test. Fractions serve `threshold`, counts the other two rules."""

    rule: SplitRule
    seed: int
    validation_fraction: float | None
    test_fraction: float | None
    num_validation: int | None
    num_test: int | None
    family_column: str | None  # subjects of one family stay together
    stratify_columns: list[str]
    file: str | None  # a table with participant_id and split


def assign_splits(subjects: pd.DataFrame, config: SplitConfig) -> dict[str, str]:
    """The split of every subject in the table's index (subject_id)."""
    units = family_units(subjects, config.family_column)
    if config.rule == "none":
        split_of_unit = dict.fromkeys(units, "train")
    elif config.rule == "threshold":
        split_of_unit = {unit: _by_threshold(unit, config) for unit in units}
    elif config.rule == "file":
        split_of_unit = _from_file(units, config)
    else:
        split_of_unit = _by_rank(subjects, units, config)
    return {subject: split_of_unit[unit] for unit, members in units.items() for subject in members}


def family_units(subjects: pd.DataFrame, family_column: str | None) -> dict[str, list[str]]:
    """Subjects by unit: the value of the family column, or the subject itself where there is none."""
    if family_column is not None and family_column not in subjects.columns:
        raise SplitError(f"splits.family_column: {family_column} is not one of {sorted(map(str, subjects.columns))}")
    units: dict[str, list[str]] = defaultdict(list)
    for subject in sorted(map(str, subjects.index)):
        family = None if family_column is None else subjects.at[subject, family_column]
        units[f"sub:{subject}" if family is None or pd.isna(family) else f"family:{family}"].append(subject)
    return dict(units)


def _by_threshold(unit: str, config: SplitConfig) -> str:
    """Depends on the unit alone: a growing corpus never moves anyone."""
    drawn = float(unit_interval(np.array(hash_name("split", config.seed, unit), dtype=np.uint64)))
    test, validation = config.test_fraction or 0.0, config.validation_fraction or 0.0
    return "test" if drawn < test else "validation" if drawn < test + validation else "train"


def _by_rank(subjects: pd.DataFrame, units: dict[str, list[str]], config: SplitConfig) -> dict[str, str]:
    """Exact counts of subjects: units sorted by hash fill test, then validation; by stratum in proportion."""
    wanted = {"test": config.num_test or 0, "validation": config.num_validation or 0}
    if sum(wanted.values()) > len(subjects):
        raise SplitError(
            f"splits asks for {wanted['test']} test and {wanted['validation']} validation subjects of {len(subjects)}; "
            "lower num_test or num_validation"
        )
    ranked = sorted(units, key=lambda unit: hash_name("split", config.seed, unit))
    split_of_unit = dict.fromkeys(units, "train")
    for split, count in wanted.items():
        free = [unit for unit in ranked if split_of_unit[unit] == "train"]
        for members, share in _strata_shares(subjects, units, free, count, config):
            for unit in _fill(units, members, share):
                split_of_unit[unit] = split
        missing = count - sum(len(units[unit]) for unit in units if split_of_unit[unit] == split)
        left = [unit for unit in ranked if split_of_unit[unit] == "train"]
        for unit in _fill(units, left, missing):  # families may leave a place open in their own stratum
            split_of_unit[unit] = split
        found = sum(len(units[unit]) for unit in units if split_of_unit[unit] == split)
        if found != count:
            raise SplitError(f"families cannot be put together to exactly {count} {split} subjects; {found} would do")
    return split_of_unit


def _fill(units: dict[str, list[str]], ranked: list[str], num_subjects: int) -> list[str]:
    """The first units that together hold at most `num_subjects`; one too large is passed over."""
    taken = []
    for unit in ranked:
        if len(units[unit]) <= num_subjects:
            taken.append(unit)
            num_subjects -= len(units[unit])
    return taken


def _strata_shares(
    subjects: pd.DataFrame, units: dict[str, list[str]], free: list[str], count: int, config: SplitConfig
) -> list[tuple[list[str], int]]:
    """(units, subjects to take) of each stratum: proportional, rounded by largest remainder."""
    if config.rule == "ranked":
        return [(free, count)]
    unknown = [column for column in config.stratify_columns if column not in subjects.columns]
    if unknown:
        raise SplitError(f"splits.stratify_columns: {unknown} not among {sorted(map(str, subjects.columns))}")
    strata: dict[str, list[str]] = defaultdict(list)
    for unit in free:
        values = (subjects.at[units[unit][0], column] for column in config.stratify_columns)
        strata["/".join("n/a" if pd.isna(value) else str(value) for value in values)].append(unit)
    names = sorted(strata)
    sizes = np.array([sum(len(units[unit]) for unit in strata[name]) for name in names])
    exact = count * sizes / max(1, sizes.sum())
    shares = np.floor(exact).astype(int)
    shares[np.argsort(shares - exact, kind="stable")[: count - shares.sum()]] += 1
    return [(strata[name], int(share)) for name, share in zip(names, shares, strict=True)]


def _from_file(units: dict[str, list[str]], config: SplitConfig) -> dict[str, str]:
    path = Path(config.file or "")
    if not path.is_file():
        raise SplitError(f"splits.file: {path} does not exist; give a TSV or CSV with participant_id and split")
    table = pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",", dtype=str)
    if not {"participant_id", "split"} <= set(table.columns):
        raise SplitError(f"{path} has the columns {list(table.columns)}; it needs participant_id and split")
    named = dict(zip(table["participant_id"].str.removeprefix("sub-"), table["split"], strict=True))
    if unknown := sorted(set(named.values()) - set(SPLITS)):
        raise SplitError(f"{path} names the splits {unknown}; use {', '.join(SPLITS)}")
    missing = [subject for members in units.values() for subject in members if subject not in named]
    if missing:
        raise SplitError(f"{path} lacks {len(missing)} subjects of the source, first {missing[0]}; add them")
    split_of_unit = {}
    for unit, members in units.items():
        splits = {named[subject] for subject in members}
        if len(splits) > 1:
            raise SplitError(f"{path} divides {unit} over {sorted(splits)}; put {members} into one split")
        split_of_unit[unit] = splits.pop()
    return split_of_unit


def validate_splits(config: SplitConfig) -> list[str]:
    """All problems of the split rule."""
    problems = []
    if config.rule == "threshold":
        fractions = (config.validation_fraction, config.test_fraction)
        if None in fractions:
            problems.append("splits: rule threshold needs validation_fraction and test_fraction")
        elif not (all(0 <= (share or 0) <= 1 for share in fractions) and sum(share or 0 for share in fractions) <= 1):
            problems.append(f"splits: fractions {fractions} must lie in 0..1 and add up to at most 1")
    if config.rule in ("ranked", "stratified"):
        counts = (config.num_validation, config.num_test)
        if any(count is None or count < 0 for count in counts):
            problems.append(f"splits: rule {config.rule} needs num_validation and num_test, 0 or more")
    if config.rule == "stratified" and not config.stratify_columns:
        problems.append("splits.stratify_columns: empty; name columns of participants.tsv, or use rule=ranked")
    if config.rule == "file" and not config.file:
        problems.append("splits.file: null; give a TSV or CSV with the columns participant_id and split")
    return problems
