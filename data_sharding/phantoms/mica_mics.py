"""MICA-MICs: raw T1w and rest in `rawdata`, the same rest in template space in `derivatives`, and a 116-label atlas."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_sharding.phantoms.fields import bold_values, grid, t1_values, write_json, write_volume

NUM_FRAMES = 24
REPETITION_TIME_S = 0.6
NUM_REGIONS = 116
HEAD_OFFSET_MM = (11.0, -17.0, 23.0)  # where the head lies in the scanner, so that centring has work to do


def write(out: Path, num_subjects: int, seed: int) -> None:
    """Subjects HC001, HC002 ...; the first has a second T1w of the same session."""
    described = {"Name": "MICA-MICs phantom", "BIDSVersion": "1.6.0"}
    made_by = {"DatasetType": "derivative", "GeneratedBy": [{"Name": "fMRIPrep", "Version": "23.2.0"}]}
    write_json(out / "rawdata" / "dataset_description.json", described)
    write_json(out / "derivatives/fmriprep" / "dataset_description.json", described | made_by)
    affine, positions = grid(12.0)
    head = positions - np.array(HEAD_OFFSET_MM)
    for number in range(1, num_subjects + 1):
        subject = f"HC{number:03d}"
        stem = f"sub-{subject}_ses-01"
        raw = out / "rawdata" / f"sub-{subject}" / "ses-01"
        write_volume(raw / "anat" / f"{stem}_T1w.nii.gz", t1_values(head, (seed, subject)), affine, code=1)
        if number == 1:
            values = t1_values(head, (seed, subject, 2))
            write_volume(raw / "anat" / f"{stem}_run-2_T1w.nii.gz", values, affine, code=1)
        values = bold_values(positions, NUM_FRAMES, (seed, subject))
        rest = f"{stem}_task-rest_acq-AP"
        write_volume(raw / "func" / f"{rest}_bold.nii.gz", values, affine, code=1)
        write_json(raw / "func" / f"{rest}_bold.json", {"RepetitionTime": REPETITION_TIME_S})
        name = f"{rest}_space-MNI152NLin6Asym_res-12_desc-preproc_bold"
        derived = out / "derivatives/fmriprep" / f"sub-{subject}" / "ses-01" / "func"
        write_volume(derived / f"{name}.nii.gz", values, affine)
        write_json(derived / f"{name}.json", {"RepetitionTime": REPETITION_TIME_S})
    write_volume(out / "atlas" / "aal116.nii.gz", labels(positions), affine)


def labels(positions_mm: np.ndarray) -> np.ndarray:
    """int16 labels 1..116 in slabs of the grid's inside, 0 elsewhere."""
    inside = np.linalg.norm(positions_mm - np.array([0, -18, 8]), axis=-1) < 75
    order = np.zeros(positions_mm.shape[:-1], dtype=np.int16)
    order[inside] = 1 + np.arange(int(inside.sum())) * NUM_REGIONS // int(inside.sum())
    return order
