"""How fast one run becomes its part of a shard, against the gunzip of its file alone and against nilearn.

    python benchmarks/ingest.py --json ingest.json
    python benchmarks/ingest.py --long-frames 1200       # also the peak memory of a 91x109x91x1200 run (a few minutes)

Ingest is everything the sharder does to a run: gunzip, resampling, cleaning with the defaults of
configs/data_sharding.yaml, standardising, quality, checksums and the tar. The scans are seeded: a smooth head, noise of
1.5 %, slow drifts, air around it, int16, gzip.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

if "--pack" in sys.argv:
    sys.modules["torch"] = None  # type: ignore[assignment] # as in the sharder's own packing process

import nibabel
import numpy as np
from _measure import Row, arguments_of, cpu_seconds, report
from isal import igzip

from brain_models.cleaning import clean_bold
from brain_models.nifti import read_header
from brain_models.preprocess import pack_bold, standardise_bold
from brain_models.resample import resampler_for
from brain_models.space import BrainSpace, SpaceConfig, fsl_grid, volume_space
from configs.entry import compose
from configs.parse import parse
from data_sharding.config import AcceptanceConfig, PreprocessingConfig
from data_sharding.scans import Scan
from data_sharding.write.packing import PackContext, PackSettings, write_segment

REPETITION_TIME_S = 2.0
COARSE_AFFINE = nibabel.affines.from_matvec(np.diag([-3.0, 2.9, 3.1]), [95.0, -127.0, -73.0])
TURNED_AFFINE = nibabel.affines.from_matvec(nibabel.eulerangles.euler2mat(0.14, 0.14, 0.14)) @ COARSE_AFFINE
COARSE_SHAPE = (64, 76, 60)
BLOCK_BYTES = 1 << 20


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--frames", type=int, default=300, help="of each run")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--nilearn-frames", type=int, default=4, help="frames given to nilearn; its time is scaled")
    parser.add_argument("--long-frames", type=int, default=0, help="of a run whose peak memory is measured; 0: none")
    parser.add_argument("--pack", nargs=2, help="(used by itself) pack this scan onto this space, say the peak memory")
    arguments = parser.parse_args()
    if arguments.pack:
        pack_once(Path(arguments.pack[0]), float(arguments.pack[1]))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        tables = {"Ingest of one run, one core": [], "Stages": [], "Processes at once": []}  # type: dict[str, list[Row]]
        for name, spacing_mm, grid in cases():
            path = write_run(Path(folder) / f"{len(tables['Stages'])}.nii.gz", *grid, num_frames=arguments.frames)
            total, stages = one_case(name, path, spacing_mm, arguments.repetitions, arguments.nilearn_frames)
            tables["Ingest of one run, one core"].append(total)
            tables["Stages"].append(stages)
            if spacing_mm == 2:
                tables["Processes at once"].append(scaling(name, path, spacing_mm, arguments.repetitions))
            path.unlink()
        if arguments.long_frames:
            tables["Peak memory"] = [peak_memory(Path(folder), arguments.long_frames)]
    report("Ingest", tables, repetitions=arguments.repetitions, json_path=arguments.json)


def cases() -> list[tuple[str, float, tuple[np.ndarray, tuple[int, int, int]]]]:
    """Name, spacing of the space, grid of the scan."""
    return [
        ("(a) 91x109x91 on its own grid (2 mm)", 2.0, fsl_grid(2.0)),
        ("(b) 64x76x60 (3 mm) onto 2 mm", 2.0, (COARSE_AFFINE, COARSE_SHAPE)),
        ("(b) the same, its axes turned by 8 degrees", 2.0, (TURNED_AFFINE, COARSE_SHAPE)),
        ("(c) phantom, 31x37x31 on its own grid (6 mm)", 6.0, fsl_grid(6.0)),
    ]


def write_run(path: Path, affine: np.ndarray, shape: tuple[int, int, int], *, num_frames: int) -> Path:
    """A seeded run, written a frame at a time."""
    generator = np.random.default_rng(0)
    places = np.stack(np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij"))
    radius = np.sqrt((places**2).sum(axis=0))
    anatomy = (1 + 0.3 * np.cos(9 * places[0]) * np.cos(7 * places[1]) * np.sin(8 * places[2])) * (radius < 0.95)
    base = (8000 * anatomy).astype(np.float32).ravel(order="F")
    noise = (120 * (radius < 0.95) + 6).astype(np.float32).ravel(order="F")
    drift = (100 * anatomy * places[1]).astype(np.float32).ravel(order="F")
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape((*shape, num_frames))
    header.set_sform(affine, code=4)
    header.set_zooms((*np.linalg.norm(affine[:3, :3], axis=0), REPETITION_TIME_S))
    header.set_xyzt_units("mm", "sec")
    header["vox_offset"], header["magic"] = 352, b"n+1"
    with igzip.open(path, "wb", compresslevel=1) as file:
        file.write(header.binaryblock + bytes(4))
        for frame in range(num_frames):
            values = generator.standard_normal(len(base), dtype=np.float32) * noise + base
            values += np.float32(np.cos(np.pi * frame / num_frames)) * drift
            file.write(np.maximum(values, 0).astype(np.int16).tobytes())
    return path


def one_case(name: str, path: Path, spacing_mm: float, repetitions: int, num_nilearn_frames: int) -> tuple[Row, Row]:
    """The row of ratios and the row of stages."""
    context = context_of(spacing_mm)
    header = read_header(path, "bold")
    started = time.process_time()
    resampler_for(header, context.space, None)
    build_s = time.process_time() - started
    contenders: dict[str, Callable[[], object]] = {
        "gunzip": lambda: gunzip(path),
        "ingest": lambda: pack(path, context),
    }
    seconds = cpu_seconds(contenders, repetitions=repetitions)
    stages = stage_seconds(path, context, repetitions)
    linear_s, default_s = (
        nilearn_seconds(path, context.space, interpolation, num_nilearn_frames)
        for interpolation in ("linear", "continuous")
    )
    total: Row = {
        "scan": f"{name}, {header.num_frames} frames",
        "gunzip s": seconds["gunzip"],
        "ingest s": seconds["ingest"],
        "ingest / gunzip": seconds["ingest"] / seconds["gunzip"],
        "nilearn linear / ingest": linear_s / seconds["ingest"],
        "nilearn default (cubic) / ingest": default_s / seconds["ingest"],
    }
    rest_s = seconds["ingest"] - sum(stages.values())
    return total, {"scan": name, **stages, "quality, checksums, tar": rest_s, "once a grid: weights": build_s}


def gunzip(path: Path) -> None:
    with igzip.open(path, "rb") as file:
        while file.read(BLOCK_BYTES):
            pass


def pack(path: Path, context: PackContext) -> None:
    """What the sharder's child process does to a run."""
    part = path.with_suffix(".part")
    write_segment(scan_of(path), context, part)
    part.unlink()


