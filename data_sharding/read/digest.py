"""A record of the samples a run has really taken: 64 bits that are the same however they were shared out and resumed.

Made from the batches that were handed over, so that it says what was read and not what was planned.
"""

from __future__ import annotations

from collections.abc import Iterable

from data_sharding.hashing import hash_name
from data_sharding.read.batch import Batch

NOTHING_TAKEN = f"{0:016x}"


def digest_of(batches: Iterable[Batch], *, position: int) -> str:
    """The sum of a hash of every sample that counts: its scan, first frame, seed, and the step's `position`."""
    rows = [
        (scan_id, first_frame, seed)
        for batch in batches
        for scan_id, first_frame, seed, weight in zip(
            batch.scan_ids, batch.first_frame, batch.sample_seed.tolist(), batch.weight.tolist(), strict=True
        )
        if weight > 0
    ]
    return added(f"{hash_name(position, *row):016x}" for row in rows)


def added(digests: Iterable[str]) -> str:
    """The digest of all samples of these digests together."""
    return f"{sum(int(digest, 16) for digest in digests) % 2**64:016x}"
