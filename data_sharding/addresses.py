"""Where every window of a split lies: the index's columns as arrays, made once in the rank process."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from data_sharding import schema
from data_sharding.errors import ShardError
from data_sharding.fetch import FrameSpan, WindowRead
from data_sharding.hashing import hash_names
from data_sharding.order import RunTable, SlotGrids
from data_sharding.shard_set import ShardSet


@dataclass(frozen=True)
class AddressBook:
    """The runs of one kind and split, sorted by scan_id, and their chunks in order."""

    runs: RunTable
    scan_ids: list[str]
    subjects: list[str]
    shards: list[str]  # by run
    repetition_time_s: np.ndarray  # float32 [run]
    first_chunk: np.ndarray  # int64 [run + 1]: the run's chunks are first_chunk[run]..first_chunk[run + 1] - 1
    chunk_start: np.ndarray  # int64 [chunk], frame
    members: list[str]  # by chunk
    offsets: np.ndarray  # int64 [chunk]
    frame_crc32: list[str]  # by chunk: 8 hexadecimal digits a frame

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
        in_split = shard_set.index[shard_set.index.scan_id.isin(scan_ids)]
        chunks = _sorted(in_split, schema.BOLD if kind == "bold" else schema.KIND_OF_SCAN[kind])
        counts = chunks.groupby("scan_id").size().reindex(scan_ids).to_numpy()
        return cls(
            runs=runs,
            scan_ids=scan_ids,
            subjects=table.subject.tolist(),
            shards=table.shard.tolist(),
            repetition_time_s=table.repetition_time_s.to_numpy(dtype=np.float32),
            first_chunk=np.concatenate([[0], np.cumsum(counts)]),
            chunk_start=chunks.first_frame.to_numpy(dtype=np.int64),
            members=chunks.member.tolist(),
            offsets=chunks.offset.to_numpy(dtype=np.int64),
            frame_crc32=chunks.frame_crc32.tolist(),
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
            crc32 = bytes.fromhex(self.frame_crc32[number][8 * inside : 8 * (inside + num_frames)])
            spans.append(FrameSpan(self.members[number], int(self.offsets[number]), inside, num_frames, crc32))
            frame = min(end, chunk_end)
            chunk += 1
        return WindowRead(self.shards[run], tuple(spans))

    def label(self, run: int, first_frame: int) -> str:
        """The name of a sample in messages and in the quarantine."""
        return f"{self.scan_ids[run]}:{first_frame}"


def run_table(shard_set: ShardSet, *, kind: str, split: str, window_frames: int) -> RunTable:
    """What the order needs of a split's runs; its `num_samples` is how many windows an epoch draws."""
    table = shard_set.runs(kind, [split])
    shard_number = {shard.name: number for number, shard in enumerate(shard_set.manifest.shards)}
    return RunTable(
        scan_hash=hash_names(table.scan_id.tolist()),
        shard=table.shard.map(shard_number).to_numpy(dtype=np.int64),
        num_frames=table.num_frames.to_numpy(dtype=np.int64),
        window_frames=window_frames,
        grids=_grids(table, window_frames, shard_set.max_censored_fraction),
    )


def _grids(table: pd.DataFrame, window_frames: int, max_censored_fraction: float) -> dict[int, SlotGrids]:
    """The slots of the runs with censored frames, by the run's row."""
    return {
        int(row): SlotGrids(
            num_frames=int(table.num_frames[row]),
            window_frames=window_frames,
            censored=np.array(schema.frames_of(table.censored[row])),
            max_censored_fraction=max_censored_fraction,
        )
        for row in np.flatnonzero(table.censored != "")
    }


def _sorted(index: pd.DataFrame, kind: str) -> pd.DataFrame:
    return index[index.kind == kind].sort_values(["scan_id", "first_frame"])
