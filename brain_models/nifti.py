"""Reads NIfTI headers and streams frames, bounded in memory whatever the header claims.

Promise: either the values the file states (orientation, slope, byte order honoured) or a ScanError that names file and
cause. nibabel parses the header; the frames are streamed here because slicing a .nii.gz through nibabel starts from the
beginning of the file each time.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from nibabel.nifti1 import Nifti1Header, Nifti1PairHeader
from nibabel.nifti2 import Nifti2Header, Nifti2PairHeader
from nibabel.spatialimages import HeaderDataError

from brain_models.errors import ScanError

ScanKind = Literal["bold", "t1w"]

BLOCK_BYTES = 1 << 20
FRAMES_BLOCK_BYTES = 32 << 20  # read at a time, if they hold a frame
MAX_FRAMES_A_BLOCK = 32  # 16 to 32 are fastest to turn round and to resample
MAX_FRAME_VOXELS = 1 << 29  # 800^3: no scanner makes more; a header that says more lies
HEADERS: dict[bytes, tuple[Any, bool]] = {  # by magic: class, and whether the data are in the same file
    b"n+1\0": (Nifti1Header, True),
    b"ni1\0": (Nifti1PairHeader, False),
    b"n+2\0": (Nifti2Header, True),
    b"ni2\0": (Nifti2PairHeader, False),
}
SECONDS = {"sec": 1.0, "msec": 1e-3, "usec": 1e-6, "unknown": 1.0}


@runtime_checkable
class Readable(Protocol):
    """An open file of bytes."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True)
class ScanHeader:
    """What a NIfTI header says about a scan; `repetition_time_s` is None when the header has none."""

    path: Path
    data_path: Path
    shape: tuple[int, int, int]
    affine: np.ndarray  # float64 [4, 4], voxel index -> mm
    has_orientation: bool  # False: sform and qform codes are 0, so left and right are unknown
    num_frames: int
    repetition_time_s: float | None
    dtype: np.dtype
    data_offset: int = 0
    slope: float = 1.0
    intercept: float = 0.0
    conflict_mm: float = 0.0  # how far the qform would put a corner from where the sform, which is used, puts it


def read_header(path: Path | str, kind: ScanKind) -> ScanHeader:
    """Returns the header of a scan of `kind`.

    Raises ScanError: missing, empty, not NIfTI, complex, 3D where BOLD is expected, no usable affine.
    A repetition time outside 0.05-30 s is no repetition time (None).
    """
    path = Path(path)
    header, is_single = _parse(path)
    shape = _shape(path, header, kind)
    try:
        affine = np.asarray(header.get_best_affine(), dtype=np.float64)
        slope, intercept = header.get_slope_inter()
        data_offset = int(header.get_data_offset())
    except (HeaderDataError, ValueError, OverflowError) as error:
        raise ScanError(f"{path}: damaged NIfTI header ({error}); convert the scan again") from error
    if data_offset < 0:
        raise ScanError(f"{path}: the header puts the data at byte {data_offset}; convert the scan again")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ScanError(f"{path}: the affine is singular or not finite; restore the geometry")
    return ScanHeader(
        path=path,
        data_path=path if is_single else _data_file(path),
        shape=shape[:3],
        affine=affine,
        has_orientation=bool(header["qform_code"] or header["sform_code"]),
        conflict_mm=_conflict_mm(header, shape[:3]),
        num_frames=shape[3],
        repetition_time_s=_repetition_time_s(header),
        dtype=_dtype(path, header),
        data_offset=data_offset,
        slope=1.0 if slope is None else float(slope),
        intercept=0.0 if intercept is None else float(intercept),
    )


def stream_frames(header: ScanHeader) -> Iterator[np.ndarray]:
    """Yields blocks [frame, source voxel] float32 in scan units, source voxels in Fortran order of the grid."""
    for stored in stream_stored(header):
        yield in_scan_units(stored.astype(np.float32), header.slope, header.intercept)


