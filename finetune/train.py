"""From a configuration to a fine-tuned, evaluated, registered model. `train` is called by every rank."""

from __future__ import annotations

from typing import Any

from finetune.config import FinetuneConfig
from finetune.tasks import task_module
from training import study
from training.watch.progress import phase


def train(config: FinetuneConfig) -> dict[str, Any]:
    """The numbers of <run.folder>/metrics.json, on rank 0; empty on the others."""
    phase(f"opening {config.shards} and {config.encoder}")
    opened = task_module(config.task).open_study(config)
    return study.run(opened, config.train, config.run, identity=config, register=config.register)
