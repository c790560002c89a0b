"""Bytes at a location (a folder, s3://bucket/prefix, or another address of fsspec) behind one small interface.

Names are relative to the location, with `/`. A `put` is seen whole or not at all. Knows nothing about what is stored.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from cluster.storage.files import (
    CreateGuarantee,
    Names,
    checked_name,
    ends_early,
    is_hidden,
    is_missing,
    is_unreadable,
    partial_file,
    refusal_is_an_error,
    sync,
    whole_file,
)


class RangeReader(Protocol):
    """One open object: many small reads without opening it again."""

    def read_into(self, offset: int, buffer: memoryview) -> None: ...

    def close(self) -> None: ...


class Store(Protocol):
    """What every store can do. A missing name raises StorageError, except in `exists` and `delete`."""

    location: str

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes: ...

    def open_ranges(self, name: str) -> RangeReader: ...

    def get_file(self, name: str, local: Path) -> None: ...

    def put(self, name: str, source: bytes | Path) -> None: ...

    def put_if_absent(self, name: str, data: bytes) -> bool: ...

    def create_guarantee(self) -> CreateGuarantee: ...

    def list(self, prefix: str = "") -> Names: ...

    def exists(self, name: str) -> bool: ...

    def size(self, name: str) -> int: ...

    def delete(self, name: str) -> None: ...

    def join(self, name: str) -> str: ...


def store_for(location: str | Path) -> Store:
    """The store of a location: a local folder (made at the first write), or an address fsspec has a driver for."""
    text = str(location)
    if "://" not in text:
        return LocalStore(text)
    if text.startswith("file://"):
        return LocalStore(text.removeprefix("file://"))
    if text.startswith("s3://"):
        from cluster.storage.s3 import S3Store  # s3fs takes half a second to import, and most commands never touch it

        return S3Store(text)
    from cluster.storage.remote import RemoteStore

    return RemoteStore(text)


class LocalRangeReader:
    """An open local file read by position, so threads may share it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole buffer from `offset`; StorageError when the file ends before."""
        num_done = 0
        while num_done < len(buffer):
            num_read = os.preadv(self.descriptor, [buffer[num_done:]], offset + num_done)
            if num_read == 0:
                raise ends_early(self.path, offset + len(buffer))
            num_done += num_read

    def close(self) -> None:
        os.close(self.descriptor)


class LocalStore:
    """A local folder, or one on a file system every node mounts."""

    def __init__(self, location: str | Path) -> None:
        self.location = str(location)
        self.root = Path(location)

    def join(self, name: str) -> str:
        return str(self._path(name))

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        path = self._path(name)
        with _failure_is_an_error(path), path.open("rb") as file:
            file.seek(offset)
            data = file.read() if size is None else file.read(size)
        if size is not None and len(data) != size:
            raise ends_early(path, offset + size)
        return data

    def open_ranges(self, name: str) -> LocalRangeReader:
        path = self._path(name)
        with _failure_is_an_error(path):
            return LocalRangeReader(path)

    def get_file(self, name: str, local: Path) -> None:
        """Copy an object to a local file, which appears whole or not at all."""
        path = self._path(name)
        with _failure_is_an_error(path), whole_file(local) as partial:
            _fill(partial, path)

    def put(self, name: str, source: bytes | Path) -> None:
        with whole_file(self._path(name)) as partial:
            _fill(partial, source)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """True when this call created the object, False when it was there before; of several callers one gets True."""
        path = self._path(name)
        with refusal_is_an_error(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial_file(path.parent) as partial:
                _fill(partial, data)
                sync(partial)
                try:
                    os.link(partial, path)  # unlike rename, link fails when the target exists: also on NFS
                except FileExistsError:
                    return False
            sync(path.parent)
        return True

    def create_guarantee(self) -> CreateGuarantee:
        return CreateGuarantee(True, "exactly one writer creates a name: a hard link fails when its target exists")

    def list(self, prefix: str = "") -> Names:
        """Every name that starts with `prefix`, sorted, in all folders below; StorageError where one cannot be read."""
        start = self.root / prefix.rpartition("/")[0]
        files = (Path(folder) / name for folder, _, names in os.walk(start, onerror=_not_listed) for name in names)
        relative = (file.relative_to(self.root).as_posix() for file in files)
        return sorted(name for name in relative if name.startswith(prefix) and not is_hidden(name))

    def exists(self, name: str) -> bool:
        path = self._path(name)
        with _failure_is_an_error(path):
            return path.exists()

    def size(self, name: str) -> int:
        path = self._path(name)
        with _failure_is_an_error(path):
            return path.stat().st_size

    def delete(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.root / checked_name(name, self.location)


@contextlib.contextmanager
def _failure_is_an_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise is_missing(path) from error
    except PermissionError as error:
        raise is_unreadable(path, error) from error


def _not_listed(error: OSError) -> None:
    """What cannot be listed must not count as empty; a folder that is not there, or is gone by now, is empty."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise is_unreadable(error.filename, error) from error


def _fill(path: Path, source: bytes | Path) -> None:
    with path.open("wb") as file:
        if isinstance(source, bytes):
            file.write(source)
        else:
            with source.open("rb") as original:
                shutil.copyfileobj(original, file, 1 << 20)
