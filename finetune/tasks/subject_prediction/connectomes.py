"""Functional connectivity of every subject of a shard set: region means of whole runs, read from the shards.

What the baseline is made from. Reads no label.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from brain_models.atlas import Atlas
from data_sharding.read.reader import BatchSource, DataConfig, ShardSet, Windows
from finetune.tasks.subject_prediction.baselines import connectivity

FRAMES_AT_ONCE = 8  # a run's last frames that fill no such window are left out: at most 7
WINDOWS_AT_ONCE = 16


@dataclass(frozen=True)
class Connectomes:
    """Connectivity by subject, the mean over the subject's runs; NaN where a region was not measured."""

    features: dict[str, np.ndarray]
    split_of: dict[str, str]
    num_regions: int

    def subjects_of(self, split: str) -> list[str]:
        """Subjects of a split, sorted."""
        return sorted(subject for subject, theirs in self.split_of.items() if theirs == split)

    def rows(self, subjects: list[str]) -> np.ndarray:
        """[subject, pair of regions], in the order asked for; NaN for a subject without a connectome."""
        unknown = np.full_like(next(iter(self.features.values())), np.nan)
        return np.stack([self.features.get(subject, unknown) for subject in subjects])


def read_connectomes(shard_set: ShardSet, atlas_name: str, splits: list[str], *, data: DataConfig) -> Connectomes:
    """The connectivity of every subject with a BOLD run in these splits, read as the run reads; damaged windows up to
    its share are left out."""
    atlas = shard_set.atlases[atlas_name]
    by_subject: dict[str, list[np.ndarray]] = {}
    split_of = {}
    for split in splits:
        for subject, series in _runs(shard_set, atlas, split, data):
            by_subject.setdefault(subject, []).append(connectivity(series))
            split_of[subject] = split
    features = {subject: _mean(runs) for subject, runs in by_subject.items()}
    return Connectomes(features, split_of, len(atlas.region_ids))


def _mean(runs: list[np.ndarray]) -> np.ndarray:
    """The mean over runs of what each has measured; NaN where none has."""
    stacked = np.stack(runs)
    counts = np.isfinite(stacked).sum(axis=0)
    return np.where(counts > 0, np.nansum(stacked, axis=0) / np.maximum(counts, 1), np.nan)


def _runs(shard_set: ShardSet, atlas: Atlas, split: str, data: DataConfig) -> Iterator[tuple[str, np.ndarray]]:
    """(subject, region means [time, region]) of every run of a split."""
    windows = Windows(shard_set, kind="bold", window_frames=FRAMES_AT_ONCE)
    config = dataclasses.replace(data, micro_batch_size=WINDOWS_AT_ONCE)
    source = BatchSource(windows, config, rank=0, world_size=1)
    scan_id, subject, parts = "", "", list[np.ndarray]()
    try:
        for batch in source.evaluation(split, limit=None):
            for row in np.flatnonzero(batch.weight.numpy() > 0):
                if batch.scan_ids[row] != scan_id:  # the windows of a run follow one another
                    if parts:
                        yield subject, np.concatenate(parts)
                    scan_id, subject, parts = batch.scan_ids[row], batch.subjects[row], []
                parts.append(atlas.region_means(batch.values[row].numpy(), batch.is_measured[row].numpy()))
        if parts:
            yield subject, np.concatenate(parts)
    finally:
        source.close()
