"""Windows of one kind of a shard set: which there are, where they lie, and the batches they become.

The rank process holds a few columns of the index as arrays; loader processes are told byte ranges.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from data_sharding import schema
from data_sharding.errors import ShardError
from data_sharding.hashing import hash_names
from data_sharding.read.batch import ResponseBatch, StoredBatch
from data_sharding.read.censored import CensoredRuns
from data_sharding.read.config import DataConfig
from data_sharding.read.fetch import Fetched, Fetcher, FetchSettings, FrameSpan, ImageRead, WindowRead
from data_sharding.read.file_cache import FileCache
from data_sharding.read.order import RunTable, Samples
from data_sharding.read.shard_set import Kind, ShardSet


class Windows:
    """Windows of one kind of a set, as a source draws them; a T1 or a response is one window of one frame.

    A run shorter than `window_frames` has no window; with `pads_short_runs` it has one, padded (WindowBatch.is_frame).
    """

    has_substitutes = True  # a damaged window is replaced by another one

    def __init__(self, shard_set: ShardSet, *, kind: Kind, window_frames: int, pads_short_runs: bool = False) -> None:
        self.shard_set = shard_set
        self.kind = kind
        self.window_frames = window_frames
        self.pads_short_runs = pads_short_runs
        self.fingerprint = shard_set.fingerprint
        self._runs: dict[str, RunTable] = {}
        self._books: dict[str, AddressBook] = {}

    def runs(self, split: str) -> RunTable:
        """What the order needs of a split's runs; `num_samples` is how many windows an epoch draws."""
        if split not in self._runs:
            table = self.shard_set.runs(self.kind, [split])
            shard_number = {shard.name: number for number, shard in enumerate(self.shard_set.manifest.shards)}
            self._runs[split] = RunTable(
                scan_hash=hash_names(table.scan_id.tolist()),
                shard=table.shard.map(shard_number).to_numpy(dtype=np.int64),
                num_frames=table.num_frames.to_numpy(dtype=np.int64),
                window_frames=self.window_frames,
                censored=self._censored(table),
                pads_short_runs=self.pads_short_runs,
            )
        return self._runs[split]

    def book(self, split: str) -> AddressBook:
        """Where the windows of a split lie; ShardError when it has no window of this length."""
        if split not in self._books:
            self._require_samples(split)
            self._books[split] = AddressBook(self, split)
        return self._books[split]

    def names(self, split: str) -> list[str]:
        """What the quarantine calls each run of a split."""
        return self.book(split).scan_ids

    def fetcher(self, config: DataConfig) -> Fetcher:
        """A fetcher of these windows."""
        cache = shard_cache(self.shard_set, config)
        settings = FetchSettings(
            location=self.shard_set.location,
            frame_type=self.shard_set.frame_type(self.kind),
            num_voxels=self.shard_set.frame_width(self.kind),
            window_frames=self.window_frames,
            reader=config.reader,
            num_kept_shards=config.shuffle_shards,
            cache=cache,
            shards=self.shard_set.cached_shards if cache else {},
        )
        return Fetcher(settings)

    def reads(self, split: str, samples: Samples) -> list[WindowRead]:
        """Where each sample lies."""
        book = self.book(split)
        return [book.window(run, first) for run, first in zip(samples.run, samples.first_frame, strict=True)]

    def batch(self, split: str, samples: Samples, weight: np.ndarray, fetched: Fetched) -> StoredBatch:
        """The batch of these samples, read as `fetched`."""
        book = self.book(split)
        frames_left = book.runs.num_frames[samples.run] - samples.first_frame
        return StoredBatch(
            stored=fetched.stored,
            repetition_time_s=torch.from_numpy(book.repetition_time_s[samples.run]),
            weight=torch.from_numpy(weight),
            sample_seed=torch.from_numpy(samples.seed),
            scan_ids=[book.scan_ids[run] for run in samples.run],
            subjects=[book.subjects[run] for run in samples.run],
            first_frame=samples.first_frame.tolist(),
            is_frame=torch.from_numpy(np.arange(self.window_frames) < frames_left[:, None]),
        )

    def _require_samples(self, split: str) -> None:
        runs = self.runs(split)
        if runs.num_samples:
            return
        longest = runs.num_frames.max(initial=0)
        why = f"the longest run has {longest} frames" if longest else "it has no such scan"
        if longest >= self.window_frames or (longest and self.pads_short_runs):
            why = f"more than {self.shard_set.max_censored_fraction:.0%} of the frames of each are censored"
        raise ShardError(
            f"{self.shard_set.location}: split {split!r} holds no {self.kind} window of {self.window_frames} frames "
            f"({why}); choose another split, kind or window_frames, or other splits (data.split)"
        )

    def _censored(self, table: pd.DataFrame) -> CensoredRuns:
        run = np.flatnonzero(table.censored != "")
        return CensoredRuns(
            run=run,
            num_frames=table.num_frames.to_numpy(dtype=np.int64)[run],
            ranges=table.censored.iloc[run].tolist(),
            window_frames=self.window_frames,
            max_censored_fraction=self.shard_set.max_censored_fraction,
            pads_short_runs=self.pads_short_runs,
        )


