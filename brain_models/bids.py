"""What a BIDS tree says about a scan: its entities, sidecar fields, confounds and brain mask.

Promise: the sharder and the prediction command find the same files for a scan, because both call these functions.
"""

import json
from pathlib import Path

from brain_models.errors import ScanError

DESCRIPTION = "dataset_description.json"
VOLUME_ENDINGS = (".nii.gz", ".nii")
SURFACE_ENDINGS = (".dtseries.nii", ".func.gii", ".func.gii.gz")
NOT_MAGNITUDE = ("phase", "real", "imag")
OF_THE_IMAGE = ("space", "res", "den", "desc", "hemi", "echo", "part", "suffix")  # entities that confounds lack


def ending_of(path: Path) -> str:
    """Returns the file name from its first dot on."""
    return "." + path.name.partition(".")[2]


def entities_of(path: Path) -> dict[str, str]:
    """Returns the entities of a file name as text, in its order, and `suffix` ("" where it has none)."""
    *parts, last = path.name.partition(".")[0].split("_")
    if "-" in last:
        parts, last = [*parts, last], ""
    pairs = (part.split("-", maxsplit=1) for part in parts if "-" in part)
    return {name: value for name, value in pairs} | {"suffix": last}


def is_image(path: Path, suffixes: tuple[str, ...]) -> bool:
    """Returns True for an image with one of the suffixes that is preprocessed or raw, and a magnitude."""
    entities = entities_of(path)
    return (
        ending_of(path) in (*VOLUME_ENDINGS, *SURFACE_ENDINGS)
        and entities["suffix"] in suffixes
        and entities.get("desc", "preproc") == "preproc"
        and entities.get("part") not in NOT_MAGNITUDE
    )


def dataset_of(path: Path) -> Path:
    """Returns the nearest folder above a scan with a dataset_description.json, else the one that holds its sub- folder,
    else the scan's own."""
    described = (folder for folder in path.parents if (folder / DESCRIPTION).is_file())
    of_subject = (folder.parent for folder in path.parents if folder.name.startswith("sub-"))
    return next(described, None) or next(of_subject, None) or path.parent


def inherited_sidecar(path: Path, *, root: Path) -> dict[str, object]:
    """Returns all JSON fields that apply to a scan, from `root` down to its folder: nearer files and longer names win.

    ScanError when one of the files is not a JSON object.
    """
    scan = entities_of(path)
    folders = [folder for folder in reversed(path.parents) if folder.is_relative_to(root)]
    fields: dict[str, object] = {}
    for folder in folders:
        applying = []
        for candidate in sorted(folder.glob(f"*{scan['suffix']}.json")):
            entities = entities_of(candidate)
            if all(scan.get(name) == value for name, value in entities.items()):
                applying.append((len(entities), candidate))
        for _, candidate in sorted(applying):
            fields |= read_json(candidate)
    return fields


def repetition_time_s(path: Path, sidecar: dict[str, object]) -> float | None:
    """Returns the repetition time that a scan's sidecar states, None when it states none; ScanError for nonsense."""
    stated = sidecar.get("RepetitionTime")
    if stated is None:
        return None
    if isinstance(stated, int | float) and not isinstance(stated, bool) and 0.05 <= stated <= 30:
        return float(stated)
    raise ScanError(f"{path}: RepetitionTime {stated!r} in its sidecar is not a time in seconds; correct it")


def confounds_of(path: Path) -> Path | None:
    """Returns the table that fMRIPrep puts beside a run, named by its entities without those of the image."""
    kept = [f"{name}-{value}" for name, value in entities_of(path).items() if name not in OF_THE_IMAGE]
    table = path.with_name("_".join([*kept, "desc-confounds_timeseries.tsv"]))
    return table if table.exists() else None


def brain_mask_of(path: Path) -> Path | None:
    """Returns the mask that fMRIPrep puts beside a scan: the same entities, desc-brain, suffix mask."""
    kept = [part for part in path.name.split("_")[:-1] if not part.startswith("desc-")]
    masks = (path.with_name("_".join([*kept, f"desc-brain_mask{ending}"])) for ending in VOLUME_ENDINGS)
    return next((mask for mask in masks if mask.exists()), None)


def read_json(path: Path) -> dict[str, object]:
    """Returns the fields of a JSON file; ScanError when it holds no object."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ScanError(f"{path} is not JSON ({error}); correct the sidecar") from error
    if not isinstance(fields, dict):
        raise ScanError(f"{path} holds a {type(fields).__name__}, not an object of fields; correct the sidecar")
    return fields
