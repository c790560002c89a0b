"""The page about a set says what the set holds, and needs no other file."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from brain_models.bundle import code_commit
from data_sharding.check.report import balance_columns, mean_maps, notices, render, split_balance, worst_regions
from data_sharding.read.shard_set import ShardSet, open_set
from data_sharding.report import SetReportConfig, run
from data_sharding.schema import MEAN
from data_sharding.write.build import build
from reports import figures
from reports.page import Origin
from tests.data_sharding.test_shards import npy
from tests.helpers_scans import sharding_config, write_confounds, write_study


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    root = write_study(tmp_path_factory.mktemp("study"), num_subjects=5, num_frames=(20,))
    for scan in sorted(root.rglob("*_bold.nii.gz"))[:3]:
        write_confounds(scan, num_frames=20, num_non_steady=1, spikes=(7,))
    table = (root / "participants.tsv").read_text().splitlines()
    rows = [f"{row}\t{sex}" for row, sex in zip(table, ["sex", *"FMFMF"], strict=True)]
    (root / "participants.tsv").write_text("\n".join(rows) + "\n")
    damaged = next((root / "sub-05").rglob("*_bold.nii.gz"))
    damaged.write_bytes(damaged.read_bytes()[:5000])
    config = sharding_config(root, tmp_path_factory.mktemp("report") / "set")
    build(replace(config, atlas="template"))
    return open_set(config.out)


def test_quality_is_known_or_missing_and_never_made_up(shard_set: ShardSet) -> None:
    quality = shard_set.quality.set_index("scan_id")
    runs = quality[quality.kind == "bold"]
    moved_mm = runs.mean_framewise_displacement_mm
    assert moved_mm.notna().tolist() == [True, True, True, False]
    assert moved_mm.iloc[0] == pytest.approx((18 * 0.1 + 0.9) / 19, rel=1e-5)
    assert runs.num_dropped.tolist() == [1, 1, 1, 0]
    assert runs.num_frames.tolist() == [19, 19, 19, 20]
    assert runs.num_censored.tolist() == [1, 1, 1, 0]
    (mean,), (scale,) = npy(shard_set, runs.index[0], MEAN), npy(shard_set, runs.index[0], "scale.npy")
    assert runs.tsnr.iloc[0] == pytest.approx(np.median(mean[scale > 0] / scale[scale > 0]), rel=1e-6)
    assert quality[quality.kind == "t1"].tsnr.isna().all()
    coverage = shard_set.region_coverage
    assert sorted(coverage.index) == sorted(quality.index)
    lowest = coverage.loc[runs.index[0]].min()
    assert runs.lowest_region_coverage.iloc[0] == pytest.approx(lowest, abs=1e-4)
    assert shard_set.manifest.preprocessing["frames_dropped"] == 3
    frames = npy(shard_set, runs.index[0], "frames.npy")[0]
    assert np.flatnonzero(frames[:, 3] == 0).tolist() == [6]
    assert frames[6, 0] == np.float32(0.9)


def test_the_page_holds_counts_refusals_images_and_balance(
    shard_set: ShardSet, capsys: pytest.CaptureFixture[str]
) -> None:
    run(SetReportConfig(shard_set.location))
    assert "report.html" in capsys.readouterr().out
    page = (Path(shard_set.location) / "report.html").read_text()
    assert not re.findall(r"(?:src|href)=.(?!data:|#)", page)
    assert page.count("<img") == 3 + 5  # and one per subject
    linked, shown = set(re.findall(r'<a href="#(.*?)">', page)), re.findall(r'<figure id="(.*?)">', page)
    assert shown == [f"{number:02d}" for number in range(1, 6)]
    assert linked > set(shown)
    assert linked <= set(re.findall(r' id="(.*?)"', page)), "every link leads somewhere"
    lines = dict(re.findall(r'<tr id="scan-(.*?)"><td>\1</td>(.*?)</tr>', page))
    assert sorted(lines) == sorted(shard_set.quality.scan_id)
    assert {f"scan-{scan}" for scan in lines if scan.endswith("_bold")} <= linked
    scan = shard_set.quality.set_index("scan_id").loc["sub-01_task-rest_bold"]
    cells = re.findall(r"<td>(.*?)</td>", lines["sub-01_task-rest_bold"])
    assert cells[:6] == [scan.split, scan.site, "2 s", "19", "1", "1"]
    assert cells[6:9] == [f"{scan.mean_framewise_displacement_mm:.2f} mm", f"{scan.tsnr:.1f}", f"{scan.coverage:.1%}"]
    assert re.findall(r"<td>(.*?)</td>", lines["sub-01_t1"])[2:3] == ["–"]
    (atlas,) = shard_set.atlases.values()
    assert cells[9] == atlas.names[int(scan.lowest_region.removeprefix("template/"))]
    (refusal,) = shard_set.manifest.refused
    reasons = [html.unescape(cell) for cell in re.findall(r'<tr><td>1</td><td class="long">(.*?)</td></tr>', page)]
    assert reasons[0] == refusal.reason, "whole, with its numbers"
    assert re.search(r"<td>acceptance\.min_frames</td><td><code>\d+</code>", page)
    assert page.count("<svg") == 8
    captions = re.findall(r"<h2.*?>(.*? over \d.*?)</h2>", page)
    assert [caption.split(" over ")[0] for caption in captions] == ["Mean BOLD", "Temporal signal to noise", "Mean T1"]
    assert ["outlines of template" in caption for caption in captions] == [True, False, True]
    balance = re.findall(r"Balance of the splits: (\w+)</h2>.*?<table.*?>\s*<tr><th>(\w+)</th>", page, re.DOTALL)
    assert balance == [(column, column) for column in ("site", "sex", "age", "diagnosis")]
    assert "affine registration only" not in page
    assert "Refused scans: 1" in page
    assert "sub-05_task-rest_bold" in page
    assert "mean framewise displacement (mm): unknown for 1 of 4 runs" in page
    made = re.search(r"Made on (.*?) by <code>(.*?)</code> with code commit <code>(.*?)</code>", page)
    assert made is not None
    date, command, commit = made.groups()
    assert command == f"python -m data_sharding.report {shard_set.location}"
    assert commit == code_commit()
    assert "8-bit integers in steps of 1/21" in page
    assert "Evans AC, Janke AL" in page
    assert page == render(shard_set, Origin(date, command, commit)), "the same set gives the same page"


def test_a_phantom_and_a_preview_are_called_so_before_the_numbers(shard_set: ShardSet) -> None:
    assert notices(shard_set) == []
    made = shard_set.manifest.preprocessing | {"alignment": "affine"}
    other = ShardSet(shard_set.store, replace(shard_set.manifest, name="phantom_small", preprocessing=made))
    assert [notice.text.partition(":")[0] for notice in notices(other)] == [
        "Phantom data",
        "These scans were aligned by an affine registration only",
    ]


def test_outlines_are_drawn_along_the_borders_of_regions_only(shard_set: ShardSet) -> None:
    (atlas,) = shard_set.atlases.values()
    values = np.ones(shard_set.space.num_voxels)

    def drawn(outlines: np.ndarray | None) -> str:
        return figures.slices(values, shard_set.space, label="x", outlines=outlines, colours="gray", upper=2.0)

    assert drawn(atlas.labels) != drawn(None)
    assert drawn(atlas.labels) == drawn(atlas.labels * 2), "borders, not labels"
    assert drawn(np.zeros_like(atlas.labels)) == drawn(None)


def test_balance_counts_every_subject_once_a_split() -> None:
    subjects = pd.DataFrame(
        {
            "Site": ["A", "B", "A", None, "B", "A"],
            "age": [1.0, 2, 3, 4, 5, np.nan],
            "notes": list("abcdef"),
            "split": ["train", "train", "train", "train", "test", "test"],
        }
    )
    assert balance_columns(subjects) == ["Site", "age"]
    site = split_balance(subjects, "Site")
    assert site["splits"] == ["train", "test"]
    assert site["rows"] == {"A": ["2 (50%)", "1 (50%)"], "B": ["1 (25%)", "1 (50%)"], "missing": ["1 (25%)", "0 (0%)"]}
    many = pd.DataFrame({"age": np.arange(40.0), "split": ["train"] * 20 + ["validation"] * 20})
    assert split_balance(many, "age")["rows"]["mean"] == ["9.5", "29.5"]


def test_mean_images_leave_out_what_was_not_measured(shard_set: ShardSet) -> None:
    maps = mean_maps(shard_set)
    assert (maps.num_runs, maps.num_t1) == (4, 5)
    assert maps.bold is not None
    assert np.nanmedian(maps.bold) == pytest.approx(1, abs=0.05)
    rows = worst_regions(shard_set)
    assert [row["mean"] for row in rows] == sorted(row["mean"] for row in rows)
