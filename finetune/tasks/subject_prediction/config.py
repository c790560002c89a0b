"""The schema of the YAML files whose task.module is subject_prediction: every value is in the YAML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from brain_models.heads import HeadConfig
from finetune.tasks.subject_prediction.baselines import LinearConfig
from finetune.tasks.subject_prediction.labels import ClassLabel, ValueLabel
from finetune.tasks.subject_prediction.probe import ProbeConfig
from training.registry.promotion import ChampionConfig
from training.unfreezing import UnfreezingConfig


@dataclass
class Config:
    """configs/task/*.yaml of this module."""

    name: str
    module: Literal["subject_prediction"]
    label: ClassLabel | ValueLabel
    num_windows: int  # consecutive windows of the backbone that make one prediction
    atlas: str
    balance_classes: bool
    threshold: Literal["validation", "half"]  # a case from the best cut on validation subjects, or from even odds
    weight_decay: float
    head: HeadConfig
    probe: ProbeConfig | None
    baselines: LinearConfig
    head_learning_rate_scale: float  # as a share of the run's learning rate
    unfreezing: UnfreezingConfig
    champion: ChampionConfig | None  # what register.champion is, unless the run says otherwise
