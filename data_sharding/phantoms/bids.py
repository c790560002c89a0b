"""A BIDS derivatives folder with all that the BIDS source chooses between or refuses.

Subject 01: two sessions, two runs, two templates and two resolutions, surfaces, events, confounds. Subject 02: echoes
with and without a combination, a phase image, a scan in raw space.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_sharding.phantoms.fields import (
    bold_values,
    cifti_axis,
    grid,
    t1_values,
    vertex_values,
    write_cifti_series,
    write_gifti_series,
    write_json,
    write_volume,
)

SPACING_MM = 12.0
NUM_FRAMES = 20
REPETITION_TIME_S = 2.0
TEMPLATE = "space-MNI152NLin6Asym"
FSAVERAGE5_VERTICES = 10242
FSLR_VERTICES = 32492
EVENTS = "onset\tduration\ttrial_type\n2.0\t1.5\tface\n6.0\t1.5\thouse\nn/a\t1.0\tlost\n"


def write(out: Path, num_subjects: int, seed: int) -> None:
    """Two subjects as above, and further plain ones."""
    write_json(
        out / "dataset_description.json", {"Name": "BIDS phantom", "BIDSVersion": "1.9.0", "DatasetType": "derivative"}
    )
    write_json(out / "participants.json", {"sex": {"Levels": {"1": "female", "2": "male"}}, "age": {"Units": "years"}})
    rows = ["participant_id\tage\tsex\tsite\tfamily"]
    for number in range(1, num_subjects + 1):
        age = "n/a" if number == 2 else str(20 + number)
        rows.append(f"sub-{number:02d}\t{age}\t{1 + number % 2}\t{'AB'[number % 2]}\tF{number // 2}")
        _plain(out, f"{number:02d}", seed)
    (out / "participants.tsv").write_text("\n".join(rows) + "\n")
    _choices(out, seed)
    _refusals(out, seed)


def _name(folder: Path, stem: str) -> Path:
    session = f"{stem.split('_')[1]}/" if "_ses-" in stem else ""
    kind = "anat" if stem.endswith("T1w") else "func"
    return folder / stem.split("_")[0] / session / kind / stem


def _bold(out: Path, stem: str, seed: int, *, spacing_mm: float = SPACING_MM) -> None:
    path = _name(out, stem)
    affine, positions = grid(spacing_mm)
    write_volume(
        path.with_name(f"{stem}.nii.gz"), bold_values(positions, NUM_FRAMES, (seed, stem.split("_space")[0])), affine
    )
    sidecar = {
        "RepetitionTime": REPETITION_TIME_S,
        "EchoTime": 0.03,
        "InstitutionName": "A hospital",
        "TaskName": "rest",
    }
    write_json(path.with_name(f"{stem}.json"), sidecar)


def _t1(out: Path, stem: str, seed: int) -> None:
    affine, positions = grid(SPACING_MM)
    write_volume(_name(out, stem).with_name(f"{stem}.nii.gz"), t1_values(positions, (seed, stem)), affine)


def _plain(out: Path, subject: str, seed: int) -> None:
    _bold(out, f"sub-{subject}_ses-1_task-rest_run-1_{TEMPLATE}_res-12_desc-preproc_bold", seed)
    _t1(out, f"sub-{subject}_ses-1_{TEMPLATE}_res-12_desc-preproc_T1w", seed)


def _choices(out: Path, seed: int) -> None:
    """Subject 01: everything there is more than one of."""
    for session, run in ((1, 2), (2, 1)):
        _bold(out, f"sub-01_ses-{session}_task-rest_run-{run}_{TEMPLATE}_res-12_desc-preproc_bold", seed)
    first = "sub-01_ses-1_task-rest_run-1"
    _bold(out, f"{first}_{TEMPLATE}_res-18_desc-preproc_bold", seed, spacing_mm=18.0)
    _bold(out, f"{first}_space-MNI152NLin2009cAsym_res-12_desc-preproc_bold", seed)
    folder = _name(out, f"{first}_bold").parent
    (folder / f"{first}_events.tsv").write_text(EVENTS)
    _write_confounds(folder / f"{first}_desc-confounds_timeseries.tsv", seed)
    series = vertex_values(2 * FSAVERAGE5_VERTICES, NUM_FRAMES, (seed, first))
    for side, half in zip("LR", np.split(series, 2, axis=1), strict=True):
        name = f"{first}_hemi-{side}_space-fsaverage5_bold.func.gii"
        write_gifti_series(folder / name, half, repetition_time_s=REPETITION_TIME_S)
    models = cifti_axis(fslr_cortex())
    series = vertex_values(len(models), NUM_FRAMES, (seed, first, "fsLR"))
    name = f"{first}_space-fsLR_den-91k_bold.dtseries.nii"
    write_cifti_series(folder / name, series, models, repetition_time_s=REPETITION_TIME_S)


def fslr_cortex() -> tuple[np.ndarray, np.ndarray]:
    """Which vertices of the fsLR 32k meshes the phantom's CIFTI files hold: few, so that they stay small."""
    left, right = np.zeros((2, FSLR_VERTICES), dtype=bool)
    left[5::50], right[7::60] = True, True
    return left, right


def _write_confounds(path: Path, seed: int) -> None:
    numbers = np.random.default_rng(seed)
    names = [*(f"{kind}_{axis}" for kind in ("trans", "rot") for axis in "xyz"), "framewise_displacement"]
    values = numbers.normal(0, 0.01, size=(NUM_FRAMES, len(names)))
    values[:, -1] = np.abs(values[:, -1])
    rows = [[f"{value:.6f}" for value in row] for row in values]
    rows[0][-1] = "n/a"
    path.write_text("".join("\t".join(row) + "\n" for row in [names, *rows]))


def _refusals(out: Path, seed: int) -> None:
    """Subject 02: what needs a rule, or cannot be used."""
    combined = f"sub-02_task-combined_{TEMPLATE}_res-12_desc-preproc_bold"
    _bold(out, combined, seed)
    for echo in (1, 2):
        _bold(out, combined.replace("_space", f"_echo-{echo}_space"), seed)
        _bold(out, f"sub-02_task-echoes_echo-{echo}_{TEMPLATE}_res-12_desc-preproc_bold", seed)
    for part in ("mag", "phase"):
        _bold(out, f"sub-02_task-parts_part-{part}_{TEMPLATE}_res-12_desc-preproc_bold", seed)
    _bold(out, "sub-02_task-raw_bold", seed)
