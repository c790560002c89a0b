"""Which split each subject belongs to, when a set is written or when it is read: pure functions of names.

So a rerun and another set agree. A unit (a family, or a lone subject) is never divided; in a set of responses,
"subjects" are stimuli.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from data_sharding.errors import SplitError
from data_sharding.hashing import hash_name, unit_interval

SplitRule = Literal["threshold", "ranked", "stratified", "file", "none", "fold", "site", "set"]
READING_RULES = ("fold", "site", "set")  # that only a run chooses
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


@dataclass
class ReadingSplit(SplitConfig):
    """Which subjects a run trains on, validates on and tests, whatever its shard sets were written with.

    `set` keeps the set's own splits. `fold` tests one of `num_folds` folds and validates on the next one; `site` tests
    a site and splits the others as `threshold` does, without a test share. A null `family_column` is the set's own.
    """

    num_folds: int | None
    fold: int | None
    left_out_site: str | None


AS_WRITTEN = ReadingSplit("set", 0, None, None, None, None, None, [], None, None, None, None)


def assign_splits(
    subjects: pd.DataFrame, config: SplitConfig, *, sites_of: Mapping[str, set[str]] | None = None
) -> dict[str, str]:
    """The split of every subject in the table's index (subject_id); `sites_of` every subject serve rule `site`."""
    units = family_units(subjects, config.family_column)
    if config.rule == "none":
        split_of_unit = dict.fromkeys(units, "train")
    elif config.rule == "threshold":
        split_of_unit = {unit: _by_threshold(unit, config) for unit in units}
    elif config.rule == "file":
        split_of_unit = _from_file(units, config, key=str(subjects.index.name))
    elif isinstance(config, ReadingSplit) and config.rule == "fold":
        split_of_unit = _by_fold(subjects, units, config)
    elif isinstance(config, ReadingSplit) and config.rule == "site":
        split_of_unit = _by_site(units, config, sites_of or {})
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
        for unit in _fill(units, left, missing):  # families may not fill up the share of their own stratum
            split_of_unit[unit] = split
        num_subjects = sum(len(units[unit]) for unit in units if split_of_unit[unit] == split)
        if num_subjects != count:
            raise SplitError(
                f"families cannot be put together to exactly {count} {split} subjects; {num_subjects} would do"
            )
    return split_of_unit


def _fill(units: dict[str, list[str]], ranked: list[str], num_subjects: int) -> list[str]:
    """The first units that together hold at most `num_subjects`; one too large is passed over."""
    taken = []
    for unit in ranked:
        if len(units[unit]) <= num_subjects:
            taken.append(unit)
            num_subjects -= len(units[unit])
    return taken


def _by_fold(subjects: pd.DataFrame, units: dict[str, list[str]], config: ReadingSplit) -> dict[str, str]:
    """Units dealt out stratum by stratum, large families first, then in hash order, each to the smallest fold."""
    num_folds, fold = config.num_folds or 0, config.fold or 0
    if num_folds > len(units):
        raise SplitError(f"split.num_folds: {num_folds} folds of {len(units)} subjects or families; use fewer folds")
    ranked = sorted(units, key=lambda unit: (-len(units[unit]), hash_name("split", config.seed, unit)))
    sizes, fold_of = [0] * num_folds, {}
    for members in _strata(subjects, units, ranked, config.stratify_columns).values():
        for unit in members:
            fold_of[unit] = sizes.index(min(sizes))
            sizes[fold_of[unit]] += len(units[unit])
    split_of_fold = {fold: "test", (fold + 1) % num_folds: "validation"}
    return {unit: split_of_fold.get(number, "train") for unit, number in fold_of.items()}


def _by_site(units: dict[str, list[str]], config: ReadingSplit, sites_of: Mapping[str, set[str]]) -> dict[str, str]:
    """A unit is tested when any scan of its members comes from the site."""
    known = {site for sites in sites_of.values() for site in sites}
    if config.left_out_site not in known:
        raise SplitError(f"split.left_out_site: {config.left_out_site} is none of the set's sites {sorted(known)}")
    at_site = {subject for subject, sites in sites_of.items() if config.left_out_site in sites}
    if not any(at_site.intersection(members) for members in units.values()):
        raise SplitError("split.rule: site divides subjects, this set is split by stimulus; choose another rule")
    others = replace(config, test_fraction=0.0)
    return {
        unit: "test" if at_site.intersection(members) else _by_threshold(unit, others)
        for unit, members in units.items()
    }


