"""The position of a source, and a record of the samples it has really taken.

The record is a digest made from the batches that were handed over, so it says what was read and not what was planned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from data_sharding.hashing import hash_name
from data_sharding.read.batch import AnyBatch

NOTHING_TAKEN = f"{0:016x}"


@dataclass
class DataState:
    """Where a source resumes."""

    fingerprint: str
    seed: int
    samples_consumed: int
    samples_digest: str  # of what was read for them, 64 bits in hexadecimal; the ranks' digests add up to the run's
    quarantine: list[str]  # damaged samples met so far, as <scan_id>:<slot>

    def to_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> DataState:
        return cls(**raw)


def digest_of(batches: Iterable[AnyBatch], *, position: int) -> str:
    """The sum of a hash of every sample that counts: its scan, first frame, seed, and the step's `position`."""
    rows = [
        (scan_id, first_frame, seed)
        for batch in batches
        for scan_id, first_frame, seed, weight in zip(
            batch.scan_ids, batch.first_frame, batch.sample_seed.tolist(), batch.weight.tolist(), strict=True
        )
        if weight > 0
    ]
    return sum_of_digests(f"{hash_name(position, *row):016x}" for row in rows)


def sum_of_digests(digests: Iterable[str]) -> str:
    """The digest of all samples of these digests together."""
    return f"{sum(int(digest, 16) for digest in digests) % 2**64:016x}"
