"""How fast windows come out of shards, against the bare system calls and against WebDataset.

    python benchmarks/read_shards.py --json read_shards.json

The set has 2 mm BOLD runs (272,554 voxels, int8) and the windows have 20 frames; everything is in the page cache. Each
contender reads the same windows in the same random order: `preadv + crc32` is the least anybody can do, the same byte
ranges into rotating buffers and isal's crc32 of every frame; `fetch` is what a loader process does (int8 tensors:
decoding happens on the training device, here on the same core); WebDataset reads as many frames of the same shards
front to back and decodes every chunk to the int8 array, without checking it.
"""

import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

import numpy as np
import torch
from _measure import Row, arguments_of, cpu_seconds, report
from isal import isal_zlib
from webdataset.writer import TarWriter

from brain_models.recipe import NOT_MEASURED
from data_sharding import schema
from data_sharding.read.batch import decode
from data_sharding.read.fetch import Fetcher, FetchSettings, FrameSpan, WindowRead
from data_sharding.read.loading import fetched_in_order
from data_sharding.write.packing import npy_bytes

NUM_VOXELS = 272_554
NUM_ROTATING = 8


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--frames", type=int, default=300, help="of the one run in each")
    parser.add_argument("--window-frames", type=int, default=20)
    parser.add_argument("--windows", type=int, default=120, help="read in one repetition")
    parser.add_argument("--batch", type=int, default=4, help="windows fetched at a time")
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        spans = write_shards(Path(folder), arguments.shards, arguments.frames)
        reads = windows(spans, arguments.frames, arguments.window_frames, arguments.windows)
        settings = FetchSettings(folder, "int8", NUM_VOXELS, arguments.window_frames, "indexed", arguments.shards)
        seconds = cpu_seconds(contenders(settings, reads, arguments.batch), repetitions=arguments.repetitions)
        scaling = [workers(settings, reads, count, arguments.batch) for count in (0, 1, 2)]
    floor = seconds["preadv + crc32"]
    rows: list[Row] = [
        {
            "reader": name,
            "windows/s": len(reads) / taken,
            "MB/s of stored bytes": len(reads) * arguments.window_frames * NUM_VOXELS / taken / 1e6,
            "share of preadv + crc32": floor / taken,
        }
        for name, taken in seconds.items()
    ]
    tables = {f"Windows of {arguments.window_frames} frames, one core, page cache": rows, "Loader processes": scaling}
    report("Reading shards", tables, repetitions=arguments.repetitions, json_path=arguments.json)


def write_shards(folder: Path, num_shards: int, num_frames: int) -> list[list[FrameSpan]]:
    """A seeded run in each shard, in chunks of 64 frames as the sharder writes them; the chunks of every run."""
    generator = np.random.default_rng(0)
    chunks_of_run: list[list[FrameSpan]] = []
    (folder / schema.SHARDS).mkdir()
    for shard in range(num_shards):
        chunks_of_run.append([])
        with (folder / schema.shard_name(shard)).open("wb") as file, TarWriter(file, mtime=0, encoder=False) as writer:
            for chunk, (first, stop) in enumerate(schema.chunk_bounds(num_frames, 64)):
                frames = generator.integers(-60, 60, size=(stop - first, NUM_VOXELS), dtype=np.int8)
                frames[:, ::50] = NOT_MEASURED
                key, checksums = schema.chunk_key(f"run{shard}", chunk), schema.crc32_of_frames(frames)
                offset = writer.tarstream.offset + schema.TAR_BLOCK_BYTES
                # Members are written in the order of their kinds: bold.npy, then crc.npy.
                writer.write({"__key__": key, schema.BOLD: npy_bytes(frames), schema.CRC: npy_bytes(checksums)})
                span = FrameSpan(f"{key}.{schema.BOLD}", offset, first, stop - first, checksums.tobytes())
                chunks_of_run[-1].append(span)
    return chunks_of_run


