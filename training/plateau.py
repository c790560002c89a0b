"""When a metric has stopped improving: a pure function of its values so far, which COMMIT.json keeps.

A resumed run therefore lowers its learning rate and opens its layers at the steps of the undisturbed one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from training.config import PlateauConfig
from training.errors import TrainingError

Watched = Mapping[str, Sequence[tuple[int, float]]]  # by metric: updates done and the value then, in order
NOTHING_WATCHED: Watched = MappingProxyType({})


@dataclass(frozen=True)
class AtPlateau:
    """The moment at which a metric has stopped improving for the `number`-th time, counted from 1."""

    rule: PlateauConfig
    number: int


def plateaus(config: PlateauConfig, watched: Watched) -> list[int]:
    """The steps at which `patience` evaluations in a row had brought no new best; each starts the count again.

    A value that is not a number is no new best. (PyTorch's ReduceLROnPlateau with one less patience.)
    """
    sign = 1 if config.best_is == "lowest" else -1
    best, num_without, steps = float("inf"), 0, []
    for step, value in watched.get(config.metric, ()):
        if sign * value < best - config.min_change:
            best, num_without = sign * value, 0
        else:
            num_without += 1
        if num_without == config.patience:
            steps.append(step)
            num_without = 0
    return steps


def opening_step(opens_at: int | AtPlateau, watched: Watched) -> int | None:
    """The step of the first update that moves a group; None while its plateau has not been reached."""
    if isinstance(opens_at, int):
        return opens_at
    reached = plateaus(opens_at.rule, watched)
    return reached[opens_at.number - 1] if len(reached) >= opens_at.number else None


class Watch:
    """The values so far of the metrics that schedule and openings depend on."""

    def __init__(self, rules: Iterable[PlateauConfig], *, start: Watched) -> None:
        self.values = {rule.metric: list(start.get(rule.metric, ())) for rule in rules}

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep what was evaluated after `step` updates; TrainingError when a watched metric is not among it."""
        for name, values in self.values.items():
            if name not in metrics:
                raise TrainingError(
                    f"step {step}: a plateau of {name} is waited for, but the evaluation gave {', '.join(metrics)}; "
                    "name one of these as the plateau's metric"
                )
            values.append((step, metrics[name]))

    def so_far(self) -> dict[str, list[tuple[int, float]]]:
        """A copy of the values, for a commit that is written later."""
        return {name: list(values) for name, values in self.values.items()}
