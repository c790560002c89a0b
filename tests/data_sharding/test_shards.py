"""A shard set is the same bytes however it was written, and anything that is not as written is found."""

import contextlib
import gzip
import hashlib
import io
import json
import re
import tarfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import webdataset

from brain_models.preprocess import dequantise, pack_bold, pack_t1
from brain_models.recipe import UNITS_PER_SCALE
from cluster.storage.stores import LocalStore
from data_sharding import schema
from data_sharding.check.verify import verify
from data_sharding.config import LimitsConfig, ShardingConfig, validate_config
from data_sharding.errors import ShardError
from data_sharding.read.shard_set import ShardSet, open_set
from data_sharding.scans import Scan
from data_sharding.verify import VerifyConfig
from data_sharding.verify import run as run_verify
from data_sharding.write.build import build
from data_sharding.write.isolation import SETTINGS, Helper
from data_sharding.write.plan import pack_settings
from data_sharding.write.prepare import describe, prepare
from tests.helpers_scans import sharding_config, write_bold, write_study

FAULT_SECTION = "Writing a shard set"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def written(study: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardingConfig:
    config = sharding_config(study, tmp_path_factory.mktemp("written") / "set")
    build(config)
    return config


@pytest.fixture
def copied(written: ShardingConfig, tmp_path: Path) -> Path:
    return copy_set(Path(written.out), tmp_path / "copy")


def copy_set(source: Path, target: Path) -> Path:
    for name, data in contents(source).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(data)
    return target


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def npy(shard_set: ShardSet, scan_id: str, kind: str) -> list[np.ndarray]:
    rows = shard_set.index[(shard_set.index.scan_id == scan_id) & (shard_set.index.kind == kind)]
    assert len(rows)
    return [
        np.load(io.BytesIO(shard_set.store.read(row.shard, row.offset, row.size)), allow_pickle=False)
        for row in rows.sort_values("first_frame").itertuples()
    ]


def test_two_ray_workers_write_the_same_bytes_as_one_process(
    written: ShardingConfig, study: Path, tmp_path: Path
) -> None:
    config = sharding_config(study, tmp_path / "set", cluster="local", num_workers=2)
    build(config)
    assert contents(tmp_path / "set") == contents(Path(written.out))


@pytest.mark.faults
def test_eight_ray_workers_write_the_same_bytes_as_one_process(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", num_subjects=14)
    sets = {}
    for cluster, num_workers in (("inline", 1), ("local", 8)):
        config = sharding_config(study, tmp_path / cluster, cluster=cluster, num_workers=num_workers)
        manifest = build(replace(config, storage=replace(config.storage, target_bytes=70_000)))
        assert len(manifest.shards) > 8, "each of the eight has one"
        sets[cluster] = contents(tmp_path / cluster)
    assert sets["local"] == sets["inline"]


def test_a_rerun_writes_only_what_is_missing(
    copied: Path, written: ShardingConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = contents(copied)
    shards = sorted(name for name in whole if name.endswith(".tar"))
    assert len(shards) >= 3
    for name in (shards[1], "receipts/000000.json", "manifest.json", "index.parquet"):
        (copied / name).unlink()
    kept = (copied / shards[2]).stat().st_mtime_ns
    build(replace(written, out=str(copied)))
    printed = capsys.readouterr().out
    assert f"{len(shards) - 2} of {len(shards)} shards are written already" in printed
    progress = re.findall(r"shards (\d+)/(\d+)  scans (\d+)/(\d+)  0 refused  (\S+) scans/s  (\S+) left", printed)
    assert [row[:2] for row in progress] == [(str(len(shards) - missing), str(len(shards))) for missing in (1, 0)]
    assert [row[2] == row[3] for row in progress] == [False, True]
    assert all(float(row[4]) > 0 for row in progress)
    assert progress[-1][5] == "0:00:00"
    assert contents(copied) == whole
    assert (copied / shards[2]).stat().st_mtime_ns == kept
    build(replace(written, out=str(copied)))
    assert "is complete already; nothing to do" in capsys.readouterr().out


def test_a_folder_claimed_a_moment_ago_by_the_same_command_is_no_strange_one(
    copied: Path, written: ShardingConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exists, first = LocalStore.exists, iter([False])
    monkeypatch.setattr(
        LocalStore, "exists", lambda store, name: exists(store, name) and (name != schema.PLAN or next(first, True))
    )
    build(replace(written, out=str(copied)))
    assert "is complete already; nothing to do" in capsys.readouterr().out


def test_an_output_with_another_set_is_refused(
    copied: Path, written: ShardingConfig, study: Path, tmp_path: Path
) -> None:
    other = replace(written, out=str(copied), source=replace(written.source, kinds=["t1"]))
    with pytest.raises(ShardError, match=r"already holds another set \(tiny: .*give another out="):
        build(other)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("mine")
    with pytest.raises(ShardError, match=r"is not empty and holds no set of this kind \(first: thesis.txt\)"):
        build(replace(written, out=str(tmp_path / "home")))


def test_webdataset_streams_the_arrays_the_index_points_at(written: ShardingConfig) -> None:
    shard_set = open_set(written.out)
    urls = [shard_set.store.join(shard.name) for shard in shard_set.manifest.shards]
    streamed = {}
    for entry in webdataset.WebDataset(urls, shardshuffle=False):
        for kind, data in entry.items():
            if not kind.startswith("__"):
                streamed[f"{entry['__key__']}.{kind}"] = data
    rows = list(shard_set.index.itertuples())
    assert set(streamed) == {row.member for row in rows}
    for row in rows:
        assert shard_set.store.read(row.shard, row.offset, row.size) == streamed[row.member]


def test_a_run_comes_back_within_half_a_unit_of_its_voxels(written: ShardingConfig, study: Path) -> None:
    shard_set = open_set(written.out)
    scan_id = "sub-03_task-rest_bold"
    path = next((study / "sub-03" / "func").glob("*bold.nii.gz"))
    packed = pack_bold(path, shard_set.space, brain_mask=None)
    (mean,), (scale,) = npy(shard_set, scan_id, schema.MEAN), npy(shard_set, scan_id, schema.SCALE)
    chunks = npy(shard_set, scan_id, schema.BOLD)
    assert [len(chunk) for chunk in chunks] == [last - first for first, last in schema.chunk_bounds(20, 8)] == [8, 12]
    values = mean + scale * dequantise(np.concatenate(chunks))
    inside = packed.is_measured & (np.abs((packed.values - mean) / np.where(scale > 0, scale, 1)) < 6).all(axis=0)
    assert inside.mean() > 0.9
    error = np.abs(values - packed.values)[:, inside] / scale[inside]
    assert error.max() <= 0.5 / UNITS_PER_SCALE * 1.01
    assert error.max() > 0.4 / UNITS_PER_SCALE


def test_a_t1_comes_back_in_its_own_units(written: ShardingConfig, study: Path) -> None:
    shard_set = open_set(written.out)
    path = next((study / "sub-03" / "anat").glob("*T1w.nii.gz"))
    packed = pack_t1(path, shard_set.space, brain_mask=None)
    (values,) = npy(shard_set, "sub-03_t1", schema.T1)
    row = shard_set.index[(shard_set.index.scan_id == "sub-03_t1") & (shard_set.index.kind == schema.META)].iloc[0]
    meta = json.loads(shard_set.store.read(row.shard, row.offset, row["size"]))
    np.testing.assert_allclose(values.astype(np.float32) * meta["std"] + meta["mean"], packed.values[0], atol=0.5)


def test_the_plan_knows_the_bytes_exactly(written: ShardingConfig) -> None:
    plan = prepare(written).plan
    shard_set = open_set(written.out)
    assert [shard.num_bytes for shard in plan.shards] == [shard.bytes for shard in shard_set.manifest.shards]
    assert all(shard.bytes <= written.storage.target_bytes for shard in shard_set.manifest.shards)
    text = describe(written)
    assert f"shards: {len(plan.shards)}, {plan.num_bytes / 1e3:.1f} kB" in text
    assert "6 BOLD runs (156 frames), 6 T1" in text
    assert "4 train, 1 validation, 1 test" in text


def test_tars_are_plain_and_the_subjects_travel_with_them(written: ShardingConfig) -> None:
    shard_set = open_set(written.out)
    for shard in shard_set.manifest.shards:
        with tarfile.open(shard_set.store.join(shard.name)) as tar:
            members = tar.getmembers()
        assert {(member.mtime, member.uid, member.uname) for member in members} == {(0, 0, "callosum")}
        assert [member.name for member in members] == sorted(member.name for member in members)
    assert shard_set.subjects.loc["03", "diagnosis"] == "ADHD"
    assert pd.isna(shard_set.subjects.loc["02", "age"])
    assert dict(shard_set.subjects.split.value_counts()) == {"train": 4, "validation": 1, "test": 1}
    assert shard_set.runs("bold", ["train", "validation", "test"]).num_frames.tolist() == [18, 40, 20, 18, 40, 20]


@pytest.mark.parametrize("frame", [0, 11])
def test_verify_names_the_byte_range_of_a_corrupted_frame(
    copied: Path, frame: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(str(copied)) == []
    shard_set = open_set(str(copied))
    row = shard_set.index[shard_set.index.member == "sub-03_task-rest_bold_0002.bold.npy"].iloc[0]
    first = row.offset + schema.NPY_HEADER_BYTES + frame * shard_set.space.num_voxels
    flip(copied / row.shard, first + 5)
    assert run_verify(VerifyConfig(str(copied), repair=[])) == 1
    printed = capsys.readouterr().out
    assert f"{row.shard} bytes {first}-{first + shard_set.space.num_voxels - 1}: frame {frame} of sub-03" in printed


def test_verify_finds_cut_shards_changed_stats_and_a_forged_index(copied: Path) -> None:
    shard_set = open_set(str(copied))
    first, second, third = (shard.name for shard in shard_set.manifest.shards[:3])
    size = shard_set.manifest.shards[0].bytes
    (copied / first).write_bytes((copied / first).read_bytes()[:-100])
    mean = shard_set.index[(shard_set.index["shard"] == second) & (shard_set.index.kind == schema.MEAN)].iloc[0]
    flip(copied / second, mean.offset + 200)
    problems = [str(problem) for problem in verify(str(copied))]
    assert problems[0] == f"{first} bytes {size - 100}-{size - 1}: missing: the shard is cut short"
    assert problems[1].startswith(f"{second} bytes {mean.offset}-{mean.offset + mean['size'] - 1}: {mean.member}")
    assert len(problems) == 2
    (copied / first).unlink()
    assert "does not exist" in str(verify(str(copied))[0])
    index = shard_set.index.copy()
    index.loc[index["shard"] == third, "offset"] += 1
    index.to_parquet(copied / schema.INDEX, index=False)
    problems = [str(problem) for problem in verify(str(copied))]
    assert problems[0].startswith(f"{schema.INDEX}: its SHA-256 is")
    assert (
        problems[2] == f"{second} bytes 0-{shard_set.manifest.shards[1].bytes - 1}: sha256 differs from the manifest's"
    )
    manifest = json.loads((copied / schema.MANIFEST).read_text())
    manifest["tables"][schema.INDEX] = hashlib.sha256((copied / schema.INDEX).read_bytes()).hexdigest()
    (copied / schema.MANIFEST).write_text(json.dumps(manifest))
    assert "the index expects member" in str(verify(str(copied))[-1])


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def test_a_scan_that_cannot_be_packed_leaves_a_hole_and_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_study(tmp_path / "study", num_subjects=3)
    damaged = next((root / "sub-02" / "func").glob("*bold.nii.gz"))
    damaged.write_bytes(damaged.read_bytes()[:3000])
    config = sharding_config(root, tmp_path / "set")
    manifest = build(config)
    assert [refusal.scan_id for refusal in manifest.refused] == ["sub-02_task-rest_bold"]
    assert str(damaged) in manifest.refused[0].reason
    table = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[-1:]]
    assert table == [["sub-02_task-rest_bold", manifest.refused[0].reason]]
    assert manifest.counts["bold_runs"] == 2
    assert manifest.counts["t1"] == 3
    strict = replace(
        config, out=str(tmp_path / "strict"), acceptance=replace(config.acceptance, max_refused_fraction=0)
    )
    with pytest.raises(ShardError, match=r"1 of 6 scans were refused.*max_refused_fraction is 0"):
        build(strict)
    assert not (tmp_path / "strict" / schema.MANIFEST).exists()


def test_a_scan_that_takes_too_long_or_too_much_memory_is_refused(written: ShardingConfig, tmp_path: Path) -> None:
    path = write_bold(tmp_path, "01", num_frames=400)
    request = Scan("sub-01_bold", "bold", str(path), 2.0, 400, {"sub": "01"}, "01")
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[48:50] = (30000).to_bytes(2, "little")
    (tmp_path / "liar.nii").write_bytes(raw)
    liar = replace(request, path=str(tmp_path / "liar.nii"))  # its header says 30,000 frames: 200 MB when packed
    enough = LimitsConfig(memory_mb=2048, timeout_s=60.0, download_mb=64)
    (tmp_path / schema.SPACE).write_bytes((Path(written.out) / schema.SPACE).read_bytes())
    (tmp_path / SETTINGS).write_text(json.dumps(asdict(pack_settings(written, []))))
    with contextlib.closing(Helper(tmp_path, enough)) as helper:
        for limits, scan, reason in (
            (replace(enough, timeout_s=0.001), request, "took longer than limits.timeout_s allows (0.001 s)"),
            (replace(enough, memory_mb=50), liar, "needs more memory than limits.memory_mb allows"),
            (enough, liar, "the data end at frame 400 of the 30000 the header states"),
        ):
            helper.limits = limits
            assert reason in helper.pack(scan, tmp_path / "part")["reason"]
        assert helper.pack(request, tmp_path / "part")["num_bytes"] > 0


def test_open_set_says_what_is_missing_and_which_schema_it_reads(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"holds no shard set \(no manifest.json\): write one with"):
        open_set(str(tmp_path / "empty"))
    manifest = json.loads((copied / schema.MANIFEST).read_text())
    (copied / schema.MANIFEST).write_text(json.dumps(manifest | {"schema": 1}))
    with pytest.raises(ShardError, match="has schema 1, this code reads 2; write it again"):
        open_set(str(copied))
    (copied / schema.MANIFEST).unlink()
    with pytest.raises(ShardError, match="its writing was not finished"):
        open_set(str(copied))


def test_validate_lists_every_problem_at_once(written: ShardingConfig) -> None:
    broken = replace(
        written,
        storage=replace(written.storage, chunk_frames=0, target_bytes=10),
        splits=replace(written.splits, num_test=None),
        acceptance=replace(written.acceptance, min_coverage=1.5),
        source=replace(written.source, root="/nowhere"),
    )
    problems = "\n".join(validate_config(broken))
    for key in (
        "storage.chunk_frames",
        "storage.target_bytes",
        "num_validation and num_test",
        "min_coverage: 1.5",
        "/nowhere is",
    ):
        assert key in problems
    assert validate_config(written) == []
