"""Re-reads a whole shard set and names the first bad byte range of each object that is not as written.

Repairing deletes what is damaged, with the manifest, and lets the ordinary run of the sharder rebuild it.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import yaml
from isal import isal_zlib

from cluster.config import ClusterConfig
from cluster.errors import StorageError
from cluster.storage.stores import RangeReader
from configs.parse import ConfigError, parse
from data_sharding import schema
from data_sharding.config import ShardingConfig
from data_sharding.errors import ShardError
from data_sharding.read.shard_set import ShardSet, open_set
from data_sharding.write.build import complete
from data_sharding.write.prepare import prepare

BLOCK_BYTES = 1 << 23  # what is in memory of a shard
INLINE = ClusterConfig("inline", 1, 1, False, 0, 600.0, 600.0, None, "unused")


@dataclass
class Problem:
    """Something that differs from the manifest; bytes first..last of the object, where they are known."""

    name: str
    first_byte: int | None
    last_byte: int | None
    reason: str

    def __str__(self) -> str:
        where = "" if self.first_byte is None else f" bytes {self.first_byte}-{self.last_byte}"
        return f"{self.name}{where}: {self.reason}"


def verify(location: str) -> list[Problem]:
    """Every problem of the set: tables first, then shards in order; empty when everything is as written."""
    shard_set = open_set(location)
    problems = list(_object_problems(shard_set))
    is_index_good = schema.INDEX not in {problem.name for problem in problems}
    if not problems:
        problems += _table_problems(shard_set)
    for entry in shard_set.manifest.shards:
        rows = shard_set.index[shard_set.index.shard == entry.name].sort_values("offset") if is_index_good else None
        problems += shard_problems(shard_set, entry, rows)
    return problems


def _object_problems(shard_set: ShardSet) -> Iterator[Problem]:
    """Space, atlases and tables against their hashes."""
    for name, sha256 in shard_set.manifest.tables.items():
        try:
            actual = hashlib.sha256(shard_set.store.read(name)).hexdigest()
        except StorageError as error:
            yield Problem(name, None, None, str(error))
            continue
        if actual != sha256:
            yield Problem(name, None, None, f"its SHA-256 is {actual}, the manifest says {sha256}")


def _table_problems(shard_set: ShardSet) -> Iterator[Problem]:
    manifest = shard_set.manifest
    units = shard_set.subjects if shard_set.stimuli is None else shard_set.stimuli
    splits = dict(zip(units.index, units.split, strict=True))
    fingerprint = schema.set_fingerprint(shard_set.space.fingerprint, manifest.shards, splits)
    if fingerprint != manifest.fingerprint:
        yield Problem(schema.MANIFEST, None, None, "the set's fingerprint does not follow from its shards and splits")
    if len(shard_set.index) != manifest.counts["members"]:
        num_rows = len(shard_set.index)
        yield Problem(schema.INDEX, None, None, f"{num_rows} rows, the manifest counts {manifest.counts['members']}")
    if strangers := sorted(set(shard_set.index.shard) - {shard.name for shard in manifest.shards}):
        yield Problem(schema.INDEX, None, None, f"names shards that the manifest does not: {strangers[:3]}")
    unit_of_row = shard_set.index["subject" if shard_set.stimuli is None else "stimulus"]
    wrong = unit_of_row[unit_of_row.map(splits) != shard_set.index.split]
    if len(wrong):
        name = schema.SUBJECTS if shard_set.stimuli is None else schema.STIMULI
        yield Problem(schema.INDEX, None, None, f"{wrong.iloc[0]} has another split than in {name}")


def shard_problems(shard_set: ShardSet, entry: schema.ShardEntry, rows: pd.DataFrame | None) -> list[Problem]:
    """The first problem of a shard: its size, its members against the index, its checksums, its hash.

    Without `rows` (where the index itself is damaged) only size and hash are compared.
    """
    try:
        size = shard_set.store.size(entry.name)
        if size < entry.bytes:
            return [Problem(entry.name, size, entry.bytes - 1, "missing: the shard is cut short")]
        if size > entry.bytes:
            return [Problem(entry.name, entry.bytes, size - 1, "more bytes than were written")]
        reader = shard_set.store.open_ranges(entry.name)
        try:
            return list(_content_problems(_Sequential(reader, entry.bytes), entry, rows))[:1]
        finally:
            reader.close()
    except StorageError as error:
        return [Problem(entry.name, None, None, str(error))]


class _Sequential:
    """A shard that is read from front to back in large blocks and hashed on the way."""

    def __init__(self, reader: RangeReader, num_bytes: int) -> None:
        self.reader = reader
        self.num_bytes = num_bytes
        self.position = 0
        self.digest = hashlib.sha256()
        self._block = memoryview(b"")

    def pieces(self, num_bytes: int) -> Iterator[memoryview]:
        """The next bytes, in pieces of at most a block."""
        while num_bytes:
            if not len(self._block):
                self._block = memoryview(bytearray(min(BLOCK_BYTES, self.num_bytes - self.position)))
                self.reader.read_into(self.position, self._block)
                self.digest.update(self._block)
            piece = self._block[:num_bytes]
            self._block = self._block[len(piece) :]
            self.position += len(piece)
            num_bytes -= len(piece)
            yield piece

    def read(self, num_bytes: int) -> bytes:
        return b"".join(self.pieces(num_bytes))

    def skip_to(self, position: int) -> None:
        for _ in self.pieces(position - self.position):
            pass


def _content_problems(content: _Sequential, entry: schema.ShardEntry, rows: pd.DataFrame | None) -> Iterator[Problem]:
    for row in () if rows is None else rows.itertuples():
        problem = _header_problem(content, entry, row)
        if problem is None:
            checksum = 0
            for piece in content.pieces(row.size):
                checksum = isal_zlib.crc32(piece, checksum)
            problem = None if checksum == row.crc32 else _damage(content.reader, entry.name, row)
        if problem is not None:
            yield problem
            return
        content.skip_to(content.position + -content.position % schema.TAR_BLOCK_BYTES)
    content.skip_to(entry.bytes)
    if content.digest.hexdigest() != entry.sha256:
        reason = "sha256 differs from the manifest's"
        reason += "" if rows is None else ", in bytes no checksum covers (tar headers, padding, end)"
        yield Problem(entry.name, 0, entry.bytes - 1, reason)


def _header_problem(content: _Sequential, entry: schema.ShardEntry, row: Any) -> Problem | None:
    first = content.position
    block = content.read(min(schema.TAR_BLOCK_BYTES, entry.bytes - first))
    try:
        member = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        actual = f"{member.name} of {member.size} bytes at {first + schema.TAR_BLOCK_BYTES}"
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        actual = f"no tar header ({error})"
    expected = f"{row.member} of {row.size} bytes at {row.offset}"
    if actual == expected:
        return None
    reason = f"the index expects member {expected}, the tar has {actual}"
    return Problem(entry.name, first, first + schema.TAR_BLOCK_BYTES - 1, reason)


def _damage(reader: RangeReader, name: str, row: Any) -> Problem:
    """The damaged bytes of a member whose checksum fails: a single frame where frames have checksums."""
    reason = f"{row.member} (scan {row.scan_id}) does not match its checksum"
    expected = np.frombuffer(bytes.fromhex(row.frame_crc32), dtype="<u4")
    for frame in range(len(expected)):
        num_bytes = (row.size - schema.NPY_HEADER_BYTES) // len(expected)
        first = row.offset + schema.NPY_HEADER_BYTES + frame * num_bytes
        values = bytearray(num_bytes)
        reader.read_into(first, memoryview(values))
        if isal_zlib.crc32(values) != expected[frame]:
            return Problem(name, first, first + num_bytes - 1, f"frame {frame} of {reason}")
    return Problem(name, row.offset, row.offset + row.size - 1, reason)


def repair(location: str, damaged: set[str], *, overrides: list[str]) -> None:
    """Rebuilds the damaged objects of a set; every other shard is kept. `overrides` give what the set does not record.

    ShardError, with nothing deleted, when the scans are not those of the set or an object cannot be made again; and
    after the rebuild, when the scans gave other bytes than before. If it is stopped, `python -m data_sharding` with the
    set's configuration finishes it.
    """
    shard_set = open_set(location)
    store, manifest = shard_set.store, shard_set.manifest
    config = config_of_set(shard_set, overrides)
    prepared = prepare(config)
    if prepared.plan.digest != json.loads(store.read(schema.PLAN))["digest"]:
        raise ShardError(
            f"{location}: {config.source.root} does not hold the scans this set was made of (names, sizes or headers "
            "differ); give the source as it was, or write a new set"
        )
    if lost := sorted(name for name in damaged if name.startswith(schema.TRANSFORMS)):
        raise ShardError(f"{location}/{lost[0]}: registration is not reproducible; restore this file from a copy")
    for shard in prepared.plan.shards:
        if shard.name in damaged:
            store.delete(shard.receipt_name)
    store.delete(schema.MANIFEST)
    rebuilt = complete(store, prepared, config)
    if rebuilt.fingerprint != manifest.fingerprint:
        raise ShardError(
            f"{location}: the scans now give other bytes, so this is another set (fingerprint "
            f"{rebuilt.fingerprint[:12]}, before {manifest.fingerprint[:12]}) and no run resumes on it; it was written "
            f"with {rebuilt.versions}, before with {manifest.versions}"
        )


def config_of_set(shard_set: ShardSet, overrides: list[str]) -> ShardingConfig:
    """The configuration a set was written with; ConfigError names what `overrides` must still give."""
    raw: dict[str, Any] = json.loads(shard_set.store.read(schema.PLAN))["config"]
    for override in overrides:
        key, is_given, text = override.partition("=")
        *groups, name = key.split(".")
        group = raw
        for key_part in groups:
            group = group.get(key_part, {})
        if not is_given or name not in group:
            raise ConfigError(f"{override}: no key=value of this set's configuration, such as source.root=/data/bids")
        group[name] = yaml.safe_load(text)
    return parse(raw | {"out": shard_set.location, "cluster": vars(INLINE)}, ShardingConfig)
