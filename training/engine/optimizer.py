"""The optimiser, and what it uses in a step: learning rates, weight decay and which groups are open."""

from __future__ import annotations

import math

import torch

from training.config import ScheduleConfig, TrainConfig
from training.task import ParameterGroup
from training.unfreezing import is_open


def make_optimizer(groups: list[ParameterGroup], config: TrainConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW with one param_group a ParameterGroup, in order; learning rates are set by `begin`."""
    return torch.optim.AdamW(
        [{"params": group.parameters, "weight_decay": group.weight_decay, "lr": 0.0} for group in groups],
        betas=config.optimizer.betas,
        eps=config.optimizer.epsilon,
        fused=device.type == "cuda",
    )


def open_groups(optimizer: torch.optim.Optimizer, groups: list[ParameterGroup], *, step: int, rate: float) -> None:
    """Set learning rate, weight decay and requires_grad of every group for the update of `step`."""
    for settings, group in zip(optimizer.param_groups, groups, strict=True):
        opened = is_open(group, step)
        settings["lr"] = rate * group.learning_rate_scale if opened else 0.0
        settings["weight_decay"] = group.weight_decay if opened else 0.0
        for parameter in group.parameters:
            parameter.requires_grad_(opened)


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