def stream_stored(header: ScanHeader) -> Iterator[np.ndarray]:
    """Yields the same blocks as they are stored: the file's data type, without its slope and intercept.

    All are views of one buffer, which the next block overwrites.
    """
    frame_voxels = int(np.prod(header.shape))
    frame_bytes = frame_voxels * header.dtype.itemsize
    frames_a_block = min(max(FRAMES_BLOCK_BYTES // frame_bytes, 1), MAX_FRAMES_A_BLOCK, header.num_frames)
    block = np.empty((frames_a_block, frame_voxels), dtype=header.dtype)
    with _opened(header.data_path) as file:
        for done in range(0, header.data_offset, BLOCK_BYTES):  # piecewise: an offset may lie, too
            _read(file, min(BLOCK_BYTES, header.data_offset - done), header, frame=0)
        for first in range(0, header.num_frames, frames_a_block):
            count = min(frames_a_block, header.num_frames - first)
            for row in range(count):
                block[row] = np.frombuffer(_read(file, frame_bytes, header, frame=first + row), dtype=header.dtype)
            yield block[:count]


def in_scan_units(values: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """Returns the float32 values, to which a header's slope and intercept were applied in place."""
    if (slope, intercept) != (1.0, 0.0):
        values *= np.float32(slope)
        values += np.float32(intercept)
    return values


@contextmanager
def _opened(path: Path) -> Iterator[Readable]:
    """Opens plain or gzipped bytes, by content: some tools name uncompressed files .nii.gz."""
    from isal import igzip

    with open(path, "rb") as raw:
        is_gzip = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        if is_gzip:
            with igzip.open(raw, "rb") as unzipped:
                yield unzipped
        else:
            yield raw


def _read(file: Readable, num_bytes: int, header: ScanHeader, *, frame: int) -> bytes:
    try:
        data = file.read(num_bytes)
    except (OSError, EOFError, ValueError) as error:
        raise ScanError(f"{header.data_path}: damaged at frame {frame} ({error}); fetch the file again") from error
    if len(data) < num_bytes:
        raise ScanError(
            f"{header.data_path}: the data end at frame {frame} of the {header.num_frames} the header states; "
            "fetch the file again"
        )
    return data


def _parse(path: Path) -> tuple[Any, bool]:
    if not path.is_file():
        raise ScanError(f"{path}: no such file; check the path")
    if path.stat().st_size == 0:
        raise ScanError(f"{path}: empty (0 bytes); fetch the file again")
    try:
        with _opened(path) as file:
            start = file.read(544)
    except (OSError, EOFError) as error:
        raise ScanError(f"{path}: damaged gzip ({error}); fetch the file again") from error
    found = HEADERS.get(start[344:348]) or HEADERS.get(start[4:8])
    if found is None:
        raise ScanError(f"{path}: not NIfTI (starts with {start[:12]!r}); convert it to .nii or .nii.gz")
    try:
        header_class = found[0]
        # Extensions after the header hold nothing we need: a flag byte of 0 says there are none.
        header_bytes = start[: header_class.sizeof_hdr] + bytes(4)
        return header_class.from_fileobj(io.BytesIO(header_bytes)), found[1]
    except (HeaderDataError, ValueError) as error:
        raise ScanError(f"{path}: damaged NIfTI header ({error}); convert the scan again") from error


def _shape(path: Path, header: Any, kind: ScanKind) -> tuple[int, int, int, int]:
    full = tuple(int(size) for size in header.get_data_shape())
    shape = full
    while len(shape) > 4 and shape[3] == 1:  # X, Y, Z, 1, T
        shape = (*shape[:3], *shape[4:])
    while len(shape) > 4 and shape[-1] == 1:
        shape = shape[:-1]
    if min(full, default=0) < 1 or np.prod(shape[:3]) > MAX_FRAME_VOXELS:
        raise ScanError(f"{path}: impossible shape {full}; convert the scan again")
    if kind == "bold" and len(shape) != 4:
        raise ScanError(f"{path}: a {len(shape)}D image of shape {full} where 4D BOLD is expected; name it differently")
    if kind == "bold" and shape[3] < 2:
        raise ScanError(f"{path}: BOLD with {shape[3]} frame; a run needs at least 2")
    if kind == "t1w" and (len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] != 1)):
        raise ScanError(f"{path}: shape {full} where one 3D T1w image is expected; average or select the repeats")
    return (*shape, 1)[:4]  # type: ignore[return-value]


def _conflict_mm(header: Any, shape: tuple[int, ...]) -> float:
    """0 where only one of the two geometries is given, or the qform is no rotation."""
    if not (header["qform_code"] and header["sform_code"]):
        return 0.0
    try:
        difference = header.get_sform() - header.get_qform()
    except HeaderDataError:
        return 0.0
    corners = np.stack(np.meshgrid(*([0, size - 1] for size in shape), indexing="ij"), axis=-1).reshape(-1, 3)
    distances_mm = np.linalg.norm(corners @ difference[:3, :3].T + difference[:3, 3], axis=1)
    return float(distances_mm.max()) if np.isfinite(distances_mm).all() else 0.0


def _dtype(path: Path, header: Any) -> np.dtype:
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf":
        raise ScanError(f"{path}: data type {dtype} (complex or colour); export the magnitude image")
    return dtype


def _repetition_time_s(header: Any) -> float | None:
    if int(header["dim"][0]) < 4:
        return None
    zoom = float(header["pixdim"][5] if header["dim"][0] == 5 and header["dim"][4] == 1 else header["pixdim"][4])
    seconds = zoom * SECONDS.get(header.get_xyzt_units()[1], 0.0)
    return seconds if 0.05 <= seconds <= 30 else None


def _data_file(header_path: Path) -> Path:
    name = header_path.name
    for ending in (".hdr.gz", ".hdr"):
        if name.endswith(ending):
            for candidate in (".img", ".img.gz"):
                data = header_path.with_name(name[: -len(ending)] + candidate)
                if data.is_file():
                    return data
    raise ScanError(f"{header_path}: a NIfTI pair without its .img file; put it beside the header")
