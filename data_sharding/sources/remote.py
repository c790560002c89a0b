"""Sources on object storage: a local view of the tree that headers and tables can be read from, and files on demand.

Promise: no source knows where its scans lie. The view holds every name; small files are complete, large ones hold only
their beginning and are extended as sparse files to their true size. Packing fetches the files of one scan at a time.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brain_models.errors import ScanError
from cluster.errors import StorageError
from cluster.storage.stores import Store, store_for
from data_sharding.errors import SourceError

HEAD_BYTES = 1 << 18  # holds every NIfTI header and nearly every CIFTI one
WHOLE_BYTES = 1 << 22  # tables, sidecars, small masks
MAX_HEADER_BYTES = 1 << 26
NIFTI2 = (540).to_bytes(4, "little")
READS_AT_ONCE = 16
MAX_FILES = 2_000_000


class UnreachableError(Exception):
    """The store did not return the file, which says nothing about the scan."""


@dataclass(frozen=True)
class SourceView:
    """A folder in which to look for scans, and the location its files really have."""

    root: str
    location: str

    def original(self, path: str) -> str:
        """The location to read a file of the view from; other paths are unchanged."""
        text = str(Path(path).absolute())
        return text if self.root == self.location else text.replace(f"{self.root}/", f"{self.location}/", 1)

    def reworded(self, message: str) -> str:
        """A message of the source with the locations the user knows."""
        return message.replace(self.root, self.location)


@contextlib.contextmanager
def source_view(location: str) -> Iterator[SourceView]:
    """The source itself where it is a folder; for another address a local view of it, deleted after the block."""
    if "://" not in location:
        yield SourceView(location, location)
        return
    store = store_for(location)
    names = store.list()
    if not names:
        raise SourceError(f"source.root: {location} holds nothing; check the bucket and the prefix")
    if len(names) > MAX_FILES:
        raise SourceError(f"source.root: {location} holds {len(names)} objects; give a narrower prefix")
    with tempfile.TemporaryDirectory(prefix="callosum-source-") as folder:
        root = Path(folder).resolve()
        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            list(pool.map(lambda name: _write_head(store, name, root), names))
        yield SourceView(str(root), store.location)


def _write_head(store: Store, name: str, root: Path) -> None:
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise SourceError(f"source.root: {store.location} holds the name {name!r}, which leaves the folder; rename it")
    size = store.size(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        if size:
            file.write(_head(store, name, size))
        os.truncate(file.fileno(), size)


def _head(store: Store, name: str, size: int) -> bytes:
    if size <= WHOLE_BYTES:
        return store.read(name, 0, size)
    head = store.read(name, 0, HEAD_BYTES)
    if name.endswith(".nii") and head[:4] == NIFTI2:  # CIFTI: what its rows and columns mean stands before the data
        data_offset = int.from_bytes(head[168:176], "little")
        if HEAD_BYTES < data_offset <= MAX_HEADER_BYTES:
            return store.read(name, 0, min(size, data_offset))
    return head


def fetched(value: Any, folder: Path, *, max_bytes: int) -> Any:
    """The value (a path, None, or a mapping of them) with every file elsewhere copied to `folder` and named there.

    ScanError for a file larger than `max_bytes`, UnreachableError when the store does not return it.
    """
    if isinstance(value, dict):
        return {name: fetched(item, folder, max_bytes=max_bytes) for name, item in value.items()}
    if isinstance(value, str) and "://" in value:
        return str(_fetch(value, folder, max_bytes))
    return value


def _fetch(location: str, folder: Path, max_bytes: int) -> Path:
    parent, _, name = location.rpartition("/")
    store = store_for(parent)
    target = folder / location.replace("://", "/", 1)
    try:
        size = store.size(name)
        if size > max_bytes:
            raise ScanError(f"{location} has {size} bytes, more than limits.download_mb allows; raise it")
        store.get_file(name, target)
    except StorageError as error:
        raise UnreachableError(str(error)) from error
    return target


def originals(text: str, folder: Path) -> str:
    """The text with the names of fetched files replaced by the locations they were fetched from."""
    return re.sub(rf"{re.escape(str(folder))}/(\w+)/", r"\1://", text)
