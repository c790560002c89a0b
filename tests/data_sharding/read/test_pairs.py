"""The sides of a pair are always of one subject: after damage, on any number of ranks, and after any resume."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from data_sharding import schema
from data_sharding.errors import ShardError
from data_sharding.read.batch import PairedBatch
from data_sharding.read.pairs import Pairs
from data_sharding.read.reader import BatchSource, Windows, open_set
from data_sharding.read.shard_set import ShardSet
from data_sharding.write.build import build
from tests.data_sharding.read.test_reader import DATA, steps_of
from tests.data_sharding.test_shards import copy_set, flip
from tests.helpers_scans import TEMPLATE, bold_values, save_nifti, sharding_config, write_study


def second_run(root: Path, subject: str) -> None:
    name = f"sub-{subject}_task-rest_run-2_{TEMPLATE}_res-12_desc-preproc_bold"
    path = root / f"sub-{subject}" / "func" / f"{name}.nii.gz"
    save_nifti(path, bold_values(77, 24))
    path.with_name(f"{name}.json").write_text(json.dumps({"RepetitionTime": 2.0}))


@pytest.fixture(scope="module")
def location(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Eight subjects: 02 has two runs, 03 no T1, 04 a run that is too short, 07 and 08 are held out."""
    root = write_study(tmp_path_factory.mktemp("study"), num_subjects=8, num_frames=(20, 18, 40))
    second_run(root, "02")
    next((root / "sub-03" / "anat").iterdir()).unlink()
    for path in (root / "sub-04" / "func").glob("*.nii.gz"):
        save_nifti(path, bold_values(4, 5))
    split = {"07": "validation", "08": "test"}
    rows = [f"sub-{number:02d}\t{split.get(f'{number:02d}', 'train')}" for number in range(1, 9)]
    (root / "splits.tsv").write_text("\n".join(["participant_id\tsplit", *rows]) + "\n")
    config = sharding_config(root, tmp_path_factory.mktemp("written") / "set")
    build(replace(config, splits=replace(config.splits, rule="file", file=str(root / "splits.tsv"))))
    return config.out


def pairs_of(bold: ShardSet, t1: ShardSet | None = None) -> Pairs:
    return Pairs(
        {
            "rest": Windows(bold, kind="bold", window_frames=6),
            "anat": Windows(t1 or bold, kind="t1", window_frames=1),
        }
    )


def source_of(location: str, rank: int = 0, world_size: int = 1, **changes: object) -> BatchSource:
    data = replace(DATA, batch_size=4, **changes)  # type: ignore[arg-type]
    return BatchSource(pairs_of(open_set(location)), data, rank=rank, world_size=world_size)


def rows_of(batches: list[PairedBatch]) -> list[tuple[object, ...]]:
    """(subject, scans, first frames, seed, values of both sides) of every pair that counts."""
    return [
        (
            *(batch.subjects[row], batch.scan_ids[row], batch.first_frame[row], int(batch.sample_seed[row])),
            *(side.values[row].numpy().tobytes() for side in batch.sides.values()),
        )
        for batch in batches
        for row in range(len(batch.subjects))
        if batch.weight[row] > 0
    ]


def test_every_pair_holds_one_subjects_windows_and_an_epoch_every_subject_once(location: str) -> None:
    source = source_of(location)
    single = {
        name: BatchSource(side, DATA, rank=0, world_size=1).evaluation("train", limit=None)
        for name, side in pairs_of(open_set(location)).sides.items()
    }
    t1 = {batch.scan_ids[row]: batch.values[row] for batch in single["anat"] for row in range(len(batch.scan_ids))}
    assert source.drawn.runs("train").num_samples == 4
    scans_of_two = set()
    for step in steps_of(source, 12):
        assert sorted(row[0] for row in rows_of(step)) == ["01", "02", "05", "06"]
        for batch in step:
            assert list(batch.sides) == ["rest", "anat"]
            for row, subject in enumerate(batch.subjects):
                assert {side.subjects[row] for side in batch.sides.values()} == {subject}
                assert (batch.sides["anat"].values[row] == t1[batch.sides["anat"].scan_ids[row]]).all()
                if subject == "02":
                    scans_of_two.add(batch.sides["rest"].scan_ids[row])
    assert len(scans_of_two) == 2, "of two runs, one is drawn in every epoch"


def test_the_windows_of_an_epoch_vary_and_lie_inside_their_run(location: str) -> None:
    taken = [row for step in steps_of(source_of(location), 12) for row in rows_of(step)]
    frames = open_set(location).runs("bold", ["train"]).set_index("scan_id").num_frames
    starts = {row[2][0] for row in taken if row[0] == "05"}  # type: ignore[index]
    assert len(starts) > 4
    assert all(row[2][0] + 6 <= frames[str(row[1]).partition("+")[0]] for row in taken)  # type: ignore[index]


