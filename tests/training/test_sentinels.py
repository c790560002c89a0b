"""The page of a run says what training watched, how often, and at which steps something was unusual."""

from __future__ import annotations

from configs.entry import compose
from configs.parse import parse
from pretrain.masked.config import PretrainConfig
from training.config import TrainConfig
from training.watch.sentinels import QUIET, sentinel_section


def config() -> TrainConfig:
    overrides = ["kind=bold", "shards=s", "run.folder=r", "train.steps=240", "train.spikes.window_steps=40"]
    return parse(compose("pretrain", [*overrides, "train.spikes.threshold=7.5"]), PretrainConfig).train


CALM = {
    "train/data_wait_share": [(step, 0.2) for step in range(20, 241, 20)],  # at the limit, not above
    "train/slowest_rank_lag": [(step, 0.3) for step in range(20, 241, 20)],
    "validation/embedding_collapsed": [(0, 0.0), (120, 0.0), (240, 0.0)],
}


def test_a_quiet_run_says_what_was_asked_how_often_and_that_nothing_was_unusual() -> None:
    section = sentinel_section(CALM, config())
    assert section.title == "Sentinels: nothing unusual"
    assert section.table[1:] == [
        ["loss spikes", QUIET, "220 steps", "a loss more than 7.5 robust deviations above the last 40 steps"],
        ["finite numbers", QUIET, "240 steps", "a loss or gradient that is not finite"],
        [
            "collapse of the embedding",
            QUIET,
            "3 evaluations",
            "rank or variance far below the untrained encoder's (report.sentinels)",
        ],
        ["data wait", QUIET, "12 intervals", "more than 20% of the step time spent waiting for data"],
        ["slow rank", QUIET, "12 intervals", "more than 30% longer than the median rank"],
    ]


def test_what_was_unusual_is_counted_with_its_steps() -> None:
    history = CALM | {
        "train/loss_spike_deviations": [(77, 9.31), (180, 12.0)],
        "train/data_wait_share": [(20, 0.31), (40, 0.1)],
        "train/slowest_rank_lag": [(step, 0.5) for step in range(20, 241, 20)],
        "validation/rest/embedding_collapsed": [(120, 1.0), (240, 0.0)],
    }
    section = sentinel_section(history, config())
    seen = {row[0]: row[1] for row in section.table[1:]}
    assert section.title == "Sentinels: 4 of 6 saw something"
    assert seen["loss spikes"] == "2 times: step 77 (9.3 deviations), step 180 (12.0 deviations)"
    assert seen["data wait"] == "1 time: step 20 (31%)"
    assert seen["collapse of rest"] == "1 time: step 120"
    assert seen["collapse of the embedding"] == "nothing unusual"
    assert seen["slow rank"].startswith("12 times: step 20 (50%), ")
    assert seen["slow rank"].endswith("step 160 (50%) and 4 more, in metrics.jsonl")


def test_a_run_shorter_than_the_window_of_spikes_does_not_claim_to_have_looked() -> None:
    short = config()
    short.steps = 20
    assert sentinel_section({}, short).table[1][1:3] == ["too few steps to tell", "0 steps"]
