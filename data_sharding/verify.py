"""Re-reads a whole shard set and names the first bad byte range of each shard that is not as written.

Example:
  python -m data_sharding.verify out/shards

Exits 1 when anything is wrong, 0 when every hash, count, checksum and index row holds.
"""

from __future__ import annotations

import hashlib
import io
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from cluster.errors import StorageError
from data_sharding import schema
from data_sharding.checksums import crc32, crc32_of_frames
from data_sharding.errors import ShardError
from data_sharding.shard_set import ShardSet, open_set


@dataclass
class Problem:
    """Something that is not as the manifest says; bytes first..last of the object, where they are known."""

    name: str
    first_byte: int | None
    last_byte: int | None
    reason: str

    def __str__(self) -> str:
        where = "" if self.first_byte is None else f" bytes {self.first_byte}-{self.last_byte}"
        return f"{self.name}{where}: {self.reason}"


def verify(location: str) -> list[Problem]:
    """Every problem of the set, in the order of the shards; empty when all is as written."""
    shard_set = open_set(location)
    problems = list(_table_problems(shard_set))
    for entry in shard_set.manifest.shards:
        rows = shard_set.index[shard_set.index.shard == entry.name].sort_values("offset")
        problems += shard_problems(shard_set, entry, rows)
    return problems


def _table_problems(shard_set: ShardSet) -> Iterator[Problem]:
    manifest = shard_set.manifest
    splits = dict(zip(shard_set.subjects.index, shard_set.subjects.split, strict=True))
    fingerprint = schema.set_fingerprint(shard_set.space.fingerprint, manifest.shards, splits)
    if fingerprint != manifest.fingerprint:
        yield Problem(schema.MANIFEST, None, None, "the set's fingerprint does not follow from its shards and splits")
    if len(shard_set.index) != manifest.counts["members"]:
        found = len(shard_set.index)
        yield Problem(schema.INDEX, None, None, f"{found} rows, the manifest counts {manifest.counts['members']}")
    if strangers := sorted(set(shard_set.index.shard) - {shard.name for shard in manifest.shards}):
        yield Problem(schema.INDEX, None, None, f"names shards that the manifest does not: {strangers[:3]}")
    wrong = [
        subject
        for subject, split in zip(shard_set.index.subject, shard_set.index.split, strict=True)
        if splits.get(subject) != split
    ]
    if wrong:
        yield Problem(schema.INDEX, None, None, f"subject {wrong[0]} has another split than in {schema.SUBJECTS}")


def shard_problems(shard_set: ShardSet, entry: schema.ShardEntry, rows: pd.DataFrame) -> list[Problem]:
    """What is wrong with one shard: its size, its members against the index, its checksums, its hash."""
    try:
        data = shard_set.store.read(entry.name)
    except StorageError as error:
        return [Problem(entry.name, None, None, str(error))]
    if len(data) < entry.bytes:
        return [Problem(entry.name, len(data), entry.bytes - 1, "missing: the shard is cut short")]
    if len(data) > entry.bytes:
        return [Problem(entry.name, entry.bytes, len(data) - 1, "more bytes than were written")]
    if hashlib.sha256(data).hexdigest() == entry.sha256:
        return list(_member_problems(entry.name, data, rows))
    found = [*_member_problems(entry.name, data, rows)]
    return found or [
        Problem(entry.name, 0, entry.bytes - 1, "sha256 differs from the manifest's, in bytes no checksum covers")
    ]


def _member_problems(name: str, data: bytes, rows: pd.DataFrame) -> Iterator[Problem]:
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            in_tar = [(member.name, member.offset_data, member.size) for member in tar]
    except tarfile.TarError as error:
        yield Problem(name, None, None, f"no readable tar: {error}")
        return
    in_index = list(zip(rows.member, rows.offset, rows["size"], strict=True))
    for number in range(max(len(in_tar), len(in_index))):
        ours = in_index[number] if number < len(in_index) else None
        theirs = in_tar[number] if number < len(in_tar) else None
        if ours != theirs:
            first = (ours or theirs or ("", 0, 0))[1] - schema.TAR_BLOCK_BYTES
            reason = f"the index expects member {ours}, the tar has {theirs}"
            yield Problem(name, int(first), int(first) + schema.TAR_BLOCK_BYTES - 1, reason)
            return
    yield from _checksum_problems(name, data, rows)


def _checksum_problems(name: str, data: bytes, rows: pd.DataFrame) -> Iterator[Problem]:
    """The first member whose bytes are not as written, down to the frame where frames have checksums."""
    checksums = {row.key: row for row in rows[rows.kind == schema.CRC].itertuples()}
    for row in rows.itertuples():
        if crc32(_bytes_of(data, row)) == row.crc32:
            continue
        first, last = row.offset, row.offset + row.size - 1
        reason = f"{row.member} (scan {row.scan_id}) does not match its checksum"
        checksum = checksums.get(row.key)
        if (
            row.kind in (schema.BOLD, schema.T1)
            and checksum is not None
            and crc32(_bytes_of(data, checksum)) == checksum.crc32
        ):
            stored = np.frombuffer(_bytes_of(data, row)[schema.NPY_HEADER_BYTES :], dtype=np.uint8)
            frames = stored.reshape(row.num_frames, -1)
            expected = np.load(io.BytesIO(_bytes_of(data, checksum)), allow_pickle=False)
            bad = np.flatnonzero(crc32_of_frames(frames) != expected)
            if len(bad):
                first = row.offset + schema.NPY_HEADER_BYTES + int(bad[0]) * frames[0].nbytes
                last = first + frames[0].nbytes - 1
                reason = f"frame {bad[0]} of {reason}"
        yield Problem(name, first, last, reason)
        return


def _bytes_of(data: bytes, row: Any) -> bytes:
    return data[row.offset : row.offset + row.size]


def main() -> int:
    """The exit code of the command line."""
    arguments = sys.argv[1:]
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        print((__doc__ or "").strip())
        return 0 if arguments in (["-h"], ["--help"]) else 2
    try:
        problems = verify(arguments[0])
    except (ShardError, StorageError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    for problem in problems:
        print(f"BAD {arguments[0]}/{problem}")
    if problems:
        print("restore these files from a copy, or delete them and run the same 'python -m data_sharding' again")
        return 1
    manifest = open_set(arguments[0]).manifest
    print(f"{arguments[0]} is as written: {len(manifest.shards)} shards, {manifest.counts['bytes']} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
