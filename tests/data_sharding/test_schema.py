"""A manifest is believed only as far as its names stay inside the set and its hashes are hashes."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from data_sharding.errors import ShardError
from data_sharding.schema import SCHEMA_VERSION, Manifest, ShardEntry

HASH = "a1" * 32
WHOLE = Manifest(
    schema=SCHEMA_VERSION,
    fingerprint=HASH,
    name="toy",
    space={},
    atlases=[],
    tables={"index.parquet": HASH},
    shards=[ShardEntry("shards/000000.tar", 10, HASH, 1)],
    counts={},
    refused=[],
    splits={},
    preprocessing={},
    notes=[],
    versions={},
)


def test_a_manifest_is_read_as_it_was_written() -> None:
    assert Manifest.from_json(WHOLE.to_json(), "/set") == WHOLE


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tables": {"index.parquet": "./../evil"}}, r"'\./\.\./evil' of index\.parquet is no SHA-256; write the set"),
        ({"tables": {"/etc/passwd": HASH}}, r"is damaged \('/etc/passwd' is not a name inside /set"),
        ({"shards": [{"name": "a.tar", "bytes": 1, "sha256": "../b", "num_samples": 1}]}, r"'\.\./b' of a\.tar is no"),
        ({"shards": [{"name": "../a.tar", "bytes": 1, "sha256": HASH, "num_samples": 1}]}, r"'\.\./a\.tar' is not a"),
        ({"shards": [{"name": "a.tar"}]}, r"is damaged \(.*missing 3 required"),
        ({"shards": None}, "is damaged"),
        ({"extra": 1}, r"is damaged \(.*unexpected keyword argument 'extra'"),
    ],
)
def test_a_manifest_with_a_wrong_name_hash_or_key_is_refused(change: dict[str, Any], said: str) -> None:
    raw = dataclasses.asdict(WHOLE) | change
    with pytest.raises(ShardError, match=f"/set/manifest.json.*{said}"):
        Manifest.from_json(json.dumps(raw).encode(), "/set")


def test_a_manifest_without_a_key_is_refused_by_its_name() -> None:
    raw = dataclasses.asdict(WHOLE)
    del raw["counts"]
    with pytest.raises(ShardError, match=r"/set/manifest\.json is damaged \(.*'counts'"):
        Manifest.from_json(json.dumps(raw).encode(), "/set")
