"""Tiny BIDS derivative folders of real NIfTI files for the tests of data_sharding."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import nibabel
import numpy as np

from brain_models.recipe import CleaningConfig
from brain_models.space import SpaceConfig, fsl_grid
from cluster.config import ClusterConfig
from data_sharding.config import (
    AcceptanceConfig,
    LimitsConfig,
    PreprocessingConfig,
    PrivacyConfig,
    ShardingConfig,
    SourceConfig,
    StorageConfig,
)
from data_sharding.splits import SplitConfig

SPACE = SpaceConfig(name="mni12", template="NLin6Asym", spacing_mm=12.0, mask="mni152", dilate_mm=0.0)
NO_CLEANING = CleaningConfig([], None, None, "cosine", False, "drop", 0.5, None)
ACCEPTANCE = AcceptanceConfig(
    min_frames=4,
    min_coverage=0.5,
    min_region_coverage=None,
    min_tsnr=None,
    max_mean_fd_mm=None,
    max_censored_fraction=None,
    max_clipped_fraction=None,
    unknown_orientation="refuse",
    max_refused_fraction=0.5,
)
TEMPLATE = "space-MNI152NLin6Asym"


@cache
def grid(spacing_mm: float = 12.0) -> tuple[np.ndarray, tuple[int, int, int]]:
    return fsl_grid(spacing_mm)


def save_nifti(path: Path, values: np.ndarray, *, repetition_time_s: float | None = None) -> Path:
    """Writes values on the 12 mm grid."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(values, grid()[0])
    if values.ndim == 4:
        image.header.set_zooms((12.0, 12.0, 12.0, repetition_time_s or 0.0))
        image.header.set_xyzt_units("mm", "sec")
    nibabel.save(image, path)
    return path


def bold_values(seed: int, num_frames: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    shape = grid()[1]
    mean = generator.uniform(500, 1500, size=shape)[..., None]
    return (mean + generator.normal(0, 20, size=(*shape, num_frames))).astype(np.float32)


def write_bold(root: Path, subject: str, *, num_frames: int = 20, seed: int = 0, sidecar: bool = True) -> Path:
    """One run named as fMRIPrep does, with its sidecar."""
    name = f"sub-{subject}_task-rest_{TEMPLATE}_res-12_desc-preproc_bold"
    path = root / f"sub-{subject}" / "func" / f"{name}.nii.gz"
    save_nifti(path, bold_values(seed, num_frames))
    if sidecar:
        (path.parent / f"{name}.json").write_text(json.dumps({"RepetitionTime": 2.0}))
    return path


def write_confounds(scan: Path, *, num_frames: int, num_non_steady: int = 0, spikes: tuple[int, ...] = ()) -> Path:
    """The confound table of a run as fMRIPrep writes it; framewise displacement is 0.1 mm, 0.9 mm at the spikes."""
    generator = np.random.default_rng(5)
    names = ["trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z", "csf", "white_matter"]
    table = {name: [f"{value:.6f}" for value in generator.normal(size=num_frames)] for name in names}
    table["framewise_displacement"] = ["n/a", *("0.9" if frame in spikes else "0.1" for frame in range(1, num_frames))]
    for number in range(num_non_steady):
        column = ["1" if frame == number else "0" for frame in range(num_frames)]
        table[f"non_steady_state_outlier{number:02d}"] = column
    base = scan.name.partition("_space-")[0]
    path = scan.with_name(f"{base}_desc-confounds_timeseries.tsv")
    path.write_text(
        "\n".join(["\t".join(table), *("\t".join(row) for row in zip(*table.values(), strict=True))]) + "\n"
    )
    return path


def write_t1(root: Path, subject: str, *, seed: int = 0) -> Path:
    path = root / f"sub-{subject}" / "anat" / f"sub-{subject}_{TEMPLATE}_res-12_desc-preproc_T1w.nii.gz"
    values = np.random.default_rng(seed + 1000).uniform(100, 900, size=grid()[1]).astype(np.float32)
    return save_nifti(path, values)


def write_study(root: Path, *, num_subjects: int = 6, num_frames: tuple[int, ...] = (20, 18, 40)) -> Path:
    """A folder of subjects 01, 02, ... with a run and a T1 each; run lengths take turns."""
    rows = ["participant_id\tage\tsite\tdiagnosis"]
    for number in range(1, num_subjects + 1):
        subject = f"{number:02d}"
        write_bold(root, subject, num_frames=num_frames[number % len(num_frames)], seed=number)
        write_t1(root, subject, seed=number)
        age = "n/a" if number == 2 else f"{20 + number}.5"
        rows.append(f"sub-{subject}\t{age}\t{'AB'[number % 2]}\t{'ADHD' if number % 3 == 0 else 'control'}")
    (root / "participants.tsv").write_text("\n".join(rows) + "\n")
    return root


def sharding_config(root: Path, out: Path, *, cluster: str = "inline", num_workers: int = 1) -> ShardingConfig:
    """Shards of about two subjects each, chunks of 8 frames, the last subject in test."""
    return ShardingConfig(
        name="tiny",
        source=SourceConfig(
            "bids",
            str(root),
            ["bold", "t1"],
            subjects=None,
            tasks=None,
            allow_template_mix=False,
            options={"echo": None, "sessions": None},
        ),
        privacy=PrivacyConfig(key_file=None, sidecar_fields=["RepetitionTime"], participant_columns=None),
        out=str(out),
        space=replace(SPACE),
        atlas=None,
        storage=StorageConfig(chunk_frames=8, target_bytes=130_000, bold_type="int8"),
        preprocessing=PreprocessingConfig(replace(NO_CLEANING), max_censored_fraction=0.2),
        acceptance=replace(ACCEPTANCE),
        limits=LimitsConfig(memory_mb=2048, timeout_s=60.0, download_mb=64),
        registration=None,
        splits=SplitConfig("ranked", 0, None, None, 1, 1, None, [], None),
        seed=0,
        cluster=ClusterConfig(cluster, num_workers, 1, False, 0, 60.0, 60.0, None, str(out.parent / "ray")),  # type: ignore[arg-type]
    )
