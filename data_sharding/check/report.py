"""Writes one HTML page about a shard set: contents, quality, refused scans, balance of the splits."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from configs.parse import flatten
from configs.words import counted, size_of
from data_sharding import schema
from data_sharding.hashing import hash_names
from data_sharding.read.methods import kinds_of, set_methods
from data_sharding.read.shard_set import ShardSet
from data_sharding.splits import SPLITS
from reports import figures
from reports.methods import methods
from reports.page import Notice, Origin, Page, Section
from reports.page import render as page

REPORT = "report.html"
PREVIEW = "affine registration only: a preview, regions are off by several millimetres."
PHANTOM = Notice("warning", "Phantom data: a program made these scans, and no person was scanned.")
SCANS_IN_MEAN = 40
REFUSED_SHOWN = 500
OVERLAYS_SHOWN = 200
SCANS_SHOWN = 2000
WORST_REGIONS = 12
MAX_CATEGORIES = 12
BALANCE = ("site", "sex", "gender", "age", "diagnosis", "dx", "group", "handedness")

MEASURES = {  # column of quality.parquet: (label, acceptance rule that limits it)
    "mean_framewise_displacement_mm": ("mean framewise displacement (mm)", "max_mean_fd_mm"),
    "median_dvars": ("median DVARS (robust units)", None),
    "tsnr": ("temporal signal to noise, median over voxels", "min_tsnr"),
    "coverage": ("share of the space measured", "min_coverage"),
    "lowest_region_coverage": ("coverage of the worst covered region", "min_region_coverage"),
    "clipped_fraction": ("share of values clipped", "max_clipped_fraction"),
    "num_frames": ("frames", "min_frames"),
    "censored_share": ("share of frames censored", "max_censored_fraction"),
}

SCAN_COLUMNS = {  # head of the table of scans: (column of quality.parquet, how it is written)
    "scan": ("scan_id", "{}"),
    "split": ("split", "{}"),
    "site": ("site", "{}"),
    "repetition time": ("repetition_time_s", "{:g} s"),
    "frames": ("num_frames", "{:,}"),
    "dropped": ("num_dropped", "{:,}"),
    "censored": ("num_censored", "{:,}"),
    "mean displacement": ("mean_framewise_displacement_mm", "{:.2f} mm"),
    "signal to noise": ("tsnr", "{:.1f}"),
    "coverage": ("coverage", "{:.1%}"),
    "worst region": ("lowest_region", "{}"),
    "its coverage": ("lowest_region_coverage", "{:.1%}"),
    "clipped": ("clipped_fraction", "{:.2%}"),
}


@dataclass
class MeanMaps:
    """Averages over scans, [voxel]; NaN where no scan measured."""

    bold: np.ndarray | None  # each run by its own median
    tsnr: np.ndarray | None
    t1: np.ndarray | None  # in standard deviations
    num_runs: int
    num_t1: int


def render(shard_set: ShardSet, origin: Origin) -> str:
    """The page as HTML text."""
    manifest, space = shard_set.manifest, shard_set.manifest.space
    made = manifest.preprocessing
    quality = shard_set.quality.assign(
        censored_share=shard_set.quality.num_censored / shard_set.quality.num_frames.clip(lower=1)
    )
    is_preview = made["alignment"] == "affine"
    contents = (
        f"{counted(len(manifest.shards), 'shard')}, {size_of(manifest.counts['bytes'])}; space {space['name']} "
        f"({space['template']}, {space['num_voxels']} {'vertices' if space['kind'] == 'surface' else 'voxels'}); "
        f"atlases: {', '.join(manifest.atlases) or 'none'}; {made['frames_dropped']} frames before the steady state "
        f"dropped, {made['frames_censored']} censored."
    )
    legend = "Colours are sites; a dotted line is the limit of an acceptance rule. Numbers by scan: quality.parquet."
    sections = [
        Section("What it holds", split_rows(shard_set), " ".join([contents, *(f"{note}." for note in manifest.notes)])),
        _refusals(manifest.refused),
        Section(
            "Quality of the BOLD runs",
            text=" ".join([*(f"{line}." for line in _unknown(quality)), legend]),
            figures=_distributions(quality, made["acceptance"]),
        ),
        *_images(shard_set),
        *_overlays(shard_set),
        _coverage(shard_set, is_preview=is_preview),
        *(_balance(shard_set.subjects, column) for column in balance_columns(shard_set.subjects)),
        _scans(shard_set, quality),
    ]
    lineage = {"fingerprint": manifest.fingerprint, "splits": manifest.splits, "versions": manifest.versions} | made
    return page(
        Page(
            title=f"{manifest.name}: shard set",
            verdict=shard_set.location,
            notices=notices(shard_set),
            sections=sections,
            lineage={key: str(value) for key, value in flatten(lineage).items()},
            origin=origin,
            methods=methods([set_methods(shard_set, kinds_of(shard_set), shard_set.atlases.values())]),
        )
    )


def notices(shard_set: ShardSet) -> list[Notice]:
    """What a reader must know before the numbers."""
    found = [PHANTOM] if shard_set.is_phantom else []
    if shard_set.manifest.preprocessing["alignment"] == "affine":
        found.append(Notice("warning", f"These scans were aligned by an {PREVIEW}"))
    return found


def split_rows(shard_set: ShardSet) -> list[list[str]]:
    """Subjects, scans, frames and hours of each split that has any, below their head."""
    rows = [["split", "subjects", "BOLD runs", "frames", "hours of BOLD", "T1", "other"]]
    for split in SPLITS:
        quality = shard_set.quality[shard_set.quality.split == split]
        if len(quality):
            runs, counts = quality[quality.kind == "bold"], Counter(quality.kind)
            hours = (runs.num_frames * runs.repetition_time_s).sum() / 3600
            numbers = [quality.subject.nunique(), counts["bold"], runs.num_frames.sum(), f"{hours:.1f}"]
            numbers += [counts["t1"], len(quality) - counts["bold"] - counts["t1"]]
            rows.append([split, *map(str, numbers)])
    return rows


def _refusals(refused: list[schema.Refusal]) -> Section:
    """Reasons with how many scans each refused, worded as for the first of them, then the scans one by one."""
    counted = Counter(_kind_of_reason(refusal) for refusal in refused)
    first = {_kind_of_reason(refusal): refusal.reason for refusal in reversed(refused)}
    table = [["scans", "reason"], *([str(count), first[kind]] for kind, count in counted.most_common())]
    table += [[refusal.scan_id, refusal.reason] for refusal in refused[:REFUSED_SHOWN]]
    more = f"and {len(refused) - REFUSED_SHOWN} more, all in {schema.MANIFEST}" if len(refused) > REFUSED_SHOWN else ""
    return Section(f"Refused scans: {len(refused)}", table if refused else (), more)


def _scans(shard_set: ShardSet, quality: pd.DataFrame) -> Section:
    """A line per scan with its numbers, to which its picture links."""
    shown = quality.sort_values("scan_id")[:SCANS_SHOWN]
    shown = shown.assign(lowest_region=[region_name(shard_set, key) for key in shown.lowest_region])
    table = [list(SCAN_COLUMNS)]
    table += [[_cell(row[column], form) for column, form in SCAN_COLUMNS.values()] for _, row in shown.iterrows()]
    more = f" The first {SCANS_SHOWN:,} of {len(quality):,} scans." if len(quality) > SCANS_SHOWN else ""
    text = f"All columns are in {schema.QUALITY}.{more}"
    return Section("Every scan", table, text, row_ids=[scan_anchor(scan_id) for scan_id in shown.scan_id])


def _cell(value: Any, form: str) -> str:
    """The value as text, or a dash where it is not known; a T1 has no repetition time."""
    return "–" if pd.isna(value) or value == "" or (form == "{:g} s" and not value) else form.format(value)


def scan_anchor(scan_id: str) -> str:
    """The id of a scan's line."""
    return f"scan-{scan_id}"


