"""Brain spaces: the ordered list of in-brain locations that packed arrays are indexed by.

Promise: two spaces with the same fingerprint hold the same locations in the same order. Knows no scan and no model.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from brain_models.errors import SpaceError

Kind = Literal["volume", "surface", "parcels"]

# The FSL MNI152 field of view: the corner of the 91x109x91 grid at 2 mm, and its extent. Coarser grids keep the corner.
FSL_ORIGIN_MM = (90.0, -126.0, -72.0)
FSL_EXTENT_MM = (180.0, 216.0, 180.0)

NO_TEMPLATE = "none"  # of a cube around a head, whose middle is each scan's own centre of mass


@dataclass
class SpaceConfig:
    """How a volume space is made: FSL-grid relative at `spacing_mm`, masked by `mask` (mni152 or a NIfTI file)."""

    name: str
    template: str
    spacing_mm: float
    mask: str
    dilate_mm: float


@dataclass
class CubeSpaceConfig:
    """A cube of `edge_voxels`^3 voxels of `spacing_mm`, axes to the right, the front and the top."""

    name: str
    template: str  # "none": nothing is aligned but the centre
    spacing_mm: float
    edge_voxels: int


@dataclass(frozen=True, eq=False)
class BrainSpace:
    """An ordered list of in-brain locations; volumes also carry the grid they lie on, surfaces their meshes.

    `positions_mm` is NaN where a surface's shape was not given.
    """

    name: str
    kind: Kind
    template: str
    positions_mm: np.ndarray  # float32 [voxel, 3]
    grid_shape: tuple[int, int, int] | None
    affine: np.ndarray | None  # float64 [4, 4], voxel index -> mm
    voxel_indices: np.ndarray | None  # int32 [voxel, 3]
    hemispheres: np.ndarray | None = None  # int8 [voxel], 0 left, 1 right
    vertices: np.ndarray | None = None  # int32 [voxel], number in its hemisphere's mesh
    mesh_sizes: tuple[int, int] | None = None  # vertices of the left and the right mesh
    triangles: np.ndarray | None = None  # int32 [triangle, 3], packed indices; None where the meshes were not given

    @property
    def num_voxels(self) -> int:
        return len(self.positions_mm)

    @property
    def spacing_mm(self) -> float:
        """Returns the mean voxel edge of a volume in mm."""
        return float(np.cbrt(abs(np.linalg.det(require_grid(self)[0][:3, :3]))))

    @cached_property
    def fingerprint(self) -> str:
        """Returns a SHA-256 over kind, template, positions and grid: equal for spaces that can be used alike.

        Triangles are left out: they say nothing about the order of locations.
        """
        digest = hashlib.sha256(f"{self.kind}|{self.template}|{self.grid_shape}".encode())
        digest.update(np.round(self.positions_mm, 3).astype("<f4").tobytes())
        if self.hemispheres is not None and self.vertices is not None:
            digest.update(str(self.mesh_sizes).encode())
            digest.update(self.hemispheres.astype("<i1").tobytes() + self.vertices.astype("<i4").tobytes())
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BrainSpace) and other.fingerprint == self.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def save(self, path: Path | str) -> None:
        """Writes space.npz, without pickle."""
        arrays: dict[str, np.ndarray] = {"positions_mm": self.positions_mm}
        if self.kind == "volume":
            affine, grid_shape, voxel_indices = require_grid(self)
            arrays |= {"grid_shape": np.array(grid_shape), "affine": affine, "voxel_indices": voxel_indices}
        if self.kind == "surface":
            hemispheres, vertices, mesh_sizes = require_mesh(self)
            arrays |= {"hemispheres": hemispheres, "vertices": vertices, "mesh_sizes": np.array(mesh_sizes)}
            arrays |= {} if self.triangles is None else {"triangles": self.triangles}
        arrays |= {"name": np.array(self.name), "kind": np.array(self.kind), "template": np.array(self.template)}
        with open(path, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path | str) -> "BrainSpace":
        """Returns the space saved at `path`; SpaceError when the file is not one."""
        try:
            with np.load(path, allow_pickle=False) as file:
                saved = {key: file[key] for key in file.files}
        except (OSError, ValueError) as error:
            raise SpaceError(f"{path} is not a space.npz ({error}); write the shard set or bundle again") from error
        return cls(
            name=str(saved["name"]),
            kind=str(saved["kind"]),  # type: ignore[arg-type]
            template=str(saved["template"]),
            positions_mm=saved["positions_mm"],
            grid_shape=tuple(int(size) for size in saved["grid_shape"]) if "grid_shape" in saved else None,  # type: ignore[arg-type]
            affine=saved.get("affine"),
            voxel_indices=saved.get("voxel_indices"),
            hemispheres=saved.get("hemispheres"),
            vertices=saved.get("vertices"),
            mesh_sizes=tuple(int(size) for size in saved["mesh_sizes"]) if "mesh_sizes" in saved else None,  # type: ignore[arg-type]
            triangles=saved.get("triangles"),
        )


def require_grid(space: BrainSpace) -> tuple[np.ndarray, tuple[int, int, int], np.ndarray]:
    """Returns affine, grid shape and voxel indices of a volume; SpaceError for other kinds."""
    if space.affine is None or space.grid_shape is None or space.voxel_indices is None:
        raise SpaceError(f"space {space.name} is a {space.kind} without a voxel grid; use a volume space here")
    return space.affine, space.grid_shape, space.voxel_indices


def require_mesh(space: BrainSpace) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Returns hemispheres, vertices and mesh sizes of a surface; SpaceError for other kinds."""
    if space.hemispheres is None or space.vertices is None or space.mesh_sizes is None:
        raise SpaceError(f"space {space.name} is a {space.kind} without a mesh; use a surface space here")
    return space.hemispheres, space.vertices, space.mesh_sizes


