"""Which parameters move at which step. Works under every ZeRO stage because nothing is ever added to the optimiser.

Flipping requires_grad after deepspeed.initialize is silently wrong (opened parameters never train, closed ones keep
moving under AdamW), so all groups are trainable when the engine is made; closed ones then have learning rate 0, weight
decay 0 and no gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from training.config import EvaluationConfig, PlateauConfig, plateau_problems
from training.errors import TrainingError
from training.plateau import AtPlateau, Watched, opening_step
from training.task import ParameterGroup, Task

Layers = Sequence[tuple[str, Sequence[nn.Module | nn.Parameter]]]  # top first, by name


@dataclass
class UnfreezingConfig:
    """When the layers of one encoder open, from the top down, and their learning rates as shares of the run's.

    They open at steps, or, where `plateau` is given, the top layer at the first plateau of a metric, the next layer at
    the second, and so on; the two keys of steps are then null.
    """

    first_layer_opens_at_step: int | None  # train.steps: never
    steps_per_layer: int | None  # 0: all layers open together
    plateau: PlateauConfig | None
    learning_rate_scale: float  # of the top layer
    depth_decay: float  # times this for every layer deeper


def unfreezing_problems(config: UnfreezingConfig, key: str, evaluation: EvaluationConfig) -> list[str]:
    """All problems of an unfreezing configuration; `key` is its full name in the composed configuration."""
    steps = {"first_layer_opens_at_step": config.first_layer_opens_at_step, "steps_per_layer": config.steps_per_layer}
    problems = [f"{key}.{name}: {value}; must be 0 or more" for name, value in steps.items() if (value or 0) < 0]
    wrong = [name for name, value in steps.items() if (value is None) != (config.plateau is not None)]
    if wrong:
        problems.append(f"{key}: give {' and '.join(steps)}, or plateau, and set what is not used to null")
    if config.plateau is not None:
        problems += plateau_problems(config.plateau, f"{key}.plateau", evaluation)
    for name, value in (("learning_rate_scale", config.learning_rate_scale), ("depth_decay", config.depth_decay)):
        if value <= 0:
            problems.append(f"{key}.{name}: {value}; must be above 0")
    return problems


def layer_groups(side: str, layers: Layers, config: UnfreezingConfig, *, weight_decay: float) -> list[ParameterGroup]:
    """Groups `<side>.<layer>` of an encoder's layers, each deeper one opening later and moving more slowly."""
    return [
        group
        for depth, (name, modules) in enumerate(layers)
        for group in split_decay(
            f"{side}.{name}",
            modules,
            learning_rate_scale=config.learning_rate_scale * config.depth_decay**depth,
            weight_decay=weight_decay,
            opens_at=_opening(config, depth),
        )
    ]


def _opening(config: UnfreezingConfig, depth: int) -> int | AtPlateau:
    if config.plateau is not None:
        return AtPlateau(config.plateau, number=depth + 1)
    assert config.first_layer_opens_at_step is not None
    assert config.steps_per_layer is not None
    return config.first_layer_opens_at_step + depth * config.steps_per_layer


def split_decay(
    name: str,
    modules: Iterable[nn.Module | nn.Parameter],
    *,
    learning_rate_scale: float,
    weight_decay: float,
    opens_at: int | AtPlateau,
) -> list[ParameterGroup]:
    """A group of matrices with weight decay and one of norms, biases and other vectors without; no empty ones."""
    parameters: dict[int, nn.Parameter] = {}
    for module in modules:
        for parameter in [module] if isinstance(module, nn.Parameter) else module.parameters():
            parameters[id(parameter)] = parameter
    matrices = [parameter for parameter in parameters.values() if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters.values() if parameter.ndim < 2]
    groups = [
        ParameterGroup(f"{name}", matrices, learning_rate_scale, weight_decay, opens_at),
        ParameterGroup(f"{name}/no_decay", vectors, learning_rate_scale, 0.0, opens_at),
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


def is_open(group: ParameterGroup, step: int, watched: Watched) -> bool:
    """True when the group moves in the update of `step`."""
    opened = opening_step(group.opens_at, watched)
    return opened is not None and step >= opened


def set_training_modes(module: nn.Module) -> None:
    """Training mode for what moves; evaluation mode for a module whose parameters are all closed, with all it contains:
    dropout is off there and statistics of norms stay as they are."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        module.eval()
        return
    module.training = True
    for child in module.children():
        set_training_modes(child)
