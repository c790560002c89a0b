"""Addresses of fsspec that are no S3: what they promise, and what is said where they cannot keep it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from web_servers import WebHandler, web_server

from cluster.errors import StorageError, StoreUnavailableError
from cluster.storage import remote
from cluster.storage.stores import LocalStore, store_for


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The address at which `tmp_path` is served."""
    with web_server(tmp_path) as address:
        yield address


def test_a_web_server_is_read_and_never_written(web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local, store = store_for(tmp_path / "set"), store_for(f"{web}/set")
    for name in ("a", "b/c"):
        local.put(name, name.encode() * 1000)
    assert store.list() == local.list() == ["a", "b/c"]
    assert (store.size("b/c"), store.read("b/c"), store.read("a", 10, 3)) == (3000, b"b/c" * 1000, b"aaa")
    store.get_file("b/c", tmp_path / "fetched")
    assert (tmp_path / "fetched").read_bytes() == b"b/c" * 1000
    assert (store.exists("a"), store.exists("missing")) == (True, False)
    with pytest.raises(StorageError, match=r"http.*/set/missing does not exist; check the location"):
        store.read("missing")
    for attempt in (lambda: store.put("a", b""), lambda: store.put_if_absent("new", b""), lambda: store.delete("a")):
        with pytest.raises(StorageError, match=r"/set/\w+ cannot be written: http:// is read only; give another"):
            attempt()
    assert not store.create_guarantee().is_exact
    assert "read only" in store.create_guarantee().words
    assert local.read("a") == b"a" * 1000
    monkeypatch.setattr(WebHandler, "honours_ranges", False)
    with pytest.raises(StorageError, match=r"/set/a: its server ignores ranged reads; read whole objects"):
        store.read("a", 10, 3)


def test_a_server_that_is_not_there_says_nothing_about_the_object() -> None:
    with pytest.raises(StoreUnavailableError, match=r"http://127.0.0.1:9/set/a: its driver could not read it \(Client"):
        store_for("http://127.0.0.1:9/set").read("a")


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("gs://brains/set", "Please install gcsfs"),
        ("az://brains/set", "Install adlfs"),
        ("ftps4://brains/set", "Protocol not known: ftps4"),
    ],
)
def test_a_missing_driver_is_named_before_anything_is_done(location: str, words: str) -> None:
    with pytest.raises(StorageError, match=f"{location} cannot be opened: {words}"):
        store_for(location)


def test_a_store_whose_driver_asks_for_a_free_name_has_one_winner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(remote.CONDITIONS, "memory", "a test")
    remote.forget_drivers()
    store = store_for("memory://conditional/set")
    assert store.create_guarantee() == remote.CreateGuarantee(
        True, "exactly one writer creates a name: the store honours a test (probed)"
    )
    assert [store.put_if_absent("COMMIT.json", data) for data in (b"first", b"second")] == [True, False]
    assert store.read("COMMIT.json") == b"first"
    assert store.list() == ["COMMIT.json"]
    assert fsspec.filesystem("memory").find("/conditional") == ["/conditional/set/COMMIT.json"]


def test_a_file_address_is_the_folder(tmp_path: Path) -> None:
    store = store_for(f"file://{tmp_path}/set")
    assert isinstance(store, LocalStore)
    store.put("a", b"1")
    assert (tmp_path / "set" / "a").read_bytes() == b"1"


def test_a_write_that_fails_leaves_the_old_object_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_for(f"local://{tmp_path}/set")
    store.put("a", b"old")

    def fail(driver: object, old: str, new: str) -> None:
        raise TimeoutError("as ordered")

    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.mv", fail)
    with pytest.raises(StoreUnavailableError, match=r"set/a: its driver could not write it \(TimeoutError"):
        store.put("a", b"new")
    assert store.read("a") == b"old"
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["a"]
