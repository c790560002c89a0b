"""What a rank pays for a large set before the first voxel: planning, opening, ordering and resuming.

    python benchmarks/scale.py --json scale.json

Makes the tables of sets of --rows index rows (tar members) with no shards behind them: runs of 300 frames, 12 members
each, six runs a shard (500 MB at 2 mm), half of the runs with censored frames, one run a subject and visit. Every stage
runs in a process of its own, whose time is that of the stage without imports and whose memory is the peak of the whole
process, imports included.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from _measure import Row, arguments_of, report

from brain_models.space import SpaceConfig
from data_sharding import schema
from data_sharding.read.order import SampleOrder, rank_share
from data_sharding.read.reader import BatchSource, DataConfig, ShardSet, Windows, open_set
from data_sharding.splits import AS_WRITTEN
from data_sharding.write.prepare import make_space

NUM_FRAMES, CHUNK_FRAMES, WINDOW_FRAMES = 300, 64, 20
RUNS_A_SHARD = 6
SHARD_BYTES = 500_000_000
KINDS = (schema.MEAN, schema.SCALE, schema.FRAMES, schema.META)
BOUNDS = schema.chunk_bounds(NUM_FRAMES, CHUNK_FRAMES)
ROWS_A_RUN = len(KINDS) + 2 * len(BOUNDS)
RUNS_AT_A_TIME = 60_000
BATCH_SIZE, WORLD_SIZE, SHUFFLE_SHARDS = 256, 64, 16
BUDGET_S, BUDGET_GB = 10.0, 2.0


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        print(json.dumps(measured(arguments.stage, str(arguments.folder))))
        return
    tables: dict[str, list[Row]] = {}
    for num_rows in arguments.rows:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            num_runs = write_set(Path(folder), num_rows)
            name = f"{num_rows:,} index rows: {num_runs:,} runs, {num_runs * NUM_FRAMES // WINDOW_FRAMES:,} windows"
            size = (Path(folder) / schema.INDEX).stat().st_size
            tables[f"{name}, index {size / 1e6:,.0f} MB"] = [
                stage_row(stage, folder, arguments.repetitions) for stage in STAGES
            ]
    report("Large sets", tables, repetitions=arguments.repetitions, json_path=arguments.json)


def stage_row(stage: str, folder: str, repetitions: int) -> Row:
    """The least time and the largest peak of a stage's processes, one after the other."""
    command = [sys.executable, __file__, "--stage", stage, "--folder", folder]
    found = [json.loads(subprocess.check_output(command)) for _ in range(repetitions)]
    seconds, peak = min(each["seconds"] for each in found), max(each["peak_gb"] for each in found)
    kept = "yes" if seconds <= BUDGET_S and peak <= BUDGET_GB else "no"
    return {"stage": stage, "CPU s": seconds, "wall s": min(each["wall_s"] for each in found), "peak GB": peak} | {
        f"under {BUDGET_S:.0f} s and {BUDGET_GB:.0f} GB": kept
    }


def measured(stage: str, folder: str) -> Row:
    """CPU and wall time of the stage, and the peak memory of this process."""
    work = STAGES[stage](folder)
    cpu_started, started = time.process_time(), time.perf_counter()
    work()
    wall, seconds = time.perf_counter() - started, time.process_time() - cpu_started
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"seconds": seconds, "wall_s": wall, "peak_gb": int(lines["VmHWM"].split()[0]) * 1024 / 1e9}


def planning(folder: str) -> Callable[[], object]:
    """What `python -m pretrain --plan` asks of a set's tables: every split's runs, and the windows of an epoch."""

    def work() -> int:
        shard_set = open_set(folder)
        longest = [int(shard_set.runs("bold", [split]).num_frames.max()) for split in ("train", "validation", "test")]
        assert longest == [NUM_FRAMES] * 3
        assert len(shard_set.subjects)
        return windows_of(shard_set).runs("train").num_samples

    return work


def opening(folder: str) -> Callable[[], object]:
    """A rank's source, up to knowing where every window of the train split lies."""
    return lambda: windows_of(open_set(folder)).book("train")


