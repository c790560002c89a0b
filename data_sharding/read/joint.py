"""Several sets in one run: the set of a step is a function of (seed, step), one set a step, consumed counts per set.

Exactly resumable as its sets are. Knows nothing of what the sets hold.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from data_sharding.errors import ShardError
from data_sharding.hashing import hash_name, mix, unit_interval
from data_sharding.read.batch import AnyBatch
from data_sharding.read.reader import BatchSource


def sets_of_steps(weights: Mapping[str, float], *, seed: int, first_step: int, num_steps: int) -> list[str]:
    """The set of each step: drawn with these weights (of any sum), independent of what came before."""
    names = list(weights)
    edges = np.cumsum([weights[name] for name in names])
    drawn = unit_interval(mix(np.arange(first_step, first_step + num_steps), hash_name("set of a step", seed)))
    numbers = np.searchsorted(edges / edges[-1], drawn, side="right")
    return [names[number] for number in np.minimum(numbers, len(names) - 1)]


class JointSource:
    """One rank's view of several sets, each batch named after its set."""

    def __init__(self, sources: Mapping[str, BatchSource], weights: Mapping[str, float], *, seed: int) -> None:
        self.sources = dict(sources)
        self.weights = {name: weights[name] for name in sources}
        self.seed = seed
        described = [f"{name} {source.fingerprint}" for name, source in self.sources.items()]
        self.fingerprint = f"{hash_name('joint', *described):016x}"

    @property
    def num_micro_batches(self) -> int:
        return next(iter(self.sources.values())).num_micro_batches

    def initial_state(self) -> dict[str, object]:
        return {
            "fingerprint": self.fingerprint,
            "step": 0,
            "sets": {name: source.initial_state() for name, source in self.sources.items()},
        }

    def steps(self, state: Mapping[str, Any]) -> Iterator[tuple[list[AnyBatch], dict[str, object]]]:
        """Endless: this rank's batches of one global step, all of one set, and the state to resume from after it."""
        if state.get("sets", {}).keys() != self.sources.keys():
            raise ShardError(
                f"the saved position belongs to the sets {sorted(state.get('sets', {})) or 'of another kind of run'}, "
                f"this run reads {sorted(self.sources)}; resume with the same sets, or start a new run"
            )
        # Of all sets: the digests of one that no step reads before the next commit must add up, too.
        states = {name: source.state_of_rank(state["sets"][name]) for name, source in self.sources.items()}
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

    def evaluation(self, split: str, *, limit: int | None) -> Iterator[AnyBatch]:
        """This rank's share of a split of every set, set by set; `limit` applies to each set."""
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


def named(batch: Any, name: str) -> Any:
    """The batch with the name of its set."""
    batch.set_name = name
    return batch