def _coverage(shard_set: ShardSet, *, is_preview: bool) -> Section:
    head = ["region", "atlas", "mean coverage", "runs below one half"]
    rows = [
        [row["name"], row["atlas"], f"{100 * row['mean']:.1f} %", f"{row['below']} of {row['num_runs']}"]
        for row in worst_regions(shard_set)
    ]
    why_empty = "" if rows else "No atlas, or no BOLD run."
    text = f"Aligned by an {PREVIEW}" if rows and is_preview else why_empty
    return Section("Regions covered worst", [head, *rows] if rows else (), text)


def _balance(subjects: pd.DataFrame, column: str) -> Section:
    balance = split_balance(subjects, column)
    rows = [[name, *cells] for name, cells in balance["rows"].items()]
    return Section(f"Balance of the splits: {column}", [[column, *balance["splits"]], *rows])


def balance_columns(subjects: pd.DataFrame) -> list[str]:
    """The columns by which splits are compared: known names, in a fixed order."""
    by_name = {str(column).lower(): str(column) for column in subjects.columns}
    return [by_name[name] for name in BALANCE if name in by_name]


def split_balance(subjects: pd.DataFrame, column: str) -> dict[str, Any]:
    """The distribution of a column in each split: numbers as mean, deviation and range, the rest as counts."""
    splits = [split for split in SPLITS if (subjects.split == split).any()]
    columns = {split: subjects.loc[subjects.split == split, column] for split in splits}
    if pd.api.types.is_numeric_dtype(subjects[column]) and subjects[column].nunique() > MAX_CATEGORIES:
        rows = {
            "mean": [f"{values.mean():.1f}" for values in columns.values()],
            "standard deviation": [f"{values.std():.1f}" for values in columns.values()],
            "range": [f"{values.min():.1f} to {values.max():.1f}" for values in columns.values()],
        }
    else:
        named = {
            split: values.astype("object").where(values.notna(), "missing").map(str)
            for split, values in columns.items()
        }
        common = [name for name, _ in Counter(value for values in named.values() for value in values).most_common()]
        rows = {
            name: [f"{int((values == name).sum())} ({(values == name).mean():.0%})" for values in named.values()]
            for name in sorted(common[:MAX_CATEGORIES])
        }
    missing = [int(values.isna().sum()) for values in columns.values()]
    if any(missing) and "missing" not in rows:
        rows["missing"] = [str(count) for count in missing]
    return {"column": column, "splits": splits, "rows": rows}


