"""No subject and no family is in two splits, and exact counts are exact."""

import itertools
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from data_sharding.errors import ShardError, SplitError
from data_sharding.read.reader import BatchSource, Windows, open_set
from data_sharding.splits import ReadingSplit, SplitConfig, assign_splits, validate_splits
from data_sharding.write.build import build
from data_sharding.write.prepare import prepare
from tests.data_sharding.read.test_reader import DATA
from tests.helpers_scans import sharding_config, write_bold, write_study, write_t1

RANKED = SplitConfig(
    rule="ranked",
    seed=0,
    validation_fraction=None,
    test_fraction=None,
    num_validation=5,
    num_test=5,
    family_column=None,
    stratify_columns=[],
    file=None,
)
THRESHOLD = replace(RANKED, rule="threshold", validation_fraction=0.2, test_fraction=0.3)


def subjects(count: int = 50) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "family": [f"f{number // 3}" if number % 7 else None for number in range(count)],
            "site": ["A" if number % 5 < 3 else "B" for number in range(count)],
        },
        index=pd.Index([f"{number:03d}" for number in range(count)], name="subject_id"),
    )


def counts(splits: dict[str, str]) -> dict[str, int]:
    return {split: list(splits.values()).count(split) for split in ("train", "validation", "test")}


@pytest.mark.parametrize("seed", range(8))
def test_ranked_counts_are_exact_for_any_seed(seed: int) -> None:
    splits = assign_splits(subjects(), replace(RANKED, seed=seed))
    assert counts(splits) == {"train": 40, "validation": 5, "test": 5}
    with_families = assign_splits(subjects(), replace(RANKED, seed=seed, family_column="family"))
    assert counts(with_families) == {"train": 40, "validation": 5, "test": 5}


@pytest.mark.parametrize("config", [RANKED, THRESHOLD, replace(RANKED, rule="stratified", stratify_columns=["site"])])
@pytest.mark.parametrize("seed", range(8))
def test_a_family_is_never_divided(config: SplitConfig, seed: int) -> None:
    table = subjects()
    splits = assign_splits(table, replace(config, seed=seed, family_column="family"))
    assert set(splits) == set(table.index)
    for _, members in table.groupby("family"):
        assert len({splits[subject] for subject in members.index}) == 1


@pytest.mark.parametrize("seed", range(8))
def test_subjects_and_families_keep_their_split_across_sets_that_hold_others_of_them(seed: int) -> None:
    table = subjects(60)
    config = replace(THRESHOLD, seed=seed, family_column="family")
    first, second = assign_splits(table.iloc[::2], config), assign_splits(table.iloc[20:], config)
    assert all(second[subject] == split for subject, split in first.items() if subject in second)
    siblings = [set(members.index) for _, members in table.groupby("family")]
    assert any(family & set(first) and family & set(second) - set(first) for family in siblings)
    for family in siblings:
        assert len({splits[subject] for splits in (first, second) for subject in family & set(splits)}) <= 1


@pytest.mark.parametrize("rule", ["threshold", "ranked"])
@pytest.mark.parametrize("seed", range(4))
def test_all_sessions_and_kinds_of_a_subject_are_in_one_split(rule: str, seed: int, tmp_path: Path) -> None:
    for subject, session in itertools.product(("01", "02", "03", "04"), ("1", "2")):
        for write in (write_bold, write_t1):
            path = write(tmp_path, subject)
            path.rename(path.with_name(path.name.replace(f"sub-{subject}", f"sub-{subject}_ses-{session}")))
            path.with_suffix("").with_suffix(".json").unlink(missing_ok=True)
    (tmp_path / "task-rest_bold.json").write_text('{"RepetitionTime": 2.0}')
    config = sharding_config(tmp_path, tmp_path / "set")
    splits = replace(THRESHOLD if rule == "threshold" else replace(RANKED, num_validation=1, num_test=1), seed=seed)
    prepared = prepare(replace(config, splits=splits))
    assert len(prepared.source.scans) == 16
    split_of_scan = {scan.scan_id: prepared.split_of_unit[scan.unit] for scan in prepared.source.scans}
    for subject in ("01", "02", "03", "04"):
        own = [split for scan_id, split in split_of_scan.items() if scan_id.startswith(f"sub-{subject}_")]
        assert len(own) == 4
        assert len(set(own)) == 1


def test_a_growing_corpus_moves_nobody_under_the_threshold_rule() -> None:
    small, large = assign_splits(subjects(30), THRESHOLD), assign_splits(subjects(400), THRESHOLD)
    assert all(large[subject] == split for subject, split in small.items())
    shares = counts(large)
    assert shares["test"] / 400 == pytest.approx(0.3, abs=0.08)
    assert shares["validation"] / 400 == pytest.approx(0.2, abs=0.08)


