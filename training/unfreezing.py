"""Which parameters move at which step. Works under every ZeRO stage because nothing is ever added to the optimiser.

Flipping requires_grad after deepspeed.initialize is silently wrong (opened parameters never train, closed ones keep
moving under AdamW), so all groups are trainable when the engine is made; closed ones then have learning rate 0, weight
decay 0 and no gradient.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from training.errors import TrainingError
from training.task import ParameterGroup, Task


def split_decay(
    name: str,
    modules: Iterable[nn.Module | nn.Parameter],
    *,
    learning_rate_scale: float,
    weight_decay: float,
    opens_at_step: int,
) -> list[ParameterGroup]:
    """A group of matrices with weight decay and one of norms, biases and other vectors without; no empty ones."""
    parameters: dict[int, nn.Parameter] = {}
    for module in modules:
        for parameter in [module] if isinstance(module, nn.Parameter) else module.parameters():
            parameters[id(parameter)] = parameter
    matrices = [parameter for parameter in parameters.values() if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters.values() if parameter.ndim < 2]
    groups = [
        ParameterGroup(f"{name}", matrices, learning_rate_scale, weight_decay, opens_at_step),
        ParameterGroup(f"{name}/no_decay", vectors, learning_rate_scale, 0.0, opens_at_step),
    ]
    return [group for group in groups if group.parameters]


def checked_groups(task: Task) -> list[ParameterGroup]:
    """The task's groups, all trainable; TrainingError unless they hold every parameter exactly once."""
    groups = task.parameter_groups()
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    grouped = [id(parameter) for group in groups for parameter in group.parameters]
    twice = sorted({names.get(key, "?") for key in grouped if grouped.count(key) > 1})
    missing = sorted(name for key, name in names.items() if key not in set(grouped))
    if twice or missing:
        raise TrainingError(
            f"{type(task).__name__}.parameter_groups(): in no group: {missing or 'none'}, "
            f"in several: {twice or 'none'}; put every parameter in exactly one group (a frozen one in a group that "
            "opens at train.steps)"
        )
    if scalars := sorted(name for name, parameter in task.named_parameters() if parameter.ndim == 0):
        raise TrainingError(
            f"{type(task).__name__}: {', '.join(scalars)}: a parameter without dimensions cannot be divided among "
            "ranks; give it the shape [1]"
        )
    for group in groups:
        for parameter in group.parameters:
            parameter.requires_grad_(True)
    return groups


def is_open(group: ParameterGroup, step: int) -> bool:
    """True when the group moves in the update of `step`."""
    return step >= group.opens_at_step
