"""Every kind of scan comes out of a source with its own values: region series, padded runs, responses with images."""

from __future__ import annotations

import io
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_sharding import schema
from data_sharding.errors import ShardError, SplitError
from data_sharding.hashing import hash_names
from data_sharding.phantoms import algonauts2023
from data_sharding.read.censored import CensoredRuns
from data_sharding.read.order import RunTable, SampleOrder, tiled
from data_sharding.read.reader import BatchSource, Windows, open_set
from data_sharding.read.shard_set import ShardSet
from data_sharding.read.windows import Responses
from data_sharding.write.build import build
from tests.data_sharding.read.test_reader import DATA, rows_of, steps_of
from tests.data_sharding.test_shards import copy_set, flip
from tests.data_sharding.test_splits import READING
from tests.helpers_scans import sharding_config, write_study
from tests.helpers_sources import array, member, set_of, write_phantom


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Region series beside the voxels of runs of 20, 18 and 9 frames."""
    root = write_study(tmp_path_factory.mktemp("study"), num_frames=(20, 18, 9))
    config = sharding_config(root, tmp_path_factory.mktemp("written") / "set")
    source = replace(config.source, kinds=["bold", "parcels"])
    build(replace(config, source=source, atlas="template"))
    return config.out


@pytest.fixture(scope="module")
def responses(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    root = write_phantom("algonauts2023", tmp_path_factory.mktemp("algonauts"), num_subjects=1)
    splits = ["splits.validation_fraction=0.3", "splits.test_fraction=0.3"]
    overrides = ["dataset=algonauts2023", f"source.root={root}", "source.options.subject=subj01", *splits]
    return set_of(tmp_path_factory.mktemp("sets") / "subj01", *overrides)


def series_source(location: str, **changes: object) -> BatchSource:
    windows = Windows(open_set(location), kind="parcels", window_frames=6)
    return BatchSource(windows, replace(DATA, **changes), rank=0, world_size=1)  # type: ignore[arg-type]


def test_windows_of_region_series_are_the_frames_of_their_scan(series: str) -> None:
    shard_set = open_set(series)
    (atlas,) = shard_set.atlases.values()
    taken = steps_of(series_source(series), 4)
    for batch in itertools.chain(*taken):
        assert batch.values.shape[2] == len(atlas.region_ids)
        for row, scan_id in enumerate(batch.scan_ids):
            first = batch.first_frame[row]
            stored = array(shard_set, scan_id, schema.PARCELS)[first : first + 6].astype(np.float32)
            is_measured = np.isfinite(stored).all(axis=0)
            np.testing.assert_array_equal(batch.values[row].numpy(), np.where(is_measured, stored, 0))
            np.testing.assert_array_equal(batch.is_measured[row].numpy(), is_measured)
    expected = [rows_of(batches) for batches in taken]
    assert [rows_of(batches) for batches in steps_of(series_source(series, reader="stream"), 4)] == expected


@pytest.mark.parametrize("kind", ["bold", "parcels"])
def test_a_run_shorter_than_the_window_is_padded_and_marked_where_that_is_asked_for(series: str, kind: str) -> None:
    shard_set = open_set(series)
    skipping, padding = (
        Windows(shard_set, kind=kind, window_frames=12, pads_short_runs=pads)  # type: ignore[arg-type]
        for pads in (False, True)
    )
    num_short = int((skipping.runs("train").num_frames == 9).sum())
    assert num_short > 0
    assert skipping.runs("train").num_padded == 0
    assert padding.runs("train").num_padded == num_short
    assert padding.runs("train").num_samples == skipping.runs("train").num_samples + num_short
    source = BatchSource(padding, DATA, rank=0, world_size=1)
    whole = Windows(shard_set, kind=kind, window_frames=9)  # type: ignore[arg-type]
    nine = BatchSource(whole, DATA, rank=0, world_size=1).evaluation("train", limit=None)
    short = {(row[0], row[1]): row[3] for row in rows_of(list(nine))}
    num_found = 0
    for batch in [*source.evaluation("train", limit=None), *itertools.chain(*steps_of(source, 3))]:
        for row, scan_id in enumerate(batch.scan_ids):
            is_short = int(batch.is_frame[row].sum()) < 12
            assert batch.is_frame[row].tolist() == [True] * 9 + [False] * 3 if is_short else [True] * 12
            if is_short and batch.weight[row] > 0:
                assert batch.values[row, :9].numpy().tobytes() == short[scan_id, 0]
                assert not batch.values[row, 9:].any()
                num_found += 1
    assert num_found > num_short


def test_a_short_censored_run_is_padded_only_when_enough_of_its_frames_are_left() -> None:
    lengths = np.array([9, 9, 30])
    censored = CensoredRuns(np.array([0, 1, 2]), lengths, ["0-4", "3", "25"], 12, 0.2, pads_short_runs=True)
    runs = RunTable(hash_names(["a", "b", "c"]), np.zeros(3, dtype=int), lengths, 12, censored, pads_short_runs=True)
    assert runs.num_slots.tolist() == [0, 1, 2]
    assert runs.num_padded == 1
    drawn = SampleOrder(runs, fingerprint="set", seed=0, shuffle_shards=1).stretch(0, 9)
    assert set(drawn.first_frame[drawn.run == 1].tolist()) == {0}
    assert tiled(runs, fingerprint="set", limit=None).first_frame.tolist() == [0, 0, 12]


def response_source(shard_set: ShardSet, rank: int = 0, world_size: int = 1, **changes: object) -> BatchSource:
    data = replace(DATA, batch_size=4, **changes)  # type: ignore[arg-type]
    return BatchSource(Responses(shard_set), data, rank=rank, world_size=world_size)


def response_rows(batches: list) -> list[tuple[str, int, bytes, bytes]]:
    return [
        (batch.stimuli[row], int(batch.sample_seed[row]), batch.image[row].numpy().tobytes(), betas.numpy().tobytes())
        for batch in batches
        for row, betas in enumerate(batch.betas)
        if batch.weight[row] > 0
    ]


def test_images_come_with_the_responses_to_them_and_only_those_of_the_split(responses: ShardSet) -> None:
    assert responses.stimuli is not None
    table = responses.runs("response", ["train", "validation", "test"]).set_index("scan_id")
    for split in ("train", "test"):
        batches = list(response_source(responses).evaluation(split, limit=None))
        found = []
        for batch in batches:
            for row in np.flatnonzero(batch.weight.numpy()):
                image = Image.open(io.BytesIO(member(responses, batch.scan_ids[row], schema.IMAGE)))
                np.testing.assert_array_equal(batch.image[row].numpy(), np.asarray(image))
                (betas,) = array(responses, batch.scan_ids[row], schema.BETAS).astype(np.float32)
                np.testing.assert_array_equal(batch.betas[row].numpy(), np.nan_to_num(betas))
                assert table.split[batch.scan_ids[row]] == split
                found.append(batch.stimuli[row])
        assert sorted(found) == sorted(responses.stimuli.index[responses.stimuli.split == split])


def test_folds_of_a_set_of_responses_divide_images(responses: ShardSet) -> None:
    split = replace(READING, rule="fold", num_folds=4)
    folds = [open_set(responses.location, split=replace(split, fold=fold)) for fold in range(4)]
    tested = [batch for fold in folds for batch in response_source(fold).evaluation("test", limit=None)]
    stimuli = [name for batch in tested for name, weight in zip(batch.stimuli, batch.weight, strict=True) if weight > 0]
    assert responses.stimuli is not None
    assert sorted(stimuli) == sorted(responses.stimuli.index)
    with pytest.raises(SplitError, match="site divides subjects, this set is split by stimulus"):
        open_set(responses.location, split=replace(split, rule="site", left_out_site="")).fingerprint  # noqa: B018


def test_responses_keep_the_rules_of_order_and_resuming(responses: ShardSet) -> None:
    whole = [response_rows(batches) for batches in steps_of(response_source(responses), 6)]
    assert len({row[0] for step in whole for row in step}) > 3
    for changes in ({"reader": "stream"}, {"num_workers": 1}):
        again = steps_of(response_source(responses, **changes), 6)
        assert [response_rows(batches) for batches in again] == whole
    ranks = [steps_of(response_source(responses, rank, 2), 6) for rank in range(2)]
    assert [[row for steps in ranks for row in response_rows(steps[step])] for step in range(6)] == whole
    source = response_source(responses)
    *_, (_, state) = itertools.islice(source.steps(source.initial_state()), 2)
    resumed = steps_of(response_source(responses), 4, json.loads(json.dumps(state)))
    assert [response_rows(batches) for batches in resumed] == whole[2:]


def test_a_damaged_image_is_replaced_in_training_and_has_no_weight_in_evaluation(
    responses: ShardSet, tmp_path: Path
) -> None:
    copy_set(Path(responses.location), tmp_path / "copy")
    index = responses.index
    row = index[(index.kind == schema.IMAGE) & (index.split == "train")].iloc[0]
    flip(tmp_path / "copy" / row.shard, int(row.offset) + 60)
    damaged = open_set(str(tmp_path / "copy"))
    source = response_source(damaged, max_bad_fraction=1.0)
    evaluated = response_rows(list(source.evaluation("train", limit=None)))
    whole = response_rows(list(response_source(responses).evaluation("train", limit=None)))
    assert evaluated == [each for each in whole if each[0] != row.stimulus]
    assert list(source.quarantine) == [f"{row.scan_id}:0"]
    before = [response_rows(batches) for batches in steps_of(response_source(responses), 6)]
    after = [response_rows(batches) for batches in steps_of(source, 6)]
    for one, other in zip(itertools.chain(*before), itertools.chain(*after), strict=True):
        assert (one == other) == (one[0] != row.stimulus)
        assert other[1] == one[1]
    with pytest.raises(ShardError, match=r"1 damaged samples, .*image\.png does not match its checksum"):
        list(response_source(damaged).evaluation("train", limit=None))


def test_images_of_different_sizes_are_refused(tmp_path: Path) -> None:
    root = write_phantom("algonauts2023", tmp_path / "study", num_subjects=1)
    images = root / "subj01" / "training_split" / "training_images"
    Image.new("RGB", (9, 8)).save(sorted(images.iterdir())[3])
    overrides = ["dataset=algonauts2023", f"source.root={root}", "source.options.subject=subj01", "splits.rule=none"]
    mixed = set_of(tmp_path / "set", *overrides)
    source = response_source(mixed, micro_batch_size=algonauts2023.NUM_IMAGES)
    with pytest.raises(ShardError, match=r"holds images of 2 sizes, such as \[\(8, 9, 3\), \(16, 16, 3\)\]"):
        list(source.evaluation("train", limit=None))
