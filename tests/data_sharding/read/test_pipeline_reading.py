"""A window costs one request; a node's cache holds whole, checked shards and never more bytes than it may."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.storage.files import partial_file
from cluster.storage.stores import LocalRangeReader, LocalStore, store_for
from data_sharding import schema
from data_sharding.errors import ShardError
from data_sharding.read import file_cache
from data_sharding.read.file_cache import CachedFile, FileCache
from data_sharding.read.reader import open_set
from data_sharding.write.build import build
from tests.data_sharding.read.test_reader import DATA, rows_of, source_of, steps_of, windows_of
from tests.data_sharding.test_shards import copy_set, flip
from tests.helpers_scans import sharding_config, write_study


@pytest.fixture(scope="module")
def location(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = write_study(tmp_path_factory.mktemp("study"))
    out = tmp_path_factory.mktemp("written") / "set"
    build(sharding_config(root, out))
    return str(out)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Every ranged read of a shard, as (offset, bytes)."""
    seen: list[tuple[int, int]] = []
    original = LocalRangeReader.read_into

    def counted(self: LocalRangeReader, offset: int, buffer: memoryview) -> None:
        seen.append((offset, len(buffer)))
        original(self, offset, buffer)

    monkeypatch.setattr(LocalRangeReader, "read_into", counted)
    return seen


def test_a_window_is_one_request_and_two_across_a_chunk_boundary(
    location: str, requests: list[tuple[int, int]]
) -> None:
    windows = windows_of(location, window_frames=6)
    book, fetcher = windows.book("train"), windows.fetcher(DATA)
    for run, num_frames in enumerate(book.runs.num_frames):
        bounds = schema.chunk_bounds(int(num_frames), 8)
        for first in range(int(num_frames) - 5):
            requests.clear()
            assert not fetcher.fetch([book.window(run, first)]).damaged
            touched = [start for start, stop in bounds if start < first + 6 and stop > first]
            assert len(requests) == len(touched)
            assert sum(size for _, size in requests) == 6 * open_set(location).space.num_voxels


def test_the_cache_changes_no_sample_and_reads_each_shard_once(
    location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = [rows_of(batches) for batches in steps_of(source_of(location), 12)]
    fetched = []
    original = LocalStore.get_file
    monkeypatch.setattr(
        LocalStore, "get_file", lambda self, name, local: (fetched.append(name), original(self, name, local))[1]
    )
    cached = {"cache_folder": str(tmp_path / "cache"), "cache_bytes": 1 << 30}
    assert [rows_of(batches) for batches in steps_of(source_of(location, **cached), 12)] == reference
    shards = {shard.sha256 for shard in open_set(location).manifest.shards}
    kept = {path.stem: path for path in (tmp_path / "cache").glob("*.whole")}
    assert set(kept) <= shards
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() == name for name, path in kept.items())
    assert sorted(fetched) == sorted(set(fetched))
    assert [rows_of(batches) for batches in steps_of(source_of(location, **cached, num_workers=2), 12)] == reference


def test_a_cache_smaller_than_a_shuffle_block_is_not_used_and_that_is_said(location: str, tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"cache is not used: a shuffle block of 2 shards has \d+ bytes, cache_bytes is 1"
    ):
        source = source_of(location, cache_folder=str(tmp_path / "cache"), cache_bytes=1000)
    assert source._fetcher.settings.cache is None


def shards_of(location: str) -> list[CachedFile]:
    return list(open_set(location).cached_shards.values())


def test_the_least_recently_used_shards_make_room(location: str, tmp_path: Path) -> None:
    first, second, third = shards_of(location)[:3]
    room = max(first.num_bytes, second.num_bytes, third.num_bytes) * 2
    cache, store = FileCache(str(tmp_path), room), store_for(location)
    opened = cache.open(store, first, LocalRangeReader)
    cache.open(store, second, LocalRangeReader).close()
    cache.open(store, first, LocalRangeReader).close()
    cache.open(store, third, LocalRangeReader).close()
    assert {path.stem for path in tmp_path.glob("*.whole")} == {first.sha256, third.sha256}
    cache.open(store, second, LocalRangeReader).close()
    assert sum(path.stat().st_size for path in tmp_path.glob("*.whole")) <= room
    buffer = bytearray(600)
    opened.read_into(0, memoryview(buffer))  # evicted, but still open
    opened.close()
    assert buffer == store.read(first.name, 0, 600)


