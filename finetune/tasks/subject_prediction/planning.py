"""What a configuration of subject prediction would do, and everything wrong with it, without doing it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from brain_models.bundle import Bundle
from brain_models.errors import BundleError
from cluster.errors import StorageError
from configs.words import size_of
from data_sharding.errors import ShardError
from data_sharding.read.reader import ShardSet, Windows, open_set
from data_sharding.schema import MANIFEST
from finetune.backbone import GOLDEN, fetch_backbone, local_bundles
from finetune.config import FinetuneConfig
from finetune.errors import FinetuneError
from finetune.tasks import parse_task
from finetune.tasks.subject_prediction.config import Config
from finetune.tasks.subject_prediction.labels import ClassLabel, Labels, read_labels
from finetune.tasks.subject_prediction.scores import CLASS_METRICS, VALUE_METRICS
from finetune.tasks.subject_prediction.study import SubjectStudy
from training.checkpoint import file_sha256
from training.engine.engines import checkpoint_bytes
from training.errors import RegistryError
from training.statistics import Metric
from training.task import Task
from training.unfreezing import unfreezing_problems

SPLIT_KEYS = "other splits (data.split, or data_sharding splits.*)"
ALL_SPLITS = ("train", "validation", "test")


def metrics(config: FinetuneConfig) -> Sequence[Metric]:
    """The numbers of a model, the most important first."""
    return CLASS_METRICS if isinstance(parse_task(config.task, Config).label, ClassLabel) else VALUE_METRICS


def open_study(config: FinetuneConfig) -> SubjectStudy:
    """The study; FinetuneError when set, labels and backbone do not fit."""
    task = parse_task(config.task, Config)
    shard_set = open_set(config.shards, scratch=config.run.scratch, split=config.data.split)
    labels = read_labels(shard_set.subjects, task.label, location=config.shards)
    backbone = fetch_backbone(config)
    if problems := fit_problems(config, task, shard_set, backbone.load(shard_set.space)):
        raise FinetuneError("; ".join(problems))
    return SubjectStudy(config, task, shard_set, labels, backbone)


def validate(config: FinetuneConfig) -> list[str]:
    """All problems of the task's numbers, of the labels in the set, and of the backbone for this set."""
    try:
        task = parse_task(config.task, Config)
    except FinetuneError as error:
        return [str(error)]
    problems = number_problems(task)
    problems += unfreezing_problems(task.unfreezing, "task.unfreezing", config.train.evaluation)
    try:
        shard_set = open_set(config.shards, split=config.data.split)
        labels = read_labels(shard_set.subjects, task.label, location=config.shards)
    except (ShardError, StorageError, FinetuneError) as error:
        return [*problems, str(error)]
    problems += split_problems(config, shard_set, labels)
    try:
        backbone = fetch_backbone(config).load(shard_set.space)
    except (RegistryError, BundleError) as error:
        is_named = isinstance(error, BundleError) or config.encoder.startswith("models:/")
        shown = str(error) if is_named else f"no folder with a model.yaml, and {error}"
        return [*problems, f"encoder={config.encoder}: {shown}"]
    problems += fit_problems(config, task, shard_set, backbone)
    if "bold" in backbone.stems and task.num_windows > 0:
        problems += length_problems(task, shard_set, backbone.stems["bold"].window_frames)
    return problems


def tested_subjects(config: FinetuneConfig) -> list[str]:
    """The labelled subjects of the test split."""
    return tested_labels(config)[0]


def tested_labels(config: FinetuneConfig) -> tuple[list[str], Labels]:
    """The same, and the labels of the set."""
    shard_set = open_set(config.shards, split=config.data.split)
    labels = read_labels(shard_set.subjects, parse_task(config.task, Config).label, location=config.shards)
    return sorted(set(shard_set.runs("bold", ["test"])["subject"]) & labels.truth_of.keys()), labels