def scan_of(path: Path) -> Scan:
    return Scan("sub-01_bold", "bold", str(path), REPETITION_TIME_S, 0, {"subject": "01"}, "01")


def context_of(spacing_mm: float) -> PackContext:
    """The space and the settings of configs/data_sharding.yaml, without an atlas."""
    raw = compose("data_sharding", ["name=bench", "source.root=.", "out=.", f"space=mni{spacing_mm:g}"])
    space = volume_space(parse(raw["space"], SpaceConfig), atlas_images=[])
    settings = PackSettings(
        chunk_frames=raw["storage"]["chunk_frames"],
        bold_type=raw["storage"]["bold_type"],
        cleaning=parse(raw["preprocessing"], PreprocessingConfig).cleaning,
        acceptance=parse(raw["acceptance"], AcceptanceConfig),
        series_atlas=None,
    )
    return PackContext(space, {}, settings)


def stage_seconds(path: Path, context: PackContext, repetitions: int) -> dict[str, float]:
    """CPU seconds by stage, the least of the repetitions; what standardising computes anew is taken off it."""
    cleaning, stored_as = context.settings.cleaning, context.settings.bold_type
    names = ("gunzip + hold", "resample", "clean", "standardise")
    least = dict.fromkeys(names, float("inf"))
    for _ in range(repetitions):
        times = [time.process_time()]
        packed = pack_bold(path, context.space, brain_mask=None)
        times.append(time.process_time())
        run = clean_bold(packed, cleaning, repetition_time_s=REPETITION_TIME_S, confounds=None).packed
        for scan in (packed, run):
            for piece in scan.held.pieces:
                scan.block(piece)
            times.append(time.process_time())
        standardise_bold(run, stored_as=stored_as)
        times.append(time.process_time())
        held_s, resampled_s, cleaned_s, standardised_s = (float(each) for each in np.diff(times))
        found = (held_s, resampled_s, cleaned_s - resampled_s, standardised_s - cleaned_s)
        least = {name: min(least[name], seconds) for name, seconds in zip(names, found, strict=True)}
    return least


