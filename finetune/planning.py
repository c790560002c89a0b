"""What a configuration would do, and everything wrong with it, without doing it."""

from __future__ import annotations

import math
from pathlib import Path

from brain_models.errors import BundleError
from cluster.config import Needs, validate_cluster
from cluster.errors import StorageError
from data_sharding.errors import ShardError
from data_sharding.read.reader import ShardSet, Windows, open_set
from data_sharding.read.shard_set import copied_index_bytes
from data_sharding.schema import MANIFEST
from data_sharding.splits import validate_splits
from finetune.config import FinetuneConfig
from finetune.errors import FinetuneError
from finetune.tasks.adhd_classification import METRICS, AdhdClassification
from finetune.tasks.subject_prediction.labels import Labels, read_labels
from finetune.train import build_task, fetch_backbone, fit_problems
from training.config import CheckpointConfig, validate_train
from training.engine.engines import checkpoint_bytes, scratch_bytes
from training.errors import RegistryError

MODEL = "model.yaml"  # of every bundle
SPLITS = ("train", "validation", "test")


def validate(config: FinetuneConfig) -> list[str]:
    """All problems of a configuration, those that need the shard set and the backbone included."""
    problems = (
        validate_cluster(config.cluster, "cluster")
        + validate_train(config.train, "train", num_workers=config.cluster.num_workers)
        + number_problems(config)
        + validate_splits(config.data.split, "data.split")
        + rule_problems(config)
    )
    try:
        shard_set = open_set(config.shards, split=config.data.split)
        labels = read_labels(shard_set.subjects, config.task.label, location=config.shards)
    except (ShardError, StorageError, FinetuneError) as error:
        return [*problems, str(error)]
    problems += split_problems(config, shard_set, labels)
    try:
        backbone = fetch_backbone(config).load(shard_set.space)
    except (RegistryError, BundleError) as error:
        is_named = isinstance(error, BundleError) or config.encoder.startswith("models:/")
        told = str(error) if is_named else f"no folder with a model.yaml, and {error}"
        return [*problems, f"encoder={config.encoder}: {told}"]
    problems += fit_problems(config, shard_set, backbone)
    if "bold" in backbone.stems and config.task.num_windows > 0:
        problems += length_problems(config, shard_set, backbone.stems["bold"].window_frames)
    return problems


def number_problems(config: FinetuneConfig) -> list[str]:
    """Problems of single numbers."""
    data, task = config.data, config.task
    positive = {
        "data.batch_size": data.batch_size,
        "data.micro_batch_size": data.micro_batch_size,
        "data.shuffle_shards": data.shuffle_shards,
        "task.num_windows": task.num_windows,
        "task.head.num_channels": task.head.num_channels,
        "task.unfreezing.depth_decay": task.unfreezing.depth_decay,
        "bootstrap.num_resamples": config.bootstrap.num_resamples,
    }
    problems = [f"{key}: {value}; must be above 0" for key, value in positive.items() if value <= 0]
    shares = {"bootstrap.confidence": config.bootstrap.confidence}
    problems += [f"{key}: {value}; must lie between 0 and 1" for key, value in shares.items() if not 0 < value < 1]
    if not 0 <= task.head.dropout < 1:
        problems.append(f"task.head.dropout: {task.head.dropout}; must be at least 0 and below 1")
    if data.batch_size < config.cluster.num_workers:
        problems.append(
            f"data.batch_size: {data.batch_size} for {config.cluster.num_workers} workers; give each at least one run"
        )
    probes = {"baselines": config.baselines} | ({"task.probe": task.probe} if task.probe else {})
    for key, probe in probes.items():
        if not probe.strengths or min(probe.strengths) <= 0:
            problems.append(f"{key}.strengths: {probe.strengths}; give at least one inverse penalty, all above 0")
        if probe.num_folds < 2:
            problems.append(f"{key}.num_folds: {probe.num_folds}; give at least 2")
    return problems


def rule_problems(config: FinetuneConfig) -> list[str]:
    """Settings that would let the test split, or nothing at all, choose the model."""
    evaluation, checkpoint = config.train.evaluation, config.train.checkpoint
    problems = []
    if "test" in (evaluation.split, *evaluation.final_splits):
        problems.append(
            "train.evaluation: the test split is looked at once, at the end, by finetune itself; use validation here"
        )
    if config.choose == "best" and checkpoint.every_steps % evaluation.every_steps:
        problems.append(
            f"train.checkpoint.every_steps: {checkpoint.every_steps} is no multiple of train.evaluation.every_steps "
            f"{evaluation.every_steps}, so commits have no score and choose=best cannot choose; make it one"
        )
    if config.choose == "best":
        problems += choice_problems(checkpoint, evaluation.split)
    if config.train.start.registered is not None:
        problems.append("train.start.registered: finetune takes its weights from encoder=...; set it to null")
    return problems


def choice_problems(checkpoint: CheckpointConfig, split: str) -> list[str]:
    """A best commit that nothing, or the wrong end of a metric, would choose."""
    metric, known = checkpoint.best_metric, [f"{split}/{name}" for name in METRICS]
    if metric is None:
        return [f"train.checkpoint.best_metric: null with choose=best; name one, e.g. {split}/auroc"]
    if metric not in known:
        return [f"train.checkpoint.best_metric: {metric} is no metric of this task; choose from {', '.join(known)}"]
    best = "lowest" if metric.endswith("/loss") else "highest"
    if checkpoint.best_is != best:
        return [f"train.checkpoint.best_is: {checkpoint.best_is}, but the best {metric} is the {best}; set it so"]
    return []


