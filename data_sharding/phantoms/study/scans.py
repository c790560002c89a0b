"""One subject's arrays: the T1 and the BOLD frames on their grids, from its hidden truth.

BOLD(voxel, time) = mean(voxel) x (1 + neural + global + drift + motion, all in percent) + thermal noise; nothing here
looks at the diagnosis: it has acted through `subject.coupling` alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from .config import MarkerConfig, PhantomConfig, SignalConfig
from .population import Population, sample_tissue
from .regions import COUPLED_NETWORKS, NETWORKS, OPPOSED_NETWORKS, region_maps, regions
from .subject import Subject, framewise_displacement, stream

_GREY, _WHITE, _FLUID = 1.0, 0.85, 1.25  # relative T2*-weighted signal, echo-planar at 3 T: fluid > grey > white
_HEAD = 0.05  # share of brain in a voxel below which it is background
_EDGE_WIDTH_MM = 10.0  # over which the mean image falls from brain to background


@dataclass(frozen=True)
class Tissue:
    """One subject's brain on one grid: where each voxel lies in the average brain, and what it is made of."""

    positions_mm: Float[np.ndarray, "voxel 3"]
    grey: Float[np.ndarray, " voxel"]
    white: Float[np.ndarray, " voxel"]
    brain: Float[np.ndarray, " voxel"]
    regions: Float[np.ndarray, "region voxel"]


def subject_tissue(config: PhantomConfig, subject: Subject, population: Population) -> Tissue:
    """The average brain seen through the subject's smooth deformation."""
    displacement = np.tensordot(subject.shape.astype(np.float32), population.shape_modes, axes=1)
    positions = population.positions_mm + displacement
    grey, white, brain = (sample_tissue(population, name, positions) for name in ("grey", "white", "brain"))
    total = np.maximum(grey + white, 1.0)  # the two packaged maps overlap by a few percent after blurring
    return Tissue(
        positions_mm=positions,
        grey=grey / total,
        white=white / total,
        brain=brain,
        regions=region_maps(positions, config.signal.region_width_mm),
    )


def brain_voxels(tissue: Tissue) -> Bool[np.ndarray, " voxel"]:
    """True where at least half the voxel is brain."""
    return tissue.brain >= 0.5


def field_of_view(config: PhantomConfig, subject: Subject, population: Population) -> Bool[np.ndarray, " voxel"]:
    """True where the subject's BOLD slices reach: above the cut, counted from the grid's lowest slice."""
    lowest_mm = population.affine[2, 3]
    return population.positions_mm[:, 2] >= lowest_mm + subject.fov_cut_mm


def t1_image(
    config: PhantomConfig, subject: Subject, population: Population, tissue: Tissue
) -> Float[np.ndarray, " voxel"]:
    """T1 intensity: warped template with the site's contrast, regional grey matter, coil bias, marker and noise."""
    anatomy = config.anatomy
    contrast = sample_tissue(population, "t1", tissue.positions_mm) ** np.float32(subject.site.t1_contrast)
    excess = subject.regional_anatomy.astype(np.float32) @ tissue.regions
    grey_matter = 1 + anatomy.grey_matter_percent / 100 * excess * tissue.grey
    values = contrast * grey_matter * _coil_bias(subject, population.positions_mm)
    values *= 1 + _marker(config.marker, population.positions_mm)
    noise = stream(config, subject.index, "t1_noise").standard_normal(len(values), dtype=np.float32)
    values = np.maximum(values + anatomy.noise_percent / 100 * noise, 0)
    return anatomy.white_matter_intensity * values * (tissue.brain >= _HEAD)


def bold_frames(
    config: PhantomConfig, subject: Subject, population: Population, tissue: Tissue, *, block_frames: int
) -> Iterator[Float[np.ndarray, "time voxel"]]:
    """The run in blocks of frames, so a fine grid never holds a whole run; zero outside head and field of view."""
    is_inside = (tissue.brain >= _HEAD) & field_of_view(config, subject, population)
    mean = bold_mean(config, subject, population, tissue)[is_inside]
    maps, courses = _components(config, subject, tissue, mean, is_inside)
    noise_scale = np.float32(subject.site.noise_percent / 100 * config.signal.baseline_intensity)
    noise = stream(config, subject.index, "bold_noise")
    for first in range(0, config.num_frames, block_frames):
        percent = courses[first : first + block_frames] @ maps
        inside = mean * (1 + percent / 100)
        inside += noise_scale * noise.standard_normal(inside.shape, dtype=np.float32)
        block = np.zeros((len(inside), len(is_inside)), dtype=np.float32)
        block[:, is_inside] = np.maximum(inside, 0)
        yield block


def bold_mean(
    config: PhantomConfig, subject: Subject, population: Population, tissue: Tissue
) -> Float[np.ndarray, " voxel"]:
    """The run's mean image: T2*-weighted tissue contrast, coil bias and marker; intensities in the thousands."""
    fluid = np.maximum(1 - tissue.grey - tissue.white, 0)
    contrast = (_GREY * tissue.grey + _WHITE * tissue.white + _FLUID * fluid) * np.minimum(tissue.brain, 1)
    marked = contrast * (1 + _marker(config.marker, population.positions_mm))
    return config.signal.baseline_intensity * marked * _coil_bias(subject, population.positions_mm)


