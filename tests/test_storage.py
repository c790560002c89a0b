"""A store never shows half an object, and lets exactly one of several writers create a name."""

import os
import threading
from pathlib import Path

import pytest

from cluster.errors import StorageError
from cluster.storage import store_for


def test_what_was_put_is_read_back_whole_and_in_ranges(tmp_path: Path) -> None:
    store = store_for(tmp_path / "set")
    store.put("shards/000000.tar", b"0123456789")
    assert store.read("shards/000000.tar") == b"0123456789"
    assert store.read("shards/000000.tar", 3, 4) == b"3456"
    assert store.size("shards/000000.tar") == 10
    ranges = store.open_ranges("shards/000000.tar")
    buffer = bytearray(5)
    ranges.read_into(5, memoryview(buffer))
    ranges.close()
    assert buffer == b"56789"


def test_put_replaces_and_a_local_file_can_be_put_and_fetched(tmp_path: Path) -> None:
    store = store_for(str(tmp_path / "set"))
    local = tmp_path / "local"
    local.write_bytes(b"second")
    store.put("a", b"first")
    store.put("a", local)
    store.get_file("a", tmp_path / "elsewhere" / "copy")
    assert (tmp_path / "elsewhere" / "copy").read_bytes() == b"second"


def test_list_is_sorted_recursive_relative_and_hides_files_being_written(tmp_path: Path) -> None:
    store = store_for(tmp_path)
    for name in ("b/2", "b/1", "a", "bc"):
        store.put(name, b"")
    (tmp_path / "b" / ".partial-xyz").write_bytes(b"half")
    assert store.list() == ["a", "b/1", "b/2", "bc"]
    assert store.list("b/") == ["b/1", "b/2"]
    assert store.list("b") == ["b/1", "b/2", "bc"]
    assert store.list("missing/") == []


def test_of_many_writers_exactly_one_creates_a_name(tmp_path: Path) -> None:
    store = store_for(tmp_path)
    outcomes: list[bool] = []
    writers = [
        threading.Thread(target=lambda number=number: outcomes.append(store.put_if_absent("m", bytes([number]) * 1000)))
        for number in range(8)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(outcomes) == [False] * 7 + [True]
    content = store.read("m")
    assert len(content) == 1000
    assert len(set(content)) == 1
    assert os.listdir(tmp_path) == ["m"]


def test_a_put_that_fails_leaves_the_old_object_and_no_litter(tmp_path: Path) -> None:
    store = store_for(tmp_path)
    store.put("a", b"old")
    with pytest.raises(FileNotFoundError):
        store.put("a", tmp_path / "no such file")
    assert store.read("a") == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_delete_removes_and_is_silent_about_what_is_not_there(tmp_path: Path) -> None:
    store = store_for(tmp_path)
    store.put("a", b"1")
    store.delete("a")
    store.delete("a")
    assert not store.exists("a")


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside", "a/../../b", "", "a\0b"])
def test_a_name_outside_the_location_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(StorageError, match="relative path"):
        store_for(tmp_path).read(name)


def test_messages_say_what_is_missing_or_cut_short(tmp_path: Path) -> None:
    store = store_for(tmp_path)
    with pytest.raises(StorageError, match=r"shards/1\.tar does not exist"):
        store.read("shards/1.tar")
    store.put("short", b"123")
    with pytest.raises(StorageError, match="ends before byte 9"):
        store.read("short", 2, 7)
    ranges = store.open_ranges("short")
    with pytest.raises(StorageError, match="ends before byte 7"):
        ranges.read_into(0, memoryview(bytearray(7)))
    ranges.close()


def test_an_unknown_kind_of_location_is_refused() -> None:
    with pytest.raises(StorageError, match=r"gs://bucket: only local folders and s3://"):
        store_for("gs://bucket")
