"""HCP motor: CIFTI and GIFTI runs of both directions, EV files in the real order, midthickness, Yeo-7 labels."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np

from data_sharding.phantoms.bids import FSLR_VERTICES, fslr_cortex
from data_sharding.phantoms.fields import cifti_axis, generator, vertex_values, write_cifti_series, write_gifti_series

NUM_FRAMES = 284
REPETITION_TIME_S = 0.72
ONSETS_S = {  # of the 12 s blocks; a cue of 3 s comes before each
    "lf": (26.0, 117.0),
    "lh": (71.0, 162.0),
    "rf": (56.0, 177.0),
    "rh": (11.0, 132.0),
    "t": (41.0, 102.0),
}


def write(out: Path, num_subjects: int, seed: int) -> None:
    """Subjects 100307, 100408 ... with an LR and an RL run each; the first also as GIFTI."""
    models = cifti_axis(fslr_cortex())
    for number in range(num_subjects):
        subject = str(100307 + 101 * number)
        top = out / subject / "MNINonLinear"
        for direction in ("LR", "RL"):
            name = f"tfMRI_MOTOR_{direction}"
            folder = top / "Results" / name
            series = vertex_values(len(models), NUM_FRAMES, (seed, subject, direction))
            path = folder / f"{name}_Atlas_MSMAll.dtseries.nii"
            write_cifti_series(path, series, models, repetition_time_s=REPETITION_TIME_S)
            _write_evs(folder / "EVs")
    _write_gifti(out, seed)
    _write_meshes(out, models)
    (out / "subjects.csv").write_text(
        "Subject,Gender,Age,Family_ID\n"
        + "".join(
            f"{100307 + 101 * number},{'FM'[number % 2]},26-30,fam{number // 2}\n" for number in range(num_subjects)
        )
    )


def _write_evs(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, onsets_s in ONSETS_S.items():
        (folder / f"{name}.txt").write_text("".join(f"{onset_s}\t12.0\t1\n" for onset_s in onsets_s))
    cues_s = sorted(onset_s - 3 for onsets_s in ONSETS_S.values() for onset_s in onsets_s)
    (folder / "cue.txt").write_text("".join(f"{cue_s}\t3.0\t1\n" for cue_s in cues_s))


def _write_gifti(out: Path, seed: int) -> None:
    """A short GIFTI version of the first run."""
    folder = out / "100307" / "MNINonLinear" / "Results" / "tfMRI_MOTOR_LR"
    for side in "LR":
        series = vertex_values(FSLR_VERTICES, 20, (seed, "gifti", side))
        name = f"{folder.name}.{side}.atlasroi.32k_fs_LR.func.gii"
        write_gifti_series(folder / name, series, repetition_time_s=REPETITION_TIME_S)


def _write_meshes(out: Path, models: object) -> None:
    """Midthickness surfaces (points on a ball) and a Yeo-7 label file of the group."""
    from nibabel.cifti2 import Cifti2Image, LabelAxis

    folder = out / "group"
    folder.mkdir(parents=True, exist_ok=True)
    for side, sign in zip("LR", (-1, 1), strict=True):
        points = generator("mesh", side).normal(size=(FSLR_VERTICES, 3))
        points *= 60 / np.linalg.norm(points, axis=1, keepdims=True)
        points[:, 0] = sign * np.abs(points[:, 0])
        arrays = [nibabel.gifti.GiftiDataArray(points.astype(np.float32), intent="NIFTI_INTENT_POINTSET")]
        nibabel.gifti.GiftiImage(darrays=arrays).to_filename(folder / f"{side}.midthickness.32k_fs_LR.surf.gii")
    networks = 1 + np.arange(len(models)) % 7  # type: ignore[arg-type]
    table = {number: (f"network {number}", (0.1, 0.1, 0.1, 1.0)) for number in range(1, 8)}
    axis = LabelAxis(["Yeo-7"], [table])
    Cifti2Image(networks[None].astype(np.float32), (axis, models)).to_filename(folder / "yeo7.dlabel.nii")