def test_a_shard_with_wrong_bytes_never_enters_the_cache(location: str, tmp_path: Path) -> None:
    damaged = copy_set(Path(location), tmp_path / "copy")
    shard = shards_of(location)[0]
    flip(damaged / shard.name, 700)
    cache = FileCache(str(tmp_path / "cache"), 1 << 30)
    with pytest.raises(ShardError, match=r"000000\.tar has SHA-256 .*, the manifest says .*; run 'python -m"):
        cache.open(store_for(damaged), shard, LocalRangeReader)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]
    cache.open(store_for(location), shard, LocalRangeReader).close()
    assert (tmp_path / "cache" / f"{shard.sha256}.whole").stat().st_size == shard.num_bytes


def _open(location: str, folder: str, counts: object) -> None:
    cache = FileCache(folder, 1 << 30)
    store = store_for(location)
    original = store.get_file

    def counted(name: str, local: Path) -> None:
        with counts.get_lock():  # type: ignore[attr-defined]
            counts.value += 1  # type: ignore[attr-defined]
        original(name, local)

    store.get_file = counted  # type: ignore[method-assign]
    for shard in shards_of(location):
        cache.open(store, shard, LocalRangeReader).close()


def test_processes_of_a_node_download_a_shard_once(location: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    counts = context.Value("i", 0)
    workers = [context.Process(target=_open, args=(location, str(tmp_path), counts)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert counts.value == len(shards_of(location))


def _die_while_fetching(location: str, folder: str) -> None:
    store = store_for(location)

    def half(name: str, local: Path) -> None:
        with partial_file(local.parent) as partial:  # as every store's get_file begins
            partial.write_bytes(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)

    store.get_file = half  # type: ignore[method-assign]
    FileCache(folder, 1 << 30).open(store, shards_of(location)[0], LocalRangeReader)


def test_a_process_killed_while_it_fetches_blocks_nobody_and_leaves_nothing(location: str, tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_die_while_fetching, args=(location, str(tmp_path)))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert any(path.is_file() for path in tmp_path.glob("*.partial/.partial-*"))
    shard = shards_of(location)[0]
    FileCache(str(tmp_path), 1 << 30).open(store_for(location), shard, LocalRangeReader).close()
    left = [path for path in tmp_path.rglob("*") if path.suffix != ".lock"]
    assert left == [tmp_path / f"{shard.sha256}.whole"]
    assert hashlib.sha256(left[0].read_bytes()).hexdigest() == shard.sha256


def test_what_killed_processes_left_of_other_files_makes_room_too(location: str, tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_die_while_fetching, args=(location, str(tmp_path)))
    process.start()
    process.join()
    second, third = shards_of(location)[1:3]
    cache = FileCache(str(tmp_path), second.num_bytes + third.num_bytes)
    for shard in (second, third):
        cache.open(store_for(location), shard, LocalRangeReader).close()
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".lock"} == {
        f"{second.sha256}.whole",
        f"{third.sha256}.whole",
    }


def test_files_used_within_one_tick_of_the_kernels_clock_are_told_apart(
    location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = shards_of(location)[:2]
    cache, store = FileCache(str(tmp_path), 1 << 30), store_for(location)
    nanoseconds = itertools.count(10**18)
    monkeypatch.setattr(file_cache.time, "time_ns", lambda: next(nanoseconds))
    used_ns = []
    for shard in shards * 3:
        cache.open(store, shard, LocalRangeReader).close()
        used_ns.append((tmp_path / f"{shard.sha256}.whole").stat().st_mtime_ns)
    assert used_ns == sorted(set(used_ns))
    assert used_ns[-1] < 10**18 + 1000, "by that clock, not by the kernel's"
