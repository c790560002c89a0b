"""Everything a phantom depends on. Numbers: configs/data_sharding.phantom.yaml, their reasons: docs/phantom.md."""

from dataclasses import dataclass
from math import ceil

from brain_models.errors import UserError


class PhantomError(UserError):
    """A phantom that cannot be written as asked; the message says what, where and what to do."""


@dataclass
class SiteConfig:
    """One scanner: timing, thermal noise (percent of the mean signal), T1 contrast and share of ADHD."""

    name: str
    repetition_time_s: float
    noise_percent: float
    t1_contrast: float
    prevalence: float


@dataclass
class AnatomyConfig:
    """How brains differ: shape modes, regional grey matter, coil bias and noise of the T1."""

    num_shape_modes: int
    shortest_wave_mm: float
    longest_wave_mm: float
    displacement_mm: float
    grey_matter_percent: float
    global_share: float
    network_share: float
    age_share: float
    bias_percent: float
    noise_percent: float
    white_matter_intensity: float


@dataclass
class SignalConfig:
    """How the BOLD signal fluctuates: bands, shares, amplitudes and what anatomy and diagnosis do to coupling."""

    baseline_intensity: float
    region_width_mm: float
    lowest_hz: float
    highest_hz: float
    network_share: float
    homotopic_share: float
    opposed_correlation: float
    coupling_logit: float
    coupling_spread: float
    coupling_effect: float
    structure_coupling: float
    structure_amplitude: float
    neural_percent: float
    white_matter_fraction: float
    global_percent: float
    drift_percent: float


@dataclass
class MotionConfig:
    """How heads move, and how much of it stays in realigned scans."""

    step_mm: float
    spread: float
    spike_rate: float
    spike_mm: float
    residual_fraction: float
    spike_percent_per_mm: float


@dataclass
class MarkerConfig:
    """The bright spot in the right hemisphere by which a flip is seen."""

    position_mm: list[float]
    width_mm: float
    brightness: float


@dataclass
class PhantomConfig:
    """One phantom data set (configs/data_sharding.phantom.yaml)."""

    out: str
    num_subjects: int
    seed: int
    population_seed: int
    spacing_mm: float
    t1_spacing_mm: float
    num_frames: int
    effect_size: float
    equal_prevalence: bool
    fov_cut_lowest_mm: float
    fov_cut_highest_mm: float
    num_processes: int
    gzip_level: int
    sites: list[SiteConfig]
    anatomy: AnatomyConfig
    signal: SignalConfig
    motion: MotionConfig
    marker: MarkerConfig


def validate_phantom(config: PhantomConfig) -> list[str]:
    """All problems of a configuration: each names its key and what to give instead."""
    problems = []
    for key in ("num_subjects", "num_frames", "num_processes", "spacing_mm", "t1_spacing_mm"):
        if getattr(config, key) <= 0:
            problems.append(f"{key}: {getattr(config, key)} is not positive; give a number above 0")
    if config.effect_size < 0:
        problems.append(f"effect_size: {config.effect_size} is negative; 0 is no effect, 1 the calibrated one")
    if config.marker.position_mm[0] <= 0:
        problems.append(
            f"marker.position_mm: x = {config.marker.position_mm[0]} is not in the right hemisphere; use x > 0"
        )
    signal = config.signal
    if signal.network_share + signal.homotopic_share >= 1:
        problems.append(
            "signal: network_share + homotopic_share must stay below 1 to leave a region something of its own"
        )
    for site in config.sites:
        if not 0 <= site.prevalence <= 1:
            problems.append(f"sites.{site.name}.prevalence: {site.prevalence} is no share; use 0 to 1")
        nyquist_hz = 0.5 / site.repetition_time_s
        fewest_frames = ceil(1 / (1.5 * site.repetition_time_s * signal.highest_hz))
        if config.num_frames < fewest_frames:
            problems.append(
                f"num_frames: {config.num_frames} frames of {site.repetition_time_s} s ({site.name}) hold no wave of "
                f"the band; give at least {fewest_frames}"
            )
        if signal.highest_hz > nyquist_hz:
            problems.append(
                f"sites.{site.name}.repetition_time_s: {site.repetition_time_s} s samples up to {nyquist_hz:.3f} Hz, "
                f"below signal.highest_hz {signal.highest_hz}; shorten the TR or lower signal.highest_hz"
            )
    if not config.sites:
        problems.append("sites: empty; list at least one site")
    return problems