def fsl_grid(spacing_mm: float) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Returns affine and shape of the FSL grid's relative at `spacing_mm` (2 mm: 91x109x91, x runs right to left)."""
    affine = np.diag([-spacing_mm, spacing_mm, spacing_mm, 1.0])
    affine[:3, 3] = FSL_ORIGIN_MM
    shape = tuple(int(extent // spacing_mm) + 1 for extent in FSL_EXTENT_MM)
    return affine, shape  # type: ignore[return-value]


def volume_space(config: SpaceConfig, *, atlas_images: Sequence[Path] = ()) -> BrainSpace:
    """Returns the FSL-grid space of `config`: its mask dilated by `dilate_mm`, joined with the atlases' voxels.

    The bare MNI mask cuts 4 % of AAL3 (half of Cerebellum_10), hence dilation and union.
    """
    from scipy import ndimage

    if config.spacing_mm <= 0:
        raise SpaceError(
            f"space {config.name}: spacing_mm is {config.spacing_mm}; give a positive number of millimetres"
        )
    affine, shape = fsl_grid(config.spacing_mm)
    in_brain = on_grid(*_mask_image(config.mask), affine=affine, shape=shape) > 0
    if config.dilate_mm > 0:
        in_brain = ndimage.binary_dilation(in_brain, iterations=max(1, round(config.dilate_mm / config.spacing_mm)))
    for atlas_image in atlas_images:
        in_brain |= on_grid(*load_volume(atlas_image), affine=affine, shape=shape) > 0
    if not in_brain.any():
        raise SpaceError(f"space {config.name}: mask {config.mask} has no voxel on the {config.spacing_mm} mm grid")
    return space_from_mask(in_brain, affine, name=config.name, template=config.template)


def cube_space(config: CubeSpaceConfig) -> BrainSpace:
    """Returns the space of all voxels of the cube; its millimetres count from the head's centre of mass."""
    affine = np.diag([config.spacing_mm] * 3 + [1.0])
    affine[:3, 3] = -config.spacing_mm * (config.edge_voxels - 1) / 2
    everywhere = np.ones((config.edge_voxels,) * 3, dtype=bool)
    return space_from_mask(everywhere, affine, name=config.name, template=NO_TEMPLATE)


def space_from_mask(in_brain: np.ndarray, affine: np.ndarray, *, name: str, template: str) -> BrainSpace:
    """Returns the volume space of the True voxels of `in_brain`, in C order of the grid."""
    indices = np.argwhere(in_brain).astype(np.int32)
    positions = indices @ affine[:3, :3].T + affine[:3, 3]
    shape = tuple(int(size) for size in in_brain.shape)
    return BrainSpace(name, "volume", template, positions.astype(np.float32), shape, affine, indices)  # type: ignore[arg-type]


def on_grid(values: np.ndarray, source_affine: np.ndarray, *, affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns `values` sampled on another grid by the nearest voxel; 0 outside. Fit for masks and labels."""
    from scipy import ndimage

    to_source = np.linalg.inv(source_affine) @ affine
    return ndimage.affine_transform(values, to_source[:3, :3], to_source[:3, 3], output_shape=shape, order=0)


def load_volume(path: Path | str) -> tuple[np.ndarray, np.ndarray]:
    """Returns values and affine of a 3D NIfTI file; int64 values when the file holds whole numbers."""
    import nibabel

    try:
        image = nibabel.load(path)
        values = np.asarray(image.dataobj)  # type: ignore[attr-defined]
    except (OSError, nibabel.filebasedimages.ImageFileError) as error:
        raise SpaceError(f"{path}: not a readable NIfTI volume ({error}); give a 3D .nii or .nii.gz") from error
    values = values.reshape(values.shape[:3])
    if np.allclose(values, np.rint(values)):
        values = np.rint(values).astype(np.int64)
    return values, image.affine  # type: ignore[attr-defined]


def _mask_image(mask: str) -> tuple[np.ndarray, np.ndarray]:
    if mask != "mni152":
        return load_volume(mask)
    from nilearn.datasets import load_mni152_brain_mask

    image = load_mni152_brain_mask(resolution=1)
    return np.asarray(image.dataobj), image.affine
