"""From a configuration to a registered backbone: wires the shard set, the task, the loop and the registry together.

`train` is an ordinary function; under several workers each rank calls it.
"""

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from brain_models import bundle
from brain_models.bundle import Bundle, StemSpec
from cluster.storage import store_for
from data_sharding.reader import Batch, BatchSource, ReaderConfig, ShardSet, open_set
from pretrain.config import PretrainConfig
from pretrain.errors import PretrainError
from pretrain.masked_volumes import Geometry, MaskedVolumes
from pretrain.references import fit_references, voxel_statistics
from training import registry
from training.collectives import place
from training.loop import FitResult, Services, fit
from training.seen_subjects import write_seen
from training.task import Task


def train(config: PretrainConfig) -> dict[str, object]:
    """What the run led to, as in <run.folder>/metrics.json; every rank calls it and gets the same."""
    shard_set = open_set(config.shards)
    geometry = geometry_of(config, shard_set)
    task = build_task(config, geometry)
    fit_to_training_split(task, config, shard_set, geometry)
    source = BatchSource(shard_set, reader_config(config), rank=place().rank, world_size=place().world_size)
    exporter = Exporter(config, shard_set)
    services = Services(identity=identity(config), export=exporter.export, tags=lineage(config, shard_set))
    result = fit(task, source, config.train, services)
    summary = summarise(task, config, result)
    if result.is_main:
        exporter.publish(result, summary)
    return summary


def geometry_of(config: PretrainConfig, shard_set: ShardSet) -> Geometry:
    """The set's space and atlas, cut into the tokens of this kind; PretrainError when the set has no such atlas."""
    if config.atlas not in shard_set.atlases:
        raise PretrainError(
            f"atlas={config.atlas}: {config.shards} holds {sorted(shard_set.atlases) or 'no atlas'}; choose one of "
            "them, or write the set with another atlas"
        )
    return Geometry.of(shard_set.space, shard_set.atlases[config.atlas], config.window)


def build_task(config: PretrainConfig, geometry: Geometry) -> MaskedVolumes:
    """A fresh task, the same on every rank."""
    torch.manual_seed(config.train.seed)
    return MaskedVolumes(
        config.model,
        geometry,
        kind=config.kind,
        masking=config.masking,
        batch_size=config.data.batch_size,
        weight_decay=config.weight_decay,
    )


def fit_to_training_split(task: MaskedVolumes, config: PretrainConfig, shard_set: ShardSet, geometry: Geometry) -> None:
    """Give the task the training split's voxel statistics and the baselines fitted on it.

    Every rank reads the same fixed subset and computes the same numbers, so nothing has to be exchanged.
    """

    def batches() -> Iterator[Batch]:
        source = BatchSource(shard_set, reader_config(config), rank=0, world_size=1)
        yield from source.evaluation("train", limit=config.baselines.fit_samples)
        source.close()

    mean, deviation = torch.zeros(geometry.space.num_voxels), torch.ones(geometry.space.num_voxels)
    if shard_set.runs(config.kind, ["train"])["subject"].nunique() >= config.min_mean_subjects:
        statistics = voxel_statistics(batches(), geometry.space.num_voxels)
        mean, deviation = statistics.mean, statistics.deviation(config.deviation_floor)
    task.set_voxel_statistics(mean, deviation)
    task.references = fit_references(
        batches,
        config.baselines,
        offset=mean,
        patch_of_voxel=torch.from_numpy(geometry.layout.patch_of_voxel),
        centres_mm=torch.from_numpy(geometry.layout.centres_mm),
        hidden_patches=task.hidden_patches,
    )


def reader_config(config: PretrainConfig) -> ReaderConfig:
    """What the reader needs to know of a run; training reads the train split only."""
    data = config.data
    return ReaderConfig(
        kind=config.kind,
        split="train",
        window_frames=config.window.window_frames,
        batch_size=data.batch_size,
        micro_batch_size=data.micro_batch_size,
        shuffle_shards=data.shuffle_shards,
        seed=data.seed,
        num_workers=data.num_workers,
        prefetch=data.prefetch,
        reader=data.reader,
        max_bad_fraction=data.max_bad_fraction,
        cache_folder=data.cache_folder,
        cache_bytes=data.cache_bytes,
    )


def identity(config: PretrainConfig) -> dict[str, object]:
    """The configuration as plain mappings; `run` is there once, as train.run."""
    return {key: value for key, value in dataclasses.asdict(config).items() if key != "run"}


def lineage(config: PretrainConfig, shard_set: ShardSet) -> dict[str, str]:
    """Where a backbone comes from, for the registry."""
    return {
        "callosum.part": "pretrain",
        "callosum.kind": config.kind,
        "callosum.shards": config.shards,
        "callosum.set_fingerprint": shard_set.fingerprint,
        "callosum.space": shard_set.space.name,
        "callosum.alignment": str(shard_set.manifest.preprocessing["alignment"]),
        "callosum.space_fingerprint": shard_set.space.fingerprint,
        "callosum.atlas": config.atlas,
        "callosum.masking": f"{config.masking.kind} {config.masking.hidden_share}",
    }


def summarise(task: MaskedVolumes, config: PretrainConfig, result: FitResult) -> dict[str, object]:
    """metrics.json: r2 on each final split beside the baselines, by group and region, and where it came from."""
    reconstruction = {split: task.report(found.predictions) for split, found in result.evaluations.items()}
    return {
        "kind": config.kind,
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


class Exporter:
    """Writes the bundle while the loop still holds whole weights, and registers it afterwards. Used on rank 0."""

    def __init__(self, config: PretrainConfig, shard_set: ShardSet) -> None:
        self.config = config
        self.shard_set = shard_set
        self.store = store_for(config.run.folder)
        self.folder = Path(config.run.scratch) / f"{config.run.name}-bundle-{time.time_ns()}"

    def export(self, task: Task) -> None:
        """Write the encoder as a bundle, locally and into the run folder."""
        assert isinstance(task, MaskedVolumes)
        window = self.config.window
        stem = StemSpec(
            patch_voxels=window.patch_voxels,
            tubelet_frames=window.tubelet_frames,
            window_frames=window.window_frames,
            needs_brain_mask=self.shard_set.needs_brain_mask(self.config.kind),
            preprocessing=self.shard_set.bold_preprocessing() if self.config.kind == "bold" else None,
        )
        bundle.save(
            self.folder,
            Bundle(
                encoder=task.encoder,
                spaces={self.config.kind: self.shard_set.space},
                stems={self.config.kind: stem},
                head=None,
                classifier=None,
                made_by={"part": "pretrain", "run": self.config.run.name, "set": self.shard_set.fingerprint},
            ),
        )
        write_seen(self.folder, set(self.shard_set.runs(self.config.kind, ["train"])["subject"]))
        for path in sorted(self.folder.iterdir()):
            self.store.put(f"bundle/{path.name}", path)

    def publish(self, result: FitResult, summary: dict[str, object]) -> None:
        """Register the bundle with its lineage and write metrics.json, last."""
        config = self.config
        if config.register is not None and config.train.tracking.uri is not None:
            tags = lineage(config, self.shard_set) | {
                "callosum.config_hash": result.config_hash,
                "callosum.checkpoint_hash": result.checkpoint_hash,
            }
            summary["registered"] = registry.register(
                self.folder,
                name=config.register.names[config.kind],
                alias=config.register.alias,
                tags=tags,
                uri=config.train.tracking.uri,
                run_id=result.mlflow_run_id,
                experiment=config.train.tracking.experiment,
            )
        self.store.put("metrics.json", json.dumps(summary, indent=1, sort_keys=True).encode())
