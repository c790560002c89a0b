"""From a configuration to a fine-tuned, evaluated, registered model. `train` is called by every rank."""

from __future__ import annotations

import dataclasses

from finetune.config import FinetuneConfig
from finetune.tasks import task_module
from training import study


def train(config: FinetuneConfig) -> dict[str, object]:
    """The numbers of <run.folder>/metrics.json, on rank 0; empty on the others."""
    opened = task_module(config.task).open_study(config)
    return study.run(opened, config.train, config.run, identity=identity(config), register=config.register)


def identity(config: FinetuneConfig) -> dict[str, object]:
    """The configuration as plain mappings. When commits are saved and scored changes no number of a training, but under
    train.choose=best it decides which of them is chosen."""
    plain = dataclasses.asdict(config)
    rules = config.train.checkpoint
    chosen_by = {"every_steps": rules.every_steps, "best_metric": rules.best_metric, "best_is": rules.best_is}
    return plain | ({"chosen_by": chosen_by} if config.train.choose == "best" else {})