def windows_of(shard_set: ShardSet) -> Windows:
    return Windows(shard_set, kind="bold", window_frames=WINDOW_FRAMES)


def opened(folder: str) -> BatchSource:
    config = DataConfig(
        batch_size=BATCH_SIZE,
        micro_batch_size=4,
        shuffle_shards=SHUFFLE_SHARDS,
        seed=0,
        num_workers=0,
        prefetch=1,
        reader="indexed",
        max_bad_fraction=0.0,
        cache_folder=None,
        cache_bytes=0,
        split=AS_WRITTEN,
    )
    return BatchSource(windows_of(open_set(folder)), config, rank=0, world_size=WORLD_SIZE)


def ordering(folder: str) -> Callable[[], object]:
    """An opened rank's first hundred steps: which samples, and their byte ranges."""
    source = opened(folder)
    source.drawn.names("train")
    return lambda: hundred_steps(source, epoch=0)


def resuming(folder: str) -> Callable[[], object]:
    """Opening, and the addresses of a hundred steps from the middle of the third epoch on."""
    return lambda: hundred_steps(opened(folder), epoch=2)


def hundred_steps(source: BatchSource, *, epoch: int) -> int:
    """Bytes of the windows of rank 0."""
    assert isinstance(source.drawn, Windows)
    book = source.drawn.book("train")
    order = SampleOrder(book.runs, fingerprint=source.fingerprint, seed=0, shuffle_shards=SHUFFLE_SHARDS)
    position = int((epoch + 0.5) * book.runs.num_samples)
    num_frames = 0
    for step in range(100):
        first = position + step * BATCH_SIZE
        mine = rank_share(order.stretch(first, first + BATCH_SIZE), rank=0, world_size=WORLD_SIZE)
        for run, frame in zip(mine.run, mine.first_frame, strict=True):
            num_frames += sum(span.num_frames for span in book.window(run, frame).spans)
    return num_frames


STAGES: dict[str, Callable[[str], Callable[[], object]]] = {
    "planning": planning,
    "opening": opening,
    "ordering": ordering,
    "resuming": resuming,
}


def write_set(folder: Path, num_rows: int) -> int:
    """How many runs the set has whose tables and manifest are now in the folder."""
    num_runs = num_rows // ROWS_A_RUN
    generator = np.random.default_rng(0)
    splits = generator.choice(["train", "validation", "test"], size=num_runs, p=[0.8, 0.1, 0.1])
    space = make_space(
        SpaceConfig(name="mni6", template="NLin6Asym", spacing_mm=6.0, mask="mni152", dilate_mm=4.0), atlas_images=[]
    )
    space.save(folder / schema.SPACE)
    writer = None
    for first in range(0, num_runs, RUNS_AT_A_TIME):
        numbers = np.arange(first, min(first + RUNS_AT_A_TIME, num_runs))
        table = pa.Table.from_pandas(index_rows(numbers, splits, generator), preserve_index=False)
        writer = writer or pq.ParquetWriter(folder / schema.INDEX, table.schema)
        writer.write_table(table, row_group_size=schema.INDEX_GROUP_ROWS)
    assert writer is not None
    writer.close()
    subjects = pd.DataFrame({"subject_id": [subject(number) for number in range(num_runs)], "split": splits})
    subjects.to_parquet(folder / schema.SUBJECTS, index=False)
    with (folder / schema.INDEX).open("rb") as index:
        tables = {schema.INDEX: hashlib.file_digest(index, "sha256").hexdigest()}
    (folder / schema.MANIFEST).write_bytes(manifest(num_runs, space.fingerprint, tables).to_json())
    return num_runs


def subject(number: int) -> str:
    return f"{number:07d}"


