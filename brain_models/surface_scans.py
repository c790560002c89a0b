"""CIFTI and GIFTI runs -> packed arrays on a surface space: the counterpart of preprocess.py for meshes.

Promise: every vertex is identified by its number in its mesh, never by its order in a file; what a file lacks, or
holds as not finite, is marked not measured.
"""

import gzip
import re
from pathlib import Path
from typing import Any

import numpy as np

from brain_models.errors import ScanError
from brain_models.nifti import ScanHeader
from brain_models.preprocess import PackedScan
from brain_models.space import BrainSpace, require_mesh
from brain_models.surfaces import CIFTI_CORTEX, HEMISPHERES, load_cifti, load_gifti

HEAD_BYTES = 1 << 17  # of a GIFTI file: its root tag and the first array's
FRAMES_A_BLOCK = 16


def is_surface_run(path: Path | str) -> bool:
    """Returns True for the names of CIFTI series and GIFTI functional files."""
    return str(path).endswith((".dtseries.nii", ".func.gii", ".func.gii.gz"))


def read_surface_header(path: Path | str) -> ScanHeader:
    """Returns the header of a CIFTI dtseries or of one hemisphere's GIFTI run, without reading its values.

    Its shape is (vertices, 1, 1). Raises ScanError: not such a file, no time axis, fewer than 2 frames.
    """
    path = Path(path)
    if not path.is_file():
        raise ScanError(f"{path}: no such file; check the path")
    header = _cifti_header(path) if path.name.endswith(".dtseries.nii") else _gifti_header(path)
    if header.num_frames < 2:
        raise ScanError(f"{path}: BOLD with {header.num_frames} frame; a run needs at least 2")
    return header


def pack_cifti(path: Path | str, space: BrainSpace) -> PackedScan:
    """Returns a CIFTI run on a surface space; vertices outside its brain models are not measured."""
    path = Path(path)
    header = read_surface_header(path)
    image, models = load_cifti(path)
    columns, is_measured = _columns(path, models, space)
    values = np.zeros((header.num_frames, space.num_voxels), dtype=np.float32)
    for first in range(0, header.num_frames, FRAMES_A_BLOCK):
        try:
            block = np.asarray(image.dataobj[first : first + FRAMES_A_BLOCK], dtype=np.float32)
        except (OSError, ValueError, EOFError) as error:
            raise ScanError(f"{path}: damaged at frame {first} ({error}); fetch the file again") from error
        values[first : first + len(block), is_measured] = block[:, columns[is_measured]]
    return _packed(values, is_measured, header, space)


def pack_gifti(left: Path | str, right: Path | str, space: BrainSpace) -> PackedScan:
    """Returns a run of two GIFTI files on a surface space."""
    hemispheres, vertices, mesh_sizes = require_mesh(space)
    paths = (Path(left), Path(right))
    header = read_surface_header(paths[0])
    values = np.zeros((header.num_frames, space.num_voxels), dtype=np.float32)
    for side, path in enumerate(paths):
        series = _gifti_series(path)
        if series.shape[1] != mesh_sizes[side]:
            raise ScanError(
                f"{path}: {series.shape[1]} vertices, the {HEMISPHERES[side]} mesh of space {space.name} has "
                f"{mesh_sizes[side]}; take the files of the space's own mesh"
            )
        if len(series) != header.num_frames:
            raise ScanError(
                f"{path}: {len(series)} frames, {paths[0].name} states {header.num_frames}; fetch both files again"
            )
        values[:, hemispheres == side] = series[:, vertices[hemispheres == side]]
    return _packed(values, np.ones(space.num_voxels, dtype=bool), header, space)


def _packed(values: np.ndarray, is_measured: np.ndarray, header: ScanHeader, space: BrainSpace) -> PackedScan:
    is_measured = is_measured & np.isfinite(values).all(axis=0) & (values != 0).any(axis=0)
    if not is_measured.any():
        raise ScanError(f"{header.path}: measured no vertex of space {space.name}; check that it is on the same mesh")
    values[:, ~is_measured] = 0.0
    return PackedScan.of_values(values, is_measured, header)


