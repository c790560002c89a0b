"""Images with what a brain answered to them: a set of responses, or a folder of images beside responses or an RDM.

Vertices are standardised by the training images only: the mean and deviation of all images would tell a little of the
tested ones. Knows no encoder.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, UInt8

from brain_models.images import SUFFIXES, read_image
from cluster.storage.stores import store_for
from data_sharding.read.config import DataConfig
from data_sharding.read.order import Samples, tiled
from data_sharding.read.shard_set import ShardSet, open_set
from data_sharding.read.windows import Responses, Windows
from data_sharding.schema import MANIFEST
from data_sharding.splits import SPLITS, assign_splits
from finetune.errors import FinetuneError
from finetune.tasks.rdm_prediction.dissimilarity import Measure, rdm

ALL = "all"
UNUSED = "unused"  # of an image in no split
ROWS_AT_ONCE = 256
RESPONSES, RDM, CATEGORIES = "responses.npy", "rdm.npy", "categories.csv"
SYMMETRY_TOLERANCE = 1e-5
Images = Callable[[Sequence[int]], Iterator[UInt8[np.ndarray, "y x rgb"]]]


@dataclass
class Stimuli:
    """The images of a set in the order of their names, each in one split. `patterns` are standardised responses;
    without them `matrix` is the true RDM itself."""

    location: str
    name: str
    fingerprint: str  # of images, responses and splits
    images_fingerprint: str
    names: list[str]
    splits: list[str]
    images: Images
    patterns: Float[np.ndarray, "image vertex"] | None
    matrix: Float[np.ndarray, "image image"] | None
    categories: list[str] | None
    region: str
    is_phantom: bool
    subjects: list[str]

    def rows(self, *splits: str) -> np.ndarray:
        """The numbers of the images of these splits."""
        return np.flatnonzero(np.isin(self.splits, splits))

    def true_rdm(self, rows: np.ndarray, measure: Measure) -> Float[np.ndarray, "image image"]:
        """The dissimilarities of the responses to these images."""
        if self.patterns is None:
            assert self.matrix is not None
            return self.matrix[np.ix_(rows, rows)]
        return rdm(torch.from_numpy(self.patterns[rows]), measure, overwrites=True).numpy()


def open_stimuli(location: str, data: DataConfig, *, region: str) -> Stimuli:
    """The set at a location; FinetuneError where its parts do not belong together, or lack the region."""
    if store_for(location).exists(MANIFEST):
        return _from_shards(open_set(location, split=data.split), data, region=region)
    if (folder := Path(location) / "images").is_dir():
        return _from_folder(Path(location), folder, data, region=region)
    raise FinetuneError(
        f"shards={location}: neither a shard set (no {MANIFEST}) nor a folder with images/ beside {RESPONSES} or "
        f"{RDM}; write one with python -m data_sharding dataset=algonauts2023"
    )


def _from_shards(shard_set: ShardSet, data: DataConfig, *, region: str) -> Stimuli:
    table = shard_set.scans("response").sort_values("stimulus")
    if not len(table):
        raise FinetuneError(
            f"shards={shard_set.location}: holds no response to an image; write one with python -m data_sharding "
            "dataset=algonauts2023"
        )
    names = table.stimulus.tolist()
    is_used = vertices_of(shard_set, region)
    row_of = dict(zip(table.scan_id, range(len(names)), strict=True))
    patterns = np.empty((len(names), int(is_used.sum())), dtype=np.float32)
    split_of = table.split.tolist()
    windows = Windows(shard_set, kind="response", window_frames=1)
    for batch in read_in_batches(windows, data, sorted(set(split_of))):
        patterns[[row_of[scan_id] for scan_id in batch.scan_ids]] = batch.values[:, 0].numpy()[:, is_used]
    is_training = np.array([split == "train" for split in split_of])
    responses = Responses(shard_set)
    images_of = dict(zip(table.scan_id, names, strict=True))

    def images(rows: Sequence[int]) -> Iterator[UInt8[np.ndarray, "y x rgb"]]:
        wanted = table.iloc[list(rows)]
        found: dict[str, np.ndarray] = {}
        for split in sorted(set(wanted.split)):
            scan_ids = set(wanted.scan_id[wanted.split == split])
            for batch in read_in_batches(responses, data, [split], only=scan_ids):
                found |= dict(zip(batch.stimuli, batch.image.numpy(), strict=True))
        return (found[images_of[scan_id]] for scan_id in wanted.scan_id)

    return Stimuli(
        location=shard_set.location,
        name=shard_set.manifest.name,
        fingerprint=shard_set.fingerprint,
        images_fingerprint=shard_set.manifest.fingerprint,
        names=names,
        splits=split_of,
        images=images,
        patterns=standardised(patterns, is_training),
        matrix=None,
        categories=None,
        region=region,
        is_phantom=shard_set.is_phantom,
        subjects=sorted(shard_set.subjects.index),
    )


def read_in_batches(
    windows: Windows, data: DataConfig, splits: Sequence[str], *, only: set[str] | None = None
) -> Iterator:
    """Batches of the responses of these splits, of the scans `only` where given."""
    fetcher = windows.fetcher(data)
    try:
        for split in splits:
            samples: Samples = tiled(windows.runs(split), fingerprint=windows.fingerprint, limit=None)
            if only is not None:
                scan_ids = np.array(windows.names(split))
                samples = samples[np.isin(scan_ids[samples.run], list(only))]
            for start in range(0, len(samples), ROWS_AT_ONCE):
                chosen = samples[start : start + ROWS_AT_ONCE]
                fetched = fetcher.fetch(windows.reads(split, chosen))
                if fetched.damaged:
                    raise FinetuneError(next(iter(fetched.damaged.values())))
                yield windows.batch(split, chosen, np.ones(len(chosen), dtype=np.float32), fetched)
    finally:
        fetcher.close()


def vertices_of(shard_set: ShardSet, region: str) -> Bool[np.ndarray, "vertex"]:
    """True for the vertices of a region: `all`, an atlas's name (every labelled vertex), the name of a region, or what
    names of regions begin with (V1 is V1v and V1d). FinetuneError when the set has no such region."""
    if region == ALL:
        return np.ones(shard_set.frame_width("response"), dtype=bool)
    for name, atlas in shard_set.atlases.items():
        chosen = [label for label, each in atlas.names.items() if each == region] or [
            label for label, each in atlas.names.items() if each.startswith(region)
        ]
        is_inside = atlas.labels != 0 if name == region else np.isin(atlas.labels, chosen)
        if is_inside.any():
            return is_inside
    known = [ALL, *shard_set.atlases, *(name for atlas in shard_set.atlases.values() for name in atlas.names.values())]
    raise FinetuneError(
        f"task.region={region}: {shard_set.location} holds no vertex of it; choose one of {', '.join(known)}, or write "
        "the set with more source.options.rois"
    )


def standardised(
    patterns: Float[np.ndarray, "image vertex"], is_training: Bool[np.ndarray, "image"]
) -> Float[np.ndarray, "image vertex"]:
    """The patterns, in place, by the mean and deviation of every vertex over training images; a vertex that does not
    vary there is 0."""
    training = patterns[is_training]
    mean, scale = training.mean(axis=0), training.std(axis=0)
    patterns -= mean
    patterns *= np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    return patterns


def _from_folder(folder: Path, image_folder: Path, data: DataConfig, *, region: str) -> Stimuli:
    paths = sorted(path for path in image_folder.iterdir() if path.suffix.lower() in SUFFIXES)
    names = [path.stem for path in paths]
    if region != ALL:
        raise FinetuneError(f"task.region={region}: {folder} names no regions; set task.region={ALL}")
    if data.split.rule == "set":
        raise FinetuneError(
            f"data.split.rule=set: {folder} was not written with splits; set data.split.rule=fold (with num_folds and "
            "fold), ranked, threshold or file"
        )
    split_of = assign_splits(pd.DataFrame(index=pd.Index(names, name="stimulus_id", dtype="str")), data.split)
    splits = [split_of[name] for name in names]
    patterns, matrix = _responses_or_rdm(folder, num_images=len(paths))
    if patterns is not None:
        patterns = standardised(patterns, np.array(splits) == "train")
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    images_fingerprint = digest.hexdigest()
    values = matrix if patterns is None else patterns
    assert values is not None
    digest.update(values.tobytes() + "".join(splits).encode())
    return Stimuli(
        location=str(folder),
        name=folder.name,
        fingerprint=digest.hexdigest(),
        images_fingerprint=images_fingerprint,
        names=names,
        splits=splits,
        images=lambda rows: (read_image(paths[row]) for row in rows),
        patterns=patterns,
        matrix=matrix,
        categories=_categories(folder / CATEGORIES, names),
        region=region,
        is_phantom=False,
        subjects=[folder.name],
    )


def _responses_or_rdm(folder: Path, *, num_images: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Responses [image, vertex], or else the matrix [image, image]."""
    if (path := folder / RESPONSES).exists():
        patterns = _array(path)
        if len(patterns) != num_images:
            raise FinetuneError(
                f"{path}: {len(patterns)} rows, {folder}/images holds {num_images} images; give one row for every "
                "image, in the order of their names"
            )
        return patterns, None
    if not (path := folder / RDM).exists():
        raise FinetuneError(f"{folder}: neither {RESPONSES} nor {RDM}; put one beside images/")
    matrix = _array(path)
    if matrix.shape[0] != matrix.shape[1] or len(matrix) != num_images:
        raise FinetuneError(
            f"{path}: {matrix.shape[0]} x {matrix.shape[1]} values, {folder}/images holds {num_images} images; give a "
            "square matrix with a row and a column for every image, in the order of their names"
        )
    row, column = np.unravel_index(np.argmax(np.abs(matrix - matrix.T)), matrix.shape)
    if abs(off := float(matrix[row, column] - matrix[column, row])) > SYMMETRY_TOLERANCE * np.abs(matrix).max():
        raise FinetuneError(
            f"{path}: not symmetric: [{row}, {column}] and [{column}, {row}] differ by {abs(off):.3g}; store "
            "(matrix + matrix.T) / 2 if both orders were measured"
        )
    return None, matrix