def _strata_shares(
    subjects: pd.DataFrame, units: dict[str, list[str]], free: list[str], count: int, config: SplitConfig
) -> list[tuple[list[str], int]]:
    """(units, subjects to take) of each stratum: proportional, rounded by largest remainder."""
    if config.rule == "ranked":
        return [(free, count)]
    strata = _strata(subjects, units, free, config.stratify_columns)
    sizes = np.array([sum(len(units[unit]) for unit in members) for members in strata.values()])
    exact = count * sizes / max(1, sizes.sum())
    shares = np.floor(exact).astype(int)
    shares[np.argsort(shares - exact, kind="stable")[: count - shares.sum()]] += 1
    return [(members, int(share)) for members, share in zip(strata.values(), shares, strict=True)]


def _strata(
    subjects: pd.DataFrame, units: dict[str, list[str]], ranked: list[str], columns: list[str]
) -> dict[str, list[str]]:
    """The ranked units by the values of the columns, sorted; a family counts by its first member."""
    unknown = [column for column in columns if column not in subjects.columns]
    if unknown:
        raise SplitError(f"splits.stratify_columns: {unknown} not among {sorted(map(str, subjects.columns))}")
    strata: dict[str, list[str]] = defaultdict(list)
    for unit in ranked:
        values = (subjects.at[units[unit][0], column] for column in columns)
        strata["/".join("n/a" if pd.isna(value) else str(value) for value in values)].append(unit)
    return dict(sorted(strata.items()))


def _from_file(units: dict[str, list[str]], config: SplitConfig, *, key: str) -> dict[str, str]:
    path, column = Path(config.file or ""), "stimulus_id" if key == "stimulus_id" else "participant_id"
    if not path.is_file():
        raise SplitError(f"splits.file: {path} does not exist; give a TSV or CSV with {column} and split")
    table = pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",", dtype=str)
    if not {column, "split"} <= set(table.columns):
        raise SplitError(f"{path} has the columns {list(table.columns)}; it needs {column} and split")
    named = dict(zip(table[column].str.removeprefix("sub-"), table["split"], strict=True))
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


def validate_splits(config: SplitConfig, key: str = "splits") -> list[str]:
    """All problems of the split rule."""
    problems = []
    if config.rule in READING_RULES and not isinstance(config, ReadingSplit):
        return [f"{key}.rule: {config.rule} is chosen when a set is read (data.split); give another rule here"]
    if config.rule == "threshold":
        fractions = (config.validation_fraction, config.test_fraction)
        if None in fractions:
            problems.append(f"{key}: rule threshold needs validation_fraction and test_fraction")
        elif not (all(0 <= (share or 0) <= 1 for share in fractions) and sum(share or 0 for share in fractions) <= 1):
            problems.append(f"{key}: fractions {fractions} must lie in 0..1 and add up to at most 1")
    if config.rule in ("ranked", "stratified"):
        counts = (config.num_validation, config.num_test)
        if any(count is None or count < 0 for count in counts):
            problems.append(f"{key}: rule {config.rule} needs num_validation and num_test, 0 or more")
    if config.rule == "stratified" and not config.stratify_columns:
        problems.append(f"{key}.stratify_columns: empty; name columns of participants.tsv, or use rule=ranked")
    if config.rule == "file" and not config.file:
        problems.append(f"{key}.file: null; give a TSV or CSV with the columns participant_id and split")
    return problems + (_reading_problems(config, key) if isinstance(config, ReadingSplit) else [])


def _reading_problems(config: ReadingSplit, key: str) -> list[str]:
    problems = []
    if config.rule == "fold" and (config.num_folds is None or config.num_folds < 3):
        problems.append(f"{key}.num_folds: {config.num_folds}; give at least 3: to test, to validate, to train on")
    elif config.rule == "fold" and not 0 <= (-1 if config.fold is None else config.fold) < (config.num_folds or 0):
        problems.append(f"{key}.fold: {config.fold}; give 0 to {(config.num_folds or 0) - 1}")
    if config.rule == "site" and not config.left_out_site:
        problems.append(f"{key}.left_out_site: null; name the site to test")
    if config.rule == "site" and not 0 < (config.validation_fraction or 0) < 1:
        problems.append(f"{key}.validation_fraction: {config.validation_fraction}; rule site needs a share of the rest")
    return problems
