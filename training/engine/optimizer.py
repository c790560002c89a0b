"""The optimiser, and what it uses in a step: learning rates, weight decay and which groups are open."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from training.config import PlateauConfig, ScheduleConfig, TrainConfig
from training.plateau import NOTHING_WATCHED, AtPlateau, Watched, plateaus
from training.task import ParameterGroup
from training.unfreezing import is_open, set_training_modes

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}


def make_optimizer(groups: list[ParameterGroup], config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """The optimiser with one param_group per ParameterGroup, in order; `begin_update` sets learning rates."""
    return OPTIMIZERS[config.optimizer.kind](
        [{"params": group.parameters, "weight_decay": group.weight_decay, "lr": 0.0} for group in groups],
        betas=config.optimizer.betas,
        eps=config.optimizer.epsilon,
        fused=device.type == "cuda",
    )


def plateau_rules(schedule: ScheduleConfig, groups: Iterable[ParameterGroup]) -> list[PlateauConfig]:
    """The plateaus that a run waits for."""
    of_groups = [group.opens_at.rule for group in groups if isinstance(group.opens_at, AtPlateau)]
    return [*([] if schedule.plateau is None else [schedule.plateau]), *of_groups]


def begin_update(
    task: nn.Module,
    optimizer: torch.optim.Optimizer,
    groups: list[ParameterGroup],
    *,
    rate: float,
    step: int,
    watched: Watched,
) -> None:
    """Set learning rate, weight decay, requires_grad and training mode of every group for the update of `step`."""
    for settings, group in zip(optimizer.param_groups, groups, strict=True):
        opened = is_open(group, step, watched)
        settings["lr"] = rate * group.learning_rate_scale if opened else 0.0
        settings["weight_decay"] = group.weight_decay if opened else 0.0
        for parameter in group.parameters:
            parameter.requires_grad_(opened)
    set_training_modes(task)


def learning_rate_at(config: TrainConfig, step: int, watched: Watched = NOTHING_WATCHED) -> float:
    """The learning rate of the update of `step`, counted from 0."""
    return config.optimizer.learning_rate * learning_rate_share(
        config.schedule, step=step, num_steps=config.steps, watched=watched
    )


def learning_rate_share(
    config: ScheduleConfig, *, step: int, num_steps: int, watched: Watched = NOTHING_WATCHED
) -> float:
    """The share of the peak learning rate at `step`: linear warm-up, then what the schedule says."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, num_steps - 1 - config.warmup_steps))
    return SCHEDULES[config.kind](config, progress, watched)


def _constant(config: ScheduleConfig, progress: float, watched: Watched) -> float:
    return 1.0


def _cosine(config: ScheduleConfig, progress: float, watched: Watched) -> float:
    """Half a cosine, from 1 down to `final_share` at the last step."""
    return config.final_share + (1 - config.final_share) * 0.5 * (1 + math.cos(math.pi * progress))


def _plateau(config: ScheduleConfig, progress: float, watched: Watched) -> float:
    """`factor` for every plateau so far, but not below `final_share`."""
    assert config.plateau is not None
    return max(config.final_share, config.plateau.factor ** len(plateaus(config.plateau, watched)))


SCHEDULES = {"cosine": _cosine, "constant": _constant, "plateau": _plateau}