def index_rows(numbers: np.ndarray, splits: np.ndarray, generator: np.random.Generator) -> pd.DataFrame:
    """The members of these runs in the order of the tars."""
    rows = pd.DataFrame({"number": np.repeat(numbers, ROWS_A_RUN)})
    kinds = [*KINDS, *(kind for _ in BOUNDS for kind in (schema.BOLD, schema.CRC))]
    firsts = [0] * len(KINDS) + [first for first, _ in BOUNDS for _ in range(2)]
    lengths = [NUM_FRAMES] * len(KINDS) + [stop - first for first, stop in BOUNDS for _ in range(2)]
    places = [0] * len(KINDS) + [chunk + 1 for chunk in range(len(BOUNDS)) for _ in range(2)]
    scan = np.repeat(np.array([f"sub-{subject(number)}_ses-1_task-rest_run-1_bold" for number in numbers]), ROWS_A_RUN)
    key = pd.Series(scan) + "_" + pd.Series(np.tile([f"{place:04d}" for place in places], len(numbers)))
    rows["kind"] = np.tile(kinds, len(numbers))
    rows["key"] = key
    rows["member"] = key + "." + rows["kind"]
    rows["shard"] = np.repeat(np.array([schema.shard_name(number // RUNS_A_SHARD) for number in numbers]), ROWS_A_RUN)
    rows["offset"] = np.arange(len(rows)) % (RUNS_A_SHARD * ROWS_A_RUN) * (SHARD_BYTES // (RUNS_A_SHARD * ROWS_A_RUN))
    rows["size"] = 17_000_000
    rows["crc32"] = generator.integers(0, 2**32, size=len(rows))
    rows["subject"] = np.repeat(np.array([subject(number) for number in numbers]), ROWS_A_RUN)
    rows["split"] = np.repeat(splits[numbers], ROWS_A_RUN)
    rows["scan_id"] = scan
    rows["first_frame"] = np.tile(firsts, len(numbers))
    rows["num_frames"] = np.tile(lengths, len(numbers))
    rows["frame_crc32"] = checksums(rows, generator)
    rows["censored"] = ""
    is_first = rows["kind"] == schema.MEAN
    rows.loc[is_first, "censored"] = [censored_frames(generator) for _ in numbers]
    rows["repetition_time_s"] = 2.0
    constant = {"session": "1", "task": "rest", "run": "1", "site": "a", "stimulus": ""}
    return rows.assign(**constant)[list(schema.INDEX_COLUMNS)].astype(schema.INDEX_COLUMNS)


def checksums(rows: pd.DataFrame, generator: np.random.Generator) -> list[str]:
    """Random ones: they do not compress, as real ones do not."""
    is_checked = rows["kind"] == schema.BOLD
    return [
        generator.bytes(4 * num_frames).hex() if is_chunk else ""
        for is_chunk, num_frames in zip(is_checked, rows["num_frames"], strict=True)
    ]


def censored_frames(generator: np.random.Generator) -> str:
    """For half of the runs nothing, else one to eight stretches of one to three frames."""
    if generator.random() < 0.5:
        return ""
    starts = np.unique(generator.integers(0, NUM_FRAMES - 3, size=generator.integers(1, 9)))
    frames = np.unique(np.concatenate([np.arange(start, start + generator.integers(1, 4)) for start in starts]))
    return schema.frame_ranges(frames.tolist())


def manifest(num_runs: int, space_fingerprint: str, tables: dict[str, str]) -> schema.Manifest:
    """As complete as a reader needs it."""
    num_shards = -(-num_runs // RUNS_A_SHARD)
    shards = [
        schema.ShardEntry(schema.shard_name(number), SHARD_BYTES, f"{number:064x}", RUNS_A_SHARD)
        for number in range(num_shards)
    ]
    return schema.Manifest(
        schema=schema.SCHEMA_VERSION,
        fingerprint="generated",
        name="generated",
        space={"fingerprint": space_fingerprint},
        atlases=[],
        tables=tables,
        shards=shards,
        counts={},
        refused=[],
        splits={},
        preprocessing={"storage": {"bold_type": "int8"}, "max_censored_fraction": 0.5},
        notes=[],
        versions={},
    )


if __name__ == "__main__":
    main()