def test_the_order_of_rows_changes_nothing_and_the_seed_does() -> None:
    table = subjects()
    assert assign_splits(table, RANKED) == assign_splits(table.iloc[::-1], RANKED)
    assert assign_splits(table, RANKED) != assign_splits(table, replace(RANKED, seed=1))


def test_stratified_keeps_proportions_and_exact_totals() -> None:
    table = subjects()
    splits = assign_splits(table, replace(RANKED, rule="stratified", num_test=10, stratify_columns=["site"]))
    assert counts(splits) == {"train": 35, "validation": 5, "test": 10}
    assert [splits[subject] for subject in table.index[table.site == "A"]].count("test") == 6


def test_none_puts_everybody_into_train() -> None:
    assert counts(assign_splits(subjects(), replace(RANKED, rule="none"))) == {"train": 50, "validation": 0, "test": 0}


def test_a_file_decides_and_must_name_everybody(tmp_path: Path) -> None:
    path = tmp_path / "splits.tsv"
    lines = [f"sub-{number:03d}\t{'test' if number < 9 else 'train'}" for number in range(50)]
    path.write_text("participant_id\tsplit\n" + "\n".join(lines) + "\n")
    config = replace(RANKED, rule="file", file=str(path))
    assert counts(assign_splits(subjects(), config)) == {"train": 41, "validation": 0, "test": 9}
    with pytest.raises(SplitError, match="lacks 1 subjects of the source, first 050"):
        assign_splits(subjects(51), config)
    with pytest.raises(SplitError, match=r"divides family:f\d+ over \['test', 'train'\]"):
        assign_splits(subjects().assign(family="f1"), replace(config, family_column="family"))


def test_messages_name_what_does_not_fit() -> None:
    with pytest.raises(SplitError, match="5 test and 5 validation subjects of 8"):
        assign_splits(subjects(8), RANKED)
    with pytest.raises(SplitError, match="family_column: clan is not one of"):
        assign_splits(subjects(), replace(RANKED, family_column="clan"))
    with pytest.raises(SplitError, match=r"\['scanner'\] not among"):
        assign_splits(subjects(), replace(RANKED, rule="stratified", stratify_columns=["scanner"]))
    twins = subjects(20).assign(family=[f"f{number // 2}" for number in range(20)])
    with pytest.raises(SplitError, match="exactly 5 test subjects; 4 would do"):
        assign_splits(twins, replace(RANKED, family_column="family"))
    problems = validate_splits(replace(THRESHOLD, test_fraction=0.9)) + validate_splits(replace(RANKED, num_test=None))
    assert "add up to at most 1" in problems[0]
    assert "needs num_validation and num_test" in problems[1]


READING = ReadingSplit(
    rule="set",
    seed=0,
    validation_fraction=0.25,
    test_fraction=0.25,
    num_validation=None,
    num_test=None,
    family_column=None,
    stratify_columns=[],
    file=None,
    num_folds=5,
    fold=0,
    left_out_site=None,
)


def test_every_subject_is_tested_in_exactly_one_fold_and_families_stay_together() -> None:
    table = subjects()
    for columns, sizes in (([], {10}), (["site"], {8, 9, 10, 11, 12})):
        config = replace(READING, rule="fold", family_column="family", stratify_columns=columns)
        folds = [assign_splits(table, replace(config, fold=fold)) for fold in range(5)]
        for split in ("test", "validation"):
            held_out = [subject for fold in folds for subject, theirs in fold.items() if theirs == split]
            assert sorted(held_out) == sorted(table.index)
        assert {counts(fold)[split] for fold in folds for split in ("test", "validation")} <= sizes
        for fold in folds:
            assert all(len({fold[subject] for subject in family.index}) == 1 for _, family in table.groupby("family"))
    assert assign_splits(table, replace(READING, rule="fold")) != assign_splits(
        table, replace(READING, rule="fold", seed=1)
    )


def test_stratified_folds_hold_as_many_of_each_site() -> None:
    table = subjects()
    config = replace(READING, rule="fold", stratify_columns=["site"])
    tested = [subject for subject, split in assign_splits(table, config).items() if split == "test"]
    assert table.site[tested].value_counts().to_dict() == {"A": 6, "B": 4}


