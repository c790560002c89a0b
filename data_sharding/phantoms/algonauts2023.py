"""Algonauts 2023: images, responses, masks and mappings of `subj01` ..., each with its own number of vertices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from data_sharding.phantoms.fields import generator

FSAVERAGE_VERTICES = 163842
NUM_IMAGES = 12
REGIONS = {0: "Unknown", 1: "V1v", 2: "V1d", 3: "V2v"}
SIDES = {"lh": 40, "rh": 36}  # vertices of the first subject's challenge space


def write(out: Path, num_subjects: int, seed: int) -> None:
    """Subjects that share their first image; mappings are pickled dictionaries, as released."""
    for number in range(1, num_subjects + 1):
        folder = out / f"subj{number:02d}"
        _write_images(folder, number, seed)
        for side, num_vertices in SIDES.items():
            _write_side(folder, side, num_vertices + number - 1, (seed, number, side))
        mapping = np.array(REGIONS, dtype=object)
        np.save(folder / "roi_masks" / "mapping_prf-visualrois.npy", mapping, allow_pickle=True)


def responses(num_vertices: int, seed: tuple[object, ...]) -> np.ndarray:
    """float32 [image, vertex], standard normal."""
    return generator("responses", *seed).normal(size=(NUM_IMAGES, num_vertices)).astype(np.float32)


def _write_images(folder: Path, subject: int, seed: int) -> None:
    split = folder / "training_split" / "training_images"
    split.mkdir(parents=True)
    for row in range(NUM_IMAGES):
        nsd = 13 if row == 0 else 100 * subject + row
        pixels = generator("image", seed, nsd).integers(0, 256, size=(8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(split / f"train-{row + 1:04d}_nsd-{nsd:05d}.png")
    (folder / "test_split" / "test_images").mkdir(parents=True)


def _write_side(folder: Path, side: str, num_vertices: int, seed: tuple[object, ...]) -> None:
    for name in ("training_split/training_fmri", "roi_masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    np.save(folder / "training_split" / "training_fmri" / f"{side}_training_fmri.npy", responses(num_vertices, seed))
    on_mesh = np.zeros(FSAVERAGE_VERTICES, dtype=np.int64)
    on_mesh[generator("mask", *seed).choice(FSAVERAGE_VERTICES, size=num_vertices, replace=False)] = 1
    np.save(folder / "roi_masks" / f"{side}.all-vertices_fsaverage_space.npy", on_mesh)
    labels = np.arange(num_vertices) % len(REGIONS)
    np.save(folder / "roi_masks" / f"{side}.prf-visualrois_challenge_space.npy", labels)
