"""What registration reaches on scans that are not what their header says: where the gates belong.

    python benchmarks/registration_gates.py --data FOLDER --json gates.json

FOLDER holds studyforrest/ and t1/ds002748/ as for registration.py. The gates are switched off; every row says how far a
scan came, and whether it ended where it belongs (turned headers: within 5 mm of where the unturned one did). Right rows
must lie above the shipped gates, wrong rows below; what a gate refuses though it is right is the gate's price.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
from _measure import Row, about, markdown
from registration import CONFIG, distances, saved
from scipy import ndimage

from brain_models.transform import Transform, apply_matrix
from data_sharding.registration.ants_calls import RegistrationError
from data_sharding.registration.register import register_bold, register_t1
from data_sharding.registration.template import template_of
from data_sharding.registration.volumes import read_volume

OPEN = replace(CONFIG, kind="affine", min_similarity=0.001, min_bold_similarity=0.001)
TURNS_DEG = [(45, 0, 0), (0, 0, -40), (0, 40, 0), (90, 0, 0), (180, 0, 0), (0, 180, 0), (0, 0, 180)]  # about x, y, z
BOLD_TURNS_DEG = [(20, 0, 0), (0, 0, 20), (90, 0, 0), (180, 0, 0), (0, 180, 0), (0, 0, 90)]
RIGHT_WITHIN_MM = 5.0
NUM_FRAMES = 4

Value = str | float | list[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of real scans")
    parser.add_argument("--json", type=Path, help="the same numbers")
    arguments = parser.parse_args()
    if arguments.data is None:
        print("no --data: nothing to measure")
        return
    with tempfile.TemporaryDirectory() as folder:
        tables = {
            "T1 against the template": [*t1_rows(arguments.data, Path(folder))],
            "BOLD against the T1": [*bold_rows(arguments.data, Path(folder))],
        }
    print(f"{about()}.")
    gates = {"T1 against the template": CONFIG.min_similarity, "BOLD against the T1": CONFIG.min_bold_similarity}
    for name, rows in tables.items():
        rows.sort(key=lambda row: row["similarity"])
        print(f"\n{name} (gate {gates[name]})\n\n{markdown(rows)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(tables, indent=1) + "\n")


def t1_rows(data: Path, folder: Path) -> Iterator[Row]:
    generator = np.random.default_rng(0)
    whole = read_volume(data / "studyforrest/sub-02/anat/sub-02_T1w.nii.gz", spacing_mm=2.0)
    brain = read_volume(data / "t1/ds002748/sub-12/anat/sub-12_T1w.nii.gz", spacing_mm=2.0)

    def row(name: str, values: np.ndarray, affine: np.ndarray, *, expected: np.ndarray | None) -> Row:
        path = saved(folder / "T1w.nii.gz", values, affine)
        try:
            transform = register_t1(path, OPEN)
        except RegistrationError as error:  # an impossible size is refused whatever the gate
            print(error)
            return described(name, 0.0, None, expected)
        return described(name, transform.record["similarity"], transform.scan_to_template, expected)

    for name, image in (("head", whole), ("brain", brain)):
        path = saved(folder / "T1w.nii.gz", image.values, image.affine)
        unturned = register_t1(path, OPEN).scan_to_template
        for turn in TURNS_DEG:
            expected = unturned @ np.linalg.inv(rotation(turn))
            affine = rotation(turn) @ image.affine
            yield row(f"{name}, header turned by {turn} degrees", image.values, affine, expected=expected)
        if name == "head":
            noises = generator.normal(scale=8, size=(2, *whole.values.shape))
            noisy = np.hypot(whole.values + noises[0], noises[1])
            yield row("head, noise of 10 % of white matter", noisy, whole.affine, expected=unturned)
            coil = np.linspace(0.4, 2, whole.values.shape[1])[None, :, None]
            yield row("head, five times brighter in front", whole.values * coil, whole.affine, expected=unturned)
        else:
            upper = np.arange(brain.values.shape[2]) > ndimage.center_of_mass(brain.values)[2]
            yield row("brain, lower half missing", brain.values * upper, brain.affine, expected=unturned)
    noise = ndimage.gaussian_filter(generator.normal(size=(90, 100, 90)), 5) ** 2
    grid = np.diag([2.0, 2, 2, 1])
    yield row("smooth noise", noise, grid, expected=None)
    distance = np.linalg.norm(np.indices((90, 100, 90)).T - [45, 50, 45], axis=-1).T
    yield row("a ball", 100.0 * (distance < 40), grid, expected=None)
    yield row("a ball of shells", (distance < 40) * (100 + 50 * np.cos(distance / 5)), grid, expected=None)
    bold = nibabel.load(next((data / "studyforrest/sub-02/func").glob("*_bold.nii.gz")))
    yield row("BOLD called T1w", np.asarray(bold.dataobj[..., 30]), bold.affine, expected=None)


def bold_rows(data: Path, folder: Path) -> Iterator[Row]:
    t1 = data / "studyforrest/sub-02/anat/sub-02_T1w.nii.gz"
    other = data / "t1/ds002748/sub-12/anat/sub-12_T1w.nii.gz"
    bold = nibabel.load(next((data / "studyforrest/sub-02/func").glob("*_bold.nii.gz")))
    frames = np.asarray(bold.dataobj[..., :NUM_FRAMES])
    transforms = {path: register_t1(path, OPEN) for path in (t1, other)}

    def registered(values: np.ndarray, affine: np.ndarray, anatomy: Path = t1) -> Transform:
        path = saved(folder / "bold.nii.gz", values, affine)
        return register_bold(path, t1=anatomy, t1_transform=transforms[anatomy], config=OPEN)

    def row(name: str, found: Transform, expected: np.ndarray | None) -> Row:
        return described(name, found.record["similarity"], found.scan_to_template, expected)

    plain = registered(frames, bold.affine)
    unturned = plain.scan_to_template
    yield row("as it is", plain, unturned)
    for turn in BOLD_TURNS_DEG:
        expected = unturned @ np.linalg.inv(rotation(turn))
        yield row(f"header turned by {turn} degrees", registered(frames, rotation(turn) @ bold.affine), expected)
    yield row("T1 of another subject", registered(frames, bold.affine, other), None)
    for num_slices in (24, 15, 8):
        first = (frames.shape[2] - num_slices) // 2
        moved = bold.affine @ nibabel.affines.from_matvec(np.eye(3), [0, 0, first])
        slab = registered(frames[:, :, first : first + num_slices], moved)
        yield row(f"a slab of {num_slices} slices", slab, unturned)
    distance_mm = np.linalg.norm((np.indices(frames.shape[:3]).T - [40, 40, 17]) * [3, 3, 3.3], axis=-1).T
    ball = (distance_mm < 75)[..., None] * np.array([100.0, 101, 100, 101])
    yield row("a ball", registered(ball, bold.affine), None)


def described(name: str, similarity: Value, found: np.ndarray | None, expected: np.ndarray | None) -> Row:
    """Returns a row; `expected` is None where no alignment would be right."""
    assert isinstance(similarity, float)
    row: Row = {"scan": name, "right": "no", "similarity": similarity, "off by mm": "-"}
    if found is not None and expected is not None:
        template = template_of(OPEN)
        brain_mm = apply_matrix(np.linalg.inv(expected), template.coarse.points_mm(template.in_coarse_brain))
        off_mm = float(distances(apply_matrix(found, brain_mm), apply_matrix(expected, brain_mm)).mean())
        row |= {"off by mm": off_mm, "right": "yes" if off_mm < RIGHT_WITHIN_MM else "no"}
    return row


def rotation(degrees: tuple[int, int, int]) -> np.ndarray:
    return nibabel.affines.from_matvec(nibabel.eulerangles.euler2mat(*np.radians(degrees[::-1])))


if __name__ == "__main__":
    main()
