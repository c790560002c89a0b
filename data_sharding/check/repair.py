"""Deletes what is damaged in a shard set, with its manifest, and lets the ordinary run of the sharder rebuild it."""

from __future__ import annotations

import json
from typing import Any

import yaml

from cluster.config import ClusterConfig
from configs.parse import ConfigError, parse
from data_sharding import schema
from data_sharding.config import ShardingConfig
from data_sharding.errors import ShardError
from data_sharding.read.shard_set import ShardSet, open_set
from data_sharding.write.build import complete
from data_sharding.write.prepare import prepare

INLINE = ClusterConfig("inline", 1, 1, False, 0, 600.0, 600.0, None, "unused")


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
