"""Writes what is damaged in a shard set again, from the scans, to the very bytes it had; nothing else is touched."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import yaml

from cluster.config import ClusterConfig
from cluster.storage.stores import Store
from configs.parse import ConfigError, parse
from data_sharding import schema
from data_sharding.config import ShardingConfig
from data_sharding.errors import ShardError
from data_sharding.read.shard_set import ShardSet, open_set
from data_sharding.write.plan import ShardPlan
from data_sharding.write.prepare import Prepared, prepare
from data_sharding.write.tables import saved_arrays, saved_tables
from data_sharding.write.writer import SHARD_FILE, Receipt, close_helpers, make_shard, scratch_folder

if TYPE_CHECKING:
    from data_sharding.check.verify import Problem

INLINE = ClusterConfig("inline", 1, 1, False, 0, 600.0, 600.0, None, "unused")


def repair(location: str, problems: list[Problem], *, overrides: list[str]) -> Iterator[str]:
    """What was done, a line an object, as it is done.

    `overrides` are key=value of what the set does not remember. ShardError when the scans are not those of the set, or
    no longer give its bytes: then nothing is replaced.
    """
    shard_set = open_set(location)
    config = remembered_config(shard_set, overrides)
    prepared = prepare(config)
    recorded = json.loads(shard_set.store.read(schema.PLAN))["digest"]
    if prepared.plan.digest != recorded:
        raise ShardError(
            f"{location}: {config.source.root} does not hold the scans this set was made of (names, sizes or headers "
            "differ); give the source as it was, or write a new set"
        )
    bad = {problem.name for problem in problems}
    yield from _put_again(shard_set, saved_arrays(prepared), bad)
    plans = {shard.name: shard for shard in prepared.plan.shards}
    try:
        for entry in shard_set.manifest.shards:
            if entry.name in bad:
                yield _shard_again(shard_set.store, plans[entry.name], entry, config)
    finally:
        close_helpers()
    if bad & {schema.INDEX, schema.SUBJECTS, schema.STIMULI, schema.QUALITY, schema.REGION_COVERAGE}:
        yield from _put_again(shard_set, saved_tables(prepared, _receipts(shard_set.store, prepared)), bad)


def remembered_config(shard_set: ShardSet, overrides: list[str]) -> ShardingConfig:
    """The configuration a set was written with; ConfigError names what `overrides` must still give."""
    raw: dict[str, Any] = json.loads(shard_set.store.read(schema.PLAN))["config"]
    for override in overrides:
        key, is_given, text = override.partition("=")
        *groups, name = key.split(".")
        group = raw
        for part in groups:
            group = group.get(part, {})
        if not is_given or name not in group:
            raise ConfigError(f"{override}: no key=value of this set's configuration, such as source.root=/data/bids")
        group[name] = yaml.safe_load(text)
    return parse(raw | {"out": shard_set.location, "cluster": vars(INLINE)}, ShardingConfig)


def _put_again(shard_set: ShardSet, saved: dict[str, bytes], bad: set[str]) -> Iterator[str]:
    for name in sorted(bad & saved.keys()):
        found, expected = hashlib.sha256(saved[name]).hexdigest(), shard_set.manifest.tables[name]
        if found != expected:
            raise ShardError(f"{shard_set.location}/{name} cannot be made again as it was; restore it from a copy")
        shard_set.store.put(name, saved[name])
        yield f"repaired {shard_set.location}/{name}"


def _shard_again(store: Store, plan: ShardPlan, entry: schema.ShardEntry, config: ShardingConfig) -> str:
    with scratch_folder() as scratch:
        receipt = make_shard(plan, store, config.limits, scratch)
        if receipt.sha256 != entry.sha256:
            raise ShardError(
                f"{store.join(plan.name)}: the scans now give other bytes (SHA-256 {receipt.sha256} instead of "
                f"{entry.sha256}), so it was not replaced; compare package versions with the manifest's"
            )
        store.put(plan.name, scratch / SHARD_FILE)
        store.put(plan.receipt_name, receipt.to_json())
    return f"repaired {store.join(plan.name)}: {entry.bytes} bytes, {len(plan.requests)} scans"


def _receipts(store: Store, prepared: Prepared) -> list[Receipt]:
    return [Receipt(**json.loads(store.read(plan.receipt_name))) for plan in prepared.plan.shards]
