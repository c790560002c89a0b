"""The whole run of `python -m data_sharding`: find, plan, write shards as Ray tasks, and commit by the manifest.

A run that was stopped anywhere is finished by running it again; nothing that is complete is written twice.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from cluster.storage.files import PARTIAL_PREFIX
from cluster.storage.stores import Store, store_for
from configs.parse import MISSING
from data_sharding import schema
from data_sharding.config import ShardingConfig
from data_sharding.errors import ShardError
from data_sharding.write.alignment import find_transforms
from data_sharding.write.dispatch import write_shards
from data_sharding.write.isolation import close_helpers
from data_sharding.write.plan import SetPlan
from data_sharding.write.prepare import Prepared, prepare, refusal_lines
from data_sharding.write.tables import all_refused, make_manifest, saved_arrays, saved_tables


def build(config: ShardingConfig) -> schema.Manifest:
    """The manifest of the set, complete at config.out: written now, or read there from an earlier run."""
    store = store_for(config.out)
    prepared = prepare(config)
    _claim(store, prepared.plan, config)
    if not store.exists(schema.MANIFEST):
        return complete(store, prepared, config)
    _remove_partial_files(config.out)
    print(f"{config.out} is complete already; nothing to do")
    return schema.Manifest.from_json(store.read(schema.MANIFEST), config.out)


def complete(store: Store, prepared: Prepared, config: ShardingConfig) -> schema.Manifest:
    """The manifest of a claimed set, which is written last; shards that are there as planned are kept."""
    saved = saved_arrays(prepared)
    for name, data in saved.items():
        store.put(name, data)
    try:
        find_transforms(store, prepared.plan, config)
        receipts = write_shards(store, prepared.plan, config)
    finally:
        close_helpers()
    refused = all_refused(receipts, prepared.source)
    _check_refusals(refused, num_scans=len(prepared.source.scans) + len(prepared.source.refused), config=config)
    tables = saved_tables(prepared, receipts)
    transforms = {name: store.read(name) for name in store.list(schema.TRANSFORMS)}
    for name, data in tables.items():
        store.put(name, data)
    manifest = make_manifest(receipts, prepared, saved | tables | transforms, config=config)
    store.put_if_absent(schema.MANIFEST, manifest.to_json())
    _remove_partial_files(config.out)
    print("\n".join([f"{config.out} is complete: {_in_words(manifest.counts)}", *refusal_lines(refused)]), flush=True)
    return manifest


def config_to_record(config: ShardingConfig) -> dict[str, Any]:
    """The part of a configuration that a set records: what decides its bytes. Locations and ids must be given again."""
    raw = dataclasses.asdict(config)
    raw["source"]["root"] = MISSING
    if config.privacy.key_file is not None:
        raw["privacy"]["key_file"] = MISSING
        raw["source"]["subjects"] = MISSING if config.source.subjects else None  # ids
    return {name: value for name, value in raw.items() if name not in ("out", "cluster")}


def _claim(store: Store, plan: SetPlan, config: ShardingConfig) -> None:
    """Records the plan in the folder; ShardError when the folder belongs to another plan."""
    record = {"digest": plan.digest, "name": config.name, "config": config_to_record(config)}
    names = [] if store.exists(schema.PLAN) else store.list()
    if names and not store.exists(schema.PLAN):  # the same command started twice may just have claimed it
        raise ShardError(
            f"{config.out} is not empty and holds no set of this kind (first: {names[0]}); give an empty out="
        )
    if store.put_if_absent(schema.PLAN, (json.dumps(record, sort_keys=True, indent=1) + "\n").encode()):
        return
    theirs = json.loads(store.read(schema.PLAN))
    if theirs["digest"] != plan.digest:
        raise ShardError(
            f"{config.out} already holds another set ({theirs['name']}: other scans, space, splits or settings); "
            "give another out=, or delete that folder first"
        )


def _remove_partial_files(out: str) -> None:
    """Deletes what killed writers left in a folder beside a complete set; S3 shows no such objects."""
    for left in [] if "://" in out else Path(out).rglob(f"{PARTIAL_PREFIX}*"):
        left.unlink(missing_ok=True)


def _check_refusals(refused: list[schema.Refusal], *, num_scans: int, config: ShardingConfig) -> None:
    limit = config.acceptance.max_refused_fraction
    if len(refused) > limit * num_scans or len(refused) == num_scans:
        lines = "\n".join(refusal_lines(refused))
        raise ShardError(
            f"{config.out}: {len(refused)} of {num_scans} scans were refused, acceptance.max_refused_fraction is "
            f"{limit}; correct them, or raise the limit and run again (finished shards are kept).\n{lines}"
        )


def _in_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if count)
