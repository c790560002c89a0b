"""From a configuration to a registered backbone: wires the shard set, the task, the loop and the registry together.

`train` is an ordinary function; under several workers each rank calls it.
"""

import dataclasses
import itertools
import json
import logging
import shutil
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from brain_models import bundle
from brain_models.bundle import Bundle, StemSpec
from cluster.storage.stores import store_for
from pretrain.baselines.references import fit_references, voxel_statistics
from pretrain.masked.config import PretrainConfig
from pretrain.masked.examined import WEIGHTS, save_weights
from pretrain.masked.masked_volumes import MaskedVolumes
from pretrain.masked.sets import OpenedSet, open_sets, open_source, training_subset
from pretrain.masked.untrained import open_sentinels
from pretrain.report.tables import Table, as_report, reconstruction_table
from training.collectives import this_process
from training.loop import FitResult, Services, fit
from training.registry import models as registry
from training.registry.seen_subjects import overlap, seen_before, write_seen
from training.task import Task

log = logging.getLogger(__name__)


def train(config: PretrainConfig) -> dict[str, object]:
    """What the run led to, as in <run.folder>/metrics.json; every rank calls it and gets the same."""
    sets = open_sets(config, scratch=config.run.scratch)
    task = build_task(config, sets)
    fit_to_training_split(task, config, sets)
    task.sentinels = open_sentinels(task, config, sets)
    source = open_source(config, sets, this_process())
    exporter = Exporter(config, sets)
    tags = lineage(config, sets) | {"callosum.set_fingerprint": source.fingerprint}
    services = Services(identity=identity(config), export=exporter.export, tags=tags)
    result = fit(task, source, config.train, services)
    tables = {
        split: reconstruction_table(task, found, split, sets=sets, config=config.report.intervals)
        for split, found in result.evaluations.items()
    }
    summary = summarise(task, config, result, tables=tables, sets=sets)
    if result.is_main:
        try:
            summary["report"] = exporter.report(result, tables)
            summary["seen_before"] = held_out_seen(config, sets, seen_before(exporter.store))
            exporter.publish(result, summary, tags)
        finally:
            exporter.clear()
    return summary


def build_task(config: PretrainConfig, sets: Mapping[str, OpenedSet]) -> MaskedVolumes:
    """A fresh task, the same on every rank."""
    torch.manual_seed(config.train.seed)
    return MaskedVolumes(
        config.model,
        {name: each.spec for name, each in sets.items()},
        masking=config.masking,
        loss=config.loss,
        batch_size=config.data.batch_size,
        weight_decay=config.weight_decay,
    )


def fit_to_training_split(task: MaskedVolumes, config: PretrainConfig, sets: Mapping[str, OpenedSet]) -> None:
    """Give the task the training split's voxel statistics, a stem's from all its sets, and the baselines fitted on it.

    Every rank reads its share of the same fixed subset, and all have the same numbers.
    """
    for stem_name in task.encoder.stems:
        readers = [each for name, each in sets.items() if task.set_named(name).stem_name == stem_name]
        subjects = {subject for each in readers for subject in each.training_subjects}
        if len(subjects) >= config.min_mean_subjects:
            batches = itertools.chain.from_iterable(training_subset(config, each, this_process()) for each in readers)
            statistics = voxel_statistics(batches, readers[0].geometry.space.num_voxels)
            task.set_voxel_statistics(stem_name, statistics.mean, statistics.deviation(config.deviation_floor))
    for name, each in sets.items():
        part, layout = task.set_named(name), each.geometry.layout
        part.references = fit_references(
            partial(training_subset, config, each, this_process()),
            config.baselines,
            offset=task.encoder.stem(part.stem_name).voxel_offset.clone(),
            patch_of_voxel=torch.from_numpy(layout.patch_of_voxel),
            centres_mm=torch.from_numpy(layout.centres_mm),
            hidden_patches=task.hidden_patches,
        )


def identity(config: PretrainConfig) -> dict[str, object]:
    """The configuration as plain mappings; `run` is there once, as train.run."""
    return {key: value for key, value in dataclasses.asdict(config).items() if key != "run"}


def lineage(config: PretrainConfig, sets: Mapping[str, OpenedSet]) -> dict[str, str]:
    """Where a backbone comes from, for the registry; of several sets, in their order."""
    shard_sets = [each.shard_set for each in sets.values()]
    return {
        "callosum.part": "pretrain",
        "callosum.kind": config.label,
        "callosum.shards": ", ".join(each.location for each in sets.values()),
        "callosum.space": ", ".join(shard_set.space.name for shard_set in shard_sets),
        "callosum.alignment": ", ".join(str(one.manifest.preprocessing["alignment"]) for one in shard_sets),
        "callosum.space_fingerprint": ", ".join(shard_set.space.fingerprint for shard_set in shard_sets),
        "callosum.atlas": config.atlas,
        "callosum.masking": f"{config.masking.kind} {config.masking.hidden_share}",
    }


