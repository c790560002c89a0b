"""The prediction command finds what the sharder finds: repetition times, confounds and brain masks of a BIDS tree."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest

from brain_models.space import space_from_mask
from configs.entry import compose
from configs.parse import parse
from data_sharding.config import ShardingConfig
from data_sharding.sources import bids
from finetune.errors import FinetuneError
from finetune.predict import find_scans, scan_rows, shown

NAMES = {
    "plain": "sub-01_task-rest_space-MNI152NLin6Asym_desc-preproc_bold",
    "echo": "sub-02_task-rest_echo-1_part-mag_space-MNI152NLin6Asym_desc-preproc_bold",
    "anatomy": "sub-01_space-MNI152NLin6Asym_desc-preproc_T1w",
}


def scan_table(scans: list[Path], columns: list[str], *, brain_masks: bool) -> pd.DataFrame:
    return pd.DataFrame(scan_rows(scans, columns, brain_masks=brain_masks))


def write(path: Path, num_frames: int = 3) -> Path:
    """An image whose header states 3 s per frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(np.ones((4, 4, 4, num_frames)[: 4 if num_frames > 1 else 3], np.float32), np.eye(4))
    image.header.set_xyzt_units("mm", "sec")
    if num_frames > 1:
        image.header.set_zooms((1, 1, 1, 3.0))
    nibabel.save(image, path)
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two subjects of a derivative folder; the repetition time stands in a sidecar at its root."""
    for name in NAMES.values():
        folder = tmp_path / name[:6] / ("anat" if name.endswith("T1w") else "func")
        write(folder / f"{name}.nii.gz", 1 if name.endswith("T1w") else 3)
        write(folder / f"{name.rpartition('_desc-')[0]}_desc-brain_mask.nii.gz", 1)
    for subject in ("01", "02"):
        func = tmp_path / f"sub-{subject}" / "func"
        (func / f"sub-{subject}_task-rest_desc-confounds_timeseries.tsv").write_text("csf\n1\n2\n3\n")
    (tmp_path / "task-rest_bold.json").write_text(json.dumps({"RepetitionTime": 0.8}))
    (tmp_path / "dataset_description.json").write_text(json.dumps({"Name": "test"}))
    write(tmp_path / "sub-02" / "func" / "sub-02_task-rest_echo-1_part-phase_bold.nii.gz")
    return tmp_path


def test_predict_and_the_sharder_read_the_same_of_every_run(tree: Path) -> None:
    overrides = ["out=unused", "dataset=bids", f"source.root={tree}", "space=mni6", "source.options.echo='1'"]
    config = parse(compose("data_sharding", overrides), ShardingConfig).source
    space = space_from_mask(np.ones((4, 4, 4), dtype=bool), np.eye(4), name="cube", template="NLin6Asym")
    sharded = {
        str(scan.path): scan for scan in bids.find(config, space, accepts_raw=False).scans if scan.kind == "bold"
    }
    table = scan_table(find_scans([str(tree)]), ["bold", "confounds"], brain_masks=True)
    assert sorted(table["bold"]) == sorted(sharded)
    assert len(sharded) == 2
    for row in table.itertuples():
        scan = sharded[row.bold]
        assert (row.repetition_time_s, scan.repetition_time_s) == (0.8, 0.8)
        assert (row.confounds, row.brain_mask) == (str(scan.confounds), str(scan.brain_mask))
        assert Path(row.confounds).name == f"sub-{scan.subject}_task-rest_desc-confounds_timeseries.tsv"


def test_a_table_has_the_scans_that_the_model_reads(tree: Path) -> None:
    scans = find_scans([str(tree)])
    assert [path.name.removesuffix(".nii.gz") for path in scans] == [
        NAMES[name] for name in ("anatomy", "plain", "echo")
    ]
    both = scan_table(scans, ["bold", "t1w"], brain_masks=False)
    assert both["t1w"].notna().tolist() == [True, False, False]
    assert both["brain_mask"].isna().all()
    assert scan_table(scans, ["t1w"], brain_masks=True)["t1w"].tolist() == [str(scans[0])]
    with pytest.raises(FinetuneError, match=r"the model reads bold, none of the 1 scans is one"):
        scan_table(scans[:1], ["bold", "confounds"], brain_masks=True)


def test_a_file_outside_bids_is_taken_for_bold_with_what_its_header_says(tmp_path: Path) -> None:
    path = write(tmp_path / "rest.nii.gz")
    row = scan_table(find_scans([str(path)]), ["bold"], brain_masks=True).iloc[0]
    assert row["bold"] == str(path)
    assert pd.isna([row["repetition_time_s"], row["confounds"], row["brain_mask"]]).all()


def test_a_sidecar_that_says_nonsense_is_refused(tree: Path) -> None:
    (tree / "sub-01" / "func" / "sub-01_bold.json").write_text('{"RepetitionTime": "two"}')
    with pytest.raises(
        FinetuneError, match=r"RepetitionTime 'two' in its sidecar is not a time in seconds; correct it"
    ):
        scan_table(find_scans([str(tree)]), ["bold"], brain_masks=False)
    (tree / "sub-01" / "func" / "sub-01_bold.json").write_text("[]")
    with pytest.raises(FinetuneError, match=r"sub-01_bold\.json holds a list, not an object of fields"):
        scan_table(find_scans([str(tree)]), ["bold"], brain_masks=False)


def test_answers_are_shown_without_the_columns_that_nobody_has_and_scans_by_their_names() -> None:
    answers = pd.DataFrame(
        {
            "subject": ["01", "02"],
            "session": [None, None],
            "risk": [0.25, np.float32(0.5)],
            "bold": ["/a/x.nii", "/b/long.nii"],
        }
    )
    assert shown(answers) == "subject  risk   bold\n01       0.250  x.nii\n02       0.500  long.nii"
