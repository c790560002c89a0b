"""Where every window of a split lies: a few of the index's columns as arrays, made once in the rank process."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from data_sharding import schema
from data_sharding.errors import ShardError
from data_sharding.hashing import hash_names
from data_sharding.read.censored import CensoredRuns
from data_sharding.read.fetch import FrameSpan, WindowRead
from data_sharding.read.index_file import IndexFile
from data_sharding.read.order import RunTable
from data_sharding.read.shard_set import ShardSet


@dataclass(frozen=True)
class AddressBook:
    """The runs of one kind and split, sorted by scan_id, and their chunks in order."""

    runs: RunTable
    scan_ids: list[str]
    subjects: list[str]
    shards: list[str]  # of the set: runs.shard counts them
    repetition_time_s: np.ndarray  # float32 [run]
    first_chunk: np.ndarray  # int64 [run + 1]: the run's chunks are first_chunk[run]..first_chunk[run + 1] - 1
    chunk_start: np.ndarray  # int64 [chunk], frame
    chunk_row: np.ndarray  # int64 [chunk], in the index
    offsets: np.ndarray  # int64 [chunk]
    index_file: IndexFile

    @classmethod
    def of(cls, shard_set: ShardSet, *, kind: str, split: str, window_frames: int) -> AddressBook:
        """The book of a split; ShardError when it has no window of this length."""
        table = shard_set.runs(kind, [split])
        scan_ids = table.scan_id.tolist()
        runs = run_table(shard_set, kind=kind, split=split, window_frames=window_frames)
        if runs.num_samples == 0:
            longest = f"the longest run has {runs.num_frames.max()} frames" if len(table) else "it has no such scan"
            if len(table) and runs.num_frames.max() >= window_frames:
                longest = f"more than {shard_set.max_censored_fraction:.0%} of the frames of each are censored"
            raise ShardError(
                f"{shard_set.location}: split {split!r} holds no {kind} window of {window_frames} frames ({longest}); "
                "choose another split, kind or window_frames, or write the set with other splits"
            )
        scans = shard_set.scans(kind)
        chunk_kind = schema.BOLD if kind == "bold" else schema.KIND_OF_SCAN[kind]
        chunks = shard_set.index_file.rows(chunk_kind, ["first_frame", "offset"])
        run = _run_of_chunk(scans, (scans.split == split).to_numpy(dtype=bool), chunks.row.to_numpy())
        by_run = np.argsort(run, kind="stable")[np.count_nonzero(run < 0) :]
        return cls(
            runs=runs,
            scan_ids=scan_ids,
            subjects=table.subject.tolist(),
            shards=[shard.name for shard in shard_set.manifest.shards],
            repetition_time_s=table.repetition_time_s.to_numpy(dtype=np.float32),
            first_chunk=np.searchsorted(run[by_run], np.arange(len(table) + 1)),
            chunk_start=chunks.first_frame.to_numpy(dtype=np.int64)[by_run],
            chunk_row=chunks.row.to_numpy(dtype=np.int64)[by_run],
            offsets=chunks.offset.to_numpy(dtype=np.int64)[by_run],
            index_file=shard_set.index_file,
        )

    def window(self, run: int, first_frame: int) -> WindowRead:
        """The address of the window that starts at this frame of a run."""
        first, stop = int(self.first_chunk[run]), int(self.first_chunk[run + 1])
        starts = self.chunk_start[first:stop]
        chunk = int(np.searchsorted(starts, first_frame, side="right")) - 1
        spans = []
        frame, end = int(first_frame), int(first_frame) + self.runs.window_frames
        while frame < end:
            chunk_end = int(starts[chunk + 1]) if chunk + 1 < len(starts) else int(self.runs.num_frames[run])
            number, inside = first + chunk, frame - int(starts[chunk])
            num_frames = min(end, chunk_end) - frame
            member, frame_crc32 = self.index_file.member(int(self.chunk_row[number]))
            crc32 = bytes.fromhex(frame_crc32[8 * inside : 8 * (inside + num_frames)])
            spans.append(FrameSpan(member, int(self.offsets[number]), inside, num_frames, crc32))
            frame = min(end, chunk_end)
            chunk += 1
        return WindowRead(self.shards[int(self.runs.shard[run])], tuple(spans))

    def label(self, run: int, slot: int) -> str:
        """The name of a sample in the quarantine; not by its first frame, which is another one in every epoch."""
        return f"{self.scan_ids[run]}:{slot}"


def run_table(shard_set: ShardSet, *, kind: str, split: str, window_frames: int) -> RunTable:
    """What the order needs of a split's runs; its `num_samples` is how many windows an epoch draws."""
    table = shard_set.runs(kind, [split])
    shard_number = {shard.name: number for number, shard in enumerate(shard_set.manifest.shards)}
    return RunTable(
        scan_hash=hash_names(table.scan_id.tolist()),
        shard=table.shard.map(shard_number).to_numpy(dtype=np.int64),
        num_frames=table.num_frames.to_numpy(dtype=np.int64),
        window_frames=window_frames,
        censored=_censored(table, window_frames, shard_set.max_censored_fraction),
    )


def _censored(table: pd.DataFrame, window_frames: int, max_censored_fraction: float) -> CensoredRuns:
    run = np.flatnonzero(table.censored != "")
    return CensoredRuns(
        run=run,
        num_frames=table.num_frames.to_numpy(dtype=np.int64)[run],
        ranges=table.censored.iloc[run].tolist(),
        window_frames=window_frames,
        max_censored_fraction=max_censored_fraction,
    )


def _run_of_chunk(scans: pd.DataFrame, is_in_split: np.ndarray, chunk_row: np.ndarray) -> np.ndarray:
    """int64 [chunk]: the place of the chunk's run among those of the split, -1 for chunks of other splits.

    A run's chunks follow its own member in the tar and so in the index (schema: stats before chunks).
    """
    by_row = np.argsort(scans.row.to_numpy())
    owner = by_row[np.searchsorted(scans.row.to_numpy()[by_row], chunk_row, side="right") - 1]
    place = np.where(is_in_split, np.cumsum(is_in_split) - 1, -1)
    return place[owner]
