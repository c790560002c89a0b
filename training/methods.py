"""What a paper's Methods say of a training: optimiser, schedule, precision, processes, and which weights were used.

Sentences cite by key (reports.methods). Knows no task.
"""

from __future__ import annotations

from configs.words import counted
from training.collectives import this_process
from training.config import ScheduleConfig, TrainConfig
from training.statistics import BootstrapConfig

OPTIMIZERS = {"adamw": "AdamW [@adamw]", "adam": "Adam [@adam]"}
PRECISIONS = {"fp32": "single precision", "bf16": "bfloat16 with weights and optimiser in single precision"}


def training_methods(config: TrainConfig, *, batch_size: int, weight_decay: float, step: int) -> str:
    """A paragraph about a training; `step` is the checkpoint that was evaluated."""
    optimizer, engine = config.optimizer, config.engine
    first, second = optimizer.betas
    ranks = counted(this_process().world_size, "process", "processes")
    zero = f" and DeepSpeed ZeRO stage {engine.zero_stage} [@zero]" if engine.kind == "deepspeed" else ""
    chosen = "the last checkpoint was evaluated"
    if config.choose == "best":
        chosen = f"the checkpoint with the {config.checkpoint.best_is} {config.checkpoint.best_metric} was evaluated"
    start = config.start.registered or config.start.checkpoint
    return (
        f"Training took {counted(config.steps, 'step')} of {batch_size} samples with {OPTIMIZERS[optimizer.kind]}: "
        f"learning rate {optimizer.learning_rate:g}, betas {first:g} and {second:g}, epsilon {optimizer.epsilon:g}, "
        f"weight decay {weight_decay:g} of matrices, gradients clipped to a norm of {optimizer.clip_norm:g}, "
        f"{_schedule(config.schedule)}. It ran in {PRECISIONS[engine.precision]} on {ranks} with PyTorch "
        f"[@pytorch]{zero}, seed {config.seed}"
        f"{f', from the weights {start}' if start else ''}; {chosen} (step {step})."
    )


def interval_methods(config: BootstrapConfig, *, strata: str) -> str:
    """A sentence about the intervals; `strata` says within what subjects were drawn, "" for nothing."""
    return (
        f"Intervals are {100 * config.confidence:g} % percentile intervals of {config.num_resamples:,} bootstrap "
        f"resamples of subjects{strata}, one fewer drawn than there are and rescaled [@rao_wu]; differences are paired."
    )


def _schedule(schedule: ScheduleConfig) -> str:
    warmup = f"{counted(schedule.warmup_steps, 'step')} of linear warm-up"
    if schedule.kind == "cosine":
        return f"{warmup}, then half a cosine [@sgdr] to {100 * schedule.final_share:g} % of the learning rate"
    if schedule.plateau is None:
        return f"{warmup}, then a constant learning rate"
    return (
        f"{warmup}, then the learning rate times {schedule.plateau.factor:g} whenever {schedule.plateau.metric} had "
        f"brought no new best in {counted(schedule.plateau.patience, 'evaluation')}, not below "
        f"{100 * schedule.final_share:g} %"
    )
