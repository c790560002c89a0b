"""Byte ranges -> checked windows. Runs inside loader processes: gets addresses, never opens the index.

Windows stay as they are stored: decoded, they would be four times the bytes for the rank process to take over.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.utils.data import get_worker_info

from cluster.errors import StorageError, StoreUnavailableError
from cluster.storage.stores import LocalRangeReader, RangeReader, store_for
from data_sharding import schema
from data_sharding.checksums import crc32_of_frames
from data_sharding.errors import ShardError
from data_sharding.read.file_cache import CachedFile, CacheSettings, FileCache
from data_sharding.read.stream import read_shard

MAX_OPEN_SHARDS = 64


@dataclass(frozen=True)
class FrameSpan:
    """Consecutive frames of one chunk: where they lie in the tar, and their checksums as the index holds them."""

    member: str
    offset: int  # of the member's first byte
    first: int  # frame, counted inside the member
    num_frames: int
    crc32: bytes  # little-endian uint32 [time]


@dataclass(frozen=True)
class WindowRead:
    """One window: one span, or two across a chunk boundary."""

    shard: str
    spans: tuple[FrameSpan, ...]


@dataclass(frozen=True)
class FetchSettings:
    """What every read of a source has in common."""

    location: str
    frame_type: Literal["int8", "float16"]
    num_voxels: int
    window_frames: int
    reader: Literal["indexed", "stream"]
    num_kept_shards: int  # for reader=stream: shards held in memory
    cache: CacheSettings | None = None
    shards: Mapping[str, CachedFile] = field(default_factory=dict)  # for the cache: by name


@dataclass
class Fetched:
    """Checked windows; `failures` are (row, reason), and those rows hold nothing of use."""

    stored: Shaped[Tensor, "batch time voxel"]  # int8 or float16
    failures: list[tuple[int, str]]


class Fetcher:
    """Reads batches of windows. Usable as a map-style dataset whose indices are lists of WindowRead."""

    def __init__(self, settings: FetchSettings) -> None:
        self.settings = settings
        self.frame_type = np.dtype(settings.frame_type)
        self._cache: FileCache | None = None  # made at the first read: in the process that reads
        self._open: OrderedDict[str, RangeReader] = OrderedDict()
        self._streamed: OrderedDict[str, dict[str, np.ndarray]] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {"settings": self.settings}

    def __setstate__(self, state: dict[str, FetchSettings]) -> None:
        self.__init__(state["settings"])  # type: ignore[misc]

    def __getitem__(self, reads: list[WindowRead]) -> Fetched:
        return self.fetch(reads)

    def fetch(self, reads: list[WindowRead]) -> Fetched:
        """The windows, each frame checked against its crc32."""
        shape = (len(reads), self.settings.window_frames, self.settings.num_voxels)
        stored = _room(shape, self.frame_type)
        frames = stored.numpy()
        failures = []
        for row, read in enumerate(reads):
            try:
                self._read_window(read, frames[row])
            except StoreUnavailableError:
                raise  # a network that is down says nothing about samples
            except (ShardError, StorageError) as error:
                failures.append((row, str(error)))
                frames[row] = 0
        return Fetched(stored, failures)

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()
        self._streamed.clear()

    def _read_window(self, read: WindowRead, frames: np.ndarray) -> None:
        done = 0
        for span in read.spans:
            part = frames[done : done + span.num_frames]
            if self.settings.reader == "indexed":
                first_byte = span.offset + schema.NPY_HEADER_BYTES + span.first * frames[0].nbytes
                self._range_reader(read.shard).read_into(first_byte, part.data.cast("B"))
            else:
                arrays = self._streamed_shard(read.shard)
                if span.member not in arrays:
                    raise ShardError(f"{self.settings.location}/{read.shard} lacks {span.member}; restore the shard")
                chosen = slice(span.first, span.first + span.num_frames)
                part[:] = arrays[span.member].reshape(-1, self.settings.num_voxels)[chosen]
            self._check(read.shard, span, part)
            done += span.num_frames

    def _check(self, shard: str, span: FrameSpan, part: np.ndarray) -> None:
        for row in np.flatnonzero(crc32_of_frames(part) != np.frombuffer(span.crc32, dtype="<u4")):
            frame = part[row]
            first_byte = span.offset + schema.NPY_HEADER_BYTES + (span.first + row) * frame.nbytes
            location = self.settings.location
            raise ShardError(
                f"{location}/{shard} member {span.member}: frame {span.first + row} (bytes {first_byte}-"
                f"{first_byte + frame.nbytes - 1}) does not match its checksum; run "
                f"'python -m data_sharding.verify {location}' and restore the shard"
            )

    def _range_reader(self, shard: str) -> RangeReader:
        if shard not in self._open:
            self._open[shard] = self._opened(shard)
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        return self._open[shard]

    def _opened(self, shard: str) -> RangeReader:
        store = store_for(self.settings.location)
        if self.settings.cache is None:
            return store.open_ranges(shard)
        self._cache = self._cache or FileCache(self.settings.cache)
        return self._cache.open(store, self.settings.shards[shard], LocalRangeReader)

    def _streamed_shard(self, shard: str) -> dict[str, np.ndarray]:
        if shard not in self._streamed:
            while len(self._streamed) >= self.settings.num_kept_shards:
                self._streamed.popitem(last=False)
            self._streamed[shard] = read_shard(store_for(self.settings.location), shard)
        return self._streamed[shard]


def _room(shape: tuple[int, int, int], frame_type: np.dtype) -> Tensor:
    """An empty tensor; in a loader process in shared memory, so that windows are read to where the rank process finds
    them (what torch's own collate does)."""
    if get_worker_info() is None:
        return torch.from_numpy(np.empty(shape, dtype=frame_type))
    kind = torch.int8 if frame_type == np.int8 else torch.float16
    storage = torch.UntypedStorage._new_shared(int(np.prod(shape)) * frame_type.itemsize)
    return torch.tensor([], dtype=kind).set_(storage).view(shape)
