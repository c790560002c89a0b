"""The whole run of `python -m data_sharding`: find, plan, write shards as Ray tasks, and commit by the manifest.

A run that was stopped anywhere is finished by running it again; nothing that is complete is written twice. Registration
is not reproducible bit by bit, so the first transform of a raw scan that is stored counts, whoever made it; for a scan
that cannot be registered the reason is stored instead.
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

from cluster.storage.files import PARTIAL_PREFIX
from cluster.storage.stores import Store, store_for
from configs.parse import MISSING
from configs.words import counted
from data_sharding import schema
from data_sharding.config import LimitsConfig, ShardingConfig
from data_sharding.errors import ShardError
from data_sharding.hints import contents
from data_sharding.registration.config import RegistrationConfig
from data_sharding.registration.register import ScanGroup
from data_sharding.scans import Scan
from data_sharding.write.isolation import close_helpers, helper_for
from data_sharding.write.packing import PackSettings
from data_sharding.write.plan import SetPlan
from data_sharding.write.prepare import Prepared, prepare, refusal_lines
from data_sharding.write.tables import all_refused, make_manifest, saved_arrays, saved_tables
from data_sharding.write.writer import anywhere, each_result, scratch_folder, write_shards


def build(config: ShardingConfig) -> schema.Manifest:
    """The manifest of the set, complete at config.out: written now, or read there from an earlier run."""
    store = store_for(config.out)
    print(f"finding the scans of {config.source.root} ...", flush=True)
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
    print("\n".join([f"{config.out} is complete:", contents(manifest), *refusal_lines(refused)]), flush=True)
    return manifest


def find_transforms(store: Store, plan: SetPlan, config: ShardingConfig) -> None:
    """Every raw scan of the plan then has its transform in the set, or the reason why not."""
    if config.registration is None:  # then no raw scan came as far as the plan
        return
    groups = _groups([scan for shard in plan.shards for scan in shard.scans if scan.is_raw])
    present = {Path(name).stem for name in store.list(schema.TRANSFORMS)}
    missing = [group for group in groups if not set(group.names) <= present]
    register = partial(
        register_missing,
        out=anywhere(config.out),
        registration=config.registration,
        settings=plan.shards[0].settings,
        limits=config.limits,
    )
    num_done = len(groups) - len(missing)
    if missing:
        print(f"registering {counted(len(missing), 'T1 image')}, each with its runs ...", flush=True)
    for _ in each_result(register, missing, config.cluster, label=lambda group: group.t1_name):
        num_done += 1
        print(f"registered {num_done}/{len(groups)} T1 images and their runs", flush=True)


def _groups(scans: list[Scan]) -> list[ScanGroup]:
    by_t1: dict[str, list[Scan]] = {}
    for scan in scans:
        by_t1.setdefault(scan.path if scan.kind == "t1" else scan.files["t1w"], []).append(scan)
    groups = []
    for path, members in sorted(by_t1.items()):
        runs = {scan.scan_id: scan.path for scan in members if scan.kind != "t1"}
        own = [scan.scan_id for scan in members if scan.kind == "t1"]
        groups.append(ScanGroup(path, own[0] if own else f"{min(runs)}_t1w", runs))
    return groups


def register_missing(
    group: ScanGroup, out: str, registration: RegistrationConfig, settings: PackSettings, limits: LimitsConfig
) -> None:
    """Registers those scans of a group that have no transform in the set, and stores the transforms and reasons."""
    store = store_for(out)
    with scratch_folder() as scratch:
        for name in group.names:
            if store.exists(schema.transform_name(name)):
                store.get_file(schema.transform_name(name), scratch / f"{name}.npz")
        outcome = helper_for(store, settings, limits).register(group, registration, scratch)
        for name in group.names:
            transform = scratch / f"{name}.npz"
            if transform.exists():
                store.put_if_absent(schema.transform_name(name), transform.read_bytes())
            elif not store.exists(schema.transform_name(name)):
                reason = outcome["reason"] if "reason" in outcome else outcome["reasons"][name]
                store.put_if_absent(schema.no_transform_name(name), json.dumps({"reason": reason}).encode())


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
