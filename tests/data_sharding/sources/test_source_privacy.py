"""With a key file no subject id reaches a set or a message; sidecar fields and columns pass by allow-list only."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pandas as pd
import pytest

from data_sharding.errors import SourceError
from data_sharding.sources.privacy import pseudonym, read_key, redacted
from tests.helpers_sources import document, found_by, set_of, write_phantom

KEY = b"0123456789abcdef0123456789abcdef"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "secret.key"
    path.write_bytes(KEY + b"\n")
    return path


def everything_in(folder: Path) -> str:
    """All that a reader of the set could see: names, texts, tables, members of tars."""
    texts = []
    for path in sorted(folder.rglob("*")):
        texts.append(str(path.relative_to(folder)))
        if path.suffix == ".parquet":
            texts.append(pd.read_parquet(path).to_csv())
        elif path.is_file():
            texts.append(path.read_bytes().decode("latin-1"))
        if path.suffix == ".tar":
            with tarfile.open(fileobj=io.BytesIO(path.read_bytes())) as tar:
                texts += tar.getnames()
    return "\n".join(texts)


def test_no_id_and_nothing_of_the_key_is_in_the_set_or_its_messages(
    tmp_path: Path, key_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = write_phantom("adhd200", tmp_path / "adhd200", num_subjects=3)
    broken = root / "Athena" / "9000137" / "sfnwmrda9000137_session_1_rest_1.nii.gz"
    broken.write_bytes(broken.read_bytes()[:3000])  # its header opens: it is refused while it is packed
    overrides = ["dataset=adhd200", f"source.root={root}", "space=mni12", "atlas=null", "splits.rule=none"]
    overrides += ["source.subjects=['0010000','9000137','0010014']"]
    shard_set = set_of(
        tmp_path / "set", *overrides, f"privacy.key_file={key_file}", "acceptance.max_refused_fraction=1"
    )
    assert len(shard_set.manifest.refused) == 2, "one by its quality column, one damaged"
    seen = everything_in(tmp_path / "set") + "".join(capfd.readouterr())
    for name in ("0010000", "9000137", "0010014", "10014"):
        assert name not in seen.replace(pseudonym("0010000", KEY), "").replace(pseudonym("0010014", KEY), "")
    assert KEY.decode() not in seen
    assert str(key_file) not in seen
    assert sorted(shard_set.subjects.index) == sorted(
        pseudonym(name, KEY) for name in ("0010000", "9000137", "0010014")
    )
    assert shard_set.subjects.at[pseudonym("9000137", KEY), "diagnosis"] == "ADHD"
    assert shard_set.manifest.preprocessing["privacy"]["subject_ids"] == "keyed hashes"


def test_one_key_gives_one_name_and_another_key_another(tmp_path: Path, key_file: Path) -> None:
    root = write_phantom("bids", tmp_path / "bids", num_subjects=2)
    overrides = ["dataset=bids", f"source.root={root}", "space=mni12", "source.kinds=[t1]"]
    found = found_by(*overrides, f"privacy.key_file={key_file}")[0]
    expected = {pseudonym("01", KEY), pseudonym("02", KEY)}
    assert {scan.subject for scan in found.scans} == {scan.entities["sub"] for scan in found.scans} == expected
    assert {scan.scan_id for scan in found.scans} == {f"sub-{name}_ses-1_t1" for name in expected}
    assert "participant_id" not in found.subjects.columns
    assert found.subjects.at[pseudonym("01", KEY), "age"] == 21
    other = tmp_path / "other.key"
    other.write_bytes(KEY[::-1])
    assert not expected & {scan.subject for scan in found_by(*overrides, f"privacy.key_file={other}")[0].scans}


def test_a_short_or_missing_key_is_refused_without_showing_it(tmp_path: Path) -> None:
    (tmp_path / "short.key").write_bytes(b"hunter2")
    with pytest.raises(SourceError, match="holds 7 bytes, fewer than 16") as caught:
        read_key(tmp_path / "short.key")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(SourceError, match=r"cannot be read \(No such file"):
        read_key(tmp_path / "none.key")


def test_sidecars_and_participants_pass_by_allow_list(tmp_path: Path) -> None:
    root = write_phantom("bids", tmp_path / "bids", num_subjects=2)
    overrides = ["dataset=bids", f"source.root={root}", "space=mni12", "atlas=null", "splits.rule=none"]
    narrow = ["source.kinds=[bold]", "source.tasks=[combined]", "source.subjects=['02']"]
    allowed = ["privacy.sidecar_fields=[EchoTime,Absent]", "privacy.participant_columns=[age]"]
    shard_set = set_of(tmp_path / "set", *overrides, *narrow, *allowed, "acceptance.max_refused_fraction=1")
    assert document(shard_set, "sub-02_task-combined_bold")["sidecar"] == {"EchoTime": 0.03}
    assert list(shard_set.subjects.columns) == ["age", "split"]
    assert "A hospital" not in everything_in(tmp_path / "set")
    with pytest.raises(SourceError, match=r"privacy\.participant_columns: birthday not among age, sex"):
        found_by(*overrides, "privacy.participant_columns=[birthday]")


def test_redaction_leaves_numbers_that_are_no_ids() -> None:
    assert (
        redacted("/data/sub-01/func/sub-01_run-01_bold: 01", [("01", "abc")])
        == "/data/sub-abc/func/sub-abc_run-01_bold: 01"
    )
    assert redacted("/hcp/07/x", [("07", "abc")]) == "/hcp/abc/x"
    assert redacted("sfnwmrda0010014 and 10014", [("0010014", "abc")]) == "sfnwmrdaabc and abc"