class Responses(Windows):
    """The images of a set with the response to each, a window of one frame; splits are by image."""

    def __init__(self, shard_set: ShardSet) -> None:
        super().__init__(shard_set, kind="response", window_frames=1)
        images = shard_set.index_file.rows(schema.IMAGE, ["scan_id", "offset", "size", "crc32"])
        self._images = images.set_index("scan_id")
        self._stimuli = shard_set.scans("response").set_index("scan_id").stimulus

    def reads(self, split: str, samples: Samples) -> list[WindowRead]:
        names = self.names(split)
        return [
            replace(read, image=self._image(names[run]))
            for run, read in zip(samples.run, super().reads(split, samples), strict=True)
        ]

    def _image(self, scan_id: str) -> ImageRead:
        row = self._images.loc[scan_id]
        member = f"{schema.stats_key(scan_id)}.{schema.IMAGE}"
        return ImageRead(member, offset=int(row.offset), size=int(row["size"]), crc32=int(row.crc32))

    def batch(  # type: ignore[override]
        self, split: str, samples: Samples, weight: np.ndarray, fetched: Fetched
    ) -> ResponseBatch:
        """The batch of these samples, read as `fetched`."""
        windows = super().batch(split, samples, weight, fetched)
        return ResponseBatch(
            image=fetched.images,
            betas=windows.values[:, 0],
            is_measured=windows.is_measured,
            weight=windows.weight,
            sample_seed=windows.sample_seed,
            scan_ids=windows.scan_ids,
            subjects=windows.subjects,
            stimuli=self._stimuli.loc[windows.scan_ids].tolist(),
            first_frame=windows.first_frame,
        )


def shard_cache(shard_set: ShardSet, config: DataConfig) -> FileCache | None:
    """The node's cache, where one is configured and holds a shuffle block. A smaller one would fetch each shard again
    for every few samples, so it is not used, with a warning."""
    if config.cache_folder is None or config.reader == "stream":
        return None
    largest = sorted((shard.bytes for shard in shard_set.manifest.shards), reverse=True)
    block_bytes = sum(largest[: config.shuffle_shards])
    if block_bytes <= config.cache_bytes:
        return FileCache(config.cache_folder, config.cache_bytes)
    warnings.warn(
        f"the shard cache is not used: a shuffle block of {config.shuffle_shards} shards has {block_bytes} bytes, "
        f"cache_bytes is {config.cache_bytes}; raise it, or lower shuffle_shards",
        stacklevel=2,
    )
    return None


class AddressBook:
    """Where the windows of one kind and split lie: its runs, sorted by scan_id, and their chunks in order."""

    def __init__(self, windows: Windows, split: str) -> None:
        shard_set, kind = windows.shard_set, windows.kind
        table, scans = shard_set.runs(kind, [split]), shard_set.scans(kind)
        chunk_kind = schema.BOLD if kind == "bold" else schema.KIND_OF_SCAN[kind]
        chunks = shard_set.index_file.rows(chunk_kind, ["first_frame", "offset"])
        run = _run_of_chunk(scans, (scans.split == split).to_numpy(dtype=bool), chunks.row.to_numpy())
        by_run = np.argsort(run, kind="stable")[np.count_nonzero(run < 0) :]
        self.runs = windows.runs(split)
        self.scan_ids: list[str] = table.scan_id.tolist()
        self.subjects: list[str] = table.subject.tolist()
        self.shards = [shard.name for shard in shard_set.manifest.shards]  # runs.shard counts them
        self.repetition_time_s = table.repetition_time_s.to_numpy(dtype=np.float32)
        # A run's chunks are first_chunk[run]..first_chunk[run + 1] - 1: the first frame, index row and byte of each.
        self.first_chunk = np.searchsorted(run[by_run], np.arange(len(table) + 1))
        self.chunk_start, self.chunk_row, self.offsets = (
            chunks[column].to_numpy(dtype=np.int64)[by_run] for column in ("first_frame", "row", "offset")
        )
        self.index_file = shard_set.index_file

    def window(self, run: int, first_frame: int) -> WindowRead:
        """The address of the window that starts at this frame of a run; it ends with the run."""
        first, stop = int(self.first_chunk[run]), int(self.first_chunk[run + 1])
        starts = self.chunk_start[first:stop]
        chunk = int(np.searchsorted(starts, first_frame, side="right")) - 1
        spans = []
        num_frames = int(self.runs.num_frames[run])
        frame, end = int(first_frame), min(int(first_frame) + self.runs.window_frames, num_frames)
        while frame < end:
            chunk_end = int(starts[chunk + 1]) if chunk + 1 < len(starts) else num_frames
            number, inside = first + chunk, frame - int(starts[chunk])
            num_read = min(end, chunk_end) - frame
            member, frame_crc32 = self.index_file.member(int(self.chunk_row[number]))
            crc32 = bytes.fromhex(frame_crc32[8 * inside : 8 * (inside + num_read)])
            spans.append(FrameSpan(member, int(self.offsets[number]), inside, num_read, crc32))
            frame = min(end, chunk_end)
            chunk += 1
        return WindowRead(self.shards[int(self.runs.shard[run])], tuple(spans))


def _run_of_chunk(scans: pd.DataFrame, is_in_split: np.ndarray, chunk_row: np.ndarray) -> np.ndarray:
    """int64 [chunk]: the number of the chunk's run among those of the split, -1 for chunks of other splits.

    A run's chunks follow its own member in the tar and so in the index (schema: stats before chunks).
    """
    by_row = np.argsort(scans.row.to_numpy())
    owner = by_row[np.searchsorted(scans.row.to_numpy()[by_row], chunk_row, side="right") - 1]
    number = np.where(is_in_split, np.cumsum(is_in_split) - 1, -1)
    return number[owner]