def nilearn_seconds(path: Path, space: BrainSpace, interpolation: str, num_frames: int) -> float:
    """CPU seconds of reading the run with nibabel, resampling every frame onto the grid and saving it as float16.

    The first `num_frames` are measured, and count for all.
    """
    from nilearn.image import index_img, new_img_like, resample_to_img

    grid = np.zeros(space.grid_shape, np.uint8)
    target = new_img_like(nibabel.Nifti1Image(grid, space.affine), grid)
    started = time.process_time()
    whole = nibabel.load(path)
    run = nibabel.Nifti1Image(np.asarray(whole.dataobj), whole.affine)
    read_s = time.process_time() - started
    started = time.process_time()
    for frame in range(num_frames):
        image = index_img(run, frame)
        image = resample_to_img(image, target, interpolation=interpolation, force_resample=True, copy_header=True)
        np.save(path.with_suffix(f".{frame}.npy"), image.get_fdata(dtype=np.float32).astype(np.float16))
    frames_s = time.process_time() - started
    for frame in range(num_frames):
        path.with_suffix(f".{frame}.npy").unlink()
    return read_s + frames_s * run.shape[3] / num_frames


def scaling(name: str, path: Path, spacing_mm: float, repetitions: int) -> Row:
    """CPU and wall time of one process, and of two at once that do the same each; they take turns.

    Others on the machine lengthen the wall time; CPU time says what the two cost each other (cache, memory, locks).
    """
    least = {1: (float("inf"),) * 2, 2: (float("inf"),) * 2}
    for _ in range(repetitions):
        for count in least:
            cpu_s, wall_s = run_processes(path, spacing_mm, count)
            least[count] = min(least[count][0], cpu_s), min(least[count][1], wall_s)
    return {
        "scan": name,
        "1: CPU s": least[1][0],
        "2: CPU s of each": least[2][0],
        "throughput 2 / 1 by CPU": 2 * least[1][0] / least[2][0],
        "1: wall s": least[1][1],
        "2: wall s": least[2][1],
        "throughput 2 / 1 by wall": 2 * least[1][1] / least[2][1],
    }


def run_processes(path: Path, spacing_mm: float, count: int) -> tuple[float, float]:
    """Mean CPU seconds, and wall seconds until the last is done."""
    command = [sys.executable, __file__, "--pack"]
    processes = []
    for number in range(count):
        copy = path.with_name(f"{number}-{path.name}")
        copy.unlink(missing_ok=True)
        copy.hardlink_to(path)
        processes.append(subprocess.Popen([*command, str(copy), str(spacing_mm)], stdout=subprocess.PIPE, text=True))
    found = [json.loads(process.communicate()[0]) for process in processes]
    return sum(each["cpu_s"] for each in found) / count, max(each["wall_s"] for each in found)


def pack_once(path: Path, spacing_mm: float) -> None:
    """Prints the peak memory, the CPU and the wall time of packing a scan in this process."""
    context = context_of(spacing_mm)
    resampler_for(read_header(path, "bold"), context.space, None)
    started, started_cpu = time.perf_counter(), time.process_time()
    pack(path, context)
    wall_s, cpu_s = time.perf_counter() - started, time.process_time() - started_cpu
    # Not ru_maxrss: a process starts with the peak of the one that started it.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak_bytes = int(status["VmHWM"].split()[0]) * 1024
    print(json.dumps({"wall_s": wall_s, "cpu_s": cpu_s, "peak_bytes": peak_bytes}))


def peak_memory(folder: Path, num_frames: int) -> Row:
    """Of a process that packs one long run."""
    path = write_run(folder / "long.nii.gz", *fsl_grid(2.0), num_frames=num_frames)
    command = [sys.executable, __file__, "--pack", str(path), "2.0"]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return {
        "scan": f"91x109x91x{num_frames}, {path.stat().st_size / 1e9:.2f} GB gzip",
        "peak RSS GB": found["peak_bytes"] / 1e9,
        "CPU s": found["cpu_s"],
    }


if __name__ == "__main__":
    main()
