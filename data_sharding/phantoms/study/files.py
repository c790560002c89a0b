"""The files of a BIDS derivatives folder, named as fMRIPrep names them and byte-reproducible (no time in gzip)."""

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd

from .population import Population

TEMPLATE = "MNI152NLin6Asym"
_MNI_CODE = 4  # NIfTI's xform code for MNI 152 coordinates
_DATA_OFFSET = 352


def scan_name(subject_id: str, *, spacing_mm: float, suffix: str, task: str | None = None) -> str:
    """File name without extension: sub-0001_task-rest_space-MNI152NLin6Asym_res-6_desc-preproc_bold."""
    resolution = f"{spacing_mm:g}".replace(".", "p")
    middle = f"_task-{task}" if task else ""
    return f"sub-{subject_id}{middle}_space-{TEMPLATE}_res-{resolution}_{suffix}"


def write_volumes(
    path: Path,
    volumes: Iterable[np.ndarray],
    population: Population,
    *,
    slope: float,
    frames: tuple[int, float] | None,
    gzip_level: int,
) -> None:
    """Write in-head values [voxel], one volume after the other, as an int16 NIfTI.

    `frames` is (number of frames, TR in s), or None for a 3D file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    num_voxels = int(np.prod(population.grid_shape))
    with (
        path.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", compresslevel=gzip_level, fileobj=raw, mtime=0) as packed,
    ):
        packed.write(_header(population, slope, frames))
        for values in volumes:
            volume = np.zeros(num_voxels, dtype="<i2")
            volume[population.flat_indices] = np.clip(np.round(values / slope), -32768, 32767)
            packed.write(volume.tobytes())


def _header(population: Population, slope: float, frames: tuple[int, float] | None) -> bytes:
    header = nibabel.Nifti1Header(endianness="<")
    header.set_data_dtype(np.int16)
    header.set_data_shape(population.grid_shape if frames is None else (*population.grid_shape, frames[0]))
    spacing = (population.spacing_mm,) * 3
    header.set_zooms(spacing if frames is None else (*spacing, frames[1]))
    header.set_xyzt_units("mm", "sec")
    header.set_sform(population.affine, code=_MNI_CODE)
    header.set_qform(population.affine, code=_MNI_CODE)
    header["scl_slope"], header["scl_inter"] = slope, 0
    header["magic"], header["vox_offset"] = b"n+1", _DATA_OFFSET
    return bytes(header.binaryblock).ljust(_DATA_OFFSET, b"\0")


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON object, keys in the order given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_table(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write a tab-separated table with BIDS' "n/a" for missing values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows)
    table.to_csv(path, sep="\t", index=False, na_rep="n/a", float_format="%.4f", lineterminator="\n")
