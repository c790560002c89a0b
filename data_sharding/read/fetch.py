"""Byte ranges -> checked samples. Runs inside loader processes: is told where to read, never opens the index.

Windows stay as they are stored: decoded, they would be four times the bytes for the rank process to take over.
"""

from __future__ import annotations

import io
import tarfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Shaped, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info

from brain_models.recipe import NOT_MEASURED
from cluster.errors import StorageError, StoreUnavailableError
from cluster.storage.stores import LocalRangeReader, RangeReader, Store, store_for
from data_sharding import schema
from data_sharding.errors import ShardError
from data_sharding.read.file_cache import CachedFile, FileCache

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
class ImageRead:
    """The tar member of a stimulus."""

    member: str
    offset: int
    size: int
    crc32: int


@dataclass(frozen=True)
class WindowRead:
    """One window: one span, or two across a chunk boundary; fewer frames than a window where it is padded."""

    shard: str
    spans: tuple[FrameSpan, ...]
    image: ImageRead | None = None  # of a response


@dataclass(frozen=True)
class FetchSettings:
    """What every read of one kind of a set has in common."""

    location: str
    frame_type: Literal["int8", "float16"]
    num_voxels: int  # of a frame; regions of region series
    window_frames: int
    reader: Literal["indexed", "stream"]
    num_kept_shards: int  # for reader=stream: shards held in memory
    cache: FileCache | None = None
    shards: Mapping[str, CachedFile] = field(default_factory=dict)  # for the cache: by name


@dataclass
class Fetched:
    """Checked windows."""

    stored: Shaped[Tensor, "batch time voxel"]  # int8 or float16; 0 where a short run is padded
    damaged: dict[int, str]  # why a row could not be read; it is marked as not measured
    images: UInt8[Tensor, "batch y x rgb"]  # of responses; 1 x 1 pixels where there are none

    def put(self, row: int, other: Fetched) -> None:
        """Replaces a row by the only one of another read."""
        self.stored[row] = other.stored[0]
        if self.images.shape[1:] != other.images.shape[1:]:  # no image of this batch could be read
            self.images = self.images.new_zeros((len(self.images), *other.images.shape[1:]))
        self.images[row] = other.images[0]


@dataclass
class FetchedPairs:
    """Checked windows of every side."""

    sides: dict[str, Fetched]

    @property
    def damaged(self) -> dict[int, str]:
        """Why a pair is not whole, by row."""
        return {row: reason for side in self.sides.values() for row, reason in side.damaged.items()}