def _cifti_header(path: Path) -> ScanHeader:
    from nibabel.cifti2 import SeriesAxis

    image, models = load_cifti(path)
    series = image.header.get_axis(0)
    if not isinstance(series, SeriesAxis):
        raise ScanError(f"{path}: its rows are a {type(series).__name__}, not a series in time; give a .dtseries.nii")
    repetition_time_s = float(series.step) if series.unit == "SECOND" else None
    return _header(path, num_vertices=len(models), num_frames=len(series), repetition_time_s=repetition_time_s)


def _columns(path: Path, models: Any, space: BrainSpace) -> tuple[np.ndarray, np.ndarray]:
    """Returns the column of every location of the space (0 where there is none), and where there is one."""
    hemispheres, vertices, mesh_sizes = require_mesh(space)
    columns = np.full(space.num_voxels, -1, dtype=np.int64)
    for name, where, model in models.iter_structures():
        if name not in CIFTI_CORTEX:
            continue
        side = CIFTI_CORTEX.index(name)
        if model.nvertices[name] != mesh_sizes[side]:
            raise ScanError(
                f"{path}: its {HEMISPHERES[side]} mesh has {model.nvertices[name]} vertices, that of space "
                f"{space.name} {mesh_sizes[side]}; take the files of the space's own mesh"
            )
        column_of_vertex = np.full(mesh_sizes[side], -1, dtype=np.int64)
        column_of_vertex[model.vertex] = np.arange(len(models))[where]
        columns[hemispheres == side] = column_of_vertex[vertices[hemispheres == side]]
    return np.maximum(columns, 0), columns >= 0


def _gifti_header(path: Path) -> ScanHeader:
    head = _gifti_head(path)
    num_arrays, rows, columns = (
        re.search(pattern, head) for pattern in (r'NumberOfDataArrays="(\d+)"', r'\bDim0="(\d+)"', r'\bDim1="(\d+)"')
    )
    if num_arrays is None or rows is None:
        raise ScanError(f"{path}: not GIFTI (no array in its first {HEAD_BYTES} bytes); convert the run again")
    num_frames = int(num_arrays[1])
    if num_frames == 1 and columns is not None:
        num_frames = int(columns[1])
    step = re.search(r"TimeStep\s*(?:\]\]>)?\s*</Name>\s*<Value>\s*(?:<!\[CDATA\[)?\s*([0-9.eE+-]+)", head)
    milliseconds = float(step[1]) if step else 0.0
    repetition_time_s = milliseconds / 1000 if 50 <= milliseconds <= 30_000 else None
    return _header(path, num_vertices=int(rows[1]), num_frames=num_frames, repetition_time_s=repetition_time_s)


def _gifti_head(path: Path) -> str:
    """Returns the start of the XML; ScanError for what no run needs and a hostile file might hold."""
    opened = gzip.open if path.name.endswith(".gz") else open
    try:
        with opened(path, "rb") as file:
            head = file.read(HEAD_BYTES).decode("utf-8", errors="replace")
    except (OSError, EOFError) as error:
        raise ScanError(f"{path}: damaged ({error}); fetch the file again") from error
    for text in ("<!ENTITY", "ExternalFileBinary"):
        if text in head:
            raise ScanError(f"{path}: holds {text}, which points outside the file; write it with its data inside")
    return head


def _gifti_series(path: Path) -> np.ndarray:
    """Returns float32 [time, vertex] of one hemisphere."""
    _gifti_head(path)
    arrays = [np.asarray(array.data, dtype=np.float32) for array in load_gifti(path).darrays]
    series = arrays[0].T if len(arrays) == 1 and arrays[0].ndim == 2 else arrays
    if len({array.shape for array in series}) != 1 or series[0].ndim != 1:
        raise ScanError(f"{path}: its arrays are not frames of one mesh; write one array per frame")
    return np.stack(list(series))


def _header(path: Path, *, num_vertices: int, num_frames: int, repetition_time_s: float | None) -> ScanHeader:
    return ScanHeader(
        path=path,
        data_path=path,
        shape=(num_vertices, 1, 1),
        affine=np.eye(4),
        has_orientation=True,
        num_frames=num_frames,
        repetition_time_s=repetition_time_s,
        dtype=np.dtype(np.float32),
    )