def region_courses(
    config: PhantomConfig, subject: Subject, generator: np.random.Generator
) -> Float[np.ndarray, "time region"]:
    """Percent signal change of every region: its network's course, its pair's and its own, scaled by its anatomy."""
    listed, signal = regions(), config.signal
    times_s = np.arange(config.num_frames) * subject.site.repetition_time_s
    member = [NETWORKS.index(region.network) for region in listed]
    pair = [region.pair for region in listed]
    sources = band_limited(signal, times_s, len(NETWORKS) + max(pair) + 1 + len(listed), generator)
    network, homotopic, own = np.split(sources, [len(NETWORKS), len(NETWORKS) + max(pair) + 1], axis=1)
    network = network @ np.linalg.cholesky(_network_correlation(signal, subject.coupling)).T
    loading = np.exp(signal.structure_coupling * subject.regional_anatomy)
    own_share = 1 - signal.network_share - signal.homotopic_share
    courses = (
        np.sqrt(signal.network_share) * loading * network[:, member]
        + np.sqrt(signal.homotopic_share) * homotopic[:, pair]
        + np.sqrt(own_share) * own
    )
    return signal.neural_percent * np.exp(signal.structure_amplitude * subject.regional_anatomy) * courses


def band_limited(
    signal: SignalConfig, times_s: Float[np.ndarray, " time"], num_sources: int, generator: np.random.Generator
) -> Float[np.ndarray, "time source"]:
    """Unit-variance courses with power 1/frequency inside the band and none outside, evaluated at the frames' times."""
    period_s = 1.5 * (times_s[-1] + times_s[1])  # longer than the run: courses must not close on themselves
    frequencies_hz = np.arange(1, int(signal.highest_hz * period_s) + 1) / period_s
    frequencies_hz = frequencies_hz[frequencies_hz >= signal.lowest_hz]
    amplitudes = frequencies_hz**-0.5
    amplitudes /= np.sqrt((amplitudes**2).sum())
    angles = 2 * np.pi * times_s[:, None] * frequencies_hz[None, :]
    cosines, sines = generator.standard_normal((2, len(frequencies_hz), num_sources))
    return np.cos(angles) * amplitudes @ cosines + np.sin(angles) * amplitudes @ sines


def _network_correlation(signal: SignalConfig, coupling: float) -> np.ndarray:
    correlation = np.eye(len(NETWORKS))
    for limbic, cerebellar in COUPLED_NETWORKS:
        first, second = NETWORKS.index(limbic), NETWORKS.index(cerebellar)
        correlation[first, second] = correlation[second, first] = min(coupling, 0.999)
    first, second = (NETWORKS.index(name) for name in OPPOSED_NETWORKS)
    correlation[first, second] = correlation[second, first] = signal.opposed_correlation
    return correlation


def _components(
    config: PhantomConfig, subject: Subject, tissue: Tissue, mean: np.ndarray, is_inside: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Everything but thermal noise as maps [component, voxel] in percent and courses [time, component]."""
    signal, motion = config.signal, config.motion
    generator = stream(config, subject.index, "signal")
    vascular = tissue.grey[is_inside] + signal.white_matter_fraction * tissue.white[is_inside]
    neural_maps = tissue.regions[:, is_inside] * vascular
    neural_courses = region_courses(config, subject, generator)
    times_s = np.arange(config.num_frames) * subject.site.repetition_time_s
    global_course = signal.global_percent * band_limited(signal, times_s, 1, generator)
    unit_time = np.linspace(-1, 1, config.num_frames)
    drift_courses = np.stack([unit_time, 1.5 * unit_time**2 - 0.5], axis=1) * signal.drift_percent
    smooth = _smooth_basis(tissue.positions_mm[is_inside])
    drift_maps = generator.standard_normal((2, len(smooth))) @ smooth
    # A shift moves intensity across the brain's edge: percent per mm, outward normal times share of background.
    edge_maps = 100 / _EDGE_WIDTH_MM * smooth[1:4] * (1 - np.minimum(tissue.brain[is_inside], 1))
    motion_courses = motion.residual_fraction * subject.motion[:, :3]
    spikes = -motion.spike_percent_per_mm * framewise_displacement(subject.motion)[:, None]
    maps = [neural_maps, vascular[None], drift_maps, edge_maps, smooth[:1]]
    courses = [neural_courses, global_course, drift_courses, motion_courses, spikes]
    return np.concatenate(maps).astype(np.float32), np.concatenate(courses, axis=1).astype(np.float32)


def _smooth_basis(positions_mm: np.ndarray) -> np.ndarray:
    """1, x, y, z over 90 mm: [4, voxel]."""
    return np.concatenate([np.ones((1, len(positions_mm))), positions_mm.T / 90])


def _coil_bias(subject: Subject, positions_mm: np.ndarray) -> np.ndarray:
    scaled = positions_mm / 90
    fields = np.concatenate([scaled, scaled**2 - 1 / 3], axis=1)
    return (1 + fields @ subject.bias).astype(np.float32)


def _marker(marker: MarkerConfig, positions_mm: np.ndarray) -> np.ndarray:
    squared = ((positions_mm - np.array(marker.position_mm, dtype=np.float32)) ** 2).sum(axis=1)
    return marker.brightness * np.exp(-0.5 * squared / marker.width_mm**2).astype(np.float32)
