"""Which windows of runs with censored frames may be drawn: counts of all runs at once, the windows run by run.

Knows nothing about files; an index of millions of such runs is opened in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_sharding import schema

RUNS_AT_ONCE = 4096


class SlotGrids:
    """The windows of one run with censored frames: for every phase, the starts of those that may be drawn.

    Only phases that leave the most windows are used, so an epoch has the same number of samples each time.
    """

    def __init__(
        self, *, num_frames: int, window_frames: int, censored: np.ndarray, max_censored_fraction: float
    ) -> None:
        self.window_frames = window_frames
        is_censored = np.zeros((1, num_frames), dtype=np.int32)
        is_censored[0, censored] = 1
        self._may_be_drawn = drawable(is_censored, window_frames, max_censored_fraction)[0]
        counts = self._may_be_drawn.sum(axis=1)
        self.num_slots = int(counts.max(initial=0))
        self.phases = np.flatnonzero(counts == self.num_slots)

    def starts(self, phase: int) -> np.ndarray:
        """int64 [slot]: the first frame of each window that may be drawn."""
        if phase >= len(self._may_be_drawn):
            return np.empty(0, dtype=np.int64)
        return phase + self.window_frames * np.flatnonzero(self._may_be_drawn[phase])


@dataclass(frozen=True)
class CensoredRuns:
    """Those runs of a table that have censored frames, in the table's order."""

    run: np.ndarray  # int64 [censored run], ascending
    num_frames: np.ndarray  # int64 [censored run]
    ranges: list[str]  # as in the index: "3-5,9"
    window_frames: int
    max_censored_fraction: float
    pads_short_runs: bool = False  # one window takes a shorter run as a whole

    @classmethod
    def none(cls) -> CensoredRuns:
        """No run has a censored frame."""
        return cls(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), [], 1, 0.0)

    def __getitem__(self, run: int) -> SlotGrids:
        entry = int(np.searchsorted(self.run, run))
        return SlotGrids(
            num_frames=int(self.num_frames[entry]),
            window_frames=self._window_of(int(self.num_frames[entry])),
            censored=np.array(schema.frames_of(self.ranges[entry]), dtype=np.int64),
            max_censored_fraction=self.max_censored_fraction,
        )

    def __contains__(self, run: int) -> bool:
        return len(self.positions_in(np.array([run]))) == 1

    def positions_in(self, chosen: np.ndarray) -> np.ndarray:
        """Where in `chosen` (runs) those with censored frames are."""
        entry = np.searchsorted(self.run, chosen)
        is_inside = entry < len(self.run)
        return np.flatnonzero(is_inside)[self.run[entry[is_inside]] == chosen[is_inside]]

    @property
    def num_slots(self) -> np.ndarray:
        """int64 [censored run]: the windows of the phases that leave the most."""
        return self._counts[0]

    @property
    def num_tiled(self) -> np.ndarray:
        """int64 [censored run]: the windows that may be drawn when the first starts at frame 0."""
        return self._counts[1]

    def _window_of(self, num_frames: int) -> int:
        return min(self.window_frames, num_frames) if self.pads_short_runs else self.window_frames

    @cached_property
    def _counts(self) -> np.ndarray:
        counts = np.zeros((2, len(self.run)), dtype=np.int64)
        owner, first, last = parsed_ranges(self.ranges)
        for num_frames in np.unique(self.num_frames):
            alike = np.flatnonzero(self.num_frames == num_frames)
            for start in range(0, len(alike), RUNS_AT_ONCE):
                some = alike[start : start + RUNS_AT_ONCE]
                own = slice(*np.searchsorted(owner, [some[0], some[-1] + 1]))
                entry = np.searchsorted(some, owner[own])
                is_own = some[np.minimum(entry, len(some) - 1)] == owner[own]
                change = np.zeros((len(some), int(num_frames) + 1), dtype=np.int32)
                np.add.at(change, (entry[is_own], first[own][is_own]), 1)
                np.add.at(change, (entry[is_own], last[own][is_own] + 1), -1)
                is_censored = np.cumsum(change[:, :-1], axis=1)
                window_frames = self._window_of(int(num_frames))
                by_phase = drawable(is_censored, window_frames, self.max_censored_fraction).sum(axis=2)
                counts[0, some] = by_phase.max(axis=1, initial=0)
                counts[1, some] = by_phase[:, 0] if by_phase.shape[1] else 0
        return counts


def drawable(is_censored: np.ndarray, window_frames: int, max_censored_fraction: float) -> np.ndarray:
    """bool [run, phase, slot]: True where at most that share of a window is censored; `is_censored` is [run, time]."""
    num_runs, num_frames = is_censored.shape
    num_slots = num_frames // window_frames
    num_phases = num_frames - num_slots * window_frames + 1 if num_slots else 0
    before = np.zeros((num_runs, num_frames + 1), dtype=np.int32)
    np.cumsum(is_censored, axis=1, out=before[:, 1:])
    grid = np.arange(num_phases)[:, None] + window_frames * np.arange(num_slots)
    return before[:, grid + window_frames] - before[:, grid] <= max_censored_fraction * window_frames


def parsed_ranges(ranges: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(entry, first, last), int64 [range] each: every range of every text, in order."""
    texts = pa.array(ranges, type=pa.string())
    texts_of_ranges = pc.split_pattern(texts, ",")
    ends = pc.split_pattern(pc.list_flatten(texts_of_ranges), "-", max_splits=1)
    flat = pc.list_flatten(ends).to_numpy(zero_copy_only=False).astype(np.int64)
    num_ends = pc.list_value_length(ends).to_numpy()
    stop = np.cumsum(num_ends, dtype=np.int64)
    owner = np.repeat(np.arange(len(ranges)), pc.list_value_length(texts_of_ranges).to_numpy())
    return owner, flat[stop - num_ends], flat[stop - 1]
