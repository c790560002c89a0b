"""The schema of the YAML files whose task.module is contrastive_alignment: every value is in the YAML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from brain_models.encoder import EncoderConfig
from brain_models.scan_networks import VolumeCnnConfig
from brain_models.series_networks import SeriesConfig
from brain_models.towers import ProjectionConfig
from finetune.tasks.contrastive_alignment.augmentation import FunctionAugmentation, StructureAugmentation
from finetune.tasks.contrastive_alignment.losses import LossConfig
from training.registry.promotion import ChampionConfig
from training.unfreezing import UnfreezingConfig

SCRATCH = "scratch"  # instead of a registered encoder: the side's `network`, with fresh weights
STRUCTURE, FUNCTION = "structure", "function"


@dataclass
class StructureConfig:
    """The T1 side, from the set `shards=`. Its encoder is the run's `encoder=`."""

    network: EncoderConfig | VolumeCnnConfig | None  # of encoder=scratch: a 3D ViT, or a light 3D CNN
    patch_voxels: int  # edge of a ViT's patch
    unfreezing: UnfreezingConfig
    augmentation: StructureAugmentation | None  # null: none


@dataclass
class FunctionConfig:
    """The fMRI side: region series where it has a `network`, voxels where it has a registered `encoder`."""

    shards: str
    encoder: str
    network: SeriesConfig | None  # of encoder=scratch
    num_frames: int  # that a step sees of a run; shorter region series are padded
    num_channels: int | None  # of a registered encoder: channels whose coupling is pooled; null: the mean token
    unfreezing: UnfreezingConfig
    augmentation: FunctionAugmentation | None  # of region series; null: none


@dataclass
class Config:
    """configs/task/*.yaml of this module."""

    name: str
    module: Literal["contrastive_alignment"]
    structure: StructureConfig
    function: FunctionConfig
    projection: ProjectionConfig
    loss: LossConfig
    pairing: Literal["own", "shuffled"]  # shuffled: a control, trained on wrong partners
    order: Literal["endless", "epoch_batches"]  # endless: all steps equally large; epoch_batches: a step ends its epoch
    rows_per_chunk: int  # encoded at once: what bounds memory, not the batch
    weight_decay: float
    num_permutations: int  # of partners, for p
    champion: ChampionConfig | None
