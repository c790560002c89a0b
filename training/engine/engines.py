"""How one update is made: PlainEngine in one process, DeepSpeedEngine over ranks. Same calls, same numbers."""

from __future__ import annotations

from training.config import EngineConfig, TrainConfig
from training.engine.base import Engine
from training.engine.plain import PlainEngine
from training.task import Task
from training.whole_step import check_micro_batches


def make_engine(task: Task, config: TrainConfig, *, num_micro_batches: int) -> Engine:
    """The engine that `config.engine` names, holding `task` and a fresh AdamW."""
    check_micro_batches(task, num_micro_batches)
    if config.engine.activation_checkpointing:
        task.checkpoint_activations()
    if config.engine.compile:
        task.compile(dynamic=False)
    if config.engine.kind == "plain":
        return PlainEngine(task, config)
    from training.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(task, config, num_micro_batches=num_micro_batches)


def checkpoint_bytes(task: Task, config: EngineConfig, *, num_ranks: int) -> int:
    """Bytes of a commit's tensors: weights, buffers that travel with them, AdamW's two moments.

    ZeRO 1 and 2 store the weights twice, as the model sees them and as AdamW's own; of ZeRO 3 every rank stores the
    buffers.
    """
    stage = config.zero_stage if config.kind == "deepspeed" else 0
    weights = sum(parameter.nbytes for parameter in task.parameters())
    buffers = sum(tensor.nbytes for tensor in task.state_dict().values()) - weights
    return weights * (4 if stage in (1, 2) else 3) + buffers * (num_ranks if stage == 3 else 1)


def scratch_bytes(task: Task, config: EngineConfig, *, num_ranks: int) -> int:
    """Bytes of a node's scratch folder: a checkpoint, its download, and its form for another number of ranks."""
    return 3 * checkpoint_bytes(task, config, num_ranks=num_ranks)
