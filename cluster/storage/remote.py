"""The store of any address fsspec has a driver for: gs://, az://, https:// ... Subclassed for s3:// in s3.py.

A write is seen whole or not at all: an object store publishes an object when its upload ends; elsewhere a hidden file
is renamed. Creating an object only if its name is free is left to stores that can be asked to refuse a taken name; a
probe finds out which do. In any other a writer leaves its token in an owner file, waits SETTLES_S, and continues only
if the token is still there and the name still free (Fischer's lock, in Lamport 1987: over atomic reads and writes
nothing beats a bound on time). A writer that then hangs for longer may replace what another wrote; it finds the other's
token and fails, so that two never both believe they won.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec.core
from fsspec import AbstractFileSystem

from cluster.errors import StorageError, StoreUnavailableError
from cluster.storage.files import (
    PARTIAL_PREFIX,
    CreateGuarantee,
    Names,
    checked_name,
    ends_early,
    is_hidden,
    is_missing,
    whole_file,
)

READ_ONLY = {"http", "https"}
OBJECT_STORES = {"s3", "gs", "gcs", "az", "abfs", "abfss", "memory"}  # an object appears when its upload ends
CONDITIONS = {"s3": "If-None-Match", "az": "If-None-Match", "abfs": "If-None-Match", "abfss": "If-None-Match"}
CONDITIONS |= {"gs": "ifGenerationMatch", "gcs": "ifGenerationMatch"}  # by which a writer asks to create, not replace
SETTLES_S = 2.0

Versions = dict[str, str]  # ETag by address

_DRIVERS: dict[tuple[int, str], AbstractFileSystem] = {}  # by process and bucket
_IS_CONDITIONAL: dict[str, bool] = {}  # by bucket


def forget_drivers() -> None:
    """The next call reads the environment anew, and probes again what each store honours."""
    _DRIVERS.clear()
    _IS_CONDITIONAL.clear()


class RemoteRangeReader:
    """Ranged reads of one object; where the store tells versions apart, all see the one the first read saw."""

    def __init__(self, store: RemoteStore, name: str) -> None:
        self.store = store
        self.name = name
        self.versions: Versions = {}

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole buffer from `offset`; StorageError when the object ends before, or was replaced."""
        if len(buffer):
            buffer[:] = self.store.read_range(self.name, offset, len(buffer), self.versions)

    def close(self) -> None:
        return None


