"""Whole files of a set kept on a node's own disk, for stores that are far away: its shards, its index.

Promise: a file of the cache is one whose SHA-256 was checked, whole, or it is not there. Any number of processes of
a node share one folder; the least recently used files make room. Losing the folder loses nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cluster.storage.files import sync
from cluster.storage.stores import Store
from data_sharding.errors import ShardError

Opened = TypeVar("Opened")

ENDING = ".whole"
PARTIAL_ENDING = ".partial"  # of a folder with the file while it is fetched


@dataclass(frozen=True)
class CachedFile:
    """What is known of a file of a set before it is read."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class FileCache:
    """Files by their SHA-256, so two sets with equal names never meet; at most `max_bytes` of them in `location`."""

    location: str
    max_bytes: int

    @property
    def folder(self) -> Path:
        return Path(self.location)

    def open(self, store: Store, file: CachedFile, opened: Callable[[Path], Opened]) -> Opened:
        """`opened` of the file on local disk, downloaded first where it is missing. ShardError when its bytes are
        wrong."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{file.sha256}{ENDING}"
        while True:
            with contextlib.suppress(FileNotFoundError):
                # Used now, by a finer clock than the kernel's. An opened file may be evicted: its bytes stay readable.
                os.utime(path, ns=(time.time_ns(),) * 2)
                return opened(path)
            with self._locked(file.sha256):  # one process downloads, the others wait for it
                if not path.exists():
                    self._download(store, file, path)

    def _download(self, store: Store, file: CachedFile, path: Path) -> None:
        under_way = path.with_suffix(PARTIAL_ENDING)
        shutil.rmtree(under_way, ignore_errors=True)  # of a killed process
        partial = under_way / path.name
        with self._locked("room"):
            self._make_room(file.num_bytes)
            under_way.mkdir()
            partial.touch()
            os.truncate(partial, file.num_bytes)  # so that whoever makes room meanwhile counts it
        try:
            store.get_file(file.name, partial)
            with partial.open("rb") as content:
                sha256 = hashlib.file_digest(content, "sha256").hexdigest()
                os.fsync(content.fileno())
            if sha256 != file.sha256:
                raise ShardError(
                    f"{store.join(file.name)} has SHA-256 {sha256}, the manifest says {file.sha256}; run 'python -m "
                    f"data_sharding.verify {store.location}'"
                )
            os.replace(partial, path)
        finally:
            shutil.rmtree(under_way)
        sync(self.folder)

    def _make_room(self, num_bytes: int) -> None:
        """Deletes what killed processes left, then the files that were used longest ago, until `num_bytes` more fit."""
        for under_way in self.folder.glob(f"*{PARTIAL_ENDING}"):
            with contextlib.suppress(BlockingIOError), self._locked(under_way.stem, waits=False):
                shutil.rmtree(under_way, ignore_errors=True)
        files = []
        for path in [*self.folder.glob(f"*{ENDING}"), *self.folder.glob(f"*{PARTIAL_ENDING}/*{ENDING}")]:
            with contextlib.suppress(FileNotFoundError):  # another process has just finished or given it up
                files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        in_use = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if in_use + num_bytes <= self.max_bytes:
                return
            if path.parent == self.folder:
                path.unlink(missing_ok=True)
                in_use -= size

    @contextlib.contextmanager
    def _locked(self, name: str, *, waits: bool = True) -> Iterator[None]:
        """Held by one process of the node at a time; the system frees it when the holder dies. BlockingIOError when
        another has it and this one does not wait."""
        with (self.folder / f".{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