def worst_regions(shard_set: ShardSet) -> list[dict[str, Any]]:
    """The atlas regions with the lowest average coverage over the BOLD runs."""
    coverage = shard_set.region_coverage
    runs = set(shard_set.quality.scan_id[shard_set.quality.kind == "bold"])
    coverage = coverage[coverage.index.isin(runs)]
    if coverage.empty or not len(coverage.columns):
        return []
    mean = coverage.mean().sort_values(kind="stable")[:WORST_REGIONS]
    rows = []
    for key, share in mean.items():
        atlas, name = str(key).rpartition("/")[0], region_name(shard_set, key)
        below = int((coverage[key] < 0.5).sum())
        rows.append({"atlas": atlas, "name": name, "mean": float(share), "below": below, "num_runs": len(coverage)})
    return rows


def region_name(shard_set: ShardSet, key: Any) -> str:
    """The name of the region that tables call `<atlas>/<label>`; "" for a missing one."""
    atlas, _, label = ("" if pd.isna(key) else str(key)).rpartition("/")
    return shard_set.atlases[atlas].names.get(int(label), label) if atlas in shard_set.atlases else label


def mean_maps(shard_set: ShardSet) -> MeanMaps:
    """Averages over at most SCANS_IN_MEAN scans of each kind, chosen by hash: the same at every call."""
    runs, images = (_chosen(shard_set, kind) for kind in (schema.MEAN, schema.T1))
    bold, tsnr = [], []
    scales = {row.key: row for row in shard_set.index[shard_set.index.kind == schema.SCALE].itertuples()}
    for row in runs.itertuples():
        mean, scale = _array(shard_set, row), _array(shard_set, scales[row.key])
        is_measured = scale > 0
        bold.append(np.where(is_measured, mean / np.median(mean[is_measured]), np.nan))
        tsnr.append(np.where(is_measured, mean / np.where(is_measured, scale, 1), np.nan))
    t1 = [_array(shard_set, row).astype(np.float32) for row in images.itertuples()]
    return MeanMaps(_mean(bold), _mean(tsnr), _mean(t1), len(runs), len(images))


def _mean(maps: list[np.ndarray]) -> np.ndarray | None:
    """The mean per voxel over the scans that measured it."""
    return np.ma.masked_invalid(maps).mean(axis=0, dtype=np.float64).filled(np.nan) if maps else None


def _chosen(shard_set: ShardSet, kind: str) -> pd.DataFrame:
    rows = shard_set.index[shard_set.index.kind == kind]
    order = np.argsort(hash_names(rows.scan_id.tolist()), kind="stable")
    return rows.iloc[order[:SCANS_IN_MEAN]]