class RemoteStore:
    """A bucket's prefix, or another server's folder. Holds no connection, so it travels to other processes."""

    errors: ClassVar[tuple[type[Exception], ...]] = (Exception,)  # drivers raise whatever their libraries do

    def __init__(self, location: str) -> None:
        self.scheme, _, path = location.partition("://")
        self.location = f"{self.scheme}://{path.rstrip('/')}"
        if not path.rstrip("/"):
            raise StorageError(f"{location!r} names no bucket; give {self.scheme}://<bucket>/<prefix>")
        self.bucket = "/".join(self.location.split("/")[:3])
        try:
            fsspec.get_filesystem_class(self.scheme)
        except (ImportError, ValueError) as error:
            raise StorageError(f"{location} cannot be opened: {error}; do so on every node, or use s3://") from error

    @property
    def driver(self) -> AbstractFileSystem:
        """The driver of this process, made at its first use: connections shared with a forked child would mix their
        answers. It remembers no listing."""
        key = os.getpid(), self.bucket
        if key not in _DRIVERS:
            _DRIVERS.setdefault(key, self.make_driver())
        _DRIVERS[key].invalidate_cache()
        return _DRIVERS[key]

    def make_driver(self) -> AbstractFileSystem:
        return fsspec.core.url_to_fs(self.location, skip_instance_cache=True)[0]

    def join(self, name: str) -> str:
        return f"{self.location}/{checked_name(name, self.location)}"

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        where = self.join(name)
        if offset and size is None:
            size = max(0, self.size(name) - offset)
        if size is not None:
            return self.read_range(name, offset, size, {})
        with self.explained(where, doing="read"):
            return self.read_whole(where)

    def read_range(self, name: str, offset: int, size: int, versions: Versions) -> bytes:
        """Exactly `size` bytes, of the version noted in `versions`; the first read makes the note."""
        where = self.join(name)
        if size == 0:
            self.size(name)
            return b""
        with self.explained(where, doing="read"):
            data = b"".join(self.parts(where, offset, size, versions))
        if len(data) > size:
            raise ignores_ranges(where)
        if len(data) < size:
            raise ends_early(where, offset + size)
        return data

    def open_ranges(self, name: str) -> RemoteRangeReader:
        return RemoteRangeReader(self, name)

    def get_file(self, name: str, local: Path) -> None:
        """Copy an object to a local file, which appears whole or not at all."""
        where, size = self.join(name), self.size(name)
        with whole_file(local) as partial:
            with self.explained(where, doing="read"):
                self.driver.get_file(where, str(partial))
            if partial.stat().st_size != size:
                raise ends_early(where, size)

    def put(self, name: str, source: bytes | Path) -> None:
        where = self.writable(name)
        if isinstance(source, Path):
            source.stat()  # a FileNotFoundError of the store would be another
        with self.explained(where, doing="write"):
            self.write(where, source)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """True when this call created the object, False when it was there; `create_guarantee` says how surely."""
        where = self.writable(name)
        if self.exists(name):
            return False
        if not self.is_conditional():
            return self._create_as_owner(name, data)
        with self.explained(where, doing="write"):
            return self.create(where, data)

    def create_guarantee(self) -> CreateGuarantee:
        """What put_if_absent promises here; writes and deletes a probe at the first call."""
        if self.scheme in READ_ONLY:
            return CreateGuarantee(False, f"nobody creates a name: {self.scheme}:// is read only")
        condition = CONDITIONS.get(self.scheme, "conditions on a write")
        if self.is_conditional():
            return CreateGuarantee(True, f"exactly one writer creates a name: the store honours {condition} (probed)")
        words = (
            f"one writer creates a name while every request takes less than {SETTLES_S:g} s: the store ignores "
            f"{condition}, so writers leave an owner file and read it back; a slower one fails with an error, but may "
            "have replaced the object: start only one run that writes here"
        )
        return CreateGuarantee(False, words)

    def list(self, prefix: str = "") -> Names:
        """Every name that starts with `prefix`, sorted, in all folders below."""
        with self.explained(self.location, doing="list"):
            driver = self.driver
            start = f"{self.location}/{prefix.rpartition('/')[0]}".rstrip("/")
            found = driver.find(start) if driver.async_impl else _files_below(driver, start)
            root = driver._strip_protocol(self.location).rstrip("/") + "/"
        names = [each.removeprefix(root) for each in found if each.startswith(root) and not each.endswith("/")]
        return sorted(name for name in names if name.startswith(prefix) and not is_hidden(name))

    def exists(self, name: str) -> bool:
        where = self.join(name)
        with self.explained(where, doing="read"):
            try:
                self.info(where)
            except FileNotFoundError:
                return False
        return True

    def size(self, name: str) -> int:
        where = self.join(name)
        with self.explained(where, doing="read"):
            return int(self.info(where)["size"])

    def delete(self, name: str) -> None:
        where = self.writable(name)
        with self.explained(where, doing="delete"), contextlib.suppress(FileNotFoundError):
            self.driver.rm_file(where)

    def writable(self, name: str) -> str:
        if self.scheme in READ_ONLY:
            raise StorageError(f"{self.join(name)} cannot be written: {self.scheme}:// is read only; give another")
        return self.join(name)

    # What a kind of store may do in its own way; called inside `explained`.

    def info(self, where: str) -> dict[str, Any]:
        """What is said of an object, such as its size; FileNotFoundError for a name that only others begin with."""
        found = self.driver.info(where)
        if found["type"] == "directory":
            raise FileNotFoundError(where)
        return dict(found)

    def read_whole(self, where: str) -> bytes:
        return bytes(self.driver.cat_file(where))

    def parts(self, where: str, offset: int, size: int, versions: Versions) -> list[bytes]:
        """The bytes of a range, in order."""
        return [self.driver.cat_file(where, start=offset, end=offset + size)]

    def write(self, where: str, source: bytes | Path) -> None:
        if self.scheme in OBJECT_STORES:
            return self.upload(where, source)
        folder = where.rpartition("/")[0]
        partial = f"{folder}/{PARTIAL_PREFIX}{uuid.uuid4().hex}"
        self.driver.makedirs(folder, exist_ok=True)
        try:
            self.upload(partial, source)
            self.driver.mv(partial, where)
        except BaseException:
            with contextlib.suppress(Exception):  # what matters is why it failed
                self.driver.rm_file(partial)
            raise

    def upload(self, where: str, source: bytes | Path, **options: int) -> None:
        if isinstance(source, Path):
            self.driver.put_file(str(source), where, **options)
        else:
            self.driver.pipe_file(where, source, **options)

    def create(self, where: str, data: bytes) -> bool:
        """True when the store let this call create the object."""
        try:
            self.driver.pipe_file(where, data, mode="create")
        except FileExistsError:
            return False
        return True

    def in_words(self, error: Exception, where: str, *, doing: str) -> StorageError:
        """What the driver raised, as an error whose class says whether the object itself is at fault."""
        if isinstance(error, FileNotFoundError):
            return is_missing(where)
        said = f"{type(error).__name__}: {error}"[:200]
        return StoreUnavailableError(
            f"{where}: its driver could not {doing} it ({said}); check the address, rights and network, then run again"
        )

    @contextlib.contextmanager
    def explained(self, where: str, *, doing: str) -> Iterator[None]:
        """Turns what the driver raises inside into a StorageError about `where`; `doing`: read, write ..."""
        try:
            yield
        except StorageError:
            raise
        except self.errors as error:
            raise self.in_words(error, where, doing=doing) from error

    # Creating a name that is free.

    def is_conditional(self) -> bool:
        """True when the store refuses to create an object that exists."""
        if self.scheme not in CONDITIONS:
            return False
        if self.bucket not in _IS_CONDITIONAL:
            probe = f"{PARTIAL_PREFIX}probe-{uuid.uuid4().hex}"
            self.put(probe, b"1")
            try:
                with self.explained(self.join(probe), doing="write"):
                    _IS_CONDITIONAL[self.bucket] = not self.create(self.join(probe), b"2")
            finally:
                self.delete(probe)
        return _IS_CONDITIONAL[self.bucket]

    def _create_as_owner(self, name: str, data: bytes) -> bool:
        """True when this call created the object in a store that decides nothing."""
        token = uuid.uuid4().hex.encode()
        while not self.exists(name):
            self.put(_owner_name(name), token)
            time.sleep(SETTLES_S)
            settled_at = time.monotonic()
            if not self._owns(name, token):
                time.sleep(SETTLES_S * random.uniform(1.0, 2.0))  # the other first; it may have died
            elif not self.exists(name) and time.monotonic() - settled_at < SETTLES_S / 2:
                self.put(name, data)
                is_late = time.monotonic() - settled_at > SETTLES_S
                if not self._owns(name, token) and is_late:
                    raise StorageError(
                        f"{self.join(name)}: another writer claimed this name while its store did not answer for "
                        f"{SETTLES_S:g} s, and either may have written it; stop all but one run that writes there, "
                        "delete the object and run again"
                    )
                self.delete(_owner_name(name))
                return True
        if self._owns(name, token):
            self.delete(_owner_name(name))
        return False

    def _owns(self, name: str, token: bytes) -> bool:
        try:
            return self.read(_owner_name(name)) == token
        except StoreUnavailableError:
            raise
        except StorageError:  # there is none
            return False


def ignores_ranges(where: str) -> StorageError:
    return StorageError(
        f"{where}: its server ignores ranged reads; read whole objects (reader=stream), or use another store"
    )


def _files_below(driver: AbstractFileSystem, start: str) -> list[str]:
    """Every file in all folders below. fsspec's own walk through folders leaves out silently what it may not read."""
    files: list[str] = []
    folders = [start]
    while folders:
        with contextlib.suppress(FileNotFoundError):  # it was never there, or is gone by now
            for found in driver.ls(folders.pop(), detail=True):
                (folders if found["type"] == "directory" else files).append(found["name"])
    return files


def _owner_name(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{PARTIAL_PREFIX}owner-{base}"