def test_subjects_with_one_side_only_are_named_and_counted(location: str) -> None:
    pairs = pairs_of(open_set(location))
    assert pairs.incomplete("train") == {"03": ["anat"], "04": ["rest"]}
    assert pairs.summary("train") == "4 subjects have rest and anat; 2 left out: 03 (no anat), 04 (no rest)"
    assert pairs.summary("test") == "1 subjects have rest and anat"
    message = (
        r"^split 'holdout' has no subject with a window on all of rest, anat: rest has 8 \(01, 02 \.\.\.\), anat has 7 "
    )
    with pytest.raises(ShardError, match=message):
        list(source_of(location).evaluation("holdout", limit=None))


def test_two_ranks_and_a_resumed_source_read_the_pairs_of_one_undisturbed_rank(location: str) -> None:
    whole = [rows_of(step) for step in steps_of(source_of(location), 6)]
    assert [rows_of(step) for step in steps_of(source_of(location, num_workers=1), 6)] == whole
    ranks = [steps_of(source_of(location, rank, 2), 6) for rank in range(2)]
    assert [[row for steps in ranks for row in rows_of(steps[step])] for step in range(6)] == whole
    both = [source_of(location, rank, 2) for rank in range(2)]
    states = [list(itertools.islice(source.steps(source.initial_state()), 3))[-1][1] for source in both]
    state = json.loads(json.dumps(both[0].merge_states(states)))
    assert [rows_of(step) for step in steps_of(source_of(location), 3, state)] == whole[3:]


def test_evaluation_sees_every_pair_once_and_pads_with_weight_zero(location: str) -> None:
    whole = rows_of(list(source_of(location).evaluation("train", limit=None)))
    assert [row[0] for row in whole] == ["01", "02", "05", "06"]
    assert rows_of(list(source_of(location).evaluation("train", limit=None))) == whole
    batches = [list(source_of(location, rank, 3).evaluation("train", limit=None)) for rank in range(3)]
    assert [row for mine in batches for row in rows_of(mine)] == whole
    assert len({len(mine) for mine in batches}) == 1


@pytest.mark.parametrize(("kind", "side"), [(schema.T1, "anat"), (schema.BOLD, "rest")])
def test_a_damaged_side_takes_its_pairs_weight_and_never_another_subject(
    location: str, tmp_path: Path, kind: str, side: str
) -> None:
    copy_set(Path(location), tmp_path / "copy")
    index = open_set(location).index
    num_voxels = open_set(location).space.num_voxels
    for row in index[(index.kind == kind) & (index.subject == "05")].itertuples():
        for frame in range(row.num_frames):
            frame_bytes = num_voxels if kind == schema.BOLD else 2 * num_voxels
            flip(tmp_path / "copy" / row.shard, row.offset + schema.NPY_HEADER_BYTES + frame * frame_bytes + 8)
    source = source_of(str(tmp_path / "copy"), max_bad_fraction=0.5)
    expected = [rows_of(step) for step in steps_of(source_of(location), 5)]
    steps = steps_of(source, 5)
    assert [rows_of(step) for step in steps] == [[row for row in step if row[0] != "05"] for step in expected]
    damaged = [(batch, row) for step in steps for batch in step for row in range(2) if batch.weight[row] == 0]
    assert len(damaged) == 5
    for batch, row in damaged:
        assert batch.subjects[row] == "05"
        assert not batch.sides[side].is_measured[row].any()
        assert not batch.sides[side].values[row].any()
    assert list(source.quarantine) == ["05:0"]
    assert "05" not in {row[0] for row in rows_of(list(source.evaluation("train", limit=None)))}
    with pytest.raises(ShardError, match=r"1 damaged samples, more than max_bad_fraction=0\.2 of 4"):
        steps_of(source_of(str(tmp_path / "copy"), max_bad_fraction=0.2), 2)


def test_sets_whose_splits_conflict_are_refused(location: str) -> None:
    bold, t1 = open_set(location), open_set(location)
    assert pairs_of(bold, t1).runs("train").num_samples == 4
    t1.subjects = t1.subjects.assign(split=pd.Series({"01": "test"}).reindex(t1.subjects.index).fillna("train"))
    with pytest.raises(ShardError, match=r"sets rest and anat split 3 of 8 .*01 \(train in rest, test in anat\)"):
        pairs_of(bold, t1)