def _array(shard_set: ShardSet, row: Any) -> np.ndarray:
    return np.load(io.BytesIO(shard_set.store.read(row.shard, row.offset, row.size)), allow_pickle=False)


def _distributions(quality: pd.DataFrame, acceptance: dict[str, float | None]) -> list[str]:
    drawn = []
    runs = quality[quality.kind == "bold"]
    for column, (label, rule) in MEASURES.items():
        known = runs[runs[column].notna()]
        if len(known):
            groups = {site or "all": values[column].to_numpy() for site, values in known.groupby("site", sort=True)}
            drawn.append(figures.distribution(groups, label=label, limit=acceptance[rule] if rule else None))
    return drawn


def _unknown(quality: pd.DataFrame) -> list[str]:
    """The measures that are unknown for some runs, in words."""
    runs = quality[quality.kind == "bold"]
    counts = {label: int(runs[column].isna().sum()) for column, (label, _) in MEASURES.items()}
    return [f"{label}: unknown for {count} of {len(runs)} runs" for label, count in counts.items() if count]


def _images(shard_set: ShardSet) -> list[Section]:
    """The mean images; none for spaces without a voxel grid."""
    space = shard_set.space
    if space.kind != "volume":
        return [Section("Mean images", text=f"None: {space.name} is a {space.kind}, which has no slices.")]
    maps = mean_maps(shard_set)
    name, atlas = next(iter(shard_set.atlases.items()), ("", None))
    outlined, labels = (f", outlines of {name}", atlas.labels) if atlas else ("", None)
    drawn = []
    for values, caption, colours in (
        (maps.bold, f"Mean BOLD over {maps.num_runs} runs, each divided by its median{outlined}", "gray"),
        (maps.tsnr, f"Temporal signal to noise over {maps.num_runs} runs (mean / robust deviation)", "viridis"),
        (maps.t1, f"Mean T1 over {maps.num_t1} scans, in standard deviations above the darkest 2 %{outlined}", "gray"),
    ):
        if values is not None:
            shown = values - np.nanpercentile(values, 2) if values is maps.t1 else values
            upper, outlines = float(np.nanpercentile(shown, 99)), None if values is maps.tsnr else labels
            image = figures.slices(shown, space, label=caption, outlines=outlines, colours=colours, upper=upper)
            drawn.append(Section(caption, figures=[image]))
    sides = "Axial slices from low to high; the subject's left is on the left."
    return [replace(section, text=sides) for section in drawn]


def _overlays(shard_set: ShardSet) -> list[Section]:
    """One picture per subject, of its first run or else its T1, with the regions of the first atlas; an index first."""
    space, scans = shard_set.space, shard_set.index[shard_set.index.kind.isin([schema.MEAN, schema.T1])]
    if space.kind != "volume" or scans.empty:
        return []
    labels = next((atlas.labels for atlas in shard_set.atlases.values()), None)
    subject_of = shard_set.quality.set_index("scan_id").subject
    ordered = scans.assign(subject=subject_of.reindex(scans.scan_id).to_numpy(), is_t1=scans.kind == schema.T1)
    first = ordered.sort_values(["subject", "is_t1", "scan_id"]).drop_duplicates("subject")
    drawn = []
    for row in first[:OVERLAYS_SHOWN].itertuples():
        values = _array(shard_set, row).astype(np.float32)
        values = np.where(np.isfinite(values), values - np.nanpercentile(values, 2), np.nan)
        target = scan_anchor(row.scan_id)
        image = figures.overlay(values, space, labels=labels, name=row.subject, caption=row.scan_id, target=target)
        drawn.append(image)
    index = figures.index_of([row.subject for row in first[:OVERLAYS_SHOWN].itertuples()])
    more = f" The first {OVERLAYS_SHOWN} of {len(first)} subjects." if len(first) > OVERLAYS_SHOWN else ""
    text = f"One scan per subject; region outlines must follow the anatomy. Its name leads to its numbers.{more}"
    return [Section("Alignment, subject by subject", text=text, figures=[index, *drawn])]


def _kind_of_reason(refusal: schema.Refusal) -> str:
    """A reason without the file's name and numbers, so that equal reasons are counted together."""
    text = refusal.reason.replace(refusal.path, "").lstrip(" :")
    words = ["#" if any(letter.isdigit() for letter in word) else word for word in text.split()]
    return " ".join(words)
