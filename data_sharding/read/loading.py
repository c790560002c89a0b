"""Runs a fetcher ahead of its consumer: in loader processes, or in one thread of this process.

Knows nothing of what is read: a fetcher is anything with `fetch(read)`, and `[read]` for loader processes.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any


def fetched_in_order(
    fetcher: Any, reads: Iterator[Any], *, num_workers: int, prefetch: int
) -> Generator[Any, None, None]:
    """The result of every read, in the order of `reads`, which is consumed ahead by what is prefetched."""
    if num_workers == 0:
        return _in_a_thread(fetcher, reads, prefetch)
    return _in_processes(fetcher, reads, num_workers, prefetch)


def _in_processes(fetcher: Any, reads: Iterator[Any], num_workers: int, prefetch: int) -> Generator[Any, None, None]:
    from torch.utils.data import DataLoader

    # Not fork: an S3 client and the threads of a training process do not survive it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_sharding.read.fetch"])
    loader: DataLoader[Any] = DataLoader(
        fetcher,
        sampler=reads,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=prefetch,
        collate_fn=_as_it_is,
        worker_init_fn=partial(_take_environment, dict(os.environ)),
        multiprocessing_context=context,
    )
    try:
        yield from loader
    except (ConnectionError, EOFError) as error:  # a batch whose memory only the dead process could hand over
        raise RuntimeError(
            f"a loader process ended before its batches were taken over ({error!r}); usually the system has killed it "
            "because memory ran out: lower data.num_workers or data.prefetch"
        ) from error


def _take_environment(environment: dict[str, str], worker: int) -> None:
    """Takes over the present environment, such as credentials: the fork server has that of its own start."""
    os.environ.update(environment)


def _as_it_is(fetched: Any) -> Any:
    return fetched


def _in_a_thread(fetcher: Any, reads: Iterator[Any], prefetch: int) -> Generator[Any, None, None]:
    end = object()

    def fetch_next() -> Any:
        read = next(reads, end)
        return end if read is end else fetcher.fetch(read)

    pool = ThreadPoolExecutor(1, "shard-reader")
    ahead = deque(pool.submit(fetch_next) for _ in range(max(1, prefetch) + 1))
    try:
        while (fetched := ahead.popleft().result()) is not end:
            ahead.append(pool.submit(fetch_next))
            yield fetched
    finally:
        pool.shutdown(cancel_futures=True)  # waits for the read under way, no other
