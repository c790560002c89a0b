"""The schema of configs/data_sharding.yaml: every value is in the YAML, none has a second default here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from brain_models.space import SpaceConfig
from cluster.config import ClusterConfig, validate_cluster

SplitRule = Literal["threshold", "ranked", "stratified", "file", "none"]


@dataclass
class SourceConfig:
    """Where scans come from and which of them are taken."""

    kind: Literal["bids"]
    root: str
    kinds: list[Literal["bold", "t1"]]
    subjects: list[str] | None  # labels without sub-; null takes all
    tasks: list[str] | None  # task entities; null takes all
    allow_template_mix: bool  # take scans of another template than the space's


@dataclass
class StorageConfig:
    """How scans lie in shards."""

    chunk_frames: int
    target_bytes: int  # a shard is closed before it grows beyond this


@dataclass
class AcceptanceConfig:
    """Which scans are refused, and how many refusals end the run."""

    min_frames: int
    min_coverage: float  # share of the space's voxels that must be measured
    max_refused_fraction: float


@dataclass
class LimitsConfig:
    """What one scan may use before it is refused."""

    memory_mb: int
    timeout_s: float


@dataclass
class SplitConfig:
    """Which subjects go to train, validation and test. Fractions serve `threshold`, counts the other two rules."""

    rule: SplitRule
    seed: int
    validation_fraction: float | None
    test_fraction: float | None
    num_validation: int | None
    num_test: int | None
    family_column: str | None  # subjects of one family stay together
    stratify_columns: list[str]
    file: str | None  # a table with participant_id and split


@dataclass
class ShardingConfig:
    """One run of `python -m data_sharding`."""

    name: str
    source: SourceConfig
    out: str
    space: SpaceConfig
    atlas: str | None  # template, aal3, a label NIfTI, or null
    storage: StorageConfig
    acceptance: AcceptanceConfig
    limits: LimitsConfig
    splits: SplitConfig
    seed: int  # mixes runs over shards
    cluster: ClusterConfig


def validate_config(config: ShardingConfig) -> list[str]:
    """All problems that need no scan: each names its key and what to give instead."""
    problems = validate_cluster(config.cluster, "cluster") + validate_splits(config.splits)
    if config.storage.chunk_frames < 1:
        problems.append(f"storage.chunk_frames: {config.storage.chunk_frames}; give at least 1 (64 suits most runs)")
    if config.storage.target_bytes < 1 << 16:
        problems.append(f"storage.target_bytes: {config.storage.target_bytes}; give at least 65536")
    if not config.source.kinds:
        problems.append("source.kinds: empty; give [bold], [t1] or [bold,t1]")
    if config.space.spacing_mm <= 0:
        problems.append(f"space.spacing_mm: {config.space.spacing_mm}; give a voxel edge in mm")
    for key, share in (
        ("acceptance.min_coverage", config.acceptance.min_coverage),
        ("acceptance.max_refused_fraction", config.acceptance.max_refused_fraction),
    ):
        if not 0 <= share <= 1:
            problems.append(f"{key}: {share}; give a share between 0 and 1")
    if config.limits.memory_mb < 1 or config.limits.timeout_s <= 0:
        problems.append("limits: memory_mb and timeout_s must be above 0")
    return problems


def validate_splits(config: SplitConfig) -> list[str]:
    """All problems of the split rule."""
    problems = []
    if config.rule == "threshold":
        fractions = (config.validation_fraction, config.test_fraction)
        if None in fractions:
            problems.append("splits: rule threshold needs validation_fraction and test_fraction")
        elif not (all(0 <= (share or 0) <= 1 for share in fractions) and sum(share or 0 for share in fractions) <= 1):
            problems.append(f"splits: fractions {fractions} must lie in 0..1 and add up to at most 1")
    if config.rule in ("ranked", "stratified"):
        counts = (config.num_validation, config.num_test)
        if any(count is None or count < 0 for count in counts):
            problems.append(f"splits: rule {config.rule} needs num_validation and num_test, 0 or more")
    if config.rule == "stratified" and not config.stratify_columns:
        problems.append("splits.stratify_columns: empty; name columns of participants.tsv, or use rule=ranked")
    if config.rule == "file" and not config.file:
        problems.append("splits.file: null; give a TSV or CSV with the columns participant_id and split")
    return problems
