"""One suite for every kind of store: a folder, the same through fsspec, an S3 server that ignores
If-None-Match, and one that honours it.
What faults do to them is in test_s3_faults.py."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_servers import BUCKET, Server, running_servers, use  # noqa: F401  (a fixture)

from cluster.errors import StorageError
from cluster.storage import remote, s3, s3_errors
from cluster.storage import stores as storage
from cluster.storage.s3 import S3Store
from cluster.storage.stores import LocalStore, Store, store_for

KINDS = ("folder", "local", "rclone", "moto")


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Store:
    """An empty location on each kind of store in turn."""
    if request.param == "folder":
        return store_for(tmp_path / "set")
    if request.param == "local":
        return store_for(f"local://{tmp_path}/set")
    return s3_store(request.param, request.getfixturevalue("servers"), monkeypatch, tmp_path)


def s3_store(kind: str, running: dict[str, Server], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Store:
    use(monkeypatch, running[kind].endpoint)
    monkeypatch.setattr(s3_errors, "RETRY_FOR_S", 20.0)
    return store_for(f"s3://{BUCKET}/{tmp_path.name}")


def data_of(num_bytes: int) -> bytes:
    return random.Random(num_bytes).randbytes(num_bytes)


def test_every_range_equals_the_slice(store: Store) -> None:
    data = data_of(1_700_000)  # two blocks of a body
    store.put("shards/000000.tar", data)
    assert store.read("shards/000000.tar") == data
    assert store.read("shards/000000.tar", 1_699_990) == data[1_699_990:]
    assert store.size("shards/000000.tar") == len(data)
    ranges = store.open_ranges("shards/000000.tar")
    generator = random.Random(0)
    for _ in range(8):
        first, last = sorted(generator.sample(range(len(data)), 2))
        assert store.read("shards/000000.tar", first, last - first) == data[first:last]
        buffer = bytearray(last - first)
        ranges.read_into(first, memoryview(buffer))
        assert buffer == data[first:last]
    ranges.close()


def test_an_empty_object_is_an_object(store: Store, tmp_path: Path) -> None:
    store.put("empty", b"")
    store.get_file("empty", tmp_path / "fetched")
    assert store.exists("empty")
    assert (store.read("empty"), store.read("empty", 0, 0), store.size("empty")) == (b"", b"", 0)
    assert (tmp_path / "fetched").read_bytes() == b""


def test_a_large_file_goes_there_and_back(store: Store, tmp_path: Path) -> None:
    data = data_of(2 * s3.PART_BYTES + 12_345)  # three parts, the last one short
    (tmp_path / "local").write_bytes(data)
    store.put("checkpoint", b"old")
    store.put("checkpoint", tmp_path / "local")
    store.get_file("checkpoint", tmp_path / "elsewhere" / "copy")
    assert (tmp_path / "elsewhere" / "copy").read_bytes() == data
    assert os.listdir(tmp_path / "elsewhere") == ["copy"]
    store.put("from memory", data)
    assert store.read("from memory") == data


def test_list_is_sorted_recursive_relative_and_hides_what_writers_leave(store: Store) -> None:
    for name in ("b/2", "b/1", "a", "bc", "with space+%/é", "b/.partial-xyz"):
        store.put(name, b"1")
    assert store.list() == ["a", "b/1", "b/2", "bc", "with space+%/é"]
    assert store.list("b/") == ["b/1", "b/2"]
    assert store.list("b") == ["b/1", "b/2", "bc"]
    assert store.list("missing/") == []
    assert store.read("with space+%/é") == b"1"


@pytest.mark.parametrize("store", ["local", "rclone", "moto"], indirect=True)
def test_what_only_other_names_begin_with_is_no_object(store: Store, tmp_path: Path) -> None:
    store.put("b/1", b"1")
    assert not store.exists("b")
    for attempt in (store.size, lambda name: store.get_file(name, tmp_path / "copy")):
        with pytest.raises(StorageError, match="/b does not exist; check the location"):
            attempt("b")


def test_delete_removes_and_is_silent_about_what_is_not_there(store: Store) -> None:
    store.put("a", b"1")
    store.delete("a")
    store.delete("a")
    assert not store.exists("a")


def test_messages_say_what_is_missing_or_cut_short(store: Store, tmp_path: Path) -> None:
    for attempt in (store.read, store.size, lambda name: store.get_file(name, tmp_path / "local")):
        with pytest.raises(StorageError, match=r"shards/1\.tar does not exist; check the location"):
            attempt("shards/1.tar")
    assert not (tmp_path / "local").exists()
    store.put("short", b"123")
    with pytest.raises(StorageError, match=r"short ends before byte 9"):
        store.read("short", 2, 7)
    with pytest.raises(StorageError, match=r"short ends before"):
        store.open_ranges("short").read_into(7, memoryview(bytearray(7)))


def test_a_name_outside_the_location_is_refused(store: Store) -> None:
    for name in ("/etc/passwd", "../outside", "a/../../b", "", "a\0b"):
        for attempt in (store.read, store.exists, store.delete, lambda name: store.put_if_absent(name, b"")):
            with pytest.raises(StorageError, match="relative path"):
                attempt(name)


def test_of_eight_threads_exactly_one_creates_a_name(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "SETTLES_S", 0.8)
    outcomes: dict[int, bool] = {}
    start = threading.Barrier(8)

    def write(number: int) -> None:
        start.wait()
        outcomes[number] = store.put_if_absent("runs/COMMIT.json", bytes([number]) * 1000)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    winners = [number for number, is_winner in outcomes.items() if is_winner]
    assert (len(outcomes), len(winners)) == (8, 1)
    assert store.read("runs/COMMIT.json") == bytes(winners) * 1000
    assert store.list() == ["runs/COMMIT.json"]
    assert not store.put_if_absent("runs/COMMIT.json", b"late")
    assert hidden(store) == []


def hidden(store: Store) -> list[str]:
    """What list does not show."""
    if not isinstance(store, S3Store):
        return [path.name for path in Path(store.location.removeprefix("local://")).rglob(".partial-*")]
    root = store.location.removeprefix("s3://") + "/"
    names = [path.removeprefix(root) for path in store.driver.find(store.location) if "/.partial-" in path]
    # rclone goes on listing an object that was written twice at once and then deleted; asked for it, it has none.
    return [name for name in names if store.exists(name)]


WRITER_PROCESS = """
import sys, time
from cluster.storage import remote
from cluster.storage.stores import store_for
remote.SETTLES_S = 0.8
store = store_for(sys.argv[1])
store.exists("warm up")
print("ready", flush=True)
sys.stdin.readline()
print(store.put_if_absent("COMMIT.json", sys.argv[2].encode()))
"""


def test_of_two_processes_exactly_one_creates_a_name(store: Store) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER_PROCESS, store.location, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("first", "second")
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    outcomes = [process.communicate("go\n")[0].strip() for process in processes]
    assert sorted(outcomes) == ["False", "True"]
    assert store.read("COMMIT.json") == (b"first" if outcomes[0] == "True" else b"second")


def test_a_reader_sees_whole_versions_only_while_a_writer_replaces(store: Store) -> None:
    num_bytes = 600_000
    store.put("a", bytes(num_bytes))
    is_done = threading.Event()
    seen: set[tuple[int, bytes]] = set()
    refusals: list[str] = []

    def look() -> None:
        while not is_done.is_set():
            try:
                content = store.read("a")
                seen.add((len(content), bytes(set(content))))
            except StorageError as error:
                refusals.append(str(error))

    reader = threading.Thread(target=look)
    reader.start()
    for version in range(1, 13):
        store.put("a", bytes([version]) * (num_bytes + version))
    is_done.set()
    reader.join()
    assert seen <= {(num_bytes + version, bytes([version])) for version in range(13)}
    assert len(seen) > 1
    assert all("was replaced while it was read" in refusal for refusal in refusals)


def test_ranges_of_a_replaced_object_are_never_mixed(store: Store) -> None:
    store.put("a", b"old" * 10)
    ranges = store.open_ranges("a")
    buffer = bytearray(3)
    ranges.read_into(0, memoryview(buffer))
    store.put("a", b"new" * 10)
    if isinstance(store, S3Store):
        with pytest.raises(StorageError, match="a was replaced while it was read; read it again"):
            ranges.read_into(3, memoryview(buffer))
        assert buffer == b"old"
    else:  # an open file is still the old one; other drivers notice nothing, and read the new one
        ranges.read_into(3, memoryview(buffer))
        assert buffer == (b"old" if isinstance(store, LocalStore) else b"new")


def test_a_put_of_a_missing_file_leaves_the_old_object(store: Store, tmp_path: Path) -> None:
    store.put("a", b"old")
    with pytest.raises(FileNotFoundError):
        store.put("a", tmp_path / "no such file")
    assert store.read("a") == b"old"
    assert hidden(store) == []


def test_a_store_says_how_sure_put_if_absent_is(store: Store, request: pytest.FixtureRequest) -> None:
    kind = request.node.callspec.params["store"]
    guarantee = store.create_guarantee()
    assert guarantee.is_exact == (kind in ("folder", "moto"))
    said = {"folder": "hard link", "local": "ignores conditions", "rclone": "ignores If-None-Match"}
    assert said.get(kind, "honours If-None-Match") in guarantee.words
    assert hidden(store) == []


def test_a_store_travels_to_a_forked_process(store: Store) -> None:
    """A forked child that used its parent's sockets would read its parent's answers."""
    store.put("a", b"0123456789")
    child = os.fork()
    if child == 0:
        os._exit(0 if all(pickle.loads(pickle.dumps(store)).read("a") == b"0123456789" for _ in range(5)) else 1)
    assert all(store.read("a") == b"0123456789" for _ in range(5))
    deadline = time.monotonic() + 20
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert done == (child, 0)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "No space left on device; free some"),
        (errno.EROFS, "Read-only file system; have writing allowed"),
    ],
)
def test_a_file_system_that_refuses_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    store = store_for(tmp_path / "set")
    store.put("a", b"old")

    def refuse(path: Path, source: bytes | Path) -> None:
        path.write_bytes(b"half")
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(storage, "_fill", refuse)
    for attempt in (store.put, store.put_if_absent):
        with pytest.raises(StorageError, match=rf"set/[ab] cannot be written: {words}"):
            attempt("a" if attempt == store.put else "b", b"new")
    assert store.read("a") == b"old"
    assert os.listdir(tmp_path / "set") == ["a"]


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Root may read everything: as a user without rights, where the tests run as root."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.mark.parametrize("address", ["", "local://"])
def test_a_folder_that_cannot_be_listed_is_an_error_and_not_empty(address: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = store_for(f"{address}{folder}")
        store.put("runs/1/a", b"a")
        store.put("runs/2/b", b"b")
        closed = Path(folder, "runs", "2")
        os.chmod(folder, 0o755)
        closed.chmod(0o300)
        with as_nobody(), pytest.raises(StorageError, match="Permission denied"):
            store.list("runs/")
        closed.chmod(0o755)
        assert store.list("runs/") == ["runs/1/a", "runs/2/b"]
        assert store.list("other/") == []


def test_a_file_that_may_not_be_read_is_named_with_what_to_do() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = store_for(folder)
        store.put("a", b"a")
        os.chmod(folder, 0o600)
        with as_nobody():
            for attempt in (store.read, store.exists, store.size, store.open_ranges):
                with pytest.raises(
                    StorageError, match=r"/a cannot be read: Permission denied; give this user the right"
                ):
                    attempt("a")


def test_a_location_that_is_a_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("kept")
    for location in (tmp_path / "notes.txt", tmp_path / "notes.txt" / "set"):
        for attempt in (store_for(location).put, store_for(location).put_if_absent):
            with pytest.raises(StorageError, match=r"/a cannot be written: .*; a file lies where a folder is needed"):
                attempt("a", b"new")
    assert (tmp_path / "notes.txt").read_text() == "kept"
