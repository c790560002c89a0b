"""Every shipped YAML composes; parse() reports every problem with its full key."""

from dataclasses import dataclass
from typing import Literal

import pytest

from configs.parse import ConfigError, parse


@dataclass
class Optimizer:
    learning_rate: float
    betas: tuple[float, float]


@dataclass
class Job:
    name: str
    steps: int
    engine: Literal["plain", "zero2"]
    optimizer: Optimizer
    note: str | None


GOOD = {
    "name": "a",
    "steps": 3,
    "engine": "plain",
    "optimizer": {"learning_rate": 1, "betas": [0.9, 0.95]},
    "note": None,
}


def test_a_good_mapping_becomes_dataclasses_and_an_int_serves_as_float() -> None:
    job = parse(GOOD, Job)
    assert job == Job("a", 3, "plain", Optimizer(1.0, (0.9, 0.95)), None)
    assert isinstance(job.optimizer.learning_rate, float)


def test_unknown_missing_and_mistyped_keys_are_reported_together_with_full_names() -> None:
    raw = {
        "name": "???",
        "steps": True,
        "engine": "zero",
        "optimizer": {"learning_rte": 0.1, "betas": [0.9]},
        "note": None,
    }
    with pytest.raises(ConfigError) as caught:
        parse(raw, Job)
    message = str(caught.value)
    assert message.startswith("6 problems")
    assert "name: required; add name=<str>" in message
    assert "steps: expected int, got True (bool)" in message
    assert "engine: 'zero' is not one of plain, zero2, did you mean zero2?" in message
    assert "optimizer.learning_rte: unknown key, did you mean optimizer.learning_rate?" in message
    assert "optimizer.learning_rate: missing; add optimizer.learning_rate=<float>" in message
    assert "optimizer.betas: expected 2 values, got 1" in message
