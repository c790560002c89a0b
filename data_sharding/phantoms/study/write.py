"""Writes a phantom: subjects in parallel processes, then the tables; the truth file comes last and means complete.

Files are named as fMRIPrep names them, and byte-reproducible (no time in gzip).
"""

import gzip
import json
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from configs.words import counted
from data_sharding.phantoms.fields import MNI_CODE, write_json

from .config import PhantomConfig, PhantomError, validate_phantom
from .population import Population, load_population
from .regions import COUPLED_NETWORKS, region_maps, regions
from .scans import Tissue, bold_frames, brain_voxels, field_of_view, subject_tissue, t1_image
from .subject import Subject, draw_subject, framewise_displacement

TRUTH = "phantom_truth.json"
_DESCRIPTION = "dataset_description.json"
_BOLD_SLOPE = 0.5  # half an intensity unit: a thirtieth of the least thermal noise
_T1_SLOPE = 0.05
_BLOCK_FRAMES = 32
_SECONDS_BETWEEN_LINES = 5.0
TEMPLATE = "MNI152NLin6Asym"
_DATA_OFFSET = 352


def write_phantom(config: PhantomConfig) -> None:
    """Writes the whole folder, unless a finished run of the same configuration has written it already."""
    if problems := validate_phantom(config):
        raise PhantomError("; ".join(problems))
    out = Path(config.out)
    if _is_complete(out, config):
        print(f"{out} already holds {counted(config.num_subjects, 'subject')} of this phantom")
        return
    write_json(out / _DESCRIPTION, _description(config))
    bold_population, t1_population = _populations(config)
    started = last = time.monotonic()
    for num_done, _ in enumerate(_written(config, bold_population, t1_population), start=1):
        now = time.monotonic()
        if now - last > _SECONDS_BETWEEN_LINES:
            print(f"subjects {num_done}/{config.num_subjects}  {now - started:.0f} s", flush=True)
            last = now
    _write_tables(out, config, bold_population)
    print(f"{out}: {counted(config.num_subjects, 'subject')}, written in {time.monotonic() - started:.0f} s")


def write_subject(config: PhantomConfig, index: int, bold_population: Population, t1_population: Population) -> None:
    """Write the files of one subject: T1w, BOLD, brain masks, sidecars, confounds."""
    with threadpool_limits(1):  # one BLAS thread: the same bytes on any number of cores
        subject = draw_subject(config, index)
        tissue = subject_tissue(config, subject, bold_population)
        _write_func(config, subject, bold_population, tissue)
        if t1_population is not bold_population:
            tissue = subject_tissue(config, subject, t1_population)
        _write_anat(config, subject, t1_population, tissue)


def _write_func(config: PhantomConfig, subject: Subject, population: Population, tissue: Tissue) -> None:
    folder = Path(config.out) / f"sub-{subject.subject_id}" / "func"

    def path(suffix: str) -> Path:
        name = scan_name(subject.subject_id, spacing_mm=config.spacing_mm, suffix=suffix, task="rest")
        return folder / name

    level, repetition_time_s = config.gzip_level, subject.site.repetition_time_s
    blocks = bold_frames(config, subject, population, tissue, block_frames=_BLOCK_FRAMES)
    frames = (frame for block in blocks for frame in block)
    shape = (config.num_frames, repetition_time_s)
    write_volumes(
        path("desc-preproc_bold.nii.gz"), frames, population, slope=_BOLD_SLOPE, frames=shape, gzip_level=level
    )
    is_covered = brain_voxels(tissue) & field_of_view(config, subject, population)
    write_volumes(path("desc-brain_mask.nii.gz"), [is_covered], population, slope=1.0, frames=None, gzip_level=level)
    sidecar = {"RepetitionTime": repetition_time_s, "TaskName": "rest", "SkullStripped": False}
    write_json(path("desc-preproc_bold.json"), sidecar)
    names = ["trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z"]
    rows: list[dict[str, object]] = [dict(zip(names, frame, strict=True)) for frame in subject.motion]
    for row, moved_mm in zip(rows[1:], framewise_displacement(subject.motion)[1:], strict=True):
        row["framewise_displacement"] = moved_mm
    write_table(folder / f"sub-{subject.subject_id}_task-rest_desc-confounds_timeseries.tsv", rows)


def _write_anat(config: PhantomConfig, subject: Subject, population: Population, tissue: Tissue) -> None:
    folder = Path(config.out) / f"sub-{subject.subject_id}" / "anat"

    def path(suffix: str) -> Path:
        return folder / scan_name(subject.subject_id, spacing_mm=config.t1_spacing_mm, suffix=suffix)

    level = config.gzip_level
    values = t1_image(config, subject, population, tissue)
    write_volumes(path("desc-preproc_T1w.nii.gz"), [values], population, slope=_T1_SLOPE, frames=None, gzip_level=level)
    write_volumes(
        path("desc-brain_mask.nii.gz"), [brain_voxels(tissue)], population, slope=1.0, frames=None, gzip_level=level
    )
    write_json(path("desc-preproc_T1w.json"), {"SkullStripped": True})