def unscored_problems(config: FinetuneConfig, metric: str) -> list[str]:
    """A metric of pairs within sites, where no site of the test split has such a pair."""
    subjects, labels = tested_labels(config)
    return pair_problems(metric, *labels.rows(subjects))


def pair_problems(metric: str, is_case: np.ndarray, sites: np.ndarray) -> list[str]:
    """The same from labels and sites."""
    if metric != "within_site_auroc" or set(sites[is_case]) & set(sites[~is_case]):
        return []
    return [
        "metric: within_site_auroc, but no site of the test split has both cases and controls; use metric=auroc, or "
        f"{SPLIT_KEYS}"
    ]


def number_problems(task: Config) -> list[str]:
    """Problems of single numbers."""
    positive = {
        "task.num_windows": task.num_windows,
        "task.head.num_channels": task.head.num_channels,
        "task.head_learning_rate_scale": task.head_learning_rate_scale,
    }
    problems = [f"{key}: {value}; must be above 0" for key, value in positive.items() if value <= 0]
    if not 0 <= task.head.dropout < 1:
        problems.append(f"task.head.dropout: {task.head.dropout}; must be at least 0 and below 1")
    linear = {"task.baselines": task.baselines} | ({"task.probe": task.probe} if task.probe else {})
    for key, fit in linear.items():
        if not fit.strengths or min(fit.strengths) <= 0:
            problems.append(f"{key}.strengths: {fit.strengths}; give at least one inverse penalty, all above 0")
        if fit.num_folds < 2:
            problems.append(f"{key}.num_folds: {fit.num_folds}; give at least 2")
    return problems


def fit_problems(config: FinetuneConfig, task: Config, shard_set: ShardSet, backbone: Bundle) -> list[str]:
    """Why this backbone cannot be adapted on this set; empty when it can."""
    if "bold" not in backbone.stems:
        return [
            f"encoder={config.encoder}: knows {sorted(backbone.stems)}, this task needs bold; give a BOLD backbone "
            "(python -m pretrain kind=bold)"
        ]
    problems = []
    theirs, ours = backbone.stems["bold"].space, shard_set.space
    if theirs.fingerprint != ours.fingerprint:
        problems.append(
            f"encoder={config.encoder}: was trained on space {theirs.name} ({theirs.num_voxels} voxels, "
            f"{theirs.fingerprint[:12]}), {config.shards} is in {ours.name} ({ours.num_voxels} voxels, "
            f"{ours.fingerprint[:12]}); shard the scans in the backbone's space, or pretrain on this one"
        )
    if task.atlas not in shard_set.atlases:
        problems.append(
            f"task.atlas={task.atlas}: {config.shards} holds {sorted(shard_set.atlases) or 'no atlas'}; choose one of "
            "them, or write the set with another atlas"
        )
    return problems


def split_problems(config: FinetuneConfig, shard_set: ShardSet, labels: Labels) -> list[str]:
    """Splits with too few labelled subjects, or without both classes."""
    problems = []
    is_classes = all(isinstance(truth, bool) for truth in labels.truth_of.values())
    for split in ALL_SPLITS:
        subjects = {subject for subject in shard_set.runs("bold", [split])["subject"] if subject in labels.truth_of}
        needed = 2 if split == "train" else 1
        num_cases = sum(bool(labels.truth_of[subject]) for subject in subjects)
        if is_classes and min(num_cases, len(subjects) - num_cases) < needed:
            problems.append(
                f"shards={config.shards}: split '{split}' has {num_cases} cases and {len(subjects) - num_cases} "
                f"controls with a BOLD run; at least {needed} of each are needed: choose {SPLIT_KEYS}"
            )
        elif len(subjects) < needed:
            problems.append(
                f"shards={config.shards}: split '{split}' has {len(subjects)} labelled subjects with a BOLD run; at "
                f"least {needed} are needed: choose {SPLIT_KEYS}"
            )
    return problems