class Fetcher:
    """Reads batches of windows, and decodes the images of responses here, in the process that reads.

    Usable as a map-style dataset whose indices are lists of WindowRead.
    """

    def __init__(self, settings: FetchSettings) -> None:
        self.settings = settings
        self.frame_type = np.dtype(settings.frame_type)
        self._open: OrderedDict[str, RangeReader] = OrderedDict()
        self._streamed: OrderedDict[str, dict[str, bytes]] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {"settings": self.settings}

    def __setstate__(self, state: dict[str, FetchSettings]) -> None:
        self.__init__(state["settings"])  # type: ignore[misc]

    def __getitem__(self, reads: list[WindowRead]) -> Fetched:
        return self.fetch(reads)

    def fresh(self) -> Fetcher:
        """A fetcher of the same settings with nothing open, for another thread."""
        return Fetcher(self.settings)

    def fetch(self, reads: list[WindowRead]) -> Fetched:
        """The windows, each frame and image checked against its crc32; ShardError where images differ in size."""
        shape = (len(reads), self.settings.window_frames, self.settings.num_voxels)
        stored = _empty(shape, self.frame_type)
        frames = stored.numpy()
        images: dict[int, np.ndarray] = {}
        damaged = {}
        for row, read in enumerate(reads):
            try:
                self._read_window(read, frames[row])
                if read.image is not None:
                    images[row] = self._image(read.shard, read.image)
            except StoreUnavailableError:
                raise  # a network that is down says nothing about samples
            except (ShardError, StorageError) as error:
                damaged[row] = str(error)
                frames[row] = NOT_MEASURED if self.frame_type == np.int8 else np.nan
        sizes = {image.shape for image in images.values()} or {(1, 1, 3)}
        if len(sizes) > 1:
            raise ShardError(
                f"{self.settings.location} holds images of {len(sizes)} sizes, such as {sorted(sizes)[:2]} (y, x, "
                "colours); bring the stimuli to one size and write the set again"
            )
        stacked = np.zeros((len(reads), *sizes.pop()), dtype=np.uint8)
        for row, image in images.items():
            stacked[row] = image
        return Fetched(stored, damaged, torch.from_numpy(stacked))

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()
        self._streamed.clear()

    def _read_window(self, read: WindowRead, frames: np.ndarray) -> None:
        done = 0
        for span in read.spans:
            own = frames[done : done + span.num_frames]
            if self.settings.reader == "indexed":
                first_byte = span.offset + schema.NPY_HEADER_BYTES + span.first * frames[0].nbytes
                self._range_reader(read.shard).read_into(first_byte, own.data.cast("B"))
            else:
                data = self._streamed_member(read.shard, span.member)
                stored = np.frombuffer(data, dtype=self.frame_type, offset=schema.NPY_HEADER_BYTES)
                own[:] = stored.reshape(-1, own.shape[1])[span.first : span.first + span.num_frames]
            self._check(read.shard, span, own)
            done += span.num_frames
        frames[done:] = 0

    def _check(self, shard: str, span: FrameSpan, frames: np.ndarray) -> None:
        for row in np.flatnonzero(schema.crc32_of_frames(frames) != np.frombuffer(span.crc32, dtype="<u4")):
            frame = frames[row]
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
        return self.settings.cache.open(store, self.settings.shards[shard], LocalRangeReader)

    def _streamed_member(self, shard: str, member: str) -> bytes:
        if shard not in self._streamed:
            while len(self._streamed) >= self.settings.num_kept_shards:
                self._streamed.popitem(last=False)
            self._streamed[shard] = streamed_shard(store_for(self.settings.location), shard)
        if member not in self._streamed[shard]:
            raise ShardError(f"{self.settings.location}/{shard} lacks {member}; restore the shard")
        return self._streamed[shard][member]

    def _image(self, shard: str, read: ImageRead) -> np.ndarray:
        """uint8 [y, x, rgb]."""
        if self.settings.reader == "indexed":
            data = bytearray(read.size)
            self._range_reader(shard).read_into(read.offset, memoryview(data))
        else:
            data = bytearray(self._streamed_member(shard, read.member))
        if schema.crc32(bytes(data)) != read.crc32:
            raise ShardError(
                f"{self.settings.location}/{shard} member {read.member} does not match its checksum; run 'python -m "
                f"data_sharding.verify {self.settings.location}' and restore the shard"
            )
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            return np.array(image.convert("RGB"))


class PairFetcher:
    """Reads windows of several sides; its indices are lists of WindowRead by side."""

    def __init__(self, sides: Mapping[str, Fetcher]) -> None:
        self.sides = dict(sides)

    def __getitem__(self, reads: Mapping[str, list[WindowRead]]) -> FetchedPairs:
        return self.fetch(reads)

    def fresh(self) -> PairFetcher:
        """A fetcher of the same sides with nothing open, for another thread."""
        return PairFetcher({name: side.fresh() for name, side in self.sides.items()})

    def fetch(self, reads: Mapping[str, list[WindowRead]]) -> FetchedPairs:
        """The windows of every side, each frame checked against its crc32."""
        return FetchedPairs({name: side.fetch(reads[name]) for name, side in self.sides.items()})

    def close(self) -> None:
        for side in self.sides.values():
            side.close()


def streamed_shard(store: Store, shard: str) -> dict[str, bytes]:
    """Every array and image of a shard by its member's name, read front to back in one pass with WebDataset."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    source = {"url": store.join(shard), "stream": io.BytesIO(store.read(shard))}
    members: dict[str, bytes] = {}
    try:
        for entry in group_by_keys(tar_file_expander([source])):
            for kind in (kind for kind in entry if kind.endswith((".npy", ".png"))):
                members[f"{entry['__key__']}.{kind}"] = entry[kind]
    except tarfile.TarError as error:
        raise ShardError(f"{store.join(shard)} is no whole tar ({error}); restore the shard") from error
    return members


def _empty(shape: Sequence[int], frame_type: np.dtype) -> Tensor:
    """An empty tensor; in a loader process in shared memory, so that windows are read to where the rank process finds
    them (what torch's own collate does)."""
    if get_worker_info() is None:
        return torch.from_numpy(np.empty(shape, dtype=frame_type))
    kind = torch.int8 if frame_type == np.int8 else torch.float16
    storage = torch.UntypedStorage._new_shared(int(np.prod(shape)) * frame_type.itemsize)
    return torch.tensor([], dtype=kind).set_(storage).view(tuple(shape))
