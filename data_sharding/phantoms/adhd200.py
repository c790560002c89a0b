"""ADHD-200: RawDataBIDS of two sites, the Athena folder of the same subjects, and a phenotype table with its quirks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_sharding.phantoms.fields import bold_values, grid, t1_values, write_json, write_volume

SITES = {1: "Peking", 5: "NYU"}
NUM_FRAMES = 20
ATHENA_AFFINE = np.array([[-12.0, 0, 0, 90], [0, 12, 0, -126], [0, 0, 12, -72], [0, 0, 0, 1]])
HEADER = (
    "ScanDir ID,Site,Gender,Age,Handedness,DX,Secondary Dx ,ADHD Measure,ADHD Index,Inattentive,Hyper/Impulsive,"
    "IQ Measure,Verbal IQ,Performance IQ,Full2 IQ,Full4 IQ,Med Status,QC_Rest_1,QC_Rest_2,QC_Rest_3,QC_Rest_4,"
    "QC_Anatomical_1,QC_Anatomical_2"
)
# What the columns from Gender on say of the first subjects; every one breaks a naive reader somewhere.
QUIRKS = (
    "0,11.34,1,0,,-999,40,N/A,-999,1,-999,103,N/A,109,1,1,0,N/A,N/A,1,N/A",
    '1,8.0,L,3,"LD in reading, spelling",3,-999,41,-999,2,112,N/A,N/A,-999,-999,1,1,N/A,N/A,1,N/A',
    "1,-999,-999,pending, ,N/A,N/A,-999,N/A,-999,N/A,-999,N/A,109,,1,N/A,N/A,N/A,1,N/A",
    ",12.5,0.57,1,ODD,2,77,-999,43,2,112,103,N/A,-999,2,1,1,N/A,N/A,0,N/A",
)


def subject_number(number: int) -> int:
    """ScanDir IDs as they are: some of 5 digits, some of 7, never padded in the table."""
    return 10000 + 7 * number if number % 2 == 0 else 9000000 + 137 * number


def write(out: Path, num_subjects: int, seed: int) -> None:
    """Subjects with two rest runs in the first session; the second subject has a second session."""
    rows = [HEADER]
    for number in range(num_subjects):
        site = list(SITES)[number % len(SITES)]
        rows.append(f"{subject_number(number)},{site},{QUIRKS[number % len(QUIRKS)]}")
        subject = f"{subject_number(number):07d}"
        for session in (1, 2) if number == 1 else (1,):
            _raw(out / "RawDataBIDS" / SITES[site], subject, session, seed)
            _athena(out / "Athena", subject, session, seed)
    (out / "adhd200_phenotypic.csv").write_text("\n".join(rows) + "\n")


def _raw(site: Path, subject: str, session: int, seed: int) -> None:
    write_json(site / "dataset_description.json", {"Name": "ADHD-200 phantom", "BIDSVersion": "1.0.2"})
    write_json(site / "task-rest_bold.json", {"RepetitionTime": 2.0, "TaskName": "rest"})
    affine, positions = grid(12.0)
    stem = f"sub-{subject}_ses-{session}"
    folder = site / f"sub-{subject}" / f"ses-{session}"
    write_volume(folder / "anat" / f"{stem}_T1w.nii.gz", t1_values(positions, (seed, subject)), affine, code=1)
    for run in (1, 2):
        values = bold_values(positions, NUM_FRAMES, (seed, subject, session, run))
        write_volume(folder / "func" / f"{stem}_task-rest_run-{run}_bold.nii.gz", values, affine, code=1)


def _athena(folder: Path, subject: str, session: int, seed: int) -> None:
    positions = np.stack(np.meshgrid(*(np.arange(size) for size in (16, 19, 16)), indexing="ij"), axis=-1)
    positions = positions @ ATHENA_AFFINE[:3, :3].T + ATHENA_AFFINE[:3, 3]
    for run in (1, 2):
        values = bold_values(positions, NUM_FRAMES, (seed, subject, session, run))
        name = f"sfnwmrda{subject}_session_{session}_rest_{run}.nii.gz"
        write_volume(folder / subject / name, values, ATHENA_AFFINE, repetition_time_s=2.0)
