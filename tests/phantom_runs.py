"""Phantom runs in memory, as a reader would give them: for tests of training, where files would only cost time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from brain_models.atlas import Atlas, template_parcellation
from brain_models.space import BrainSpace, space_from_mask
from configs.entry import compose
from configs.parse import parse
from data_sharding.phantoms.study.config import PhantomConfig
from data_sharding.phantoms.study.population import Population, load_population
from data_sharding.phantoms.study.scans import bold_frames, brain_voxels, field_of_view, subject_tissue
from data_sharding.phantoms.study.subject import Subject, draw_subject
from data_sharding.read.batch import WindowBatch

SPACING_MM = 12.0
NUM_FRAMES = 96


@dataclass(frozen=True)
class Run:
    subject: str
    site: str
    is_case: bool
    repetition_time_s: float
    values: np.ndarray  # float32 [time, voxel]
    is_measured: np.ndarray


@dataclass(frozen=True)
class PhantomRuns:
    space: BrainSpace
    atlas: Atlas
    runs: list[Run]


def make_population() -> Population:
    config = _config(seed=0, effect_size=0.0)
    return load_population(config.anatomy, spacing_mm=SPACING_MM, population_seed=config.population_seed)


def make_runs(population: Population, *, seed: int, num_subjects: int, effect_size: float) -> PhantomRuns:
    """Subjects of a phantom at 12 mm with equal prevalence; everything is drawn as in the phantom on disk."""
    config = _config(seed=seed, effect_size=effect_size)
    grid = np.zeros(np.prod(population.grid_shape), dtype=bool)
    grid[population.flat_indices] = True
    in_brain = grid.reshape(population.grid_shape, order="F")
    space = space_from_mask(in_brain, population.affine, name="phantom", template="NLin6Asym")
    flat = np.ravel_multi_index(tuple(space.voxel_indices.T), population.grid_shape, order="F")
    order = np.searchsorted(population.flat_indices, flat)
    runs = [_run(config, draw_subject(config, index), population, order) for index in range(num_subjects)]
    return PhantomRuns(space, template_parcellation(space), runs)


def _config(*, seed: int, effect_size: float) -> PhantomConfig:
    overrides = [f"seed={seed}", f"effect_size={effect_size}", "equal_prevalence=true", f"num_frames={NUM_FRAMES}"]
    overrides += [f"spacing_mm={SPACING_MM}", f"t1_spacing_mm={SPACING_MM}", "out=unused"]
    return parse(compose("data_sharding.phantom", overrides), PhantomConfig)


def _run(config: PhantomConfig, subject: Subject, population: Population, order: np.ndarray) -> Run:
    tissue = subject_tissue(config, subject, population)
    frames = np.concatenate(list(bold_frames(config, subject, population, tissue, block_frames=NUM_FRAMES)))[:, order]
    is_measured = (brain_voxels(tissue) & field_of_view(config, subject, population))[order]
    scale = np.where(is_measured, frames.std(axis=0), 1.0)
    values = (frames - frames.mean(axis=0)) / scale * is_measured
    site = subject.site
    return Run(
        subject.subject_id,
        site.name,
        subject.has_adhd,
        site.repetition_time_s,
        values.astype(np.float32),
        is_measured,
    )


class RunSource:
    """A training.task.Source over runs in memory: split by position, seeded order."""

    def __init__(self, splits: dict[str, list[Run]], *, batch_size: int, seed: int) -> None:
        self.splits = splits
        self.batch_size = batch_size
        self.seed = seed
        self.fingerprint = f"runs-{seed}"
        self.num_micro_batches = 1

    def initial_state(self) -> dict[str, object]:
        return {"step": 0}

    def merge_states(self, states: list[dict[str, object]]) -> dict[str, object]:
        return states[0]

    def steps(self, state: dict[str, object]) -> Iterator[tuple[list[WindowBatch], dict[str, object]]]:
        step = int(str(state["step"]))
        train = self.splits["train"]
        while True:
            first = step * self.batch_size
            positions = range(first, first + self.batch_size)
            chosen = [train[self.permutation(position // len(train))[position % len(train)]] for position in positions]
            step += 1
            yield [make_batch(chosen)], {"step": step}

    def permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.splits["train"]))

    def evaluation(self, split: str, *, limit: int | None) -> Iterator[WindowBatch]:
        runs = self.splits[split][:limit]
        for first in range(0, len(runs), self.batch_size):
            yield make_batch(runs[first : first + self.batch_size])

    def close(self) -> None:
        return


def make_batch(runs: list[Run]) -> WindowBatch:
    return WindowBatch(
        values=torch.from_numpy(np.stack([run.values for run in runs])),
        is_measured=torch.from_numpy(np.stack([run.is_measured for run in runs])),
        repetition_time_s=torch.tensor([run.repetition_time_s for run in runs]),
        weight=torch.ones(len(runs)),
        sample_seed=torch.zeros(len(runs), dtype=torch.int64),
        scan_ids=[f"{run.subject}_bold" for run in runs],
        subjects=[run.subject for run in runs],
        first_frame=[0] * len(runs),
    )
