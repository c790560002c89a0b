"""The schema of configs/finetune.yaml: every value is in the YAML, none has a second default here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cluster.config import ClusterConfig
from configs.parse import FREE
from data_sharding.read.config import DataConfig
from training.config import RunConfig, TrainConfig
from training.statistics import BootstrapConfig
from training.study import RegisterConfig


@dataclass
class FinetuneConfig:
    """One run of `python -m finetune`."""

    shards: str
    encoder: str  # a registered backbone, 'models:/name@alias' or 'name@alias', or a bundle folder
    tracking: str | None = field(metadata=FREE)  # the MLflow server: train.tracking.uri, by one name on all commands
    run: RunConfig = field(metadata=FREE)
    task: dict[str, Any]  # {name, module, ...}: the rest is what the module of finetune/tasks/ says
    data: DataConfig
    bootstrap: BootstrapConfig
    train: TrainConfig
    register: RegisterConfig | None = field(metadata=FREE)  # null: the bundle is only written to the run folder
    cluster: ClusterConfig = field(metadata=FREE)


@dataclass
class PredictConfig:
    """One run of `python -m finetune.predict`."""

    registered_model: str  # models:/name@alias
    scans: list[str]  # NIfTI files, folders or glob patterns
    brain_masks: bool  # take the desc-brain_mask beside a scan where there is one
    tracking: str  # the MLflow server that has the model
    out: str


@dataclass
class PairsConfig:
    """One run of `python -m finetune.rdm_pairs`."""

    shards: str
    region: str
    measure: str
    out: str
    data: DataConfig


@dataclass
class OneBatchConfig:
    """How one batch is learned by heart, and whose curves are read beside it."""

    num_steps: int
    learning_rate: float  # constant
    curves: str | None  # a run folder, or a CSV file with columns train and validation
    num_train: int | None  # subjects whose losses a CSV file holds; null: as many as the sets here have
    num_validation: int | None


@dataclass
class DiagnoseConfig(FinetuneConfig):
    """One run of `python -m finetune.diagnose`: its own keys, and fine-tuning's."""

    diagnose: OneBatchConfig


@dataclass
class ModeConfig:
    """How far an encoder is adapted: task.unfreezing's keys of the same names, which it replaces."""

    first_layer_opens_at_step: int  # train.steps: never
    steps_per_layer: int


@dataclass
class CompareConfig(FinetuneConfig):
    """One run of `python -m finetune.compare`: its own keys, and fine-tuning's for every cell.

    `encoder` is the arm that the others are compared with, by name; 'first' for the first.
    """

    encoders: list[str] | dict[str, list[str]]  # one an arm, or by arm: one a pretraining seed, in the same order
    seeds: list[int]  # of fine-tuning: order, folds and drop-out
    modes: dict[str, ModeConfig]
    metric: str  # a name among the task's metrics; 'first' for its first
