"""The schema of configs/pretrain.yaml: every value is in the YAML, none has a second default here."""

from dataclasses import dataclass
from typing import Literal

from cluster.config import ClusterConfig
from pretrain.baselines import BaselineConfig
from pretrain.masked_volumes import ModelConfig, WindowConfig
from pretrain.masking import MaskingConfig
from training.config import RunConfig, TrainConfig


@dataclass
class DataConfig:
    """How samples are drawn; what a sample is, `windows` says."""

    batch_size: int  # G: samples of one step over all ranks
    micro_batch_size: int  # samples of one forward pass on one rank
    seed: int  # of order, window phases and hidden tokens
    shuffle_shards: int  # shards mixed with one another at a time
    num_workers: int  # loader processes of a rank
    prefetch: int  # batches a loader process prepares ahead
    reader: Literal["indexed", "stream"]
    max_bad_fraction: float  # samples that may fail to read before the run stops
    cache_folder: str | None  # of every node: keeps whole shards there; null reads each window from the store
    cache_bytes: int  # what it may hold; not used where a shuffle block does not fit


@dataclass
class RegisterConfig:
    """Under which name the backbone enters the registry."""

    names: dict[str, str]  # by kind
    alias: str


@dataclass
class PretrainConfig:
    """One run of `python -m pretrain`."""

    kind: Literal["bold", "t1"]
    shards: str
    atlas: str  # an atlas of the shard set: regions for masking and for scores
    run: RunConfig
    windows: dict[str, WindowConfig]  # by kind
    model: ModelConfig
    masking: MaskingConfig
    data: DataConfig
    weight_decay: float  # of matrices; norms and biases have none
    min_mean_subjects: (
        int  # with fewer training subjects no voxel mean is taken off: it would be theirs, not a population's
    )
    deviation_floor: float  # no voxel's deviation counts as less than this share of the median voxel's
    baselines: BaselineConfig
    train: TrainConfig
    register: RegisterConfig | None  # null: the bundle is only written to the run folder
    cluster: ClusterConfig

    @property
    def window(self) -> WindowConfig:
        return self.windows[self.kind]
