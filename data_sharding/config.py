"""The schema of configs/data_sharding.yaml: every value is in the YAML, none has a second default here."""

from __future__ import annotations

from dataclasses import dataclass

from brain_models.recipe import BoldType, CleaningConfig, UnknownOrientation, validate_cleaning
from brain_models.space import CubeSpaceConfig, SpaceConfig
from brain_models.surfaces import SurfaceSpaceConfig
from cluster.config import ClusterConfig, validate_cluster
from cluster.storage.files import folder_problems
from data_sharding.registration.config import RegistrationConfig, validate_registration
from data_sharding.sources import SourceConfig, validate_source
from data_sharding.sources.privacy import PrivacyConfig, validate_privacy
from data_sharding.splits import SplitConfig, validate_splits

AnySpaceConfig = SpaceConfig | SurfaceSpaceConfig | CubeSpaceConfig


@dataclass
class StorageConfig:
    """How scans are stored in shards."""

    chunk_frames: int
    target_bytes: int  # a shard is closed before it grows beyond this
    bold_type: BoldType  # float16 takes twice the bytes and errs by 1/2048 instead of 1/42 of the robust scale


@dataclass
class PreprocessingConfig:
    """What is done to every BOLD run; recorded in the manifest and repeated by a served model."""

    cleaning: CleaningConfig
    max_censored_fraction: float  # windows with a larger share of censored frames are not drawn


@dataclass
class AcceptanceConfig:
    """Which scans are refused, and how many refusals end the run."""

    min_frames: int  # of a run, after those before the steady state were dropped
    min_coverage: float  # share of the space's voxels that must be measured
    min_region_coverage: float | None  # the same of every region of the set's atlases
    min_tsnr: float | None
    max_mean_fd_mm: float | None  # an unknown displacement refuses nothing
    max_censored_fraction: float | None
    max_clipped_fraction: float | None
    unknown_orientation: UnknownOrientation  # of files whose header does not state which side is left
    max_refused_fraction: float


@dataclass
class LimitsConfig:
    """The resources one scan may use before it is refused."""

    memory_mb: int
    timeout_s: float
    download_mb: int  # larger files of a source that is no folder are refused


@dataclass
class ShardingConfig:
    """One run of `python -m data_sharding`."""

    name: str
    source: SourceConfig
    out: str
    privacy: PrivacyConfig
    space: AnySpaceConfig
    atlas: str | list[str] | None  # template, aal3, a label NIfTI, several of them, or null
    storage: StorageConfig
    preprocessing: PreprocessingConfig
    acceptance: AcceptanceConfig
    limits: LimitsConfig
    registration: RegistrationConfig | None  # null: scans must be in the space's template
    splits: SplitConfig
    seed: int  # mixes runs over shards
    cluster: ClusterConfig


def atlas_choices(config: ShardingConfig) -> list[str]:
    """The configured atlases as a list."""
    return [] if config.atlas is None else [config.atlas] if isinstance(config.atlas, str) else config.atlas


def validate_config(config: ShardingConfig) -> list[str]:
    """All problems that need no scan: each names its key and what to give instead."""
    problems = validate_cluster(config.cluster, "cluster") + folder_problems(config.out, "out")
    problems += validate_splits(config.splits)
    if config.storage.chunk_frames < 1:
        problems.append(f"storage.chunk_frames: {config.storage.chunk_frames}; give at least 1 (64 suits most runs)")
    if config.storage.target_bytes < 1 << 16:
        problems.append(f"storage.target_bytes: {config.storage.target_bytes}; give at least 65536")
    if not config.source.kinds:
        problems.append("source.kinds: empty; give [bold], [t1] or [bold,t1]")
    problems += validate_source(config.source) + validate_privacy(config.privacy) + validate_space(config.space)
    for key, share in (
        ("acceptance.min_coverage", config.acceptance.min_coverage),
        ("acceptance.min_region_coverage", config.acceptance.min_region_coverage),
        ("acceptance.max_censored_fraction", config.acceptance.max_censored_fraction),
        ("acceptance.max_clipped_fraction", config.acceptance.max_clipped_fraction),
        ("acceptance.max_refused_fraction", config.acceptance.max_refused_fraction),
        ("preprocessing.max_censored_fraction", config.preprocessing.max_censored_fraction),
    ):
        if share is not None and not 0 <= share <= 1:
            problems.append(f"{key}: {share}; give a share between 0 and 1")
    if config.limits.memory_mb < 1 or config.limits.timeout_s <= 0 or config.limits.download_mb < 1:
        problems.append("limits: memory_mb, timeout_s and download_mb must be above 0")
    if config.registration is not None:
        problems += validate_registration(config.registration, "registration")
        named, template = config.registration.template_name, getattr(config.space, "template", "none")
        if named != template and not config.source.allow_template_mix:
            problems.append(
                f"registration.template_name: {named}, the space is in {template}; give that template's T1 image as "
                "registration.template, or set source.allow_template_mix=true (recorded in the manifest)"
            )
    problems += validate_cleaning(config.preprocessing.cleaning, "preprocessing.cleaning")
    return problems


def validate_space(config: AnySpaceConfig) -> list[str]:
    """All problems that need no file: each names its key and what to give instead."""
    if isinstance(config, SurfaceSpaceConfig):
        problems = []
        if len(config.surfaces) not in (0, 2):
            problems.append(f"space.surfaces: {config.surfaces}; give the left and the right surface, or []")
        if len(config.vertices) not in (0, 1, 2):
            problems.append(
                f"space.vertices: {config.vertices}; give one CIFTI file, the left and the right file, or [] for all"
            )
        if config.labels and not config.vertices:
            problems.append("space.labels: needs space.vertices, the file that holds the labels")
        return problems
    problems = [f"space.spacing_mm: {config.spacing_mm}; give a voxel edge in mm"] if config.spacing_mm <= 0 else []
    if isinstance(config, CubeSpaceConfig) and not 8 <= config.edge_voxels <= 512:
        problems.append(f"space.edge_voxels: {config.edge_voxels}; give 8 to 512 (128 at 2 mm holds a whole head)")
    return problems
