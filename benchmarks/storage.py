"""What S3 costs: CPU of a request, up and down, and windows of a remote set with and without a node's cache.

    python benchmarks/storage.py --json storage.json

Before a local `rclone serve s3`, whose own CPU time is not counted; with --away behind a proxy that waits 20 ms before
each answer, as a store in the same region does. Windows have 4 frames of 2 mm, in batches of 8.
"""

import hashlib
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from _measure import Row, arguments_of, report
from read_shards import NUM_VOXELS, drop, windows, write_shards

from cluster.storage.stores import Store, store_for
from data_sharding.read.fetch import Fetcher, FetchSettings
from data_sharding.read.file_cache import CachedFile, FileCache
from data_sharding.schema import shard_name
from tests.s3_servers import BUCKET, Fault, FaultProxy, aws_environment, rclone_server

NUM_FRAMES, WINDOW_FRAMES, NUM_WINDOWS, BATCH = 128, 4, 48, 8
RANGE_BYTES, FILE_BYTES = 500_000, 64 << 20
Work = tuple[int, int, Callable[[], object]]  # how many things a call does, how many bytes each has, and the call


class FarServer(FaultProxy):
    """Answers each request 20 ms later than its server does."""

    def take_fault(self, method: str, path: str) -> Fault | None:
        time.sleep(0.02)
        return None


def serve_far(upstream: str, answer: Connection) -> None:
    server = FarServer(upstream)
    answer.send(server.endpoint)
    server.serve_forever()


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--away", action="store_true", help="the store is 20 ms away")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        server = rclone_server(Path(folder))
        server.start()
        try:
            server.wait_until_ready()
            receiver, sender = multiprocessing.Pipe()
            multiprocessing.Process(target=serve_far, args=(server.endpoint, sender), daemon=True).start()
            far = receiver.recv()
            os.environ |= aws_environment(far if arguments.away else server.endpoint)
            rows = measured(operations(store_for(f"s3://{BUCKET}/set"), Path(folder)), arguments.repetitions)
        finally:
            server.kill()
    name = "S3, 20 ms away" if arguments.away else "S3, loopback"
    report("Storage", {name: rows}, repetitions=arguments.repetitions, json_path=arguments.json)


def operations(store: Store, folder: Path) -> dict[str, Work]:
    chunks = write_shards(folder, 2, NUM_FRAMES)
    shards = {shard_name(number): (folder / shard_name(number)).read_bytes() for number in range(2)}
    for shard, data in shards.items():
        store.put(shard, data)
    files = {name: CachedFile(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in shards.items()}
    (folder / "file").write_bytes(os.urandom(FILE_BYTES))
    reads = windows(chunks, NUM_FRAMES, WINDOW_FRAMES, NUM_WINDOWS)
    buffer, ranges = memoryview(bytearray(RANGE_BYTES)), store.open_ranges(shard_name(0))

    def fetch(cache: FileCache | None) -> None:
        fetcher = Fetcher(FetchSettings(store.location, "int8", NUM_VOXELS, WINDOW_FRAMES, "indexed", 2, cache, files))
        drop(fetcher.fetch(reads[start : start + BATCH]) for start in range(0, NUM_WINDOWS, BATCH))
        fetcher.close()

    cache, window_bytes = FileCache(str(folder / "cache"), 1 << 32), WINDOW_FRAMES * NUM_VOXELS
    return {
        "size of an object": (100, 0, lambda: repeat(lambda _: store.size(shard_name(0)))),
        "1 kB written": (100, 1000, lambda: repeat(lambda _: store.put("small", bytes(1000)))),
        "500 kB of an object": (100, RANGE_BYTES, lambda: repeat(lambda n: ranges.read_into(n * 1000, buffer))),
        "64 MiB up": (1, FILE_BYTES, lambda: store.put("file", folder / "file")),
        "64 MiB down": (1, FILE_BYTES, lambda: store.get_file("file", folder / "back")),
        "windows": (NUM_WINDOWS, window_bytes, lambda: fetch(None)),
        "windows, node cache": (NUM_WINDOWS, window_bytes, lambda: fetch(cache)),
    }


def repeat(call: Callable[[int], object]) -> None:
    for number in range(100):
        call(number)


def measured(work: dict[str, Work], repetitions: int) -> list[Row]:
    """The least CPU time and the least wall-clock time of each; they take turns."""
    least = {name: (float("inf"), float("inf")) for name in work}
    for _ in range(repetitions):
        for name, (_, _, call) in work.items():
            cpu, wall = time.process_time(), time.perf_counter()
            call()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            least[name] = min(least[name][0], cpu), min(least[name][1], wall)
    rows: list[Row] = []
    for name, (count, size, _) in work.items():
        cpu, wall = least[name]
        row: Row = {"what": name, "CPU ms each": 1000 * cpu / count, "each second, wall": count / wall}
        rows.append(row | {"MB/s, wall": count * size / wall / 1e6})
    return rows


if __name__ == "__main__":
    main()
