"""Atlases: a label for every packed voxel, names, groups, and what share of each patch every region holds.

Promise: labels are never used as indices (AAL3 has 166 labels within 1..170). Knows no model.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from brain_models.errors import SpaceError
from brain_models.patches import PatchLayout
from brain_models.space import BrainSpace, load_volume, on_grid, require_grid

# AAL3 label ranges, inclusive (Rolls 2020); 35, 36, 81 and 82 are unused.
AAL3_GROUPS = {
    "limbic": [(37, 46), (151, 156)],
    "cerebellum": [(95, 120)],
    "thalamus": [(121, 150)],
    "brainstem": [(159, 170)],
    "frontal": [(1, 16), (19, 32)],
    "olfactory": [(17, 18)],
    "insula": [(33, 34)],
    "occipital": [(47, 60)],
    "parietal": [(61, 74)],
    "basal_ganglia": [(75, 80), (157, 158)],
    "temporal": [(83, 94)],
    "motor": [(1, 2), (15, 16), (61, 62), (73, 74)],
}

# Left-hemisphere centres (mm, MNI) of well-known regions, rounded; the right ones are mirrored, midline ones are not.
TEMPLATE_REGIONS: dict[str, dict[str, tuple[int, int, int]]] = {
    "frontal": {
        "precentral": (-39, -6, 51),
        "frontal_superior": (-18, 35, 42),
        "frontal_middle": (-33, 33, 35),
        "frontal_inferior_opercular": (-48, 13, 19),
        "frontal_inferior_triangular": (-46, 30, 14),
        "frontal_inferior_orbital": (-36, 31, -12),
        "supplementary_motor": (-5, 5, 61),
        "frontal_superior_medial": (-5, 49, 31),
        "rectus": (-5, 37, -18),
    },
    "insula": {"insula": (-35, 7, 3)},
    "limbic": {
        "cingulate_anterior": (-4, 35, 14),
        "cingulate_middle": (-5, -15, 42),
        "cingulate_posterior": (-5, -43, 25),
        "hippocampus": (-25, -21, -10),
        "parahippocampal": (-21, -16, -21),
        "amygdala": (-23, -1, -17),
    },
    "occipital": {
        "calcarine": (-7, -79, 6),
        "cuneus": (-6, -80, 27),
        "lingual": (-15, -68, -5),
        "occipital_superior": (-17, -84, 28),
        "occipital_middle": (-32, -81, 16),
        "occipital_inferior": (-36, -78, -8),
        "fusiform": (-31, -40, -20),
    },
    "parietal": {
        "postcentral": (-42, -23, 49),
        "parietal_superior": (-23, -60, 59),
        "parietal_inferior": (-43, -46, 47),
        "supramarginal": (-56, -34, 30),
        "angular": (-44, -61, 36),
        "precuneus": (-7, -56, 48),
        "paracentral": (-8, -25, 70),
    },
    "basal_ganglia": {"caudate": (-11, 11, 9), "putamen": (-24, 4, 2)},
    "thalamus": {"thalamus": (-11, -18, 8)},
    "temporal": {
        "temporal_superior": (-53, -21, 7),
        "temporal_pole": (-38, 15, -27),
        "temporal_middle": (-56, -34, -2),
        "temporal_inferior": (-50, -28, -23),
    },
    "cerebellum": {
        "cerebellum_crus1": (-35, -67, -29),
        "cerebellum_crus2": (-28, -73, -38),
        "cerebellum_4_5": (-14, -43, -17),
        "cerebellum_6": (-22, -59, -22),
        "cerebellum_8": (-25, -55, -48),
        "cerebellum_9": (-10, -49, -46),
    },
    "brainstem": {"brainstem": (0, -28, -30)},
}
TEMPLATE_REACH_MM = 30.0
NUM_PSEUDO_REGIONS = 100  # of a space without an atlas


@dataclass(frozen=True)
class Membership:
    """Share of each patch's voxels in each region; ids of regions; True in `is_named` for the atlas's own regions.

    Tissue without a label belongs to pseudo-regions (False in `is_named`), so every row sums to 1.
    """

    shares: Float32[np.ndarray, "patch region"]
    region_ids: Int32[np.ndarray, "region"]
    is_named: Bool[np.ndarray, "region"]


@dataclass(frozen=True, eq=False)
class Atlas:
    """A label per packed voxel (0 = none), the labels' names, and named groups of labels."""

    name: str
    labels: Int32[np.ndarray, "voxel"]
    names: dict[int, str]
    groups: dict[str, list[int]]

    @property
    def region_ids(self) -> list[int]:
        """Returns the labels that keep at least one voxel, ascending."""
        return [int(label) for label in np.unique(self.labels) if label != 0]

    def membership(self, layout: PatchLayout, space: BrainSpace) -> Membership:
        """Returns the regions' shares of each patch; unlabelled voxels form regions of the median size."""
        self._require_voxels(layout.num_voxels)
        labels = self.complete_labels(space)
        region_ids, column = np.unique(labels, return_inverse=True)
        counts = np.zeros((layout.num_patches, len(region_ids)))
        np.add.at(counts, (layout.patch_of_voxel, column), 1)
        shares = (counts / layout.voxels_per_patch[:, None]).astype(np.float32)
        return Membership(shares, region_ids.astype(np.int32), region_ids <= self.labels.max())

    def region_means(
        self, values: Float32[np.ndarray, "time voxel"], is_measured: Bool[np.ndarray, "voxel"]
    ) -> Float32[np.ndarray, "time region"]:
        """Returns the mean of each region's measured voxels, regions as in `region_ids`; NaN where none is measured."""
        self._require_voxels(values.shape[1])
        region_ids = np.array(self.region_ids)
        is_used = is_measured & (self.labels != 0)
        column = np.searchsorted(region_ids, self.labels[is_used])
        weights = np.zeros((int(is_used.sum()), len(region_ids)), dtype=np.float32)
        weights[np.arange(len(column)), column] = 1
        counts = weights.sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return (values[:, is_used] @ weights / counts).astype(np.float32)

    def save(self, path: Path | str) -> None:
        """Writes labels, names and groups to an npz, without pickle."""
        text = json.dumps({"name": self.name, "names": self.names, "groups": self.groups})
        with open(path, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, labels=self.labels, text=np.array(text))

    @classmethod
    def load(cls, path: Path | str) -> "Atlas":
        """Returns the atlas saved at `path`."""
        with np.load(path, allow_pickle=False) as file:
            text = json.loads(str(file["text"]))
            names = {int(label): name for label, name in text["names"].items()}
            return cls(text["name"], file["labels"], names, text["groups"])

    def _require_voxels(self, num_voxels: int) -> None:
        if len(self.labels) != num_voxels:
            raise SpaceError(f"atlas {self.name} labels {len(self.labels)} voxels, the data have {num_voxels}")

    def complete_labels(self, space: BrainSpace) -> Int64[np.ndarray, "voxel"]:
        """Returns a label above 0 for every voxel: unlabelled tissue is halved into pseudo-regions of the median
        region's size, with labels above the atlas's own; into about 100 when the atlas has no region at all."""
        sizes = np.bincount(self.labels[self.labels != 0])
        target = float(np.median(sizes[sizes > 0])) if sizes.any() else len(self.labels) / NUM_PSEUDO_REGIONS
        labels = self.labels.astype(np.int64)
        first = int(labels.max()) + 1
        for label, voxels in enumerate(halved(space, labels == 0, largest=1.5 * target), start=first):
            labels[voxels] = label
        return labels


