"""What a run finds out once, before its first step, and keeps in its folder: voxel statistics, how well the baselines
guess the samples it will be evaluated on, and the embedding of the untrained encoder.

A run that resumes reads it back. What was kept for another configuration or set is computed again.
"""

import dataclasses
import itertools
import json
import logging
from collections.abc import Iterator, Mapping
from functools import partial
from hashlib import sha256
from typing import cast

import safetensors.torch
import torch
from torch import Tensor

from cluster.storage.stores import Store, store_for
from data_sharding.read.batch import WindowBatch
from data_sharding.read.joint import named
from data_sharding.read.reader import BatchSource
from pretrain.baselines.references import (
    NAMES,
    BaselineScores,
    References,
    fit_references,
    score_baselines,
    voxel_statistics,
)
from pretrain.errors import PretrainError
from pretrain.masked.config import PretrainConfig
from pretrain.masked.masked_volumes import MaskedVolumes
from pretrain.masked.sets import OpenedSet, training_subset, windows_of
from pretrain.report.collapse import Sentinels, embedding_metrics, sampled
from training.collectives import from_main, gather, this_process
from training.engine.base import own_device
from training.watch.progress import phase

RECORD, TENSORS = "baselines.json", "baselines.safetensors"

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Preparation:
    """Voxel means and deviations by stem; the rest by set."""

    mean: dict[str, Tensor]
    deviation: dict[str, Tensor]
    baselines: dict[str, BaselineScores]
    untrained: dict[str, dict[str, float]]  # of the embedding

    def give(self, task: MaskedVolumes, config: PretrainConfig) -> None:
        """Give a task what it needs of this: all ranks give theirs the same."""
        for stem_name, mean in self.mean.items():
            task.set_voxel_statistics(stem_name, mean, self.deviation[stem_name])
        for name, baselines in self.baselines.items():
            own = task.set_named(name)
            own.training_mean, own.baselines = self.mean[own.stem_name].clone(), baselines
        task.sentinels = Sentinels(config.report.sentinels, self.untrained)


def prepare(task: MaskedVolumes, config: PretrainConfig, sets: Mapping[str, OpenedSet], *, key: str) -> Preparation:
    """Give the task what the run folder keeps under this `key`, or compute and keep it. Every rank calls it."""
    store = store_for(config.run.folder)
    record = from_main(kept_record(store, key) if this_process().is_main else None)
    if record is not None:
        prepared = read(store, cast("dict[str, object]", record))
    else:
        prepared = compute(task, config, sets)
        if this_process().is_main:
            keep(prepared, store, key)
    prepared.give(task, config)
    return prepared


def compute(task: MaskedVolumes, config: PretrainConfig, sets: Mapping[str, OpenedSet]) -> Preparation:
    """The preparation, from this rank's shares of the samples; the same on every rank."""
    phase("fitting voxel statistics and baselines")
    fit_voxel_statistics(task, config, sets)
    stems = {name: task.encoder.stem(name) for name in task.encoder.stems}
    return Preparation(
        mean={name: stem.voxel_offset.clone() for name, stem in stems.items()},
        deviation={name: stem.voxel_scale.clone() for name, stem in stems.items()},
        baselines={name: scores_of_baselines(task, config, opened) for name, opened in sets.items()},
        untrained={name: untrained_embedding(task, config, opened) for name, opened in sets.items()},
    )


def fit_voxel_statistics(task: MaskedVolumes, config: PretrainConfig, sets: Mapping[str, OpenedSet]) -> None:
    """Give every stem the mean and deviation of its voxels over the training subsets of all sets that read with it;
    leave 0 and 1 where they have fewer than `min_mean_subjects`."""
    for stem_name in task.encoder.stems:
        readers = [opened for name, opened in sets.items() if task.set_named(name).stem_name == stem_name]
        subjects = {subject for opened in readers for subject in opened.training_subjects}
        if len(subjects) >= config.min_mean_subjects:
            batches = itertools.chain.from_iterable(training_subset(config, opened) for opened in readers)
            statistics = voxel_statistics(batches, readers[0].geometry.space.num_voxels)
            task.set_voxel_statistics(stem_name, statistics.mean, statistics.deviation(config.deviation_floor))


