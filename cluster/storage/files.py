"""What stores have in common: names that stay inside a location, and local files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cluster.errors import StorageError

Names = list[str]

# Files being written start with this and are never listed: a killed writer leaves one behind.
PARTIAL_PREFIX = ".partial-"

FREE_SPACE = "free some, or give another location"
NO_FOLDER = "a file lies where a folder is needed; give another location"
ALLOW_WRITING = "have writing allowed there (with hard links), or give another location"
REFUSALS = {
    errno.ENOSPC: FREE_SPACE,
    errno.EDQUOT: FREE_SPACE,
    errno.EACCES: ALLOW_WRITING,
    errno.EPERM: ALLOW_WRITING,
    errno.EROFS: ALLOW_WRITING,
    errno.ENOTSUP: ALLOW_WRITING,
    errno.EEXIST: NO_FOLDER,
    errno.ENOTDIR: NO_FOLDER,
}


@dataclass(frozen=True)
class CreateGuarantee:
    """What `put_if_absent` promises at a location: exactly one winner whatever happens, or only under a condition."""

    is_exact: bool
    words: str


def checked_name(name: str, location: str) -> str:
    """The name itself, if it stays inside the location; StorageError otherwise."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise StorageError(f"{name!r} is not a name inside {location}; give a relative path without '..'")
    return name


def ends_early(where: object, end: int) -> StorageError:
    return StorageError(f"{where} ends before byte {end}; it is cut short, restore or rewrite it")


def is_missing(where: object) -> StorageError:
    return StorageError(f"{where} does not exist; check the location, or write it first")


def is_unreadable(where: object, error: OSError) -> StorageError:
    return StorageError(f"{where} cannot be read: {error.strerror}; give this user the right to, or check the disk")


def is_hidden(name: str) -> bool:
    """True for what a killed writer may have left behind, which no list shows."""
    return name.rpartition("/")[2].startswith(PARTIAL_PREFIX)


@contextlib.contextmanager
def refusal_is_an_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        refused = os.strerror(error.errno)
        raise StorageError(f"{path} cannot be written: {refused}; {REFUSALS[error.errno]}") from error


@contextlib.contextmanager
def partial_file(folder: Path) -> Iterator[Path]:
    """A new empty file that no list shows, removed at the end if it has not become something else."""
    descriptor, name = tempfile.mkstemp(prefix=PARTIAL_PREFIX, dir=folder)
    os.fchmod(descriptor, 0o644)
    os.close(descriptor)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A new file to fill, which is `path` after the block, whole and on disk; if the block raises, nothing changes."""
    with refusal_is_an_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial_file(path.parent) as partial:
            yield partial
            sync(partial)
            os.replace(partial, path)
        sync(path.parent)


def sync(path: Path) -> None:
    """Makes the bytes of a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def folder_problems(location: str, key: str) -> list[str]:
    """What keeps this user from writing to a local folder, which need not exist yet; nothing of other locations."""
    if "://" in location:
        return []
    path = Path(location).absolute()
    nearest = next(folder for folder in (path, *path.parents) if folder.exists())
    if not nearest.is_dir():
        return [f"{key}: {nearest} is a file; give another location"]
    try:  # permissions alone do not tell: a system's folder refuses its administrator, too
        with tempfile.TemporaryFile(dir=nearest):
            return []
    except OSError as error:
        return [f"{key}: {nearest} cannot be written ({error.strerror}); {ALLOW_WRITING}"]
