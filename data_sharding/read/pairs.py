"""Pairs: windows of the same subjects from several sides, such as two sets, or two kinds of one set.

Promise: the sides of a row are always of one subject. Where a side is damaged the row has weight 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch

from data_sharding.errors import ShardError
from data_sharding.hashing import hash_name, hash_names, mix
from data_sharding.read.batch import PairedBatch
from data_sharding.read.config import DataConfig
from data_sharding.read.fetch import FetchedPairs, PairFetcher, WindowRead
from data_sharding.read.order import RunTable, Samples, drawn_window
from data_sharding.read.shard_set import split_conflicts
from data_sharding.read.windows import Windows

MAX_NAMED_SUBJECTS = 5


class Pairs:
    """The subjects that all sides have, as a source draws them: a sample is a subject.

    Of a subject's runs on a side, one is drawn for every epoch, and a window of it; an evaluation draws the same
    every time. The side named `shuffled` is a control: in the train split every subject has another one's runs there,
    always the same one's.
    """

    has_substitutes = False  # a damaged pair stays that subject's, with weight 0

    def __init__(self, sides: Mapping[str, Windows], *, shuffled: str | None = None) -> None:
        self.sides = dict(sides)
        self.shuffled = shuffled
        conflicts = split_conflicts({name: side.shard_set.subjects for name, side in self.sides.items()})
        if conflicts:
            raise ShardError("; ".join(conflicts))
        described = [f"{name} {side.fingerprint} {side.kind}" for name, side in self.sides.items()]
        described += [f"shuffled {shuffled}"] if shuffled else []
        self.fingerprint = f"{hash_name('pairs', *described):016x}"
        self._subjects: dict[str, list[str]] = {}
        self._runs_of: dict[tuple[str, str], dict[str, np.ndarray]] = {}

    def names(self, split: str) -> list[str]:
        """The subjects of a split that have a window on every side, sorted; ShardError when there are none."""
        if split not in self._subjects:
            self._subjects[split] = sorted(set.intersection(*(set(self.runs_of(split, name)) for name in self.sides)))
            if not self._subjects[split]:
                raise ShardError(
                    f"split {split!r} has no subject with a window on all of {', '.join(self.sides)}: "
                    f"{self._examples()}; give sets of the same people under the same names, or choose other splits "
                    "(data.split)"
                )
        return self._subjects[split]

    def incomplete(self, split: str) -> dict[str, list[str]]:
        """The subjects of a split that lack a side, sorted, with the sides they lack."""
        subjects = {name: set(self.runs_of(split, name)) for name in self.sides}
        lacks = {
            subject: [name for name in self.sides if subject not in subjects[name]]
            for subject in sorted(set().union(*subjects.values()))
        }
        return {subject: names for subject, names in lacks.items() if names}

    def _examples(self) -> str:
        """The first subjects of every side's set."""
        named = {name: sorted(side.shard_set.scans(side.kind).subject.unique()) for name, side in self.sides.items()}
        return ", ".join(
            f"{name} has {len(subjects)} ({', '.join(subjects[:2])} ...)" for name, subjects in named.items()
        )

    def summary(self, split: str) -> str:
        """How many subjects of a split are paired, and which ones are left out for want of a side."""
        left_out = self.incomplete(split)
        text = f"{len(self.names(split))} subjects have {' and '.join(self.sides)}"
        if not left_out:
            return text
        named = [f"{subject} (no {', no '.join(lacks)})" for subject, lacks in left_out.items()]
        more = f" and {len(named) - MAX_NAMED_SUBJECTS} more" if len(named) > MAX_NAMED_SUBJECTS else ""
        return f"{text}; {len(left_out)} left out: {', '.join(named[:MAX_NAMED_SUBJECTS])}{more}"

    def runs(self, split: str) -> RunTable:
        """What the order needs of a split's subjects: each is a run of one frame, in a shard of its largest side."""
        subjects = self.names(split)
        largest = max(self.sides, key=lambda name: _window_bytes(self.sides[name]))
        own, shard = self.runs_of(split, largest), self.sides[largest].runs(split).shard
        return RunTable(
            scan_hash=hash_names(subjects),
            shard=np.array([shard[own[subject][0]] for subject in subjects]),
            num_frames=np.ones(len(subjects), dtype=np.int64),
            window_frames=1,
        )

    def runs_of(self, split: str, name: str) -> dict[str, np.ndarray]:
        """The runs of a side that have a window, by subject."""
        if (split, name) not in self._runs_of:
            side = self.sides[name]
            usable = np.flatnonzero(side.runs(split).num_slots)
            subjects = side.shard_set.runs(side.kind, [split]).subject
            by_subject = subjects.iloc[usable].groupby(subjects.iloc[usable]).indices
            runs_of = {str(subject): usable[rows] for subject, rows in by_subject.items()}
            is_shuffled = name == self.shuffled and split == "train"
            self._runs_of[split, name] = self._dealt_out(runs_of) if is_shuffled else runs_of
        return self._runs_of[split, name]

    @staticmethod
    def _dealt_out(runs_of: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The same subjects, each with the runs of the next one in the order of their hashes."""
        subjects = sorted(runs_of)
        order = [subjects[number] for number in np.argsort(hash_names(subjects), kind="stable")]
        return dict(zip(order, (runs_of[subject] for subject in [*order[1:], order[0]]), strict=True))

    def fetcher(self, config: DataConfig) -> PairFetcher:
        """A fetcher of all sides."""
        return PairFetcher({name: side.fetcher(config) for name, side in self.sides.items()})

    def reads(self, split: str, samples: Samples) -> dict[str, list[WindowRead]]:
        """Where each sample lies, by side."""
        return {name: side.reads(split, self._drawn(split, name, samples)) for name, side in self.sides.items()}

    def batch(self, split: str, samples: Samples, weight: np.ndarray, fetched: FetchedPairs) -> PairedBatch:
        """The batch of these samples, read as `fetched`."""
        sides = {
            name: side.batch(split, self._drawn(split, name, samples), weight, fetched.sides[name])
            for name, side in self.sides.items()
        }
        subjects = [self.names(split)[number] for number in samples.run]
        assert all(side.subjects == subjects for name, side in sides.items() if name != self.shuffled)
        return PairedBatch(
            sides=dict(sides),
            weight=torch.from_numpy(weight),
            sample_seed=torch.from_numpy(samples.seed),
            scan_ids=["+".join(scans) for scans in zip(*(side.scan_ids for side in sides.values()), strict=True)],
            subjects=subjects,
            first_frame=list(zip(*(side.first_frame for side in sides.values()), strict=True)),
        )

    def _drawn(self, split: str, name: str, samples: Samples) -> Samples:
        """The side's run and window of every subject: a function of the sample's seed."""
        table, runs_of, subjects = self.sides[name].runs(split), self.runs_of(split, name), self.names(split)
        drawn = mix(samples.seed, hash_name("run of", name))
        runs, first_frames = samples.run.copy(), samples.first_frame.copy()
        for row, number in enumerate(samples.run):
            own = runs_of[subjects[number]]
            runs[row] = own[int(drawn[row] % np.uint64(len(own)))]
            first_frames[row] = drawn_window(table, int(runs[row]), int(drawn[row]))
        return dataclasses.replace(samples, run=runs, first_frame=first_frames)


def _window_bytes(side: Windows) -> int:
    frame_type = np.dtype(side.shard_set.frame_type(side.kind))
    return side.window_frames * side.shard_set.frame_width(side.kind) * frame_type.itemsize
