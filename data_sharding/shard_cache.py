"""Whole shards kept on a node's own disk, for stores that are far away.

Promise: a file of the cache is a shard whose SHA-256 was checked, whole, or it is not there. Any number of processes of
a node share one folder; the least recently used shards make room. Losing the folder loses nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.storage import LocalRangeReader, Store, sync_folder
from data_sharding.errors import ShardError

ENDING = ".tar"
PARTIAL_ENDING = ".partial"


@dataclass(frozen=True)
class CacheSettings:
    """Where a node keeps shards, and how many bytes of them."""

    folder: str
    max_bytes: int


@dataclass(frozen=True)
class CachedShard:
    """What the manifest says of a shard."""

    name: str
    num_bytes: int
    sha256: str


class ShardCache:
    """Shards by their SHA-256: two sets with equal names never meet."""

    def __init__(self, settings: CacheSettings) -> None:
        self.folder = Path(settings.folder)
        self.max_bytes = settings.max_bytes
        self.folder.mkdir(parents=True, exist_ok=True)

    def open(self, store: Store, shard: CachedShard) -> LocalRangeReader:
        """The shard opened on local disk, downloaded first where it is missing. ShardError when its bytes are wrong."""
        path = self.folder / f"{shard.sha256}{ENDING}"
        while True:
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)  # used now; an opened file may be evicted, its bytes stay readable
                return LocalRangeReader(path)
            with self._locked(shard.sha256):  # one process downloads, the others wait for it
                if not path.exists():
                    self._download(store, shard, path)

    def _download(self, store: Store, shard: CachedShard, path: Path) -> None:
        partial = self.folder / f"{shard.sha256}{PARTIAL_ENDING}"
        partial.unlink(missing_ok=True)  # of a killed process
        with self._locked("room"):
            self._make_room(shard.num_bytes)
            with partial.open("wb") as file:
                os.truncate(file.fileno(), shard.num_bytes)  # counted by whoever makes room meanwhile
        try:
            store.get_file(shard.name, partial)
            with partial.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
            if found != shard.sha256:
                raise ShardError(
                    f"{store.join(shard.name)} has SHA-256 {found}, the manifest says {shard.sha256}; run 'python -m "
                    f"data_sharding.verify {store.location}'"
                )
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        sync_folder(self.folder)

    def _make_room(self, num_bytes: int) -> None:
        """Deletes the shards that were used longest ago until `num_bytes` more fit."""
        files = [
            (path.stat().st_mtime_ns, path.stat().st_size, path)
            for path in self.folder.iterdir()
            if path.suffix in (ENDING, PARTIAL_ENDING)
        ]
        in_use = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if in_use + num_bytes <= self.max_bytes:
                return
            if path.suffix == ENDING:
                path.unlink(missing_ok=True)
                in_use -= size

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Held by one process of the node at a time; the system frees it when the holder dies."""
        with (self.folder / f".{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
