"""The schema of configs/pretrain.yaml: every value is in the YAML, none has a second default here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.config import ClusterConfig
from configs.parse import FREE
from data_sharding.read.config import DataConfig
from pretrain.baselines.guesses import BaselineConfig
from pretrain.masked.costs import ModelConfig
from pretrain.masked.masked_set import LossConfig, WindowConfig
from pretrain.masked.masking import MaskingConfig
from pretrain.report.config import ReportConfig
from training.config import RunConfig, TrainConfig

REQUIRED = {"kind": "<bold|t1>", "shards": "<shard set>"}  # unless sets are given


@dataclass
class SetConfig:
    """One shard set of a joint run."""

    kind: Literal["bold", "t1"]
    shards: str
    weight: float  # its share of the steps, up to a factor


@dataclass
class RegisterBackbonesConfig:
    """Under which name the backbone enters the registry."""

    names: dict[str, str]  # by kind; 'joint' for sets of several kinds
    alias: str


@dataclass
class PretrainConfig:
    """One run of `python -m pretrain`."""

    kind: Literal["bold", "t1"] | None  # with shards: a run on one set
    shards: str | None
    sets: dict[str, SetConfig] | None  # instead of the two: a joint run, by name
    atlas: str | None  # an atlas of every set: regions for masking and for scores; None: pseudo-regions
    tracking: str | None = field(metadata=FREE)  # the MLflow server: train.tracking.uri, by one name on all commands
    run: RunConfig = field(metadata=FREE)
    windows: dict[str, WindowConfig]  # by kind, or by the name of a set that has its own
    model: ModelConfig
    masking: MaskingConfig
    loss: LossConfig
    data: DataConfig
    weight_decay: float  # of matrices; norms and biases have none
    min_mean_subjects: (
        int  # with fewer training subjects no voxel mean is taken off: it would be theirs, not a population's
    )
    deviation_floor: float  # no voxel's deviation counts as less than this share of the median voxel's
    baselines: BaselineConfig
    report: ReportConfig = field(metadata=FREE)
    train: TrainConfig
    register: RegisterBackbonesConfig | None = field(
        metadata=FREE
    )  # null: the bundle is only written to the run folder
    cluster: ClusterConfig = field(metadata=FREE)

    @staticmethod
    def missing(raw: Mapping[str, Any]) -> list[str]:
        """Keys that are required although they may be null; asked by configs.parse, which then reports all at once."""
        absent = [key for key in REQUIRED if raw.get("sets") is None and raw.get(key) is None]
        return [f"{key}: required; add {key}={REQUIRED[key]}, or give sets=... for a joint run" for key in absent]

    @property
    def named_sets(self) -> dict[str, SetConfig]:
        """The sets by name; kind and shards alone are a set named as its kind."""
        if self.sets is not None:
            return self.sets
        assert self.kind is not None
        assert self.shards is not None
        return {self.kind: SetConfig(self.kind, self.shards, 1.0)}

    @property
    def label(self) -> str:
        """What the backbone reads: its kind, or 'joint' for several."""
        kinds = {each.kind for each in self.named_sets.values()}
        return kinds.pop() if len(kinds) == 1 else "joint"

    def window_of(self, name: str) -> WindowConfig:
        """The window of a set: its own, or that of its kind."""
        return self.windows[name if name in self.windows else self.named_sets[name].kind]