def _written(config: PhantomConfig, bold_population: Population, t1_population: Population) -> Iterator[None]:
    """One item for each subject written, in any order."""
    if config.num_processes == 1:
        for index in range(config.num_subjects):
            write_subject(config, index, bold_population, t1_population)
            yield
        return
    context = multiprocessing.get_context("forkserver")
    shared = (config, bold_population, t1_population)
    with ProcessPoolExecutor(config.num_processes, context, _initialise, shared) as pool:
        for finished in as_completed([pool.submit(_write_shared, index) for index in range(config.num_subjects)]):
            yield finished.result()


_shared: tuple[PhantomConfig, Population, Population] | None = None  # of a worker process


def _initialise(config: PhantomConfig, bold_population: Population, t1_population: Population) -> None:
    global _shared
    _shared = (config, bold_population, t1_population)


def _write_shared(index: int) -> None:
    assert _shared is not None
    config, bold_population, t1_population = _shared
    write_subject(config, index, bold_population, t1_population)


def _populations(config: PhantomConfig) -> tuple[Population, Population]:
    seed = config.population_seed
    bold = load_population(config.anatomy, spacing_mm=config.spacing_mm, population_seed=seed)
    if config.t1_spacing_mm == config.spacing_mm:
        return bold, bold
    return bold, load_population(config.anatomy, spacing_mm=config.t1_spacing_mm, population_seed=seed)


def _identity(config: PhantomConfig) -> dict[str, object]:
    """What the bytes depend on: everything but the folder and the number of processes."""
    return asdict(replace(config, out="", num_processes=1))


def _is_complete(out: Path, config: PhantomConfig) -> bool:
    """True when the folder already holds this phantom; PhantomError when it holds anything else."""
    if out.exists() and not out.is_dir():
        raise PhantomError(f"{out} is a file; give another out=<folder>")
    if not out.exists() or not any(out.iterdir()):
        return False
    description = out / _DESCRIPTION
    held = json.loads(description.read_text()) if description.exists() else {}
    if held.get("Phantom") != _identity(config):
        what = "a phantom of another configuration" if "Phantom" in held else "files that are not a phantom"
        raise PhantomError(f"{out} holds {what}; give another out=<folder> or remove this one")
    return (out / TRUTH).exists()


def _description(config: PhantomConfig) -> dict[str, object]:
    return {
        "Name": "Callosum phantom: synthetic rest fMRI and T1w, no person's data",
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "callosum data_sharding.phantom"}],
        "Phantom": _identity(config),
    }


def _write_tables(out: Path, config: PhantomConfig, population: Population) -> None:
    subjects = [draw_subject(config, index) for index in range(config.num_subjects)]
    write_table(out / "participants.tsv", [_participant(subject) for subject in subjects])
    write_json(out / "participants.json", _participant_columns())
    maps = region_maps(population.positions_mm, config.signal.region_width_mm).astype(np.float16)
    np.savez(
        out / "phantom_truth.npz",
        region_maps=maps,
        flat_indices_fortran=population.flat_indices,
        affine=population.affine,
        regional_anatomy=np.stack([subject.regional_anatomy for subject in subjects]),
        shape=np.stack([subject.shape for subject in subjects]),
    )
    truth = {
        "config": _identity(config),
        "marker_position_mm": config.marker.position_mm,
        "coupled_networks": COUPLED_NETWORKS,
        "regions": [asdict(region) for region in regions()],
        "subjects": [_truth(subject) for subject in subjects],
    }
    unfinished = out / f"{TRUTH}.unfinished"
    write_json(unfinished, truth)
    os.replace(unfinished, out / TRUTH)


def _participant(subject: Subject) -> dict[str, object]:
    return {
        "participant_id": f"sub-{subject.subject_id}",
        "site": subject.site.name,
        "age": subject.age,
        "sex": subject.sex,
        "diagnosis": "ADHD" if subject.has_adhd else "control",
        "mean_fd": float(framewise_displacement(subject.motion)[1:].mean()),
    }


def _participant_columns() -> dict[str, object]:
    return {
        "site": {"Description": "Scanner; sites differ in TR, noise, T1 contrast and prevalence"},
        "age": {"Description": "Age", "Units": "years"},
        "sex": {"Description": "Sex", "Levels": {"F": "female", "M": "male"}},
        "diagnosis": {"Description": "Simulated diagnosis", "Levels": {"control": "control", "ADHD": "ADHD"}},
        "mean_fd": {"Description": "Mean framewise displacement of the rest run (Power)", "Units": "mm"},
    }


def _truth(subject: Subject) -> dict[str, object]:
    return {
        **_participant(subject),
        "repetition_time_s": subject.site.repetition_time_s,
        "coupling_logit": subject.coupling_logit,
        "coupling": subject.coupling,
        "fov_cut_mm": subject.fov_cut_mm,
    }


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
    header.set_sform(population.affine, code=MNI_CODE)
    header.set_qform(population.affine, code=MNI_CODE)
    header["scl_slope"], header["scl_inter"] = slope, 0
    header["magic"], header["vox_offset"] = b"n+1", _DATA_OFFSET
    return bytes(header.binaryblock).ljust(_DATA_OFFSET, b"\0")


def write_table(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write a tab-separated table with BIDS' "n/a" for missing values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows)
    table.to_csv(path, sep="\t", index=False, na_rep="n/a", float_format="%.4f", lineterminator="\n")