def windows(chunks_of_run: list[list[FrameSpan]], num_frames: int, window_frames: int, count: int) -> list[WindowRead]:
    """Windows at random places: one span, or two across a chunk boundary."""
    generator = np.random.default_rng(1)
    reads = []
    for _ in range(count):
        run, first = (
            int(generator.integers(len(chunks_of_run))),
            int(generator.integers(num_frames - window_frames + 1)),
        )
        spans = []
        for chunk in chunks_of_run[run]:
            start, stop = max(first, chunk.first), min(first + window_frames, chunk.first + chunk.num_frames)
            if start < stop:
                crc32 = chunk.crc32[4 * (start - chunk.first) : 4 * (stop - chunk.first)]
                spans.append(FrameSpan(chunk.member, chunk.offset, start - chunk.first, stop - start, crc32))
        reads.append(WindowRead(schema.shard_name(run), tuple(spans)))
    return reads


def contenders(settings: FetchSettings, reads: list[WindowRead], batch: int) -> dict[str, Callable[[], object]]:
    """Everybody who reads the same windows, by name; WebDataset reads as many frames, front to back."""
    batches = [reads[start : start + batch] for start in range(0, len(reads), batch)]
    shards = sorted({read.shard for read in reads})
    files = {shard: os.open(Path(settings.location) / shard, os.O_RDONLY) for shard in shards}
    buffers = [np.empty((settings.window_frames, NUM_VOXELS), dtype=np.int8) for _ in range(NUM_ROTATING)]
    fetcher = Fetcher(settings)
    urls = [str(Path(settings.location) / shard) for shard in shards]
    num_frames = len(reads) * settings.window_frames
    return {
        "preadv": lambda: bare(files, reads, buffers, is_checked=False),
        "preadv + crc32": lambda: bare(files, reads, buffers, is_checked=True),
        "fetch (int8, checked)": lambda: drop(fetcher.fetch(each) for each in batches),
        "fetch, then decoded to float32": lambda: drop(decode(fetcher.fetch(each).stored) for each in batches),
        "webdataset.WebDataset, int8, unchecked": lambda: webdataset_frames(urls, num_frames),
    }


def drop(results: Iterable[object]) -> None:
    """Takes every result and keeps none, as a training step does."""
    deque(results, maxlen=0)


def bare(files: dict[str, int], reads: list[WindowRead], buffers: list[np.ndarray], *, is_checked: bool) -> None:
    """The byte ranges of the windows into rotating buffers, and the crc32 of every frame."""
    for number, read in enumerate(reads):
        buffer, done = buffers[number % len(buffers)], 0
        for span in read.spans:
            frames = buffer[done : done + span.num_frames]
            first_byte = span.offset + schema.NPY_HEADER_BYTES + span.first * NUM_VOXELS
            assert os.preadv(files[read.shard], [frames], first_byte) == frames.nbytes
            if is_checked:
                for frame in frames:
                    isal_zlib.crc32(frame)
            done += span.num_frames


def webdataset_frames(urls: list[str], num_frames: int) -> None:
    """At least `num_frames` frames out of whole shards, decoded as its users do; reads over the shards again."""
    import webdataset

    num_done = 0
    while num_done < num_frames:
        for entry in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode():
            num_done += len(entry[schema.BOLD])
            if num_done >= num_frames:
                return


def workers(settings: FetchSettings, reads: list[WindowRead], num_workers: int, batch: int) -> Row:
    """Wall-clock rate of loader processes (0: a thread of this process), from the first batch to the last."""
    repeated = [reads[start : start + batch] for start in range(0, len(reads), batch)] * 4
    ahead = fetched_in_order(Fetcher(settings), iter(repeated), num_workers=num_workers, prefetch=2)
    next(ahead)
    started = time.perf_counter()
    num_batches = sum(1 for _ in ahead)
    taken = time.perf_counter() - started
    return {"loader processes": str(num_workers or "0 (thread)"), "windows/s, wall": num_batches * batch / taken}


if __name__ == "__main__":
    main()
