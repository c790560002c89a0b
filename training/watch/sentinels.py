"""What a training watched, as a section of its page: what was unusual, how often, and at which steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from configs.words import counted
from reports.page import Section
from training.config import TrainConfig
from training.watch.progress import MUCH_LAG, MUCH_WAITING

History = Mapping[str, Sequence[tuple[int, float]]]  # (step, value) by metric

QUIET = "nothing unusual"
COLLAPSED = "embedding_collapsed"  # how such metrics end: 1 where an embedding is below its limits
NUM_SHOWN = 8


@dataclass(frozen=True)
class Sentinel:
    """One thing that is watched: what is unusual, how often that was asked, and where it was so."""

    name: str
    unusual: str
    num_asked: int
    each: str  # what it was asked once in
    seen: Sequence[str]


def sentinel_section(history: History, config: TrainConfig) -> Section:
    """A line per sentinel with how often and at which steps it saw something."""
    sentinels = list(_sentinels(history, config))
    num_alarmed = sum(bool(each.seen) for each in sentinels)
    rows = [[each.name, _said(each), counted(each.num_asked, each.each), each.unusual] for each in sentinels]
    found = f"{num_alarmed} of {len(sentinels)} saw something" if num_alarmed else QUIET.capitalize()
    return Section(
        f"Sentinels: {found.lower()}",
        table=[["sentinel", "saw", "asked", "what is unusual"], *rows],
        text="None of them changes the training, but a loss or gradient that is not finite ends it.",
    )


def _sentinels(history: History, config: TrainConfig) -> Iterator[Sentinel]:
    spikes, compared = config.spikes, max(0, config.steps - config.spikes.window_steps // 2)
    yield Sentinel(
        "loss spikes",
        f"a loss more than {spikes.threshold:g} robust deviations above the last {spikes.window_steps} steps",
        compared,
        "step",
        [f"step {step} ({value:.1f} deviations)" for step, value in history.get("train/loss_spike_deviations", ())],
    )
    yield Sentinel("finite numbers", "a loss or gradient that is not finite", config.steps, "step", [])
    for key, values in sorted(history.items()):
        if key.endswith(COLLAPSED):
            of_set = key.removesuffix(COLLAPSED).partition("/")[2].strip("/")
            yield Sentinel(
                f"collapse of {of_set or 'the embedding'}",
                "rank or variance far below the untrained encoder's (report.sentinels)",
                len(values),
                "evaluation",
                [f"step {step}" for step, value in values if value],
            )
    for name, key, limit, what in (
        ("data wait", "train/data_wait_share", MUCH_WAITING, "of the step time spent waiting for data"),
        ("slow rank", "train/slowest_rank_lag", MUCH_LAG, "longer than the median rank"),
    ):
        values = history.get(key, ())
        yield Sentinel(
            name,
            f"more than {limit:.0%} {what}",
            len(values),
            "interval",
            [f"step {step} ({value:.0%})" for step, value in values if value > limit],
        )


def _said(sentinel: Sentinel) -> str:
    """`2 times: step 40 (31%), step 60 (25%)`."""
    seen = sentinel.seen
    if not seen:
        return QUIET if sentinel.num_asked else f"too few {sentinel.each}s to tell"
    more = f" and {len(seen) - NUM_SHOWN} more, in metrics.jsonl" if len(seen) > NUM_SHOWN else ""
    return f"{counted(len(seen), 'time')}: {', '.join(seen[:NUM_SHOWN])}{more}"
