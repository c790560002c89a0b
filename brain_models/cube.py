"""The cube around a head: a space without a template, whose middle is each scan's own centre of mass.

Promise: the same head anywhere in its field of view gives the same cube. Knows no template and no atlas.
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64

from brain_models.errors import ScanError
from brain_models.nifti import ScanHeader, stream_frames
from brain_models.space import BrainSpace, space_from_mask

NO_TEMPLATE = "none"
BRIGHTEST_PERCENT = 99.0  # fat and vessels beyond it must not pull the centre


@dataclass
class CubeSpaceConfig:
    """A cube of `edge_voxels`^3 voxels of `spacing_mm`, axes to the right, the front and the top."""

    name: str
    template: str  # "none": nothing is aligned but the centre
    spacing_mm: float
    edge_voxels: int


def cube_space(config: CubeSpaceConfig) -> BrainSpace:
    """Returns the space of all voxels of the cube; its millimetres count from the head's centre of mass."""
    affine = np.diag([config.spacing_mm] * 3 + [1.0])
    affine[:3, 3] = -config.spacing_mm * (config.edge_voxels - 1) / 2
    everywhere = np.ones((config.edge_voxels,) * 3, dtype=bool)
    return space_from_mask(everywhere, affine, name=config.name, template=NO_TEMPLATE)


def centred(header: ScanHeader) -> ScanHeader:
    """Returns the header of a T1 with its millimetres moved so that the head's centre of mass is 0, 0, 0."""
    affine = header.affine.copy()
    affine[:3, 3] -= centre_of_mass_mm(header)
    return replace(header, affine=affine)


def centre_of_mass_mm(header: ScanHeader) -> Float64[np.ndarray, "3"]:
    """Returns the intensity-weighted mean position of the voxels brighter than the volume's mean.

    Air lies below that mean in any head scan; intensities are clipped at their 99th percentile.
    """
    volume = next(stream_frames(header))[0].astype(np.float64).reshape(header.shape, order="F")
    volume = np.where(np.isfinite(volume), volume, 0.0)
    is_head = volume > volume.mean()
    if not is_head.any():
        raise ScanError(f"{header.path}: all voxels have the same value; this is not a T1 image")
    weights = np.where(is_head, np.minimum(volume, np.percentile(volume[is_head], BRIGHTEST_PERCENT)), 0.0)
    sums = [weights.sum(axis=tuple({0, 1, 2} - {axis})) for axis in range(3)]
    index = np.array([(np.arange(len(along)) * along).sum() / along.sum() for along in sums])
    return header.affine[:3, :3] @ index + header.affine[:3, 3]
