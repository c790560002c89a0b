"""Algonauts 2023: one subject's images, the responses of both hemispheres to them, and its regions of interest.

`subj0X/training_split/{training_images,training_fmri}` and `roi_masks`. A set holds one subject, because every subject
has its own vertices; it is split by image, and an image has one name in all of them. Test images have no responses.
"""

from __future__ import annotations

import io
import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from brain_models.atlas import Atlas
from brain_models.space import BrainSpace
from data_sharding.errors import SourceError
from data_sharding.scans import Scan, SourceContents, scan_id_of
from data_sharding.sources import SourceConfig, parse_options

IMAGE_NAME = re.compile(r"train-(\d{4,})_nsd-(\d{5})\.png")
SIDES = {"left": "lh", "right": "rh"}
CLASSES = ("prf-visualrois", "floc-bodies", "floc-faces", "floc-places", "floc-words", "streams")
MAX_MAPPING_BYTES = 1 << 20
NAMES_IN_PICKLE = {"_reconstruct", "ndarray", "dtype"}  # all that a pickled array of objects names
NUMPY_MODULES = {"numpy", "numpy.core.multiarray", "numpy._core.multiarray"}


@dataclass
class Options:
    """What only this data set asks."""

    subject: str  # subj01 ... subj08
    rois: list[str]  # classes of regions that become atlases: prf-visualrois, floc-bodies, ...; [] uses none


def find(config: SourceConfig, space: BrainSpace, *, accepts_raw: bool) -> SourceContents:
    """Every training image with its response; SourceError where images and responses do not belong together."""
    options = parse_options(config, Options)
    folder = _subject_folder(Path(config.root), options.subject)
    split = folder / "training_split"
    images = _images(split / "training_images")
    files = {side: split / "training_fmri" / f"{short}_training_fmri.npy" for side, short in SIDES.items()}
    for side, path in files.items():
        num_rows, num_vertices = _shape(path)
        expected = _num_vertices(space, side)
        if num_rows != len(images):
            raise SourceError(f"{path}: {num_rows} responses, {split / 'training_images'} has {len(images)} images")
        if num_vertices != expected:
            raise SourceError(
                f"{path}: {num_vertices} vertices, space {space.name} has {expected} on that side; "
                "set space=algonauts2023"
            )
    scans = [_scan(image, folder.name, files) for image in images]
    stimuli = pd.DataFrame(
        {"image": [path.name for path in images], "row": [scan.row for scan in scans]},
        index=pd.Index([scan.stimulus for scan in scans], name="stimulus_id", dtype="str"),
    )
    if not stimuli.index.is_unique:
        raise SourceError(f"{split}: image {stimuli.index[stimuli.index.duplicated()][0]} occurs twice; keep one")
    return SourceContents(
        scans=scans,
        subjects=pd.DataFrame(index=pd.Index([folder.name], name="subject_id", dtype="str")),
        notes=[f"{len(scans)} images of {folder.name}; responses as released: z-scored in each session"],
        stimuli=stimuli,
        atlases=[_atlas(folder / "roi_masks", name, space) for name in options.rois],
    )


def _subject_folder(root: Path, subject: str) -> Path:
    known = sorted(path.name for path in root.glob("subj*") if path.is_dir())
    if subject not in known:
        raise SourceError(
            f"{root}: no folder of source.options.subject={subject!r}; give one of "
            f"{', '.join(known) or 'its subj* folders'}"
        )
    return root / subject


def _images(folder: Path) -> list[Path]:
    """The images in the order of the responses' rows."""
    images = sorted(path for path in folder.glob("*.png") if IMAGE_NAME.fullmatch(path.name))
    numbers = [_numbers(path)[0] for path in images]
    if not images:
        raise SourceError(f"{folder}: no train-<row>_nsd-<image>.png; unpack the subject's training_split")
    if numbers != list(range(1, len(images) + 1)):
        missing = sorted(set(range(1, max(numbers) + 1)) - set(numbers))
        raise SourceError(
            f"{folder}: image train-{(missing or numbers)[0]:04d} is missing or duplicated; fetch it again"
        )
    return images