def no_atlas(space: BrainSpace) -> Atlas:
    """Returns an atlas without a region: all of the space becomes pseudo-regions."""
    return Atlas("none", np.zeros(space.num_voxels, dtype=np.int32), {}, {})


def cluster_labels(space: BrainSpace, num_voxels: int) -> Int64[np.ndarray, "voxel"]:
    """Returns labels 0, 1, ... of compact clusters of at most `num_voxels`, for `PatchLayout.from_labels`."""
    if num_voxels < 1:
        raise SpaceError(f"space {space.name} cannot be cut into clusters of {num_voxels} voxels; give 1 or more")
    labels = np.empty(space.num_voxels, dtype=np.int64)
    for label, voxels in enumerate(halved(space, np.ones(space.num_voxels, dtype=bool), largest=float(num_voxels))):
        labels[voxels] = label
    return labels


def halved(
    space: BrainSpace, is_in: Bool[np.ndarray, "voxel"], *, largest: float
) -> Iterator[Int64[np.ndarray, "voxel"]]:
    """Yields the voxels that `is_in` marks in clusters of at most `largest`, by halving along the longest axis.

    No cluster reaches from one hemisphere of a surface to the other.
    """
    sides = [is_in] if space.hemispheres is None else [is_in & (space.hemispheres == side) for side in (1, 0)]
    waiting = [np.flatnonzero(side) for side in sides]
    while waiting:
        voxels = waiting.pop()
        if len(voxels) > largest:
            positions_mm = space.positions_mm[voxels]
            along = positions_mm[:, np.ptp(positions_mm, axis=0).argmax()]
            order = np.argsort(along, kind="stable")
            waiting += [voxels[order[: len(order) // 2]], voxels[order[len(order) // 2 :]]]
        elif len(voxels):
            yield voxels


def atlas_from_image(path: Path | str, space: BrainSpace) -> Atlas:
    """Returns the atlas of a label NIfTI on `space` by the nearest voxel.

    An image with AAL3's label range gets AAL3's groups.
    """
    values, affine = load_volume(path)
    if not np.issubdtype(values.dtype, np.integer) or values.min() < 0:
        raise SpaceError(f"{path}: an atlas holds whole numbers >= 0; give a label image, not probabilities")
    grid_affine, grid_shape, indices = require_grid(space)
    labels = on_grid(values, affine, affine=grid_affine, shape=grid_shape)[tuple(indices.T)].astype(np.int32)
    if not labels.any():
        raise SpaceError(f"{path}: no label falls into space {space.name}; is it in {space.template} millimetres?")
    names = {int(label): f"region {label}" for label in np.unique(labels) if label}
    present = set(np.unique(values).tolist()) - {0}
    is_aal3 = present == set(range(1, 171)) - {35, 36, 81, 82}
    return Atlas(Path(path).name.split(".")[0], labels, names, aal3_groups() if is_aal3 else {})


def aal3(space: BrainSpace) -> Atlas:
    """Returns AAL3v2 on `space`, fetched by nilearn; SpaceError offline."""
    from nilearn.datasets import fetch_atlas_aal

    try:
        fetched = fetch_atlas_aal("3v2")
    except (OSError, ValueError) as error:
        raise SpaceError(f"AAL3 could not be fetched ({error}); give a label file: atlas=/path/AAL3.nii.gz") from error
    atlas = atlas_from_image(fetched.maps, space)
    names = dict(zip((int(index) for index in fetched.indices), fetched.labels, strict=True))
    return Atlas("aal3", atlas.labels, names, aal3_groups())


def template_parcellation(space: BrainSpace) -> Atlas:
    """Returns a parcellation made without a network: template grey matter, each voxel to the nearest region centre.

    A stand-in with AAL-like names and groups for trying things out; not an anatomical atlas to publish with.
    """
    from nilearn.datasets import load_mni152_gm_mask

    image = load_mni152_gm_mask(resolution=2)
    affine, shape, indices = require_grid(space)
    is_grey = on_grid(np.asarray(image.dataobj), image.affine, affine=affine, shape=shape)[tuple(indices.T)] > 0
    centres: list[tuple[int, int, int]] = []
    names: dict[int, str] = {}
    groups: dict[str, list[int]] = {}
    for group, regions in TEMPLATE_REGIONS.items():
        groups[group] = []
        for region, (x_mm, y_mm, z_mm) in regions.items():
            sides = {"": x_mm} if x_mm == 0 else {"_L": x_mm, "_R": -x_mm}
            for side, x_side_mm in sides.items():
                centres.append((x_side_mm, y_mm, z_mm))
                names[len(centres)] = region + side
                groups[group].append(len(centres))
    positions = space.positions_mm
    distances = np.linalg.norm(positions[:, None] - np.array(centres, dtype=np.float32)[None], axis=2)
    # A voxel never joins a region of the other hemisphere.
    sides_mm = np.sign(np.array(centres, dtype=np.float32)[:, 0])
    distances[np.sign(positions[:, :1]) * sides_mm[None] < 0] = np.inf
    nearest = distances.argmin(axis=1)
    is_near = distances.min(axis=1) <= TEMPLATE_REACH_MM
    is_deep = np.isin(nearest + 1, groups["brainstem"] + groups["thalamus"] + groups["basal_ganglia"])
    is_labelled = is_near & (is_grey | (is_deep & (distances.min(axis=1) <= 12)))
    labels = np.where(is_labelled, nearest + 1, 0).astype(np.int32)
    return Atlas("template", labels, names, groups)


def aal3_groups() -> dict[str, list[int]]:
    """Returns AAL3's labels by group."""
    return {
        group: [label for low, high in ranges for label in range(low, high + 1)]
        for group, ranges in AAL3_GROUPS.items()
    }