def length_problems(task: Config, shard_set: ShardSet, window_frames: int) -> list[str]:
    """A prediction that needs more frames than the runs of a split have."""
    windows, needed = task.num_windows, task.num_windows * window_frames
    problems = []
    for split in ALL_SPLITS:
        runs = shard_set.runs("bold", [split])
        longest = int(runs["num_frames"].max()) if len(runs) else needed
        if longest < needed:
            problems.append(
                f"task.num_windows: {windows} windows of {window_frames} frames are {needed}; the longest run of "
                f"'{split}' has {longest}: use at most {longest // window_frames}"
            )
    return problems


def plan(config: FinetuneConfig) -> dict[str, str]:
    """What would happen: subjects, samples, steps, bytes, and parameters by the step they open at."""
    study = open_study(config)
    task, labels, shard_set = study.make_task(), study.labels, study.shard_set
    runs = shard_set.runs("bold", ["train"])
    samples = Windows(shard_set, kind="bold", window_frames=task.num_frames).runs("train").num_samples
    too_short = int((runs["num_frames"] < task.num_frames).sum())
    drawn = config.train.steps * config.data.batch_size
    sample_bytes = task.num_frames * shard_set.space.num_voxels
    share = math.ceil(config.data.batch_size / config.cluster.num_workers)
    saved = checkpoint_bytes(task, config.train.engine, num_ranks=config.cluster.num_workers)
    truth = list(labels.truth_of.values())
    shown = f"{sum(truth):,} cases" if isinstance(study.config.label, ClassLabel) else f"{min(truth)} to {max(truth)}"
    return {
        "set": f"{config.shards}, space {shard_set.space.name}, {shard_set.space.num_voxels:,} voxels",
        "labels": f"{shown}, {len(truth):,} labelled, {labels.num_unlabelled:,} without a label are never used",
        "samples an epoch": f"{samples:,} of {task.num_frames} frames ({task.num_windows} windows); "
        f"{too_short:,} of {len(runs):,} training runs are too short",
        "steps": f"{config.train.steps:,} of {config.data.batch_size} runs: {drawn / max(samples, 1):.1f} epochs",
        "bytes read": f"{size_of(drawn * sample_bytes)} ({size_of(sample_bytes)} per sample)",
        "a checkpoint": f"{size_of(saved)}, the last {config.train.checkpoint.keep_last} kept",
        **{f"opens at {moment}": text for moment, text in openings(task, config.train.steps).items()},
        "workers": f"{config.cluster.num_workers} ({config.cluster.kind}), "
        f"{math.ceil(share / config.data.micro_batch_size)} forward passes per step on each",
    }


def openings(task: Task, num_steps: int) -> dict[str, str]:
    """Parameters by the moment from which they move; those that never do are named as such."""
    by_moment: dict[str, list[str]] = {}
    ending = {}
    for group in task.parameter_groups():
        at = group.opens_at
        moment = f"step {at}" if isinstance(at, int) else f"plateau {at.number} of {at.rule.metric}"
        ending[moment] = " — never, the run ends before" if isinstance(at, int) and at >= num_steps else ""
        size = sum(parameter.numel() for parameter in group.parameters)
        rate = f"{group.name} ({size:,} parameters, {group.learning_rate_scale:.2g} of the learning rate)"
        by_moment.setdefault(moment, []).append(rate)
    return {moment: ", ".join(names) + ending[moment] for moment, names in by_moment.items()}


def inputs(config: FinetuneConfig) -> dict[str, str | None]:
    """What a run reads: locations, each with an object that it holds."""
    return {config.shards: MANIFEST, **local_bundles([config.encoder])}


def contents(config: FinetuneConfig) -> Mapping[str, str]:
    """Hashes of what a run reads now, by their names in its lineage."""
    found = {"callosum.set_fingerprint": open_set(config.shards, split=config.data.split).fingerprint}
    if (golden := Path(config.encoder) / GOLDEN).exists():  # a registered version cannot change, a folder can
        found["callosum.backbone_output"] = file_sha256(golden)
    return found