def test_a_left_out_site_is_tested_whole_with_the_families_of_its_subjects() -> None:
    table = subjects()
    sites_of = {subject: {site} for subject, site in table.site.items()}
    sites_of["000"] = {"A", "B"}  # was scanned at both
    config = replace(READING, rule="site", left_out_site="B")
    splits = assign_splits(table, config, sites_of=sites_of)
    assert {subject for subject, split in splits.items() if split == "test"} == {"000", *table.index[table.site == "B"]}
    assert 2 <= counts(splits)["validation"] <= 14
    families = assign_splits(table, replace(config, family_column="family"), sites_of=sites_of)
    assert all(len({families[subject] for subject in family.index}) == 1 for _, family in table.groupby("family"))
    assert all(families[subject] == "test" for subject in table.index[table.site == "B"])
    with pytest.raises(SplitError, match=r"left_out_site: C is none of the set's sites \['A', 'B'\]"):
        assign_splits(table, replace(config, left_out_site="C"), sites_of=sites_of)


def test_a_reading_split_that_cannot_be_made_is_refused() -> None:
    wrong = {
        "data.split.num_folds: 2; give at least 3": replace(READING, rule="fold", num_folds=2),
        "data.split.fold: 5; give 0 to 4": replace(READING, rule="fold", fold=5),
        "data.split.left_out_site: null; name the site": replace(READING, rule="site"),
        "data.split.file: null": replace(READING, rule="file"),
    }
    for message, config in wrong.items():
        (problem,) = validate_splits(config, "data.split")
        assert problem.startswith(message)
    assert validate_splits(READING, "data.split") == []
    (problem,) = validate_splits(replace(RANKED, rule="fold"))
    assert problem.startswith("splits.rule: fold is chosen when a set is read (data.split)")
    with pytest.raises(SplitError, match="60 folds of 50 subjects or families"):
        assign_splits(subjects(), replace(READING, rule="fold", num_folds=60))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = write_study(tmp_path_factory.mktemp("study"), num_subjects=7)
    config = sharding_config(root, tmp_path_factory.mktemp("written") / "set")
    build(config)
    return config.out


def test_the_sets_own_split_is_the_default_and_changes_nothing(written: str, tmp_path: Path) -> None:
    own, chosen = open_set(written), open_set(written, split=READING)
    assert chosen.fingerprint == own.fingerprint == own.manifest.fingerprint
    pd.testing.assert_frame_equal(chosen.subjects, own.subjects)
    pd.testing.assert_frame_equal(chosen.scans("bold"), own.scans("bold"))
    path = tmp_path / "same.csv"
    own.subjects.split.rename_axis("participant_id").to_csv(path)
    same = open_set(written, split=replace(READING, rule="file", file=str(path)))
    assert same.fingerprint == own.fingerprint, "the same splits, however they were chosen"


def test_a_split_chosen_at_reading_is_what_every_table_and_batch_follows(written: str) -> None:
    folds = [open_set(written, split=replace(READING, rule="fold", num_folds=3, fold=fold)) for fold in range(3)]
    assert len({shard_set.fingerprint for shard_set in folds} | {open_set(written).fingerprint}) == 4
    tested: list[str] = []
    for shard_set in folds:
        of_split = {split: set(group.index) for split, group in shard_set.subjects.groupby("split")}
        for kind in ("bold", "t1"):
            for split, names in of_split.items():
                assert set(shard_set.runs(kind, [split]).subject) == names
        source = BatchSource(Windows(shard_set, kind="bold", window_frames=4), DATA, rank=0, world_size=1)
        for split, names in of_split.items():
            assert {name for batch in source.evaluation(split, limit=None) for name in batch.subjects} == names
        batches, _ = next(source.steps(source.initial_state()))
        assert {name for batch in batches for name in batch.subjects} <= of_split["train"]
        tested += of_split["test"]
    assert sorted(tested) == sorted(open_set(written).subjects.index)


def test_a_run_is_not_resumed_with_another_split(written: str) -> None:
    def source(fold: int) -> BatchSource:
        shard_set = open_set(written, split=replace(READING, rule="fold", num_folds=3, fold=fold))
        return BatchSource(Windows(shard_set, kind="bold", window_frames=4), DATA, rank=0, world_size=1)

    _, state = next(source(0).steps(source(0).initial_state()))
    next(source(0).steps(state))
    with pytest.raises(ShardError, match=r"belongs to shard set .* resume with the same set, splits and seed"):
        next(source(1).steps(state))


def test_leaving_a_site_out_follows_the_sites_of_the_scans(written: str) -> None:
    sites = open_set(written).runs("bold", ["train", "validation", "test"]).set_index("subject").site
    left_out = open_set(written, split=replace(READING, rule="site", left_out_site="A"))
    assert set(left_out.subjects.index[left_out.subjects.split == "test"]) == set(sites.index[sites == "A"])
    assert set(sites) == {"A", "B"}
