"""One subject's hidden truth: site, diagnosis, anatomy, coupling and head motion, drawn from streams of its own.

Subject k depends on (seed, k) alone, never on how many subjects there are. The diagnosis has its own stream and reaches
an array through one number, `coupling_logit`, times the effect size.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from .config import AnatomyConfig, MotionConfig, PhantomConfig, SiteConfig
from .regions import NETWORKS, regions

_STREAMS = ("person", "diagnosis", "anatomy", "coupling", "motion", "signal", "bold_noise", "t1_noise")
_YOUNGEST_YEARS, _OLDEST_YEARS = 7.0, 21.0  # the age range of ADHD-200
_HEAD_RADIUS_MM = 50.0  # turns rotations into millimetres, Power et al. 2012, NeuroImage 59:2142


@dataclass(frozen=True)
class Subject:
    """What is true of one subject. Regional arrays follow `regions()`; motion is x y z in mm, then angles in rad."""

    subject_id: str
    index: int
    site: SiteConfig
    age: float
    sex: str
    has_adhd: bool
    shape: Float[np.ndarray, " mode"]
    bias: Float[np.ndarray, " bias"]
    regional_anatomy: Float[np.ndarray, " region"]  # grey matter, standard scores
    coupling_logit: float
    fov_cut_mm: float
    motion: Float[np.ndarray, "time 6"]

    @property
    def coupling(self) -> float:
        """Correlation of limbic with cerebellar networks, 0 to 1."""
        return float(1 / (1 + np.exp(-self.coupling_logit)))


def stream(config: PhantomConfig, index: int, name: str) -> np.random.Generator:
    """The generator of one subject and purpose; independent of every other subject's and purpose's."""
    return np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=(index, _STREAMS.index(name))))


def draw_subject(config: PhantomConfig, index: int) -> Subject:
    """Subject number `index`, counted from 0; sites take turns."""
    site = config.sites[index % len(config.sites)]
    person = stream(config, index, "person")
    age = float(person.uniform(_YOUNGEST_YEARS, _OLDEST_YEARS))
    has_adhd = bool(stream(config, index, "diagnosis").random() < _prevalence(config, site))
    anatomy = stream(config, index, "anatomy")
    spread = config.signal.coupling_spread * stream(config, index, "coupling").standard_normal()
    change = config.effect_size * config.signal.coupling_effect * has_adhd
    return Subject(
        subject_id=f"{index + 1:04d}",
        index=index,
        site=site,
        age=round(age, 2),
        sex=str(person.choice(["F", "M"])),
        has_adhd=has_adhd,
        shape=anatomy.standard_normal(config.anatomy.num_shape_modes),
        bias=anatomy.standard_normal(6) * config.anatomy.bias_percent / 100,
        regional_anatomy=_regional_anatomy(config.anatomy, age, anatomy),
        coupling_logit=float(config.signal.coupling_logit + spread + change),
        fov_cut_mm=float(person.uniform(config.fov_cut_lowest_mm, config.fov_cut_highest_mm)),
        motion=_head_motion(config.motion, config.num_frames, stream(config, index, "motion")),
    )


def framewise_displacement(motion: Float[np.ndarray, "time 6"]) -> Float[np.ndarray, " time"]:
    """Head movement since the frame before in mm (Power et al. 2012); 0 for the first frame."""
    steps = np.abs(np.diff(motion, axis=0, prepend=motion[:1]))
    return steps[:, :3].sum(axis=1) + _HEAD_RADIUS_MM * steps[:, 3:].sum(axis=1)


def _prevalence(config: PhantomConfig, site: SiteConfig) -> float:
    if not config.equal_prevalence:
        return site.prevalence
    return float(np.mean([other.prevalence for other in config.sites]))


def _regional_anatomy(anatomy: AnatomyConfig, age: float, generator: np.random.Generator) -> np.ndarray:
    """Grey matter of each region in standard scores: a global factor that falls with age, a network's, its own."""
    centred = (age - (_YOUNGEST_YEARS + _OLDEST_YEARS) / 2) / ((_OLDEST_YEARS - _YOUNGEST_YEARS) / np.sqrt(12))
    drawn = generator.standard_normal()
    whole = np.sqrt(1 - anatomy.age_share) * drawn - np.sqrt(anatomy.age_share) * centred
    network = generator.standard_normal(len(NETWORKS))
    member = [NETWORKS.index(region.network) for region in regions()]
    own = generator.standard_normal(len(member))
    own_share = 1 - anatomy.global_share - anatomy.network_share
    return (
        np.sqrt(anatomy.global_share) * whole
        + np.sqrt(anatomy.network_share) * network[member]
        + np.sqrt(own_share) * own
    )


def _head_motion(motion: MotionConfig, num_frames: int, generator: np.random.Generator) -> np.ndarray:
    """A random walk pulled back to rest, with sudden jumps; restlessness varies between subjects as a log-normal."""
    restlessness = np.exp(motion.spread * generator.standard_normal())
    steps = generator.standard_normal((num_frames, 6)) * motion.step_mm * restlessness
    jumps = generator.random(num_frames) < motion.spike_rate * restlessness
    steps += jumps[:, None] * generator.standard_normal((num_frames, 6)) * motion.spike_mm
    steps[:, 3:] /= _HEAD_RADIUS_MM
    trace = np.zeros((num_frames, 6))
    for frame in range(1, num_frames):
        trace[frame] = 0.95 * trace[frame - 1] + steps[frame]
    return trace
