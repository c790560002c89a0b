"""The schema of configs/finetune.yaml: every value is in the YAML, none has a second default here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cluster.config import ClusterConfig
from finetune.baselines import LogisticConfig
from finetune.evaluation import BootstrapConfig
from finetune.tasks.adhd_classification import AdhdConfig
from training.config import RunConfig, TrainConfig


@dataclass
class DataConfig:
    """How samples are drawn; what a sample is, the task says."""

    batch_size: int  # G: runs of one step over all ranks
    micro_batch_size: int  # runs of one forward pass on one rank
    seed: int  # of order and window phases
    shuffle_shards: int  # shards mixed with one another at a time
    num_workers: int  # loader processes of a rank
    prefetch: int  # batches a loader process prepares ahead
    reader: Literal["indexed", "stream"]
    max_bad_fraction: float  # samples that may fail to read before the run stops
    cache_folder: str | None  # of every node: keeps whole shards there; null reads each window from the store
    cache_bytes: int  # what it may hold; not used where a shuffle block does not fit


@dataclass
class RegisterConfig:
    """Under which name the model enters the registry, and what it must reach to become champion."""

    name: str
    alias: str
    champion_within_site_low: float | None  # the interval's lower end that earns the alias champion; null: never


@dataclass
class FinetuneConfig:
    """One run of `python -m finetune`."""

    shards: str
    encoder: str  # a registered backbone, 'models:/name@alias' or 'name@alias', or a bundle folder
    run: RunConfig
    task: AdhdConfig
    data: DataConfig
    choose: Literal["best", "last"]  # which commit is evaluated and registered: by checkpoint.best_metric, or the last
    threshold: Literal["validation", "half"]  # a case from the best cut on validation subjects, or from even odds
    bootstrap: BootstrapConfig
    baselines: LogisticConfig
    train: TrainConfig
    register: RegisterConfig | None  # null: the bundle is only written to the run folder
    cluster: ClusterConfig


@dataclass
class PredictConfig:
    """One run of `python -m finetune.predict`."""

    classifier: str  # a registered model, models:/name@alias
    scans: list[str]  # NIfTI files, folders or glob patterns
    brain_masks: bool  # look for a desc-brain_mask beside each scan
    uri: str
    out: str