def _array(path: Path) -> Float[np.ndarray, "row column"]:
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise FinetuneError(f"{path}: not a readable .npy of numbers ({error}); write it by numpy.save") from error
    if values.ndim != 2 or values.dtype.kind not in "fiu" or not np.isfinite(values).all():
        raise FinetuneError(
            f"{path}: {values.dtype} of shape {values.shape}; give finite numbers, a row for every image"
        )
    return values.astype(np.float32)


def _categories(path: Path, names: Sequence[str]) -> list[str] | None:
    """The category of every image, from a table with the columns image and category; None without one."""
    if not path.exists():
        return None
    table = {row["image"]: row["category"] for row in csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))}
    if missing := [name for name in names if name not in table]:
        raise FinetuneError(f"{path}: lacks {len(missing)} images, first {missing[0]}; add a row for each")
    return [table[name] for name in names]


def with_fewer_training_images(stimuli: Stimuli, number: int | None, *, seed: int) -> Stimuli:
    """The stimuli with so many training images, drawn at random; the others are in no split. None: all of them."""
    training = stimuli.rows("train")
    if number is None or number >= len(training):
        return stimuli
    left_out = np.random.default_rng(seed).permutation(training)[number:]
    splits = np.array(stimuli.splits, dtype=object)
    splits[left_out] = UNUSED
    return replace(stimuli, splits=splits.tolist())


def split_warnings(stimuli: Stimuli) -> tuple[list[str], list[str]]:
    """Problems and warnings of the number of images in each split."""
    problems, warnings = [], []
    for split in SPLITS:
        num_images = len(stimuli.rows(split))
        said = f"split '{split}' of {stimuli.location} has {num_images} images"
        if num_images < 5:
            problems.append(f"{said}; at least 5 are needed: choose other splits (data.split)")
        elif num_images < 20:
            warnings.append(f"{said}: below 20, its numbers hardly mean anything")
    return problems, warnings
