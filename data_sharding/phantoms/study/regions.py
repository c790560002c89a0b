"""The phantom's map of the brain: named MNI positions, the group and the functional network of each.

Positions are textbook centres of the structures, rounded to about 2 mm (docs/phantom.md); pairs are mirrored at x = 0.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

# name, group, network, position of the right-hand member in MNI mm (x = 0: one region on the midline)
_TABLE: list[tuple[str, str, str, tuple[int, int, int]]] = [
    ("amygdala", "limbic", "affective", (24, -3, -19)),
    ("anterior_cingulate", "limbic", "affective", (6, 34, 20)),
    ("middle_cingulate", "limbic", "affective", (6, -8, 42)),
    ("hippocampus", "limbic", "memory", (28, -20, -16)),
    ("posterior_cingulate", "limbic", "memory", (7, -44, 26)),
    ("cerebellum_crus_1", "cerebellum", "cerebellum_posterior", (38, -66, -34)),
    ("cerebellum_crus_2", "cerebellum", "cerebellum_posterior", (20, -80, -40)),
    ("cerebellum_4_5", "cerebellum", "cerebellum_anterior", (16, -46, -20)),
    ("cerebellum_8", "cerebellum", "cerebellum_anterior", (22, -56, -52)),
    ("vermis", "cerebellum", "cerebellum_anterior", (0, -62, -24)),
    ("dorsolateral_frontal", "frontal", "control", (40, 36, 30)),
    ("frontal_pole", "frontal", "control", (26, 58, 4)),
    ("superior_frontal", "frontal", "default", (20, 30, 50)),
    ("medial_frontal", "frontal", "default", (7, 54, 26)),
    ("orbitofrontal", "frontal", "affective", (26, 36, -14)),
    ("inferior_frontal", "frontal", "salience", (50, 20, 14)),
    ("precentral", "motor", "somatomotor", (42, -14, 54)),
    ("rolandic", "motor", "somatomotor", (56, -8, 28)),
    ("supplementary_motor", "motor", "somatomotor", (7, -4, 62)),
    ("superior_parietal", "parietal", "attention", (26, -58, 60)),
    ("supramarginal", "parietal", "attention", (56, -34, 36)),
    ("inferior_parietal", "parietal", "control", (44, -54, 48)),
    ("angular", "parietal", "default", (48, -64, 30)),
    ("precuneus", "parietal", "default", (8, -62, 44)),
    ("calcarine", "occipital", "visual", (10, -80, 6)),
    ("lateral_occipital", "occipital", "visual", (36, -84, 8)),
    ("cuneus", "occipital", "visual", (12, -84, 32)),
    ("fusiform", "occipital", "visual", (34, -58, -14)),
    ("superior_temporal", "temporal", "auditory", (58, -18, 6)),
    ("middle_temporal", "temporal", "auditory", (60, -40, -2)),
    ("inferior_temporal", "temporal", "auditory", (52, -26, -26)),
    ("temporal_pole", "temporal", "affective", (42, 14, -30)),
    ("insula", "insula", "salience", (38, 6, 2)),
    ("thalamus", "thalamus", "subcortical", (12, -18, 8)),
    ("striatum", "basal ganglia", "subcortical", (22, 8, 2)),
    ("brainstem", "brainstem", "subcortical", (0, -28, -32)),
]

NETWORKS: list[str] = sorted({network for _, _, network, _ in _TABLE})

# Pairs of networks whose correlation the diagnosis changes (limbic with cerebellum), and the pair that works against
# each other in every rest study (default with attention: Fox et al. 2005, PNAS 102:9673).
COUPLED_NETWORKS: list[tuple[str, str]] = [("affective", "cerebellum_posterior"), ("memory", "cerebellum_anterior")]
OPPOSED_NETWORKS: tuple[str, str] = ("default", "attention")


@dataclass(frozen=True)
class Region:
    """One region: name with side, group, network, number of its left-right pair, centre in MNI mm."""

    name: str
    group: str
    network: str
    pair: int
    position_mm: tuple[int, int, int]


def regions() -> list[Region]:
    """All regions in fixed order: each pair right then left, midline ones once."""
    listed = []
    for pair, (name, group, network, position) in enumerate(_TABLE):
        sides = [("", 1)] if position[0] == 0 else [("_right", 1), ("_left", -1)]
        for side, sign in sides:
            mirrored = (sign * position[0], position[1], position[2])
            listed.append(Region(name + side, group, network, pair, mirrored))
    return listed


def region_maps(positions_mm: Float[np.ndarray, "voxel 3"], width_mm: float) -> Float[np.ndarray, "region voxel"]:
    """Smooth share of every region at each position; shares of one position sum to 1 (a soft Voronoi partition)."""
    centres = np.array([region.position_mm for region in regions()], dtype=np.float32)
    squared = (centres**2).sum(1)[:, None] - 2 * centres @ positions_mm.T + (positions_mm**2).sum(1)[None, :]
    closeness = -0.5 * squared / width_mm**2
    weights = np.exp(closeness - closeness.max(axis=0, keepdims=True))
    return (weights / weights.sum(axis=0, keepdims=True)).astype(np.float32)
