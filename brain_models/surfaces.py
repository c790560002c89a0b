"""Surface spaces: vertices of a left and a right mesh, all of them or those a mask names. Nothing is downloaded.

Promise: left vertices come first, each hemisphere in the mesh's order. Knows no scan.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.parsers.expat import ExpatError

import numpy as np
from jaxtyping import Bool, Float32, Int32

from brain_models.errors import ScanError, SpaceError
from brain_models.space import BrainSpace

HEMISPHERES = ("left", "right")
CIFTI_CORTEX = ("CIFTI_STRUCTURE_CORTEX_LEFT", "CIFTI_STRUCTURE_CORTEX_RIGHT")
PACKAGED = "fsaverage5"  # with nilearn
_UNREADABLE = (OSError, ValueError, EOFError, LookupError, SyntaxError, ExpatError)  # what nibabel's parsers raise


@dataclass
class SurfaceSpaceConfig:
    """Which vertices of which meshes."""

    name: str
    template: str  # fsaverage5, fsLR, ...: what scans of it call their space
    surfaces: list[str]  # GIFTI surfaces, left and right; [] takes nilearn's fsaverage5, or leaves positions unknown
    vertices: list[str]  # [] all; one CIFTI file; or left and right: .npy, .annot, label, shape or func GIFTI
    labels: list[int]  # of the vertices file: those that count; [] takes all it lists, or all that are not 0


# positions in mm, and corners where the file has them
Mesh = tuple[Float32[np.ndarray, "_ 3"], Int32[np.ndarray, "_ 3"] | None]


def surface_space(config: SurfaceSpaceConfig) -> BrainSpace:
    """Returns the space of a configuration; positions are the given surfaces', NaN where there are none."""
    meshes = _meshes(config)
    chosen = _chosen(config, [None if mesh is None else len(mesh[0]) for mesh in meshes])
    for side, mesh, is_chosen in zip(HEMISPHERES, meshes, chosen, strict=True):
        if mesh is not None and len(mesh[0]) != len(is_chosen):
            raise SpaceError(
                f"space {config.name}: the {side} surface has {len(mesh[0])} vertices, {config.vertices} is about "
                f"{len(is_chosen)}; give both of one mesh"
            )
    vertices = [np.flatnonzero(is_chosen) for is_chosen in chosen]
    if not sum(map(len, vertices)):
        raise SpaceError(f"space {config.name}: no vertex of {config.vertices} has one of the labels {config.labels}")
    positions_mm = [
        np.full((len(numbers), 3), np.nan) if mesh is None else mesh[0][numbers]
        for mesh, numbers in zip(meshes, vertices, strict=True)
    ]
    return BrainSpace(
        name=config.name,
        kind="surface",
        template=config.template,
        positions_mm=np.concatenate(positions_mm).astype(np.float32),
        grid_shape=None,
        affine=None,
        voxel_indices=None,
        hemispheres=np.repeat(np.arange(2, dtype=np.int8), [len(numbers) for numbers in vertices]),
        vertices=np.concatenate(vertices).astype(np.int32),
        mesh_sizes=(len(chosen[0]), len(chosen[1])),
        triangles=_packed_triangles(meshes, chosen),
    )


def _packed_triangles(
    meshes: list[Mesh | None], chosen: list[Bool[np.ndarray, "_"]]
) -> Int32[np.ndarray, "triangle 3"] | None:
    """Returns the triangles all of whose corners belong to the space, by packed index; None where not known."""
    packed, num_before = [], 0
    for mesh, is_chosen in zip(meshes, chosen, strict=True):
        if mesh is None or mesh[1] is None:
            return None
        corners = mesh[1]
        index = np.cumsum(is_chosen) - 1 + num_before
        packed.append(index[corners[is_chosen[corners].all(axis=1)]])
        num_before += int(is_chosen.sum())
    return np.concatenate(packed).astype(np.int32)


def _meshes(config: SurfaceSpaceConfig) -> list[Mesh | None]:
    """Returns the left and the right mesh, or None where their shape is not known."""
    if config.surfaces:
        return [_surface(path) for path in config.surfaces]
    if config.template != PACKAGED:
        return [None, None]
    from nilearn.datasets import fetch_surf_fsaverage

    files = fetch_surf_fsaverage(PACKAGED)  # packaged: no network
    pairs = [(_surface(files[f"white_{side}"]), _surface(files[f"pial_{side}"])) for side in HEMISPHERES]
    return [((white + pial) / 2, triangles) for (white, triangles), (pial, _) in pairs]