def summarise(
    task: MaskedVolumes,
    config: PretrainConfig,
    result: FitResult,
    *,
    tables: Mapping[str, Table],
    sets: Mapping[str, OpenedSet],
) -> dict[str, object]:
    """metrics.json: r2 on each final split beside the baselines, by group and region, and where it came from."""
    reconstruction = {split: as_report(task, found, tables[split]) for split, found in result.evaluations.items()}
    return {
        "kind": config.label,
        "sets": {
            name: dataclasses.asdict(each) | {"alignment": sets[name].alignment}
            for name, each in config.named_sets.items()
        },
        "masking": dataclasses.asdict(config.masking),
        "reconstruction": reconstruction,
        "steps": result.steps,
        "seconds": round(result.seconds, 1),
        "start": result.start,
        "fingerprint": result.fingerprint,
        "config_hash": result.config_hash,
        "checkpoint": result.checkpoint,
        "checkpoint_hash": result.checkpoint_hash,
        "mlflow_run_id": result.mlflow_run_id,
    }


def held_out_seen(
    config: PretrainConfig, sets: Mapping[str, OpenedSet], before: set[str] | None
) -> dict[str, int] | None:
    """How many subjects of each final split the weights that the run started from had been trained on, by split; None
    where these do not say. Where it is not 0, the split's scores are of no held-out subjects."""
    if before is None:
        return None
    found = {
        split: {subject for each in sets.values() for subject in each.shard_set.runs(each.kind, [split])["subject"]}
        for split in config.train.evaluation.final_splits
    }
    numbers = {split: len(overlap(subjects, before)) for split, subjects in found.items()}
    for split, number in numbers.items():
        if number:
            log.warning(
                "%d of %d subjects of split %s were seen by the weights that the run started from (%s): its scores are "
                "not of held-out subjects",
                number,
                len(found[split]),
                split,
                config.train.start.registered or config.train.start.checkpoint,
            )
    return numbers


class Exporter:
    """Writes the bundle while the loop still holds whole weights, and registers it afterwards. Used on rank 0."""

    def __init__(self, config: PretrainConfig, sets: Mapping[str, OpenedSet]) -> None:
        self.config = config
        self.sets = sets
        self.store = store_for(config.run.folder)
        self.folder = Path(config.run.scratch) / f"{config.run.name}-bundle-{time.time_ns()}"
        self.weights = self.folder.with_suffix(".safetensors")  # of the whole task

    def export(self, task: Task) -> None:
        """Write the encoder as a bundle, locally and into the run folder."""
        assert isinstance(task, MaskedVolumes)
        # First: the bundle's golden output is a forward pass, after which ZeRO 3 takes whole weights away again.
        save_weights(task, self.weights)
        self.store.put(WEIGHTS, self.weights)
        first_of = {task.set_named(name).stem_name: each for name, each in reversed([*self.sets.items()])}
        fingerprints = ", ".join(each.shard_set.fingerprint for each in self.sets.values())
        bundle.save(
            self.folder,
            Bundle(
                encoder=task.encoder,
                spaces={name: first_of[name].geometry.space for name in task.encoder.stems},
                stems={name: stem_spec(first_of[name]) for name in task.encoder.stems},
                head=None,
                classifier=None,
                made_by={"part": "pretrain", "run": self.config.run.name, "set": fingerprints},
            ),
        )
        before = seen_before(self.store)
        if before is not None:  # else the bundle says that nobody knows whom it has seen
            trained = {subject for each in self.sets.values() for subject in each.training_subjects}
            write_seen(self.folder, trained, also=before)
        for path in sorted(self.folder.iterdir()):
            self.store.put(f"bundle/{path.name}", path)

    def report(self, result: FitResult, tables: Mapping[str, Table]) -> dict[str, object]:
        """What the run says about itself: numbers for metrics.json, files in the run folder and in MLflow."""
        from pretrain.report.runs import report_run  # needs matplotlib, scikit-learn and nibabel

        run_id = result.mlflow_run_id
        return report_run(self.config, self.sets, weights=self.weights, tables=tables, mlflow_run_id=run_id)

    def publish(self, result: FitResult, summary: dict[str, object], tags: Mapping[str, str]) -> None:
        """Register the bundle with its lineage and write metrics.json, last."""
        config = self.config
        if config.register is not None and config.train.tracking.uri is not None:
            hashes = {
                "callosum.config_hash": result.config_hash,
                "callosum.checkpoint_hash": result.checkpoint_hash,
            }
            summary["registered"] = registry.register(
                self.folder,
                name=config.register.names[config.label],
                alias=config.register.alias,
                tags={**tags, **hashes},
                uri=config.train.tracking.uri,
                run_id=result.mlflow_run_id,
                experiment=config.train.tracking.experiment,
            )
        self.store.put("metrics.json", json.dumps(summary, indent=1, sort_keys=True).encode())

    def clear(self) -> None:
        """Leave nothing on scratch: all of it is in the run folder."""
        shutil.rmtree(self.folder)
        self.weights.unlink()


def stem_spec(opened: OpenedSet) -> StemSpec:
    """What a served model must know to read scans like those of this set: of sets that share a stem, the first."""
    window = opened.geometry.window
    return StemSpec(
        patch_voxels=window.patch_voxels,
        tubelet_frames=window.tubelet_frames,
        window_frames=window.window_frames,
        needs_brain_mask=opened.shard_set.needs_brain_mask(opened.kind),
        preprocessing=opened.shard_set.bold_preprocessing() if opened.kind == "bold" else None,
    )
