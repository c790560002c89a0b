"""From a configuration to a fine-tuned, evaluated, registered model: wires data, backbone, task and loop together.

`train` is an ordinary function; under several workers each rank calls it.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from brain_models import bundle
from brain_models.bundle import Bundle
from brain_models.space import BrainSpace
from cluster.storage.stores import store_for
from data_sharding.read.reader import BatchSource, ShardSet, Windows, open_set
from finetune.conclude import conclude
from finetune.config import FinetuneConfig
from finetune.errors import FinetuneError
from finetune.tasks.adhd_classification import AdhdClassification, build_model
from finetune.tasks.subject_prediction.labels import Labels, read_labels
from finetune.tasks.subject_prediction.probe import ProbeResult, start_head
from training.checkpoint import committed_folders, file_sha256
from training.collectives import from_main, this_process
from training.engine.base import own_device
from training.identity import claim
from training.loop import Services, fit
from training.registry import models as registry
from training.registry.seen_subjects import BEFORE, keep_seen, read_seen

GOLDEN = "golden.npy"  # of a bundle: a small file that other weights give another content


@dataclass(frozen=True)
class Backbone:
    """A backbone as a local bundle folder, with what its registry entry and its bundle say about its origin."""

    folder: Path
    tags: dict[str, str]
    seen: set[str] | None

    def load(self, space: BrainSpace) -> Bundle:
        """The bundle; of several BOLD stems, the one for `space` is named bold."""
        return bundle.load(self.folder).in_space("bold", space)


@dataclass(frozen=True)
class Setup:
    """What every stage of a run needs; the same on every rank."""

    config: FinetuneConfig
    shard_set: ShardSet
    labels: Labels
    backbone: Backbone

    def task(self) -> AdhdClassification:
        """A fresh task: the backbone under an untrained head."""
        return build_task(self.config, self.shard_set, self.labels, self.backbone.load(self.shard_set.space))

    def source(self, task: AdhdClassification) -> BatchSource:
        """This rank's view of the runs, a sample being as many frames as the task decides from."""
        windows = Windows(self.shard_set, kind="bold", window_frames=task.num_frames)
        return BatchSource(windows, self.config.data, rank=this_process().rank, world_size=this_process().world_size)


def train(config: FinetuneConfig) -> dict[str, object]:
    """The numbers of <run.folder>/metrics.json; every rank calls it, rank 0 writes and registers."""
    started = time.monotonic()
    shard_set = open_set(config.shards, scratch=config.run.scratch, split=config.data.split)
    labels = read_labels(shard_set.subjects, config.task.label, location=config.shards)
    setup = Setup(config, shard_set, labels, fetch_backbone(config))
    task = setup.task()
    is_new = claimed(config, setup.backbone)
    probe = start(task, setup) if is_new else None
    prepared = time.monotonic()
    source = setup.source(task)
    services = Services(config.run, identity(config), export=None, tags=lineage(setup))
    result = fit(task, source, config.train, services)
    seconds = {"start of the head": prepared - started, "training": result.seconds}
    return conclude(setup, result, probe=probe, tags=lineage(setup), seconds=seconds)


def claimed(config: FinetuneConfig, backbone: Backbone) -> bool:
    """True when the run begins, False when it goes on from a commit. Makes the run folder this run's own and notes in
    it whom the backbone has seen: an alias may have moved to another one by the time the run goes on."""
    store = store_for(config.run.folder)
    claim(store, identity(config))  # refuses the folder of another run
    # As rank 0 sees it: all begin, or all go on.
    is_new = not from_main(committed_folders(store) if this_process().is_main else None)
    if this_process().is_main and (is_new or not store.exists(BEFORE)):
        keep_seen(backbone.folder, store)
    return is_new


def start(task: AdhdClassification, setup: Setup) -> ProbeResult | None:
    """Start the head by a probe of the frozen encoder, unless it is to start at zero."""
    config = setup.config
    if config.task.probe is None:
        return None
    task.model.to(own_device())
    source = setup.source(task)
    try:
        batches = source.evaluation("train", limit=None)
        return start_head(task.model, batches, is_case_of=setup.labels.is_case_of, config=config.task.probe)
    finally:
        source.close()


def build_task(config: FinetuneConfig, shard_set: ShardSet, labels: Labels, backbone: Bundle) -> AdhdClassification:
    """The task on this backbone, the same on every rank; FinetuneError when set and backbone do not fit."""
    problems = fit_problems(config, shard_set, backbone)
    if problems:
        raise FinetuneError("; ".join(problems))
    torch.manual_seed(config.train.seed)
    return AdhdClassification(
        config.task,
        build_model(backbone, config.task, shard_set.atlases[config.task.atlas]),
        labels,
        train_subjects=sorted(set(shard_set.runs("bold", ["train"])["subject"])),
        batch_size=config.data.batch_size,
    )


def fit_problems(config: FinetuneConfig, shard_set: ShardSet, backbone: Bundle) -> list[str]:
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
    if config.task.atlas not in shard_set.atlases:
        problems.append(
            f"task.atlas={config.task.atlas}: {config.shards} holds {sorted(shard_set.atlases) or 'no atlas'}; choose "
            "one of them, or write the set with another atlas"
        )
    return problems


def fetch_backbone(config: FinetuneConfig) -> Backbone:
    """The backbone's bundle on this node: a folder as it is, a registered model downloaded."""
    local = Path(config.encoder)
    if (local / "model.yaml").exists():
        return Backbone(local, {}, read_seen(local))
    uri = config.train.tracking.uri
    folder = registry.pull(
        config.encoder, Path(config.run.scratch) / f"{config.run.name}-backbone-{this_process().rank:05d}", uri=uri
    )
    assert uri is not None  # pull has refused a missing registry
    return Backbone(folder, registry.version_tags(config.encoder, uri=uri), read_seen(folder))


def identity(config: FinetuneConfig) -> dict[str, object]:
    """The configuration as plain mappings. When commits are saved and scored changes no number of a training, but it
    decides which of them is chosen."""
    rules = config.train.checkpoint
    chosen_by = {"every_steps": rules.every_steps, "best_metric": rules.best_metric, "best_is": rules.best_is}
    return dataclasses.asdict(config) | ({"chosen_by": chosen_by} if config.choose == "best" else {})


def lineage(setup: Setup) -> dict[str, str]:
    """Where a fine-tuned model comes from, for the registry and the report."""
    config, shard_set = setup.config, setup.shard_set
    tags = {
        "callosum.part": "finetune",
        "callosum.task": config.task.name,
        "callosum.shards": config.shards,
        "callosum.set_fingerprint": shard_set.fingerprint,
        "callosum.space": shard_set.space.name,
        "callosum.alignment": str(shard_set.manifest.preprocessing["alignment"]),
        "callosum.space_fingerprint": shard_set.space.fingerprint,
        "callosum.atlas": config.task.atlas,
        "callosum.backbone": config.encoder,
        "callosum.backbone_output": file_sha256(setup.backbone.folder / GOLDEN),
    }
    passed_on = ("set_fingerprint", "checkpoint_hash", "git_commit", "masking")
    theirs = {name: setup.backbone.tags.get(f"callosum.{name}") for name in passed_on}
    return tags | {f"callosum.backbone_{name}": value for name, value in theirs.items() if value is not None}