def _surface(path: Path | str) -> Mesh:
    image = load_gifti(path)
    points = image.get_arrays_from_intent("NIFTI_INTENT_POINTSET")
    triangles = image.get_arrays_from_intent("NIFTI_INTENT_TRIANGLE")
    if len(points) != 1 or points[0].data.ndim != 2 or points[0].data.shape[1] != 3:
        raise SpaceError(f"{path}: no surface (it has {len(points)} sets of points); give a .surf.gii file")
    return points[0].data.astype(np.float32), triangles[0].data.astype(np.int32) if triangles else None


def _chosen(config: SurfaceSpaceConfig, mesh_sizes: list[int | None]) -> list[Bool[np.ndarray, "vertex"]]:
    """Returns for both meshes which vertices belong to the space."""
    if not config.vertices:
        if None in mesh_sizes:
            raise SpaceError(
                f"space {config.name}: nothing says how many vertices its meshes have; give space.surfaces (two GIFTI "
                "surfaces), or space.vertices (a CIFTI file of this space, or two masks)"
            )
        return [np.ones(size or 0, dtype=bool) for size in mesh_sizes]
    if len(config.vertices) == 1:
        return _chosen_by_cifti(Path(config.vertices[0]), config.labels)
    masks = [_vertex_values(Path(path)) for path in config.vertices]
    return [np.isin(values, config.labels) if config.labels else values != 0 for values in masks]


def _chosen_by_cifti(path: Path, labels: list[int]) -> list[Bool[np.ndarray, "vertex"]]:
    """Returns the vertices of a CIFTI file's cortical brain models whose first value is one of `labels` ([]: all)."""
    image, models = load_cifti(path)
    values = np.asarray(image.dataobj[0]) if labels else None
    chosen = [np.zeros(0, dtype=bool), np.zeros(0, dtype=bool)]
    for name, where, model in models.iter_structures():
        if name in CIFTI_CORTEX:
            is_in = np.ones(len(model), dtype=bool) if values is None else np.isin(values[where], labels)
            mask = np.zeros(model.nvertices[name], dtype=bool)
            mask[model.vertex[is_in]] = True
            chosen[CIFTI_CORTEX.index(name)] = mask
    return chosen


def _vertex_values(path: Path) -> np.ndarray:
    """Returns one number a vertex of one hemisphere's mesh."""
    from nibabel.freesurfer import read_annot

    readers: dict[str, Callable[[Path], np.ndarray]] = {
        ".npy": lambda file: np.load(file, allow_pickle=False),
        ".annot": lambda file: read_annot(file)[0],
        ".gii": lambda file: load_gifti(file).darrays[0].data,
    }
    reader = readers.get(Path(path.name.removesuffix(".gz")).suffix)
    if reader is None:
        raise SpaceError(f"{path}: no vertex mask; give one CIFTI file, or .npy, .annot or .gii for each hemisphere")
    try:
        values = np.asarray(reader(path))
    except (OSError, ValueError, IndexError) as error:
        raise SpaceError(f"{path}: not a readable vertex mask ({error}); give one number a vertex") from error
    if values.ndim != 1:
        raise SpaceError(f"{path}: shape {values.shape}; a vertex mask has one number a vertex")
    return values


def load_gifti(path: Path | str) -> Any:
    """Returns a GIFTI image; ScanError when the file is not one."""
    import nibabel

    try:
        return nibabel.gifti.GiftiImage.from_filename(path)
    except (*_UNREADABLE, nibabel.filebasedimages.ImageFileError) as error:
        raise ScanError(f"{path}: not a readable GIFTI file ({error}); give a .gii file") from error


def load_cifti(path: Path | str) -> tuple[Any, Any]:
    """Returns a CIFTI-2 image, and the axis that says which vertices its columns are; ScanError when it is none."""
    import nibabel
    from nibabel.cifti2 import BrainModelAxis

    try:
        image = nibabel.Cifti2Image.from_filename(path)
        models = image.header.get_axis(1)
    except (*_UNREADABLE, nibabel.filebasedimages.ImageFileError, nibabel.wrapstruct.WrapStructError) as error:
        raise ScanError(f"{path}: not a readable CIFTI-2 file ({error}); give .dtseries.nii or .dlabel.nii") from error
    if not isinstance(models, BrainModelAxis):
        raise ScanError(f"{path}: its columns are no vertices but a {type(models).__name__}; give a dense CIFTI file")
    return image, models