def _numbers(image: Path) -> tuple[int, str]:
    match = IMAGE_NAME.fullmatch(image.name)
    assert match is not None
    return int(match[1]), match[2]


def _scan(image: Path, subject: str, files: dict[str, Path]) -> Scan:
    number, name = _numbers(image)
    entities = {"sub": subject, "acq": f"nsd{name}", "suffix": "response"}
    return Scan(
        scan_id=scan_id_of(entities, "response"),
        kind="response",
        path=str(image),
        repetition_time_s=0.0,
        num_frames=1,
        entities=entities,
        subject=subject,
        task="nsd",
        files={side: str(path) for side, path in files.items()},
        stimulus=f"nsd-{name}",
        row=number - 1,
    )


def _shape(path: Path) -> tuple[int, int]:
    """The shape of an array of responses, from its header."""
    array = _mapped(path)
    if array.ndim != 2 or array.dtype.kind != "f":
        raise SourceError(f"{path}: {array.dtype} of shape {array.shape}, expected floats [image, vertex]")
    return array.shape


def _mapped(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise SourceError(f"{path}: not a readable .npy of numbers ({error}); fetch it again") from error


def _num_vertices(space: BrainSpace, side: str) -> int:
    if space.hemispheres is None:
        raise SourceError(f"space {space.name} is a {space.kind}: responses are on a surface; set space=algonauts2023")
    return int((space.hemispheres == list(SIDES).index(side)).sum())


def _atlas(folder: Path, roi_class: str, space: BrainSpace) -> Atlas:
    """The regions of one class on the challenge's vertices, left and right under one name."""
    if roi_class not in CLASSES:
        raise SourceError(f"source.options.rois: {roi_class!r} is not one of {', '.join(CLASSES)}")
    labels = []
    for side, short in SIDES.items():
        path = folder / f"{short}.{roi_class}_challenge_space.npy"
        values = _mapped(path)
        if values.shape != (_num_vertices(space, side),) or not np.array_equal(values, np.rint(values)):
            raise SourceError(f"{path}: {values.dtype} of shape {values.shape}, expected one whole number per vertex")
        labels.append(values.astype(np.int32))
    mapping = read_mapping(folder / f"mapping_{roi_class}.npy")
    names = {label: name for label, name in mapping.items() if label != 0}
    unnamed = sorted(set(np.unique(np.concatenate(labels)).tolist()) - set(mapping) - {0})
    if unnamed:
        raise SourceError(f"{folder}: {roi_class} has label {unnamed[0]}, which mapping_{roi_class}.npy does not name")
    return Atlas(roi_class, np.concatenate(labels), names, {})


class _StandIn:
    """Replaces an array or a type, and keeps the state it is given."""

    state: object = None

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if module in NUMPY_MODULES and name in NAMES_IN_PICKLE:
            return _StandIn
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_mapping(path: Path) -> dict[int, str]:
    """The {number: name} dictionary pickled in a .npy file; SourceError when the file holds anything else.

    No class or function named in the file is imported or called, numpy's own included: stand-ins take their place.
    """
    try:
        data = path.read_bytes() if path.stat().st_size <= MAX_MAPPING_BYTES else b""
        file = io.BytesIO(data)
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if shape != () or dtype != np.dtype(object):
            raise ValueError(f"an array of {dtype} of shape {shape}")
        array = _PlainUnpickler(file).load()
        (mapping,) = array.state[4]
        plain = {int(label): name for label, name in mapping.items()}
        if not all(isinstance(name, str) for name in plain.values()):
            raise ValueError("names that are no text")
    except (
        OSError,
        ValueError,
        EOFError,
        TypeError,
        AttributeError,
        IndexError,
        KeyError,
        pickle.UnpicklingError,
    ) as error:
        raise SourceError(
            f"{path}: not a dictionary of numbers and names ({error}); fetch the data set's own file again"
        ) from error
    return plain
