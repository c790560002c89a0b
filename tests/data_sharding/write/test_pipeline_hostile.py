"""Whatever a file claims or is called, it is packed or refused with its cause: nothing hangs, fills up or gets out."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import nibabel
import numpy as np
import pytest

from brain_models.errors import ScanError
from brain_models.nifti import read_header
from brain_models.space import volume_space
from data_sharding import schema
from data_sharding.config import LimitsConfig
from data_sharding.scans import Scan
from data_sharding.write.build import build
from data_sharding.write.isolation import SETTINGS, Helper
from data_sharding.write.plan import pack_settings
from tests.helpers_scans import ACCEPTANCE, SPACE, bold_values, grid, save_nifti, sharding_config, write_bold, write_t1

NUM_FRAMES, TR_S = 6, 1.5
MAGIC, DIM, PIXDIM, SLOPE, UNITS, CODES = 344, 40, 76, 112, 123, 252  # where NIfTI-1 keeps them


@pytest.fixture(scope="module", params=["refuse", "accept_as_stored"])
def policy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def helper(policy: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Helper]:
    folder = tmp_path_factory.mktemp("helper")
    volume_space(SPACE).save(folder / schema.SPACE)
    loose = replace(ACCEPTANCE, min_coverage=0.1, unknown_orientation=policy)  # type: ignore[arg-type]
    settings = pack_settings(replace(sharding_config(folder, folder / "out"), acceptance=loose), [])
    (folder / SETTINGS).write_text(json.dumps(asdict(settings)))
    with contextlib.closing(Helper(folder, LimitsConfig(memory_mb=300, timeout_s=20.0, download_mb=1))) as process:
        yield process


def centred_affine() -> np.ndarray:
    """What a header without geometry means by NIfTI's rule: x to the left, the middle of the grid at 0."""
    affine = np.diag([-12.0, 12.0, 12.0, 1.0])
    affine[:3, 3] = -affine.diagonal()[:3] * (np.array(grid()[1]) - 1) / 2
    return affine


