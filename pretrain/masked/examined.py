"""A trained task as one plain process sees it: whole weights, its sets, and batches of any split. Trains nothing."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from data_sharding.read.batch import Batch
from data_sharding.read.joint import named
from data_sharding.read.reader import BatchSource
from pretrain.masked.config import PretrainConfig
from pretrain.masked.masked_volumes import MaskedVolumes
from pretrain.masked.sets import OpenedSet, reader_config

WEIGHTS = "pretraining.safetensors"  # encoder and decoder; the bundle has no decoder


@dataclass(frozen=True, eq=False)
class Examined:
    """A task with its weights, in evaluation mode on `device`, and where its data lie."""

    task: MaskedVolumes
    config: PretrainConfig
    sets: Mapping[str, OpenedSet]
    device: torch.device

    def batches(self, name: str, split: str, limit: int | None) -> Iterator[Batch]:
        """The windows of a set's split, or a fixed hashed subset, without padding, on the device."""
        source = BatchSource(self.sets[name].shard_set, reader_config(self.config, name), rank=0, world_size=1)
        for batch in source.evaluation(split, limit=limit):
            if bool((batch.weight > 0).any()):
                yield named(without_padding(batch.to(self.device)), name)
        source.close()

    def subject_of(self, name: str, splits: list[str]) -> dict[str, str]:
        """Subjects by scan."""
        runs = self.sets[name].shard_set.runs(self.sets[name].kind, splits)
        return dict(zip(runs["scan_id"], runs["subject"], strict=True))


def without_padding(batch: Batch) -> Batch:
    """The rows that count."""
    rows = torch.nonzero(batch.weight > 0)[:, 0]
    numbers = rows.tolist()
    return Batch(
        values=batch.values[rows],
        is_measured=batch.is_measured[rows],
        repetition_time_s=batch.repetition_time_s[rows],
        weight=batch.weight[rows],
        sample_seed=batch.sample_seed[rows],
        scan_ids=[batch.scan_ids[row] for row in numbers],
        subjects=[batch.subjects[row] for row in numbers],
        first_frame=[batch.first_frame[row] for row in numbers],
        set_name=batch.set_name,
    )


def save_weights(task: MaskedVolumes, path: Path) -> Path:
    """Write all weights of a task; call it where they are whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: values.detach().cpu().contiguous() for name, values in task.state_dict().items()}, path)
    return path


def load_weights(task: MaskedVolumes, path: Path) -> MaskedVolumes:
    """The task with the weights of a file."""
    task.load_state_dict(load_file(path))
    return task
