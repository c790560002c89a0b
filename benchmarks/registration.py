"""How well raw scans are brought to the template, against a known truth and against somebody else's registration.

    python benchmarks/registration.py --json registration.json
    python benchmarks/registration.py --data FOLDER --whole-head-template FILE --png registration.png

Always: heads made from nilearn's template and moved by known transforms; motion of a known run, also by
ants.motion_correction. With --data, a folder that holds studyforrest/ (raw BIDS), studyforrest_mni/ (the same scans in
MNI152NLin6Asym, as derivatives) and t1/ds002748/ (skull-stripped T1w): real scans. Prints markdown tables.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
from _measure import Row, about, markdown
from nilearn.masking import compute_epi_mask
from scipy import ndimage

from brain_models.nifti import read_header
from brain_models.preprocess import pack_bold, pack_t1
from brain_models.resample import FWHM_PER_SIGMA
from brain_models.space import BrainSpace, SpaceConfig, fsl_grid, space_from_mask, volume_space
from brain_models.transform import Transform, apply_matrix
from data_sharding.registration.ants_calls import require_ants
from data_sharding.registration.config import PACKAGED, PACKAGED_NAME, RegistrationConfig
from data_sharding.registration.motion import estimate_motion
from data_sharding.registration.register import AlignedT1, align_t1, register_bold
from data_sharding.registration.template import solid, template_of
from data_sharding.registration.volumes import Volume

CONFIG = RegistrationConfig(
    kind="nonlinear",
    template=PACKAGED,
    template_name=PACKAGED_NAME,
    spacing_mm=2.0,
    num_starts=4,
    seed=0,
    min_similarity=0.65,
    min_bold_similarity=0.7,
)
NUM_HEADS = 3
GRID_AFFINE = nibabel.affines.from_matvec(np.diag([-1.5, 1.5, 1.5]), [115.0, -140.0, -115.0])
GRID_SHAPE = (154, 176, 158)
BOLD_AFFINE = nibabel.affines.from_matvec(np.diag([-3.0, 3.0, 3.3]), [105.0, -125.0, -80.0])
BOLD_SHAPE = (70, 74, 50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of real scans")
    parser.add_argument("--whole-head-template", type=Path, help="a second template, with skull, in NLin6Asym")
    parser.add_argument("--json", type=Path, help="the same numbers")
    parser.add_argument("--png", type=Path, help="registered scans with the template's outline (needs --data)")
    arguments = parser.parse_args()
    require_ants()
    print(f"{about()}. CPU seconds of one thread.")
    tables: dict[str, list[Row]] = {}
    for name, rows in run(arguments.data, arguments.whole_head_template, arguments.png):
        tables[name] = rows
        print(f"\n{name}\n\n{markdown(rows)}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(tables, indent=1) + "\n")


def run(data: Path | None, whole_head: Path | None, png: Path | None) -> Iterator[tuple[str, list[Row]]]:
    """Yields tables by name."""
    with tempfile.TemporaryDirectory() as folder:
        yield "Heads moved by a known affine", [known_head(number, Path(folder)) for number in range(NUM_HEADS)]
        yield "Known motion of a run of 10 frames", known_motion(Path(folder))
    if data is None:
        print("no --data: real scans are left out")
        return
    configs = [replace(CONFIG, kind="affine"), CONFIG]
    if whole_head is not None:
        configs.append(replace(CONFIG, template=str(whole_head), template_name="NLin6Asym"))
    t1 = data / "studyforrest/sub-02/anat/sub-02_T1w.nii.gz"
    aligned = [timed(t1, config) for config in configs]
    yield (
        "Whole head (studyforrest) against the derivative",
        [against_derivative(*each, data) for each in zip(aligned, configs, strict=True)],
    )
    bold = data / "studyforrest/sub-02/func/sub-02_task-oneback_run-1_bold.nii.gz"
    rows = [
        bold_against_derivative(bold, t1, found[0], config, data)
        for found, config in zip(aligned, configs, strict=True)
    ]
    yield "BOLD (studyforrest) against the derivative", rows
    stripped = sorted((data / "t1/ds002748").glob("sub-*/anat/*_T1w.nii.gz"))
    found = {(path, config.kind): timed(path, config) for path in stripped for config in configs[:2]}
    yield "Skull-stripped brains (ds002748)", [stripped_row(path, kind, *each) for (path, kind), each in found.items()]
    if png is not None:
        shown = {
            f"studyforrest, {config.kind}, {config.template_name}": (t1, each[0].transform)
            for each, config in zip(aligned, configs, strict=True)
        }
        shown |= {f"{path.name[:6]}, {kind}": (path, each[0].transform) for (path, kind), each in found.items()}
        picture(shown, derivative_t1(data), png)


def timed(path: Path, config: RegistrationConfig) -> tuple[AlignedT1, float]:
    started = time.process_time()
    return align_t1(path, config), time.process_time() - started


def known_head(number: int, folder: Path) -> Row:
    """A head with bone and skin, turned up to 20 degrees, moved up to 30 mm and scaled by up to 15 %."""
    generator = np.random.default_rng(number)
    turn = nibabel.eulerangles.euler2mat(*np.radians(generator.uniform(-20, 20, size=3)))
    truth = nibabel.affines.from_matvec(
        turn @ np.diag(generator.uniform(0.9, 1.15, size=3)), generator.uniform(-30, 30, size=3)
    )
    template = template_of(CONFIG)
    depth_mm = ndimage.distance_transform_edt(~np.pad(template.in_brain, 12)) * 2.0
    skin = np.where((depth_mm > 8) & (depth_mm <= 14), 0.6 * template.image.values.max(), 0)
    padded = Volume(np.pad(template.image.values, 12), template.image.origin_mm - 24, 2.0)
    head = padded.with_values(padded.values + skin)
    values = sampled(head, GRID_AFFINE, GRID_SHAPE, truth) * np.linspace(0.7, 1.3, GRID_SHAPE[1])[:, None]
    path = saved(folder / f"head{number}.nii.gz", values + generator.normal(scale=15, size=values.shape), GRID_AFFINE)
    aligned, seconds = timed(path, replace(CONFIG, kind="affine"))
    brain_mm = template.image.points_mm(template.in_brain)
    errors_mm = distances(aligned.transform.to_scan_mm(brain_mm), apply_matrix(np.linalg.inv(truth), brain_mm))
    reached = aligned.transform.record["similarity"]
    assert isinstance(reached, float)
    return {
        "head": number,
        "mean error mm": errors_mm.mean(),
        "largest error mm": errors_mm.max(),
        "similarity": reached,
        "CPU s": seconds,
    }


def known_motion(folder: Path) -> list[Row]:
    generator = np.random.default_rng(0)
    poses = generator.uniform(-1, 1, size=(10, 6)) * np.array([2, 2, 2, 0.03, 0.03, 0.03])
    poses[5] = 0  # the reference of both
    truth = [nibabel.affines.from_matvec(nibabel.eulerangles.euler2mat(*pose[3:]), pose[:3]) for pose in poses]
    template = template_of(CONFIG)
    smooth = ndimage.gaussian_filter(template.image.values, 3 / FWHM_PER_SIGMA / 2)
    image = template.image.with_values(np.where(template.in_brain, 1.3 * smooth.max() - smooth, 0))
    frames = [sampled(image, BOLD_AFFINE, BOLD_SHAPE, np.linalg.inv(pose)) for pose in truth]
    values = np.stack(frames, axis=-1) + generator.normal(scale=5, size=(*BOLD_SHAPE, len(truth)))
    path = saved(folder / "bold.nii.gz", values, BOLD_AFFINE)
    brain_mm = template.image.points_mm(template.in_brain)

    def row(method: str, matrices: list[np.ndarray] | np.ndarray, seconds: float) -> Row:
        errors = [
            distances(apply_matrix(found, brain_mm), apply_matrix(pose, brain_mm)).mean()
            for found, pose in zip(matrices, truth, strict=True)
        ]
        return {
            "method": method,
            "mean error mm": float(np.mean(errors)),
            "largest frame's error mm": float(np.max(errors)),
            "CPU s a frame": seconds / len(truth),
        }

    started = time.process_time()
    ours = row("estimate_motion", estimate_motion(read_header(path, "bold")).matrices, time.process_time() - started)
    started = time.process_time()
    theirs = row("ants.motion_correction", motion_by_ants(path), time.process_time() - started)
    return [ours, theirs]


def motion_by_ants(path: Path) -> list[np.ndarray]:
    from data_sharding.registration.ants_calls import _read_matrix

    ants = require_ants()
    run = ants.image_read(str(path))
    found = ants.motion_correction(run, fixed=ants.slice_image(run, axis=3, idx=5))
    names = [next(name for name in files if name.endswith(".mat")) for files in found["motion_parameters"]]
    return [_read_matrix(Path(name)) for name in names]


def against_derivative(found: tuple[AlignedT1, float], config: RegistrationConfig, data: Path) -> Row:
    aligned, seconds = found
    row = described(config, aligned, seconds)
    row["overlap with template (Dice)"] = overlap_with_template(aligned, config)
    reference = derivative_t1(data)
    reference_brain = align_t1(reference, replace(CONFIG, kind="affine")).brain
    raw = data / "studyforrest/sub-02/anat/sub-02_T1w.nii.gz"
    for spacing_mm in (2.0, 3.0):
        whole = whole_grid(spacing_mm)
        points_mm = whole.positions_mm.astype(np.float64)
        ours = is_brain(aligned.brain, aligned.transform.to_scan_mm(points_mm))
        theirs = is_brain(reference_brain, points_mm)
        row[f"brain overlap (Dice), mni{spacing_mm:.0f}"] = dice(ours, theirs)
        space = brain_space(spacing_mm)
        packed = pack_t1(raw, space, brain_mask=None, transform=aligned.transform)
        expected = pack_t1(reference, space, brain_mask=None)
        is_measured = packed.is_measured & expected.is_measured
        row[f"T1 correlation, mni{spacing_mm:.0f}"] = correlation(packed.values[0], expected.values[0], is_measured)
    return row


def bold_against_derivative(path: Path, t1: Path, aligned: AlignedT1, config: RegistrationConfig, data: Path) -> Row:
    started = time.process_time()
    transform = register_bold(path, t1=t1, t1_transform=aligned.transform, config=config)
    seconds = time.process_time() - started
    derivative = next((data / "studyforrest_mni/sub-02/func").glob("*_desc-preproc_bold.nii.gz"))
    whole, space = whole_grid(3.0), brain_space(3.0)
    ours = pack_bold(path, whole, brain_mask=None, transform=transform)
    theirs = pack_bold(derivative, whole, brain_mask=None)
    means = [on_grid(packed.values.mean(axis=0), whole) for packed in (ours, theirs)]
    masks = [np.asarray(compute_epi_mask(mean).dataobj) > 0 for mean in means]
    in_space = np.zeros(whole.grid_shape, dtype=bool)
    in_space[tuple(space.voxel_indices.T)] = True
    is_compared = in_space.ravel() & ours.is_measured & theirs.is_measured
    displacement_mm = transform.framewise_displacement_mm
    assert displacement_mm is not None
    reached = transform.record["similarity"]
    assert isinstance(reached, float)
    return {
        "template": config.template_name,
        "kind": config.kind,
        "similarity (correlation ratio)": reached,
        "brain overlap (Dice), mni3": dice(*masks),
        "mean BOLD correlation, mni3": correlation(ours.values.mean(axis=0), theirs.values.mean(axis=0), is_compared),
        "mean FD mm": float(np.nanmean(displacement_mm)),
        "largest FD mm": float(np.nanmax(displacement_mm)),
        "CPU s": seconds,
    }


def stripped_row(path: Path, kind: str, aligned: AlignedT1, seconds: float) -> Row:
    config = replace(CONFIG, kind=kind)
    row: Row = {"scan": path.name[:6], **described(config, aligned, seconds)}
    row["overlap with template (Dice)"] = overlap_with_template(aligned, config)
    return row


def described(config: RegistrationConfig, aligned: AlignedT1, seconds: float) -> Row:
    record = aligned.transform.record
    reached, starts = record["similarity"], record["similarity_of_starts"]
    assert isinstance(reached, float)
    assert isinstance(starts, list)
    return {
        "template": config.template_name,
        "kind": config.kind,
        "skull of scan / template": f"{record['skull_of_scan']} / {record['skull_of_template']}",
        "similarity": reached,
        "worst start": min(starts),
        "brain volume / template": 1 / float(np.linalg.det(aligned.transform.scan_to_template[:3, :3])),
        "CPU s": seconds,
    }


def overlap_with_template(aligned: AlignedT1, config: RegistrationConfig) -> float:
    template = template_of(config)
    everywhere = np.ones(template.image.values.shape, dtype=bool)
    scan_mm = aligned.transform.to_scan_mm(template.image.points_mm(everywhere))
    return dice(is_brain(aligned.brain, scan_mm), template.in_brain.ravel())


def is_brain(brain: Volume, points_mm: np.ndarray) -> np.ndarray:
    return brain.with_values(solid(brain)).sample(points_mm) > 0.5


def derivative_t1(data: Path) -> Path:
    return next((data / "studyforrest_mni/sub-02/anat").glob("*_T1w.nii.gz"))


def brain_space(spacing_mm: float) -> BrainSpace:
    return volume_space(SpaceConfig(f"mni{spacing_mm:.0f}", "2009aSym", spacing_mm, "mni152", 0.0))


def whole_grid(spacing_mm: float) -> BrainSpace:
    affine, shape = fsl_grid(spacing_mm)
    return space_from_mask(np.ones(shape, dtype=bool), affine, name="grid", template="2009aSym")


def on_grid(values: np.ndarray, whole: BrainSpace) -> nibabel.Nifti1Image:
    return nibabel.Nifti1Image(values.reshape(whole.grid_shape), whole.affine)


def dice(first: np.ndarray, second: np.ndarray) -> float:
    return float(2 * (first & second).sum() / (first.sum() + second.sum()))


def correlation(first: np.ndarray, second: np.ndarray, is_compared: np.ndarray) -> float:
    return float(np.corrcoef(first[is_compared], second[is_compared])[0, 1])


def distances(first_mm: np.ndarray, second_mm: np.ndarray) -> np.ndarray:
    return np.linalg.norm(first_mm - second_mm, axis=1)


def sampled(image: Volume, affine: np.ndarray, shape: tuple[int, int, int], to_image: np.ndarray) -> np.ndarray:
    indices = np.argwhere(np.ones(shape, dtype=bool)).astype(np.float64)
    return image.sample(apply_matrix(to_image @ affine, indices)).reshape(shape) / image.values.max() * 1000


def saved(path: Path, values: np.ndarray, affine: np.ndarray) -> Path:
    image = nibabel.Nifti1Image(values.astype(np.float32), affine)
    image.set_sform(affine, 1)
    nibabel.save(image, path)
    return path


def picture(shown: dict[str, tuple[Path, Transform]], reference: Path, png: Path) -> None:
    """Writes axial, coronal and sagittal cuts, with the outline of the packaged template's brain and its ventricles."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    whole = whole_grid(2.0)
    template = template_of(CONFIG)
    outline = template.image.sample(whole.positions_mm.astype(np.float64)).reshape(whole.grid_shape)
    images = {
        name: pack_t1(path, whole, brain_mask=None, transform=transform).values[0]
        for name, (path, transform) in shown.items()
    }
    images["the derivative"] = pack_t1(reference, whole, brain_mask=None).values[0]
    figure, axes = plt.subplots(len(images), 6, figsize=(15, 2.6 * len(images)))
    cuts = [(2, 26), (2, 40), (2, 54), (1, 40), (1, 62), (0, 42)]
    for row, (name, values) in zip(axes, images.items(), strict=True):
        grid = values.reshape(whole.grid_shape)
        brightest = np.percentile(grid[outline > 0.1], 99.5)
        for panel, (axis, cut) in zip(row, cuts, strict=True):
            panel.imshow(np.take(grid, cut, axis).T, origin="lower", cmap="gray", vmin=0, vmax=brightest)
            panel.contour(np.take(outline, cut, axis).T, [0.1, 0.55], colors=["red", "orange"], linewidths=0.6)
            if axis != 0:
                panel.invert_xaxis()  # the grid runs from right to left; now the right hand is on the right
            panel.axis("off")
        row[0].set_title(name, fontsize=8, loc="left")
    figure.tight_layout()
    figure.savefig(png, dpi=70)


if __name__ == "__main__":
    main()