def fitted_references(task: MaskedVolumes, config: PretrainConfig, opened: OpenedSet) -> References:
    """The baselines, fitted on a set's training subset."""
    layout = opened.geometry.layout
    return fit_references(
        partial(training_subset, config, opened),
        config.baselines,
        offset=task.encoder.stem(task.set_named(opened.name).stem_name).voxel_offset,
        patch_of_voxel=torch.from_numpy(layout.patch_of_voxel),
        centres_mm=torch.from_numpy(layout.centres_mm),
        hidden_tokens=task.is_hidden,
    )


def scores_of_baselines(task: MaskedVolumes, config: PretrainConfig, opened: OpenedSet) -> BaselineScores:
    """How well the baselines guess every sample of a set that the run will be evaluated on."""
    references = fitted_references(task, config, opened)
    evaluation = config.train.evaluation
    limits = {evaluation.split: evaluation.subset} | dict.fromkeys(evaluation.final_splits)  # None: the whole split
    batches = itertools.chain.from_iterable(evaluated(config, opened, split, limit) for split, limit in limits.items())
    by_region = task.set_named(opened.name).by_region
    return score_baselines(references, batches, hidden_tokens=task.is_hidden, by_region=by_region)


def untrained_embedding(task: MaskedVolumes, config: PretrainConfig, opened: OpenedSet) -> dict[str, float]:
    """The metrics of the embedding that the task's present, seeded weights give the evaluation subset."""
    evaluation, device, rows = config.train.evaluation, own_device(), []
    task.to(device).eval()
    with torch.no_grad():
        for batch in evaluated(config, opened, evaluation.split, evaluation.subset):
            moved = batch.to(device)
            encoded = task.guess(task.mask(moved)).encoded
            found = sampled(encoded, config.report.sentinels.tokens_per_sample)
            rows.append({key: values[moved.weight > 0].cpu() for key, values in found.items()})
    task.to("cpu").train()
    every = [row for share in cast("list[list[dict[str, Tensor]]]", gather(rows)) for row in share]
    return embedding_metrics({key: torch.cat([row[key] for row in every]) for key in every[0]})


def evaluated(config: PretrainConfig, opened: OpenedSet, split: str, limit: int | None) -> Iterator[WindowBatch]:
    """This rank's share of what an evaluation of a split reads of one set."""
    here = this_process()
    source = BatchSource(windows_of(opened), config.data, rank=here.rank, world_size=here.world_size)
    for batch in source.evaluation(split, limit=limit):
        yield named(batch, opened.name)
    source.close()


def kept_record(store: Store, key: str) -> dict[str, object] | None:
    """The record of what was kept under this key; None where there is none, or one of another key."""
    if not store.exists(RECORD):
        return None
    record = json.loads(store.read(RECORD))
    if record["key"] == key:
        return record
    log.warning("%s is of another configuration or set; computing it again", store.join(RECORD))
    return None


def keep(prepared: Preparation, store: Store, key: str) -> None:
    """Write the tensors, then the record, which says that they are there."""
    tensors = {f"mean/{name}": values for name, values in prepared.mean.items()}
    tensors |= {f"deviation/{name}": values for name, values in prepared.deviation.items()}
    for name, scores in prepared.baselines.items():
        tensors |= {f"sample_seed/{name}": scores.sample_seed}
        tensors |= {f"error/{name}/{baseline}": errors for baseline, errors in scores.errors.items()}
    content = safetensors.torch.save({name: values.contiguous() for name, values in tensors.items()})
    store.put(TENSORS, content)
    record = {"key": key, "sha256": sha256(content).hexdigest(), "untrained": prepared.untrained}
    store.put(RECORD, json.dumps(record, indent=1, sort_keys=True).encode())


def read(store: Store, record: Mapping[str, object]) -> Preparation:
    """What was kept with this record; PretrainError when its tensors are not the ones it was written with."""
    content = store.read(TENSORS)
    if sha256(content).hexdigest() != record["sha256"]:
        raise PretrainError(
            f"{store.join(TENSORS)} is not the file that {RECORD} was written with; delete both, and the same command "
            "computes them again"
        )
    tensors = safetensors.torch.load(content)

    def below(folder: str) -> dict[str, Tensor]:
        return {key.removeprefix(folder): values for key, values in tensors.items() if key.startswith(folder)}

    baselines = {}
    for name, sample_seed in below("sample_seed/").items():
        errors = below(f"error/{name}/")
        baselines[name] = BaselineScores(sample_seed, {key: errors[key] for key in NAMES if key in errors})
    untrained = cast("dict[str, dict[str, float]]", record["untrained"])
    return Preparation(below("mean/"), below("deviation/"), baselines, untrained)
