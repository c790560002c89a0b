"""Several sets in one run: the set of a step is a function of (seed, step), one set a step, consumed counts per set.

Exactly resumable as its sets are. Knows nothing of what the sets hold.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from data_sharding.errors import ShardError
from data_sharding.hashing import hash_name, mix, unit_interval
from data_sharding.read.batch import Batch
from data_sharding.read.reader import BatchSource

MAX_NAMED_SUBJECTS = 5


def sets_of_steps(weights: Mapping[str, float], *, seed: int, first_step: int, num_steps: int) -> list[str]:
    """The set of each step: drawn with these weights (of any sum), independent of what came before."""
    names = list(weights)
    edges = np.cumsum([weights[name] for name in names])
    drawn = unit_interval(mix(np.arange(first_step, first_step + num_steps), hash_name("set of a step", seed)))
    places = np.searchsorted(edges / edges[-1], drawn, side="right")
    return [names[place] for place in np.minimum(places, len(names) - 1)]


def split_conflicts(subjects: Mapping[str, pd.DataFrame]) -> list[str]:
    """What is wrong with the splits of sets used together: subjects that one set trains on and another holds out.

    `subjects` are the sets' subject tables, with a column split. Equal names count as one person: better so than not.
    """
    problems = []
    for (one, first), (other, second) in itertools.combinations(subjects.items(), 2):
        both = first["split"].to_frame("one").join(second["split"].rename("other"), how="inner")
        moved = both[both.one != both.other]
        if len(moved):
            named = ", ".join(
                f"{subject} ({row.one} in {one}, {row.other} in {other})"
                for subject, row in moved.head(MAX_NAMED_SUBJECTS).iterrows()
            )
            more = f" and {len(moved) - MAX_NAMED_SUBJECTS} more" if len(moved) > MAX_NAMED_SUBJECTS else ""
            problems.append(
                f"sets {one} and {other} split {len(moved)} of {len(both)} shared subjects differently: {named}{more}; "
                "write one of them again with splits.rule=threshold and the other's seed, or with splits.rule=file"
            )
    return problems


class JointSource:
    """One rank's view of several sets, each batch named after its set."""

    def __init__(self, sources: Mapping[str, BatchSource], weights: Mapping[str, float], *, seed: int) -> None:
        self.sources = dict(sources)
        self.weights = {name: weights[name] for name in sources}
        self.seed = seed
        parts = [f"{name} {source.fingerprint}" for name, source in self.sources.items()]
        self.fingerprint = f"{hash_name('joint', *parts):016x}"

    @property
    def num_micro_batches(self) -> int:
        return next(iter(self.sources.values())).num_micro_batches

    def initial_state(self) -> dict[str, object]:
        return {
            "fingerprint": self.fingerprint,
            "step": 0,
            "sets": {name: source.initial_state() for name, source in self.sources.items()},
        }

    def steps(self, state: Mapping[str, Any]) -> Iterator[tuple[list[Batch], dict[str, object]]]:
        """Endless: this rank's batches of one global step, all of one set, and the state to go on from after it."""
        if state.get("sets", {}).keys() != self.sources.keys():
            raise ShardError(
                f"the saved position is one of the sets {sorted(state.get('sets', {})) or 'of another kind of run'}, "
                f"this run reads {sorted(self.sources)}; resume with the same sets, or start a new run"
            )
        # own_part: a set that no step is of until the next commit must add up, too
        states = {name: source.own_part(state["sets"][name]) for name, source in self.sources.items()}
        with contextlib.ExitStack() as stack:
            streams = {
                name: stack.enter_context(contextlib.closing(source.steps(states[name])))  # type: ignore[type-var]
                for name, source in self.sources.items()
            }
            for step in itertools.count(int(state["step"])):
                (name,) = sets_of_steps(self.weights, seed=self.seed, first_step=step, num_steps=1)
                batches, states[name] = next(streams[name])
                after = {"fingerprint": self.fingerprint, "step": step + 1, "sets": dict(states)}
                yield [named(batch, name) for batch in batches], after

    def evaluation(self, split: str, *, limit: int | None) -> Iterator[Batch]:
        """This rank's share of a split of every set, set by set; `limit` is each set's own."""
        for name, source in self.sources.items():
            for batch in source.evaluation(split, limit=limit):
                yield named(batch, name)

    def merge_states(self, states: list[Mapping[str, Any]]) -> dict[str, object]:
        """The one state to store, from all ranks' states after the same step."""
        sets = {
            name: source.merge_states([state["sets"][name] for state in states])
            for name, source in self.sources.items()
        }
        return {**states[0], "sets": sets}

    def close(self) -> None:
        for source in self.sources.values():
            source.close()


def named(batch: Batch, name: str) -> Batch:
    """The batch, saying which set it is of."""
    batch.set_name = name
    return batch
