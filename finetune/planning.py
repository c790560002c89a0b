"""What a fine-tuning would do, and everything wrong with its configuration, without doing it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.config import Needs, validate_cluster
from cluster.storage.files import folder_problems
from configs.words import aligned, next_command
from data_sharding.read.shard_set import copied_index_bytes
from data_sharding.splits import validate_splits
from finetune.config import FinetuneConfig
from finetune.errors import FinetuneError
from finetune.tasks import task_module
from training.config import CheckpointConfig, validate_train
from training.engine.engines import scratch_bytes


def validate(config: FinetuneConfig) -> list[str]:
    """All problems of a configuration, those that need the shard set and the backbone included."""
    problems = (
        validate_cluster(config.cluster, "cluster")
        + folder_problems(config.run.folder, "run.folder")
        + validate_train(config.train, "train", num_workers=config.cluster.num_workers)
        + number_problems(config)
        + validate_splits(config.data.split, "data.split")
    )
    try:
        module = task_module(config.task)
        found = module.validate(config)
        return problems + rule_problems(config) + found
    except FinetuneError as error:
        return [*problems, str(error)]


def number_problems(config: FinetuneConfig) -> list[str]:
    """Problems of single numbers."""
    data = config.data
    positive = {
        "data.batch_size": data.batch_size,
        "data.micro_batch_size": data.micro_batch_size,
        "data.shuffle_shards": data.shuffle_shards,
        "bootstrap.num_resamples": config.bootstrap.num_resamples,
    }
    problems = [f"{key}: {value}; must be above 0" for key, value in positive.items() if value <= 0]
    if not 0 < config.bootstrap.confidence < 1:
        problems.append(f"bootstrap.confidence: {config.bootstrap.confidence}; must lie between 0 and 1")
    if data.batch_size < config.cluster.num_workers:
        problems.append(
            f"data.batch_size: {data.batch_size} for {config.cluster.num_workers} workers; give each at least one run"
        )
    return problems


def rule_problems(config: FinetuneConfig) -> list[str]:
    """Settings that would let the test split, or nothing at all, choose the model."""
    evaluation, checkpoint = config.train.evaluation, config.train.checkpoint
    problems = []
    if evaluation.split == "test":
        problems.append("train.evaluation.split: the test split is looked at once, at the end; use validation here")
    if missing := {"validation", "test"}.difference(evaluation.final_splits):
        problems.append(
            f"train.evaluation.final_splits: {evaluation.final_splits} lacks {', '.join(sorted(missing))}; results are "
            "of the test split, and what is chosen is chosen on validation"
        )
    if config.train.choose == "best":
        if checkpoint.every_steps % evaluation.every_steps:
            problems.append(
                f"train.checkpoint.every_steps: {checkpoint.every_steps} is no multiple of "
                f"train.evaluation.every_steps {evaluation.every_steps}, so commits have no score and "
                "train.choose=best cannot choose; make it one"
            )
        problems += choice_problems(config, checkpoint, evaluation.split)
    if config.train.start.registered is not None:
        problems.append("train.start.registered: finetune takes its weights from encoder=...; set it to null")
    champion = config.register.champion if config.register else None
    known = [metric.name for metric in task_module(config.task).metrics(config)]
    if champion is not None and champion.metric not in known:
        problems.append(f"register.champion.metric: {champion.metric} is not one of {', '.join(known)}")
    return problems


def choice_problems(config: FinetuneConfig, checkpoint: CheckpointConfig, split: str) -> list[str]:
    """A best commit that nothing, or the wrong end of a metric, would choose."""
    best_is = {f"{split}/{metric.name}": metric.best_is for metric in task_module(config.task).metrics(config)}
    best_is = {f"{split}/loss": "lowest"} | best_is
    name = checkpoint.best_metric
    if name is None:
        return [f"train.checkpoint.best_metric: null with train.choose=best; name one of {', '.join(best_is)}"]
    if name not in best_is:
        return [f"train.checkpoint.best_metric: {name} is no metric of this task; choose from {', '.join(best_is)}"]
    if checkpoint.best_is != best_is[name]:
        return [
            f"train.checkpoint.best_is: {checkpoint.best_is}, but the best {name} is the {best_is[name]}; set it so"
        ]
    return []


def plan(config: FinetuneConfig) -> str:
    """What would happen, one line each."""
    lines = task_module(config.task).plan(config)
    return aligned(lines.items())


def needs(config: FinetuneConfig) -> Needs:
    """What a run needs of a cluster."""

    def scratch() -> int:
        task = task_module(config.task).open_study(config).make_task()
        run = scratch_bytes(task, config.train.engine, num_ranks=config.cluster.num_workers)
        return run + copied_index_bytes(config.shards)

    return Needs(
        results=config.run.folder,
        cluster=config.cluster,
        inputs=task_module(config.task).inputs(config),
        scratch=config.run.scratch,
        scratch_bytes=scratch,
        cache=(config.data.cache_folder, config.data.cache_bytes) if config.data.cache_folder else None,
        tracking=config.train.tracking.uri,
        contents=lambda: task_module(config.task).contents(config),
    )


def following(config: FinetuneConfig, numbers: Mapping[str, Any]) -> str | None:
    """The command to type after a finished run: the registered model is asked about scans."""
    registered = numbers["registered"]
    if not registered:
        return None
    model, answers = f"registered_model=models:/{registered[0]}", f"out={config.run.folder.rstrip('/')}-predictions.csv"
    command = next_command("finetune.predict", model, answers, f"tracking={config.train.tracking.uri}")
    return f"{command} scans=[<files or folders>]"
