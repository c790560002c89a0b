"""Any training loop gets every window of a set once per epoch, over workers and ranks, in an order the seed decides."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from brain_models.preprocess import dequantise
from data_sharding import schema
from data_sharding.errors import ShardError
from data_sharding.read.open_shards import ShardDataset, open_shards
from data_sharding.read.reader import open_set
from data_sharding.write.build import build
from tests.data_sharding.read.test_reader import damaged_copy
from tests.data_sharding.test_shards import npy
from tests.helpers_scans import sharding_config, write_study


@pytest.fixture(scope="module")
def location(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = write_study(tmp_path_factory.mktemp("study"))
    out = tmp_path_factory.mktemp("written") / "set"
    build(sharding_config(root, out))
    return str(out)


def windows_of(dataset: ShardDataset, *, num_workers: int = 0) -> list[tuple[str, int]]:
    return [
        (scan_id, int(first))
        for batch in DataLoader(dataset, batch_size=3, num_workers=num_workers)
        for scan_id, first in zip(batch["scan_id"], batch["first_frame"], strict=True)
    ]


def test_two_workers_give_every_window_of_an_epoch_once(location: str) -> None:
    dataset = open_shards(location, kind="bold", window_frames=4)
    one = windows_of(dataset)
    assert len(one) == len(dataset) == len(set(one))
    for run in open_set(location).runs("bold", ["train"]).itertuples():
        starts = sorted(first for scan_id, first in one if scan_id == run.scan_id)
        assert len(starts) == run.num_frames // 4
        assert all(later - earlier == 4 for earlier, later in itertools.pairwise(starts))
    assert sorted(windows_of(dataset, num_workers=2)) == sorted(one)
    assert windows_of(open_shards(location, kind="bold", window_frames=4)) == one
    dataset.set_epoch(1)
    assert windows_of(dataset) != one
    assert len(windows_of(dataset)) == len(one)
    assert windows_of(open_shards(location, kind="bold", window_frames=4, seed=1)) != one


def test_workers_that_outlive_an_epoch_learn_of_the_next(location: str) -> None:
    dataset = open_shards(location, kind="t1")
    loader = DataLoader(dataset, batch_size=None, num_workers=1, persistent_workers=True)
    orders = []
    for epoch in range(4):
        dataset.set_epoch(epoch)
        orders.append([sample["scan_id"] for sample in loader])
    assert len({tuple(order) for order in orders}) > 1
    assert len({tuple(sorted(order)) for order in orders}) == 1


def test_a_sample_is_the_decoded_window_with_what_is_known_of_it(location: str) -> None:
    sample = next(iter(open_shards(location, kind="bold", window_frames=4, split="test")))
    frames = np.concatenate(npy(open_set(location), sample["scan_id"], schema.BOLD))
    expected = frames[sample["first_frame"] : sample["first_frame"] + 4]
    assert sample["values"].dtype == torch.float32
    np.testing.assert_array_equal(sample["values"].numpy(), dequantise(expected))
    np.testing.assert_array_equal(sample["is_measured"].numpy(), expected[0] != -128)
    assert sample["is_frame"].tolist() == [True] * 4
    assert sample["repetition_time_s"] == 2.0
    assert sample["subject"] == sample["scan_id"][4:6]
    assert open_set(location).subjects.split[sample["subject"]] == "test"


def test_ranks_share_the_windows_of_an_epoch_equally(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = windows_of(open_shards(location, kind="bold", window_frames=4))
    shares = []
    for rank in range(3):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
        shares.append(windows_of(open_shards(location, kind="bold", window_frames=4)))
    size = len(whole) // 3
    assert [list(share) for share in shares] == [whole[rank * size : (rank + 1) * size] for rank in range(3)]


def test_a_damaged_window_stops_the_loop_with_its_place(location: str, tmp_path: Path) -> None:
    damaged, member = damaged_copy(location, tmp_path / "copy")
    with pytest.raises(ShardError, match=rf"{member}: frame \d+ .* does not match its checksum"):
        windows_of(open_shards(damaged, kind="bold", window_frames=4))


def test_a_split_without_such_samples_is_refused_at_once(location: str) -> None:
    with pytest.raises(ShardError, match="split 'train' holds no bold window of 99 frames"):
        open_shards(location, kind="bold", window_frames=99)
