"""The tables of a set and its manifest, from the receipts of its shards: same receipts, same bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import io
import tempfile
from pathlib import Path

import pandas as pd

from brain_models.atlas import Atlas
from brain_models.space import BrainSpace
from data_sharding import schema
from data_sharding.config import ShardingConfig
from data_sharding.scans import SourceContents
from data_sharding.write.prepare import Prepared
from data_sharding.write.writer import Receipt

VERSIONED_PACKAGES = ("callosum-mri", "numpy", "scipy", "nibabel", "webdataset", "pyarrow")


def saved_tables(prepared: Prepared, receipts: list[Receipt]) -> dict[str, bytes]:
    """Every table of the set by its name, as bytes: index, subjects, stimuli, quality and region coverage."""
    contents = prepared.source
    tables = {schema.INDEX: _parquet(index_table(receipts, prepared))}
    for name, table in ((schema.SUBJECTS, contents.subjects), (schema.STIMULI, contents.stimuli)):
        if table is not None:
            split = pd.Series({unit: prepared.split_of_unit.get(unit) for unit in table.index}, dtype="str")
            tables[name] = _parquet(table.assign(split=split).reset_index())
    tables[schema.QUALITY] = _parquet(quality_table(receipts, prepared))
    tables[schema.REGION_COVERAGE] = _parquet(coverage_table(receipts, prepared))
    return tables


def saved_arrays(prepared: Prepared) -> dict[str, bytes]:
    """The space and the atlases as they are stored, by name."""
    saved = {schema.SPACE: _saved(prepared.space)}
    return saved | {f"{schema.ATLASES}{atlas.name}.npz": _saved(atlas) for atlas in prepared.atlases}


def index_table(receipts: list[Receipt], prepared: Prepared) -> pd.DataFrame:
    """One row per tar member, in the order of the tars."""
    scans = {scan.scan_id: scan for scan in prepared.source.scans}
    rows = []
    for receipt in receipts:
        for member in receipt.members:
            scan = scans[member["scan_id"]]
            rows.append(
                member
                | {"shard": receipt.name, "subject": scan.subject, "session": scan.session, "task": scan.task}
                | {"run": scan.run, "site": scan.site, "split": prepared.split_of_unit[scan.unit]}
                | {"repetition_time_s": scan.repetition_time_s, "stimulus": scan.stimulus}
            )
    return pd.DataFrame(rows, columns=list(schema.INDEX_COLUMNS)).astype(schema.INDEX_COLUMNS)


def quality_table(receipts: list[Receipt], prepared: Prepared) -> pd.DataFrame:
    """One row per scan, sorted by scan_id: its subject and its quality."""
    scans = {scan.scan_id: scan for scan in prepared.source.scans}
    rows = []
    for row in (row for receipt in receipts for row in receipt.quality):
        scan = scans[row["scan_id"]]
        identity = {"kind": scan.kind, "subject": scan.subject, "session": scan.session, "site": scan.site}
        split = {"split": prepared.split_of_unit[scan.unit], "repetition_time_s": scan.repetition_time_s or None}
        rows.append({"scan_id": scan.scan_id} | identity | split | row)
    columns = [*schema.QUALITY_COLUMNS]
    return pd.DataFrame(rows, columns=columns).astype(schema.QUALITY_COLUMNS).sort_values("scan_id", ignore_index=True)


def coverage_table(receipts: list[Receipt], prepared: Prepared) -> pd.DataFrame:
    """One row per scan, sorted by scan_id: the measured share of every region, in the order of the atlases."""
    regions = {f"{atlas.name}/{label}": "float64" for atlas in prepared.atlases for label in atlas.region_ids}
    rows = [row for receipt in receipts for row in receipt.regions]
    table = pd.DataFrame(rows, columns=["scan_id", *regions]).astype({"scan_id": "string"} | regions)
    return table.sort_values("scan_id", ignore_index=True)


def make_manifest(
    receipts: list[Receipt], prepared: Prepared, saved: dict[str, bytes], *, config: ShardingConfig
) -> schema.Manifest:
    """The manifest of the set whose other objects are `saved`, by name."""
    shards = [
        schema.ShardEntry(receipt.name, receipt.bytes, receipt.sha256, len(receipt.quality))
        for receipt in receipts
        if receipt.bytes
    ]
    space = prepared.space
    identity = {"name": space.name, "kind": space.kind, "template": space.template, "num_voxels": space.num_voxels}
    return schema.Manifest(
        schema=schema.SCHEMA_VERSION,
        fingerprint=schema.set_fingerprint(space.fingerprint, shards, prepared.split_of_unit),
        name=config.name,
        space=identity | {"fingerprint": space.fingerprint},
        atlases=[atlas.name for atlas in prepared.atlases],
        tables={name: hashlib.sha256(data).hexdigest() for name, data in sorted(saved.items())},
        shards=shards,
        counts=_counts(receipts, prepared),
        refused=all_refused(receipts, prepared.source),
        splits=dataclasses.asdict(config.splits),
        preprocessing=_preprocessing(receipts, prepared.source, config),
        notes=prepared.source.notes,
        versions={name: importlib.metadata.version(name) for name in VERSIONED_PACKAGES},
    )


def all_refused(receipts: list[Receipt], contents: SourceContents) -> list[schema.Refusal]:
    """Every scan that is not in the set: refused because of its header, or when it was packed."""
    return contents.refused + [schema.Refusal(**entry) for receipt in receipts for entry in receipt.refused]


def _counts(receipts: list[Receipt], prepared: Prepared) -> dict[str, int]:
    index = index_table(receipts, prepared)
    runs = index[index.kind == schema.MEAN]
    return {
        "subjects": int(index.subject.nunique()),
        "bold_runs": len(runs),
        "bold_frames": int(runs.num_frames.sum()),
        "t1": int((index.kind == schema.T1).sum()),
        "parcels": int((index.kind == schema.PARCELS).sum()),
        "responses": int((index.kind == schema.BETAS).sum()),
        "refused": len(all_refused(receipts, prepared.source)),
        "members": len(index),
        "bytes": sum(receipt.bytes for receipt in receipts),
    }


def _preprocessing(receipts: list[Receipt], contents: SourceContents, config: ShardingConfig) -> dict[str, object]:
    quality = [row for receipt in receipts for row in receipt.quality]
    kinds = [scan.kind for scan in contents.scans if scan.brain_mask is not None]
    return {
        "space": dataclasses.asdict(config.space),
        "storage": dataclasses.asdict(config.storage),
        "cleaning": dataclasses.asdict(config.preprocessing.cleaning),
        "max_censored_fraction": config.preprocessing.max_censored_fraction,
        "acceptance": dataclasses.asdict(config.acceptance),
        "alignment": alignment_of(contents, config),
        "registration": None if config.registration is None else dataclasses.asdict(config.registration),
        "allow_template_mix": config.source.allow_template_mix,
        "source": {"kind": config.source.kind, "kinds": config.source.kinds},
        "privacy": {
            "subject_ids": "keyed hashes" if config.privacy.key_file else "as given",
            "sidecar_fields": config.privacy.sidecar_fields,
            "participant_columns": config.privacy.participant_columns,
        },
        "scans_with_brain_mask": {kind: kinds.count(kind) for kind in schema.KIND_OF_SCAN},
        "scans_with_confounds": sum(scan.confounds is not None for scan in contents.scans),
        "frames_dropped": sum(row["num_dropped"] for row in quality),
        "frames_censored": sum(row["num_censored"] for row in quality),
        "seed": config.seed,
    }


def alignment_of(contents: SourceContents, config: ShardingConfig) -> schema.Alignment:
    """How scans were brought to the space: registered here, or all by fMRIPrep, or as given."""
    if config.registration is not None and any(scan.is_raw for scan in contents.scans):
        return config.registration.kind
    return "fmriprep" if all(scan.is_fmriprep for scan in contents.scans) else "given"


def _parquet(table: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False, row_group_size=schema.INDEX_GROUP_ROWS)
    return buffer.getvalue()


def _saved(saved: BrainSpace | Atlas) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "saved.npz"
        saved.save(local)
        return local.read_bytes()
