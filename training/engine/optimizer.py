"""The learning rate of a step: a pure function of configuration and step."""

from __future__ import annotations

import math

from training.config import ScheduleConfig


def learning_rate_share(config: ScheduleConfig, *, step: int, num_steps: int) -> float:
    """The share of the peak learning rate at `step` (counted from 0): linear warm-up, then constant or half a cosine
    down to `final_share` at the last step."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.kind == "constant":
        return 1.0
    num_decay_steps = max(1, num_steps - 1 - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / num_decay_steps)
    return config.final_share + (1 - config.final_share) * 0.5 * (1 + math.cos(math.pi * progress))
