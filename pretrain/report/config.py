"""The schema of `report` in configs/pretrain.yaml: how a finished run is analysed. Changes no number of training."""

from dataclasses import dataclass

from pretrain.report.collapse import SentinelConfig
from training.statistics import BootstrapConfig

PROBED_SPLITS = ["train", "validation"]


@dataclass
class MapConfig:
    """Maps of how well each voxel is guessed."""

    num_samples: int | None  # windows of each final split, a fixed hashed subset; 0: no maps, null: the whole split


@dataclass
class ContributionConfig:
    """What each region's visibility adds to the guess of the others."""

    num_samples: int  # windows of the first final split; 0: left out
    num_contexts: int  # fixed hidden parts, in complementary pairs: each region is visible in half of them
    num_null_sets: int  # control sets of a region's size that it is compared with
    num_permutations: int  # of the signs of subjects' differences; no p-value is below 1 / (this + 1)
    false_discovery_rate: float
    seed: int


@dataclass
class ConfoundProbeConfig:
    """How much of site and repetition time the frozen pooled embedding gives away."""

    num_samples: int  # windows of each of the splits train and validation; 0: left out
    num_folds: int
    num_permutations: int  # of the labels over subjects
    seed: int


@dataclass
class ReportConfig:
    """What a finished run reports, and how much it computes for it."""

    intervals: BootstrapConfig
    sentinels: SentinelConfig
    maps: MapConfig
    contribution: ContributionConfig
    probes: ConfoundProbeConfig


def report_problems(config: ReportConfig) -> list[str]:
    """Numbers out of their range."""
    intervals, sentinels = config.intervals, config.sentinels
    contribution, probes, maps = config.contribution, config.probes, config.maps
    lowest = {
        "intervals.num_resamples": (intervals.num_resamples, 1),
        "sentinels.tokens_per_sample": (sentinels.tokens_per_sample, 1),
        "maps.num_samples": (0 if maps.num_samples is None else maps.num_samples, 0),
        "contribution.num_samples": (contribution.num_samples, 0),
        "contribution.num_contexts": (contribution.num_contexts, 2),
        "contribution.num_null_sets": (contribution.num_null_sets, 1),
        "contribution.num_permutations": (contribution.num_permutations, 1),
        "probes.num_samples": (probes.num_samples, 0),
        "probes.num_folds": (probes.num_folds, 3),
        "probes.num_permutations": (probes.num_permutations, 1),
    }
    shares = {
        "intervals.confidence": intervals.confidence,
        "contribution.false_discovery_rate": contribution.false_discovery_rate,
    }
    return [
        f"report.{key}: {value}; give at least {least}" for key, (value, least) in lowest.items() if value < least
    ] + [f"report.{key}: {value}; give a share between 0 and 1" for key, value in shares.items() if not 0 < value < 1]
