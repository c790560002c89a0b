"""Finds the transforms of raw scans before shards are written: once each, stored in the set, reused from then on.

Promise: registration is not reproducible bit by bit, so the first transform that is stored counts, whoever made it; for
a scan that cannot be registered the reason is stored instead.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from cluster.storage.stores import Store, store_for
from data_sharding import schema
from data_sharding.config import LimitsConfig, ShardingConfig
from data_sharding.registration import RegistrationConfig, ScanGroup
from data_sharding.write.dispatch import anywhere, each_result
from data_sharding.write.isolation import helper_for
from data_sharding.write.packing import PackRequest, PackSettings
from data_sharding.write.plan import SetPlan, pack_settings
from data_sharding.write.writer import scratch_folder


def find_transforms(store: Store, plan: SetPlan, config: ShardingConfig) -> None:
    """Every raw scan of the plan then has its transform in the set, or the reason why not."""
    if config.registration is None:  # then no raw scan came as far as the plan
        return
    groups = _groups([request for shard in plan.shards for request in shard.requests if request.is_raw])
    present = {Path(name).stem for name in store.list(schema.TRANSFORMS)}
    missing = [group for group in groups if not set(group.names) <= present]
    register = partial(
        register_missing,
        out=anywhere(config.out),
        registration=config.registration,
        settings=pack_settings(config),
        limits=config.limits,
    )
    num_done = len(groups) - len(missing)
    for _ in each_result(register, missing, config.cluster, label=lambda group: group.t1_name):
        num_done += 1
        print(f"registered {num_done}/{len(groups)} T1 images and their runs", flush=True)


def _groups(requests: list[PackRequest]) -> list[ScanGroup]:
    by_t1: dict[str, list[PackRequest]] = {}
    for request in requests:
        by_t1.setdefault(request.path if request.kind == "t1" else request.files["t1w"], []).append(request)
    groups = []
    for path, members in sorted(by_t1.items()):
        runs = {request.scan_id: request.path for request in members if request.kind != "t1"}
        own = [request.scan_id for request in members if request.kind == "t1"]
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
