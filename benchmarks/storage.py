"""What S3 costs: CPU of a request, up and down, and windows of a remote set with and without a node's cache.

    python benchmarks/storage.py --json storage.json

Before a local `rclone serve s3`, whose own CPU time is not counted; "20 ms away" is the same server behind a proxy that
waits that long before each answer, as a store in the same region does. Windows are those of read_shards.py.
"""

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
sys.path.append(str(Path(__file__).parents[1]))

from _measure import Row, arguments_of, report
from read_shards import NUM_VOXELS, drop, windows, write_shards

from cluster.storage.stores import Store, store_for
from data_sharding.read.fetch import Fetcher, FetchSettings
from data_sharding.read.file_cache import CachedFile, CacheSettings
from data_sharding.schema import shard_name
from tests.s3_servers import BUCKET, Fault, FaultProxy, aws_environment, rclone_server

NUM_FRAMES, WINDOW_FRAMES, BATCH = 128, 4, 8
RANGE_BYTES = 500_000
FILE_BYTES = 64 << 20
AWAY_S = 0.02


class FarServer(FaultProxy):
    """Answers each request AWAY_S later than its server does."""

    def take_fault(self, method: str, path: str) -> Fault | None:
        time.sleep(AWAY_S)
        return None


def serve_far(upstream: str, answer: Connection) -> None:
    server = FarServer(upstream)
    answer.send(server.endpoint)
    server.serve_forever()


def main() -> None:
    arguments = arguments_of(__doc__)
    arguments.add_argument("--repetitions", type=int, default=3)
    arguments.add_argument("--away", action="store_true", help="the store is 20 ms away")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as text:
        folder = Path(text)
        server = rclone_server(folder)
        server.start()
        try:
            server.wait_until_ready()
            receiver, sender = multiprocessing.Pipe()
            far = multiprocessing.Process(target=serve_far, args=(server.endpoint, sender), daemon=True)
            far.start()
            os.environ |= aws_environment(receiver.recv() if options.away else server.endpoint)
            work = operations(store_for(f"s3://{BUCKET}/set"), folder)
            rows = measured(work, repetitions=options.repetitions)
        finally:
            server.kill()
    name = f"S3, {AWAY_S * 1000:.0f} ms away" if options.away else "S3, loopback"
    report("Storage", {name: rows}, repetitions=options.repetitions, json_path=options.json)


def operations(store: Store, folder: Path) -> dict[str, tuple[int, float, Callable[[], object]]]:
    """By name: how many things one call does, how many bytes each has, and the call."""
    (folder / "set").mkdir()
    chunks = write_shards(folder / "set", 2, NUM_FRAMES)
    shards = [shard_name(number) for number in range(2)]
    for shard in shards:
        store.put(shard, folder / "set" / shard)
    (folder / "file").write_bytes(os.urandom(FILE_BYTES))
    reads = windows(chunks, NUM_FRAMES, WINDOW_FRAMES, 6 * BATCH)
    window_bytes = WINDOW_FRAMES * NUM_VOXELS
    buffer, ranges = memoryview(bytearray(RANGE_BYTES)), store.open_ranges(shards[0])

    def fetch(cache: CacheSettings | None) -> None:
        known = {shard: known_file(folder / "set" / shard, shard) for shard in shards}
        settings = FetchSettings(store.location, "int8", NUM_VOXELS, WINDOW_FRAMES, "indexed", 2, cache, known)
        fetcher = Fetcher(settings)
        drop(fetcher.fetch(reads[start : start + BATCH]) for start in range(0, len(reads), BATCH))
        fetcher.close()

    return {
        "size of an object": (100, 0, lambda: [store.size(shards[0]) for _ in range(100)]),
        "1 kB written": (100, 1e3, lambda: [store.put("small", b"1" * 1000) for _ in range(100)]),
        "ranged read, 500 kB": (100, RANGE_BYTES, lambda: [ranges.read_into(n * 1000, buffer) for n in range(100)]),
        "64 MiB up": (1, FILE_BYTES, lambda: store.put("file", folder / "file")),
        "64 MiB down": (1, FILE_BYTES, lambda: store.get_file("file", folder / "back")),
        "windows, no cache": (len(reads), window_bytes, lambda: fetch(None)),
        "windows, node cache": (len(reads), window_bytes, lambda: fetch(CacheSettings(str(folder / "cache"), 1 << 32))),
    }


def known_file(path: Path, name: str) -> CachedFile:
    import hashlib

    return CachedFile(name, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())


def measured(work: dict[str, tuple[int, float, Callable[[], object]]], *, repetitions: int) -> list[Row]:
    """The least CPU time of each, and its least wall-clock time; they take turns."""
    least = {name: [float("inf")] * 2 for name in work}
    for _ in range(repetitions):
        for name, (_, _, call) in work.items():
            cpu, wall = time.process_time(), time.perf_counter()
            call()
            taken = time.process_time() - cpu, time.perf_counter() - wall
            least[name] = [min(pair) for pair in zip(least[name], taken, strict=True)]
    return [
        {
            "what": name,
            "CPU ms each": 1000 * least[name][0] / count,
            "each second, wall": count / least[name][1],
            "MB/s, wall": count * size / least[name][1] / 1e6,
        }
        for name, (count, size, _) in work.items()
    ]


if __name__ == "__main__":
    main()