def awkward_files(folder: Path) -> dict[str, tuple[bytes, str | None]]:
    """Name -> (bytes, what refuses it or None), each changed in one way from one run without geometry."""
    values = np.rint(bold_values(3, NUM_FRAMES)).astype(np.int16)

    def stored(values: np.ndarray, endianness: str = "<", changes: dict[int, bytes] | None = None) -> bytearray:
        header = nibabel.Nifti1Header(endianness=endianness)
        header.set_data_dtype(values.dtype)
        image = nibabel.Nifti1Image(values, centred_affine(), header, dtype=values.dtype)
        image.header.set_zooms((12.0, 12.0, 12.0, TR_S)[: values.ndim])
        image.header.set_xyzt_units("mm", "sec")
        image.header["sform_code"] = image.header["qform_code"] = 0
        raw = bytearray(image.to_bytes())
        for offset, data in (changes or {}).items():
            raw[offset : offset + len(data)] = data
        return raw

    plain = stored(values)
    sform = b"\x01\x00\x04\x00"
    rows = np.array([[-12, 0, 0, 90], [0, 12, 0, -126], [0, 0, 12, -72]], dtype="<f4").tobytes()
    whole = gzip.compress(bytes(plain), 1)
    dim = np.array([4, 16, 19, 16, 600, 1, 1, 1], dtype="<i2").tobytes()
    five = np.array([5, 16, 19, 16, 1, NUM_FRAMES, 1, 1], dtype="<i2").tobytes()
    zooms = np.array([1, 12, 12, 12, 1, TR_S, 1, 1], dtype="<f4").tobytes()
    nan = np.array([np.nan, np.nan], dtype="<f4").tobytes()
    msec = np.array([TR_S * 1000], dtype="<f4").tobytes()
    files: dict[str, tuple[bytes, str | None]] = {
        "original": (whole, None),
        "big_endian": (gzip.compress(bytes(stored(values.astype(">i2"), ">"))), None),
        "scl_slope_nan": (gzip.compress(bytes(stored(values, changes={SLOPE: nan}))), None),
        "tr_in_msec": (gzip.compress(bytes(stored(values, changes={PIXDIM + 16: msec, UNITS: b"\x12"}))), None),
        "plain_named_gz": (bytes(plain), None),
        "int64_4d": (gzip.compress(bytes(stored(values.astype(np.int64)))), None),
        "five_d_singleton": (gzip.compress(bytes(stored(values, changes={DIM: five, PIXDIM: zooms}))), None),
        "sform_qform_conflict": (gzip.compress(bytes(stored(values, changes={CODES: sform, 280: rows}))), None),
        "gzip_truncated": (whole[: len(whole) // 2], "damaged at frame"),
        "dim_too_big": (gzip.compress(bytes(stored(values, changes={DIM: dim}))), "the data end at frame 6 of the 600"),
        "zero_byte": (b"", "empty (0 bytes)"),
        "bad_magic": (gzip.compress(bytes(stored(values, changes={MAGIC: b"xx1\0"}))), "not NIfTI"),
        "complex64_4d": (gzip.compress(bytes(stored(values.astype(np.complex64)))), "complex"),
        "four_d_single_volume": (gzip.compress(bytes(stored(values[..., :1]))), "BOLD with 1 frame"),
        "three_d_as_bold": (gzip.compress(bytes(stored(values[..., 0]))), "3D image of shape"),
        "constant_voxels": (gzip.compress(bytes(stored(values[..., :1].repeat(6, 3)))), "no voxel varies"),
        "html_error_page": (b"<html><body>404</body></html>", "not NIfTI"),
    }
    return files


def test_every_awkward_file_gets_what_its_table_says(helper: Helper, policy: str, tmp_path: Path) -> None:
    outcomes = {}
    for name, (data, cause) in awkward_files(tmp_path).items():
        path = tmp_path / f"{name}.nii.gz"
        path.write_bytes(data)
        request = Scan("sub-01_bold", "bold", str(path), TR_S, NUM_FRAMES, {}, "01")
        outcome = helper.pack(request, tmp_path / "part")
        if cause is None and (policy == "accept_as_stored" or name == "sform_qform_conflict"):
            assert "reason" not in outcome, outcome
            outcomes[name] = (tmp_path / "part").read_bytes()[: outcome["num_bytes"]]
            assert read_header(path, "bold").repetition_time_s == pytest.approx(TR_S)
            conflict_mm = outcome["quality"]["conflict_mm"]
            assert (conflict_mm > 1) == (name == "sform_qform_conflict")
            continue
        assert str(path) in outcome["reason"]
        if cause is None or (policy == "refuse" and cause.startswith(("damaged", "the data end", "no voxel"))):
            cause = "left and right are unknown"
        assert cause in outcome["reason"], name
    if policy == "accept_as_stored":
        outcomes.pop("sform_qform_conflict")
        assert len(set(outcomes.values())) == 1, "the same voxels, stored in other ways, are the same bytes"
        assert len(outcomes) == 7


def test_bombs_and_lying_headers_cost_neither_memory_nor_time(helper: Helper, tmp_path: Path) -> None:
    header = nibabel.Nifti1Header()
    header.set_data_shape((16, 19, 16, 20))
    header.set_sform(grid()[0], 4)
    header["magic"] = b"n+1"
    raw = bytearray(header.binaryblock + bytes(4))

    zeros = gzip.compress(bytes(1 << 24), 1) * 40  # 640 MB of zeros in 3 MB

    def written(name: str, **fields: object) -> Scan:
        for field, value in fields.items():
            header[field] = value
        raw[:348] = header.binaryblock
        path = tmp_path / f"{name}.nii.gz"
        path.write_bytes(gzip.compress(bytes(raw)) + zeros)
        return Scan("sub-01_bold", "bold", str(path), 2.0, 20, {}, "01")

    cases = [
        (written("bomb"), "no voxel varies"),
        (written("offset", vox_offset=3e8), "no voxel varies"),
        (written("no_end", vox_offset=2e9), "the data end at frame 0"),
        (written("frames", vox_offset=352, dim=[4, 16, 19, 16, 30000, 1, 1, 1]), "no voxel varies"),
        (written("voxels", dim=[4, 800, 800, 800, 2, 1, 1, 1]), "needs more memory"),
        (written("too_many", dim=[4, 32000, 32000, 32000, 2, 1, 1, 1]), "impossible shape"),
    ]
    for request, cause in cases:
        reason = helper.pack(request, tmp_path / "part")["reason"]
        assert cause in reason
        assert request.path in reason


@pytest.mark.parametrize("field", [{"vox_offset": -5}, {"vox_offset": np.nan}, {"scl_slope": 1.0, "scl_inter": np.inf}])
def test_impossible_numbers_in_a_header_are_refused(field: dict[str, float], tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "bold.nii", bold_values(0, 3))
    raw = bytearray(path.read_bytes())
    for name, value in field.items():
        offset = {"vox_offset": 108, "scl_slope": 112, "scl_inter": 116}[name]
        raw[offset : offset + 4] = np.array([value], dtype="<f4").tobytes()
    path.write_bytes(raw)
    with pytest.raises(ScanError, match=r"bold\.nii: (damaged NIfTI header|the header puts the data at byte)"):
        read_header(path, "bold")


def test_names_cannot_leave_the_set_and_special_files_are_no_scans(tmp_path: Path) -> None:
    root = tmp_path / "study"
    write_t1(root, "01")
    strange = write_bold(root, "02")
    tricks = ["task-..", "task-a;rm -rf ~", "task-%2e%2e%2f", "task-é\u202e", "task-" + "x" * 150]
    for number, task in enumerate(tricks):
        name = strange.name.replace("task-rest", task)
        (strange.parent / name).write_bytes(strange.read_bytes())
        json_name = name.removesuffix(".nii.gz") + ".json"
        (strange.parent / json_name).write_text(json.dumps({"RepetitionTime": 2.0 + number}))
    os.mkfifo(root / "sub-01" / "anat" / "sub-01_acq-pipe_space-MNI152NLin6Asym_desc-preproc_T1w.nii.gz")
    config = sharding_config(root, tmp_path / "set")
    manifest = build(replace(config, splits=replace(config.splits, rule="none")))
    outside = {path for path in tmp_path.rglob("*") if path.is_file()} - set((tmp_path / "set").rglob("*"))
    assert all(path.is_relative_to(root) for path in outside)
    members = [name for shard in manifest.shards for name in _members(tmp_path / "set" / shard.name)]
    scan_ids = {name.split(".")[0].rpartition("_")[0] for name in members}
    assert len(scan_ids) == 2 + len(tricks) - 1  # what is no BIDS name is no scan
    assert sum(name.endswith(("mean.npy", "t1.npy")) for name in members) == len(scan_ids)
    assert all(
        set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.") for name in members
    )
    assert all(len(name) <= schema.MAX_NAME_LENGTH for name in members)


def _members(path: Path) -> list[str]:
    import tarfile

    with tarfile.open(path) as tar:
        return tar.getnames()
