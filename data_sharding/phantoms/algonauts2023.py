"""Algonauts 2023: images, responses, masks and mappings of `subj01` ..., each with its own number of vertices.

What is true of it is in truth.json, written before anything else: responses follow from the pixels through a known
extractor, regions follow from different features of it, and noise leaves the stated ceilings.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial.distance import pdist
from scipy.stats import spearmanr

from data_sharding.phantoms.fields import generator, write_json

FSAVERAGE_VERTICES = 163842
NUM_IMAGES = 12
SHARED = 12  # one image of so many is seen by all subjects
REGIONS = {0: "Unknown", 1: "V1v", 2: "V1d", 3: "V2v"}
SIDES = {"lh": 40, "rh": 36}  # vertices of the first subject's challenge space
GRID, SIDE = 4, 16  # of an image: blocks of one colour, smoothed, and pixels
NUM_FEATURES = 12
FEATURES_OF = {"V1": range(6), "V2": range(6, 12)}  # what regions follow from; vertices without a region: all
GRAY = 0.13  # deviation of a block's gray, of 0 to 1
GAIN = 1.5  # of the extractor, before its tanh
NOISE = 1.7  # deviation, where the signal of a vertex has 1: ceilings of about .5


def write(out: Path, num_subjects: int, seed: int, *, num_images: int = NUM_IMAGES) -> None:
    """Subjects that share some images, the first of all; mappings are pickled dictionaries, as released."""
    subjects = range(1, num_subjects + 1)
    write_json(out / "truth.json", truth(subjects, num_images, seed))
    for number in subjects:
        folder = out / f"subj{number:02d}"
        _write_images(folder, number, num_images, seed)
        for side in SIDES:
            _write_side(folder, side, responses(number, side, num_images, seed), (seed, number, side))
        mapping = np.array(REGIONS, dtype=object)
        np.save(folder / "roi_masks" / "mapping_prf-visualrois.npy", mapping, allow_pickle=True)


def truth(subjects: range, num_images: int, seed: int) -> dict[str, object]:
    """What a model of these responses may find, and how well the best one does: Spearman of the RDMs (1 - Pearson) of
    responses without and with noise, over all images."""
    return {
        "extractor": {
            "reads": f"the mean gray of {GRID} x {GRID} blocks, 0 to 255, row by row",
            "computes": "tanh(weights @ (gray / 255 - 0.5))",
            "weights": weights(seed).tolist(),
        },
        "features_of": {name: list(used) for name, used in FEATURES_OF.items()},
        "noise": NOISE,
        "ceilings": {
            f"subj{number:02d}": {name: ceiling(number, name, num_images, seed) for name in FEATURES_OF}
            for number in subjects
        },
    }


def ceiling(subject: int, region: str, num_images: int, seed: int) -> float:
    """Spearman of a region's RDMs without and with noise."""
    clean, noisy = (
        np.concatenate(
            [
                responses(subject, side, num_images, seed, noise=noise)[:, _is_in(region, subject, side)]
                for side in SIDES
            ],
            axis=1,
        )
        for noise in (0.0, NOISE)
    )
    return float(spearmanr(pdist(clean, "correlation"), pdist(noisy, "correlation"))[0])


def _is_in(region: str, subject: int, side: str) -> np.ndarray:
    names = [REGIONS[label] for label in _labels(SIDES[side] + subject - 1)]
    return np.array([name.startswith(region) for name in names])


def _labels(num_vertices: int) -> np.ndarray:
    return np.arange(num_vertices) % len(REGIONS)


def weights(seed: int) -> np.ndarray:
    """float64 [feature, block]: what enters the tanh deviates by GAIN, because the gray of blocks does by GRAY."""
    drawn = generator("extractor", seed).normal(size=(NUM_FEATURES, GRID * GRID))
    return drawn * (GAIN / GRAY) / np.linalg.norm(drawn, axis=1, keepdims=True)


def extracted(pixels: np.ndarray, seed: int) -> np.ndarray:
    """float64 [feature] of an image uint8 [y, x, rgb]."""
    size = SIDE // GRID
    gray = pixels.mean(axis=2).reshape(GRID, size, GRID, size).mean(axis=(1, 3)).ravel()
    return np.tanh(weights(seed) @ (gray / 255 - 0.5))


def stimulus(subject: int, row: int, num_images: int) -> int:
    """The number of an image in the whole data set."""
    return 13 + row if row < num_images // SHARED else max(100, num_images) * subject + row


def pixels_of(nsd: int, seed: int) -> np.ndarray:
    """uint8 [y, x, rgb]: a few colours that pass into one another."""
    blocks = generator("image", seed, nsd).integers(0, 256, size=(GRID, GRID, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(blocks).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


@lru_cache(maxsize=8)
def features_of_images(subject: int, num_images: int, seed: int) -> np.ndarray:
    """float64 [image, feature] of what a subject saw."""
    rows = [pixels_of(stimulus(subject, row, num_images), seed) for row in range(num_images)]
    return np.stack([extracted(pixels, seed) for pixels in rows])


def responses(subject: int, side: str, num_images: int, seed: int, *, noise: float = NOISE) -> np.ndarray:
    """float32 [image, vertex]: features of the vertex's region, mixed, and noise; 0 and 1 are mean and deviation."""
    features = features_of_images(subject, num_images, seed)
    num_vertices = SIDES[side] + subject - 1
    mixing = generator("mixing", seed, subject, side).normal(size=(NUM_FEATURES, num_vertices))
    for region, used in FEATURES_OF.items():
        unused = np.setdiff1d(np.arange(NUM_FEATURES), used)
        mixing[np.ix_(unused, np.flatnonzero(_is_in(region, subject, side)))] = 0
    signal = (features - features.mean(axis=0)) @ mixing
    signal /= signal.std(axis=0)
    errors = generator("noise", seed, subject, side).normal(size=signal.shape)
    return ((signal + noise * errors) / np.sqrt(1 + noise**2)).astype(np.float32)


def _write_images(folder: Path, subject: int, num_images: int, seed: int) -> None:
    split = folder / "training_split" / "training_images"
    split.mkdir(parents=True)
    for row in range(num_images):
        nsd = stimulus(subject, row, num_images)
        Image.fromarray(pixels_of(nsd, seed)).save(split / f"train-{row + 1:04d}_nsd-{nsd:05d}.png")
    (folder / "test_split" / "test_images").mkdir(parents=True)


def _write_side(folder: Path, side: str, values: np.ndarray, seed: tuple[object, ...]) -> None:
    for name in ("training_split/training_fmri", "roi_masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    num_vertices = values.shape[1]
    np.save(folder / "training_split" / "training_fmri" / f"{side}_training_fmri.npy", values)
    on_mesh = np.zeros(FSAVERAGE_VERTICES, dtype=np.int64)
    on_mesh[generator("mask", *seed).choice(FSAVERAGE_VERTICES, size=num_vertices, replace=False)] = 1
    np.save(folder / "roi_masks" / f"{side}.all-vertices_fsaverage_space.npy", on_mesh)
    np.save(folder / "roi_masks" / f"{side}.prf-visualrois_challenge_space.npy", _labels(num_vertices))