def split_problems(config: FinetuneConfig, shard_set: ShardSet, labels: Labels) -> list[str]:
    """Splits without labelled cases or controls."""
    problems = []
    for split in SPLITS:
        subjects = {subject for subject in shard_set.runs("bold", [split])["subject"] if subject in labels.is_case_of}
        num_cases = sum(labels.is_case_of[subject] for subject in subjects)
        needed = 2 if split == "train" else 1
        if min(num_cases, len(subjects) - num_cases) < needed:
            problems.append(
                f"shards={config.shards}: split '{split}' has {num_cases} cases and {len(subjects) - num_cases} "
                f"controls with a BOLD run; at least {needed} of each are needed: split anew (data_sharding splits.*)"
            )
    return problems


def length_problems(config: FinetuneConfig, shard_set: ShardSet, window_frames: int) -> list[str]:
    """A decision that needs more frames than the runs of a split have."""
    windows, needed = config.task.num_windows, config.task.num_windows * window_frames
    problems = []
    for split in SPLITS:
        runs = shard_set.runs("bold", [split])
        longest = int(runs["num_frames"].max()) if len(runs) else needed
        if longest < needed:
            problems.append(
                f"task.num_windows: {windows} windows of {window_frames} frames are {needed}; the longest run of "
                f"'{split}' has {longest}: use at most {longest // window_frames}"
            )
    return problems


def plan(config: FinetuneConfig) -> str:
    """What would happen: subjects, samples, steps, bytes, parameters by the step they open at, one line each."""
    shard_set = open_set(config.shards, split=config.data.split)
    labels = read_labels(shard_set.subjects, config.task.label, location=config.shards)
    task = build_task(config, shard_set, labels, fetch_backbone(config).load(shard_set.space))
    runs = shard_set.runs("bold", ["train"])
    samples = Windows(shard_set, kind="bold", window_frames=task.num_frames).runs("train").num_samples
    too_short = int((runs["num_frames"] < task.num_frames).sum())
    drawn = config.train.steps * config.data.batch_size
    sample_bytes = task.num_frames * shard_set.space.num_voxels
    share = math.ceil(config.data.batch_size / config.cluster.num_workers)
    saved = checkpoint_bytes(task, config.train.engine, num_ranks=config.cluster.num_workers)
    lines = {
        "set": f"{config.shards}, space {shard_set.space.name}, {shard_set.space.num_voxels:,} voxels",
        "labels": f"{sum(labels.is_case_of.values()):,} cases, {len(labels.is_case_of):,} labelled, "
        f"{labels.num_unlabelled:,} without a label are never used",
        "samples an epoch": f"{samples:,} of {task.num_frames} frames ({config.task.num_windows} windows); "
        f"{too_short:,} of {len(runs):,} training runs are too short",
        "steps": f"{config.train.steps:,} of {config.data.batch_size} runs: {drawn / max(samples, 1):.1f} epochs",
        "bytes read": f"{drawn * sample_bytes:,} ({sample_bytes:,} a sample)",
        "a checkpoint": f"{saved / 2**20:,.1f} MiB, the last {config.train.checkpoint.keep_last} kept",
        **{f"opens at step {step}": text for step, text in openings(task, config.train.steps).items()},
        "workers": f"{config.cluster.num_workers} ({config.cluster.kind}), "
        f"{math.ceil(share / config.data.micro_batch_size)} forward passes a step on each",
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())


def needs(config: FinetuneConfig) -> Needs:
    """What a run needs of a cluster."""

    def scratch() -> int:
        shard_set = open_set(config.shards, split=config.data.split)
        labels = read_labels(shard_set.subjects, config.task.label, location=config.shards)
        task = build_task(config, shard_set, labels, fetch_backbone(config).load(shard_set.space))
        run = scratch_bytes(task, config.train.engine, num_ranks=config.cluster.num_workers)
        return run + copied_index_bytes(config.shards)

    return Needs(
        results=config.run.folder,
        cluster=config.cluster,
        inputs={config.shards: MANIFEST} | local_bundles([config.encoder]),
        scratch=config.run.scratch,
        scratch_bytes=scratch,
        cache=(config.data.cache_folder, config.data.cache_bytes) if config.data.cache_folder else None,
        tracking=config.train.tracking.uri,
    )


def local_bundles(encoders: list[str]) -> dict[str, str]:
    """The encoders that are bundle folders here, each with a file that it holds."""
    return {encoder: MODEL for encoder in encoders if (Path(encoder) / MODEL).exists()}


def openings(task: AdhdClassification, num_steps: int) -> dict[int, str]:
    """Parameters by the step at which they start to move; those that never do are said so."""
    by_step: dict[int, list[str]] = {}
    for group in task.parameter_groups():
        size = sum(parameter.numel() for parameter in group.parameters)
        rate = f"{group.name} ({size:,} parameters, {group.learning_rate_scale:.2g} of the learning rate)"
        assert isinstance(group.opens_at, int)  # UnfreezingConfig of this task knows steps only
        by_step.setdefault(group.opens_at, []).append(rate)
    return {
        step: ", ".join(names) + (" — never, the run ends before" if step >= num_steps else "")
        for step, names in sorted(by_step.items())
    }
