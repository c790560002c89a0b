"""The whole run of `python -m data_sharding`: find, plan, write shards as Ray tasks, and commit by the manifest.

A run that was stopped anywhere is finished by running it again; nothing that is complete is written twice.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from brain_models.atlas import Atlas, aal3, atlas_from_image, template_parcellation
from brain_models.space import BrainSpace, volume_space
from cluster.launch import ray_session
from cluster.storage import Store, store_for
from data_sharding import schema
from data_sharding.config import LimitsConfig, ShardingConfig
from data_sharding.errors import ShardError
from data_sharding.plan import SetPlan, ShardPlan, make_plan
from data_sharding.scans import Found
from data_sharding.sources import bids
from data_sharding.splits import assign_splits
from data_sharding.writer import Receipt, close_helpers, finished_receipt, write_shard

FIND = {"bids": bids.find}
VERSIONED_PACKAGES = ("callosum", "numpy", "scipy", "nibabel", "webdataset", "pyarrow")
REFUSALS_SHOWN = 20


@dataclass
class Prepared:
    """A run that knows everything but the voxels."""

    found: Found
    space: BrainSpace
    split_of_subject: dict[str, str]
    plan: SetPlan


def prepare(config: ShardingConfig) -> Prepared:
    """What will be written: reads headers and tables only."""
    atlas_file = Path(config.atlas) if config.atlas not in (None, "template", "aal3") else None
    space = volume_space(config.space, atlas_image=atlas_file)
    found = FIND[config.source.kind](config.source, template=config.space.template, spacing_mm=config.space.spacing_mm)
    split_of_subject = assign_splits(found.subjects, config.splits)
    return Prepared(found, space, split_of_subject, make_plan(found, space, config, split_of_subject))


def describe(config: ShardingConfig) -> str:
    """What `--plan` prints."""
    prepared = prepare(config)
    plan, found = prepared.plan, prepared.found
    kinds = [scan.kind for scan in found.scans]
    splits = list(prepared.split_of_subject.values())
    lines = [
        f"set {config.name} -> {config.out}",
        f"space {prepared.space.name}: {prepared.space.num_voxels} voxels",
        f"scans: {kinds.count('bold')} BOLD runs ({sum(scan.num_frames for scan in found.scans if scan.kind == 'bold')}"
        f" frames), {kinds.count('t1')} T1; refused from their headers: {len(found.refused)}",
        *found.notes,
        "subjects: " + ", ".join(f"{splits.count(split)} {split}" for split in ("train", "validation", "test")),
        f"shards: {len(plan.shards)}, {plan.num_bytes} bytes",
        *_refusal_lines(found.refused),
    ]
    return "\n".join(lines)


def build(config: ShardingConfig) -> schema.Manifest:
    """The manifest of the set, complete at config.out: written now, or found there from an earlier run."""
    store = store_for(config.out)
    prepared = prepare(config)
    _claim(store, prepared.plan, config)
    if store.exists(schema.MANIFEST):
        print(f"{config.out} is complete already; nothing to do")
        return schema.Manifest.from_json(store.read(schema.MANIFEST), config.out)
    _put_saved(store, schema.SPACE, prepared.space)
    atlases = _save_atlases(store, prepared.space, config)
    receipts = write_shards(store, prepared.plan, config)
    refused = prepared.found.refused + [schema.Refusal(**entry) for receipt in receipts for entry in receipt.refused]
    _check_refusals(refused, num_scans=len(prepared.found.scans) + len(prepared.found.refused), config=config)
    index = _index(receipts, prepared)
    subjects = prepared.found.subjects.assign(split=pd.Series(prepared.split_of_subject))
    store.put(schema.INDEX, _parquet(index))
    store.put(schema.SUBJECTS, _parquet(subjects.reset_index()))
    manifest = _manifest(receipts, refused, index, prepared, atlases=atlases, config=config)
    store.put_if_absent(schema.MANIFEST, manifest.to_json())
    print("\n".join([f"{config.out} is complete: {_counted(manifest.counts)}", *_refusal_lines(refused)]), flush=True)
    return manifest


def write_shards(store: Store, plan: SetPlan, config: ShardingConfig) -> list[Receipt]:
    """The receipts of all planned shards; those already written are kept."""
    receipts: dict[int, Receipt] = {}
    missing: list[ShardPlan] = []
    for shard in plan.shards:
        finished = finished_receipt(store, shard)
        if finished is None:
            missing.append(shard)
        else:
            receipts[shard.number] = finished
    if receipts:
        print(f"{len(receipts)} of {len(plan.shards)} shards are written already", flush=True)
    started = time.monotonic()
    num_scans = sum(len(shard.requests) for shard in missing)
    num_done = num_refused = 0
    for shard, receipt in _written(missing, config):
        receipts[shard.number] = receipt
        num_done += len(shard.requests)
        num_refused += len(receipt.refused)
        rate = num_done / (time.monotonic() - started)
        print(
            f"shards {len(receipts)}/{len(plan.shards)}  scans {num_done}/{num_scans}  refused {num_refused}  "
            f"{rate:.1f} scans/s  {(num_scans - num_done) / rate:.0f} s left",
            flush=True,
        )
    return [receipts[shard.number] for shard in plan.shards]


def _written(missing: list[ShardPlan], config: ShardingConfig) -> Iterator[tuple[ShardPlan, Receipt]]:
    if config.cluster.kind == "inline":
        try:
            for shard in missing:
                yield shard, write_shard(shard, config.out, config.limits)
        finally:
            close_helpers()
    elif missing:
        with ray_session(config.cluster):
            yield from _written_by_ray(missing, config)


def _written_by_ray(missing: list[ShardPlan], config: ShardingConfig) -> Iterator[tuple[ShardPlan, Receipt]]:
    """Tasks on Ray, at most `cluster.num_workers` in flight, so memory and scratch space stay bounded."""
    import ray

    out = config.out if "://" in config.out else str(Path(config.out).absolute())
    task = ray.remote(num_cpus=config.cluster.cpus_per_worker, max_retries=max(0, config.cluster.max_failures))(
        _write_shard_quietly
    )
    waiting = list(reversed(missing))
    running: dict[object, ShardPlan] = {}
    while waiting or running:
        while waiting and len(running) < config.cluster.num_workers:
            shard = waiting.pop()
            running[task.remote(shard, out, config.limits)] = shard
        (done,), _ = ray.wait(list(running), num_returns=1)
        receipt = ray.get(done)
        if isinstance(receipt, ShardError):
            raise receipt
        yield running.pop(done), receipt


def _write_shard_quietly(plan: ShardPlan, out: str, limits: LimitsConfig) -> Receipt | ShardError:
    """The receipt, or the error as a value: Ray would wrap a raised one in its own class and traceback."""
    try:
        return write_shard(plan, out, limits)
    except ShardError as error:
        return error


def _claim(store: Store, plan: SetPlan, config: ShardingConfig) -> None:
    """Marks the folder as this plan's; ShardError when it is another's."""
    mine = json.dumps({"digest": plan.digest, "name": config.name}, sort_keys=True).encode()
    if not store.exists(schema.PLAN) and store.list():
        raise ShardError(
            f"{config.out} is not empty and holds no set of this kind (first: {store.list()[0]}); give an empty out="
        )
    if store.put_if_absent(schema.PLAN, mine):
        return
    theirs = json.loads(store.read(schema.PLAN))
    if theirs["digest"] != plan.digest:
        raise ShardError(
            f"{config.out} already holds another set ({theirs['name']}: other scans, space, splits or settings); "
            "give another out=, or delete that folder first"
        )


def _save_atlases(store: Store, space: BrainSpace, config: ShardingConfig) -> list[str]:
    if config.atlas is None:
        return []
    if config.atlas == "template":
        atlas = template_parcellation(space)
    elif config.atlas == "aal3":
        atlas = aal3(space)
    else:
        atlas = atlas_from_image(Path(config.atlas), space)
    _put_saved(store, f"{schema.ATLASES}{atlas.name}.npz", atlas)
    return [atlas.name]


def _put_saved(store: Store, name: str, saved: BrainSpace | Atlas) -> None:
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "saved.npz"
        saved.save(local)
        store.put(name, local)


def _check_refusals(refused: list[schema.Refusal], *, num_scans: int, config: ShardingConfig) -> None:
    limit = config.acceptance.max_refused_fraction
    if len(refused) > limit * num_scans or len(refused) == num_scans:
        lines = "\n".join(_refusal_lines(refused))
        raise ShardError(
            f"{config.out}: {len(refused)} of {num_scans} scans were refused, acceptance.max_refused_fraction is "
            f"{limit}; mend them, or raise the limit and run again (finished shards are kept).\n{lines}"
        )


def _refusal_lines(refused: list[schema.Refusal]) -> list[str]:
    lines = [f"  refused {refusal.scan_id}: {refusal.reason}" for refusal in refused[:REFUSALS_SHOWN]]
    if len(refused) > REFUSALS_SHOWN:
        lines.append(f"  and {len(refused) - REFUSALS_SHOWN} more refused scans, all in {schema.MANIFEST}")
    return lines


def _index(receipts: list[Receipt], prepared: Prepared) -> pd.DataFrame:
    """One row a tar member, in the order of the tars."""
    scans = {scan.scan_id: scan for scan in prepared.found.scans}
    rows = []
    for receipt in receipts:
        for member in receipt.members:
            scan = scans[member["scan_id"]]
            rows.append(
                member
                | {"shard": receipt.name, "subject": scan.subject, "session": scan.session, "task": scan.task}
                | {"run": scan.run, "site": scan.site, "split": prepared.split_of_subject[scan.subject]}
                | {"repetition_time_s": scan.repetition_time_s}
            )
    return pd.DataFrame(rows, columns=list(schema.INDEX_COLUMNS)).astype(schema.INDEX_COLUMNS)


def _parquet(table: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    return buffer.getvalue()


def _manifest(
    receipts: list[Receipt],
    refused: list[schema.Refusal],
    index: pd.DataFrame,
    prepared: Prepared,
    *,
    atlases: list[str],
    config: ShardingConfig,
) -> schema.Manifest:
    space = prepared.space
    shards = [
        schema.ShardEntry(receipt.name, receipt.bytes, receipt.sha256, receipt.num_samples)
        for receipt in receipts
        if receipt.bytes
    ]
    runs, images = index[index.kind == schema.MEAN], index[index.kind == schema.T1]
    return schema.Manifest(
        schema=schema.SCHEMA_VERSION,
        fingerprint=schema.set_fingerprint(space.fingerprint, shards, prepared.split_of_subject),
        name=config.name,
        space={
            "name": space.name,
            "kind": space.kind,
            "template": space.template,
            "num_voxels": space.num_voxels,
            "fingerprint": space.fingerprint,
        },
        atlases=atlases,
        shards=shards,
        counts={
            "subjects": int(index.subject.nunique()),
            "bold_runs": len(runs),
            "bold_frames": int(runs.num_frames.sum()),
            "t1": len(images),
            "refused": len(refused),
            "members": len(index),
            "bytes": sum(shard.bytes for shard in shards),
        },
        refused=refused,
        splits=dataclasses.asdict(config.splits),
        preprocessing={
            "space": dataclasses.asdict(config.space),
            "storage": dataclasses.asdict(config.storage),
            "acceptance": dataclasses.asdict(config.acceptance),
            "alignment": "given",  # the source's derivatives; nothing is registered here
            "allow_template_mix": config.source.allow_template_mix,
            "scans_with_brain_mask": _num_with_brain_mask(prepared.found),
            "seed": config.seed,
        },
        notes=prepared.found.notes,
        versions={name: importlib.metadata.version(name) for name in VERSIONED_PACKAGES},
    )


def _num_with_brain_mask(found: Found) -> dict[str, int]:
    kinds = [scan.kind for scan in found.scans if scan.brain_mask is not None]
    return {kind: kinds.count(kind) for kind in schema.KIND_OF_SCAN}


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
