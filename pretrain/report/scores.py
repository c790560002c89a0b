"""How well hidden voxels were guessed: pure functions from per-sample, per-region sums to tables of r2 with intervals.

r2 = 1 - squared error / squared distance from the training split's voxel mean, over all hidden, measured values of a
split: a perfect guess scores 1, the training mean 0.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from brain_models.atlas import Atlas
from training.statistics import BootstrapConfig, Interval, bootstrap, percentile_interval

MEAN_R2 = 0.0  # the mean baseline, by the definition of r2
MODEL = "model"
UNKNOWN = Interval(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Regions:
    """Columns of the per-region sums: one a region in label order, and a last one for voxels of no region."""

    names: list[str]
    groups: dict[str, list[int]]
    column_of_voxel: np.ndarray  # int64 [voxel]

    @classmethod
    def of(cls, atlas: Atlas) -> "Regions":
        labels = np.array(atlas.region_ids)
        column_of = {int(label): column for column, label in enumerate(labels)}
        columns = np.full(len(atlas.labels), len(labels), dtype=np.int64)
        is_labelled = atlas.labels > 0
        columns[is_labelled] = np.searchsorted(labels, atlas.labels[is_labelled])
        groups = {
            group: [column_of[label] for label in members if label in column_of]
            for group, members in atlas.groups.items()
        }
        return cls([atlas.names[int(label)] for label in labels], groups, columns)

    @property
    def num_columns(self) -> int:
        return len(self.names) + 1


@dataclass(frozen=True)
class RegionScore:
    """How well a region, a group or everything was guessed. `gain` is the model's r2 minus a baseline's, subjects
    paired."""

    scope: str  # all, group or region
    name: str
    num_subjects: int
    num_values: int
    r2: dict[str, Interval]  # of the model and every baseline
    gain: dict[str, Interval]


def explained(error: Tensor, total: Tensor) -> float:
    """r2 of summed squared errors and totals; NaN when there is nothing to explain."""
    return float(1 - error.sum() / total.sum()) if float(total.sum()) > 0 else float("nan")


def metrics_of(predictions: dict[str, Tensor], regions: Regions) -> dict[str, float]:
    """r2, r2/<baseline> and r2/group/<group>, from sums [sample, region]."""
    error, total, count = (predictions[name].double().sum(dim=0) for name in ("error", "total", "count"))
    metrics = {"r2": explained(error, total)}
    for name, sums in predictions.items():
        if name.startswith("error_"):
            metrics[f"r2/{name.removeprefix('error_')}"] = explained(sums.double(), total)
    for group, columns in regions.groups.items():
        if count[columns].sum() > 0:
            metrics[f"r2/group/{group}"] = explained(error[columns], total[columns])
    return metrics


def score_rows(
    predictions: dict[str, Tensor], regions: Regions, *, subjects: Sequence[str], config: BootstrapConfig
) -> list[RegionScore]:
    """The whole table: everything, each group, each region that was hidden at all; `subjects` are the rows'."""
    names, of_row = np.unique(np.asarray(subjects), return_inverse=True)
    scopes = scopes_of(regions)
    shares = torch.zeros(regions.num_columns, len(scopes), dtype=torch.float64)
    for number, (_, _, columns) in enumerate(scopes):
        shares[columns, number] = 1
    sums = {
        key: by_subject(values, torch.from_numpy(of_row), len(names)) @ shares
        for key, values in predictions.items()
        if key in ("error", "total", "count") or key.startswith("error_")
    }
    total, count = sums.pop("total"), sums.pop("count")
    errors = {MODEL if key == "error" else key.removeprefix("error_"): values for key, values in sums.items()}
    num_subjects = (count > 0).sum(dim=0).tolist()
    r2 = {key: r2_draws(error, total, config) for key, error in errors.items()}
    gain = {key: r2[MODEL] - found for key, found in r2.items() if key != MODEL}
    return [
        RegionScore(
            scope,
            name,
            num_subjects[number],
            int(count[:, number].sum()),
            {key: percentile_interval(found[:, number], config.confidence) for key, found in r2.items()},
            {key: percentile_interval(found[:, number], config.confidence) for key, found in gain.items()},
        )
        for number, (scope, name, _) in enumerate(scopes)
        if num_subjects[number] > 0
    ]


def r2_draws(
    error: Float[Tensor, "subject scope"], total: Float[Tensor, "subject scope"], config: BootstrapConfig
) -> Float[np.ndarray, "draw scope"]:
    """r2 of all subjects (row 0) and of every resample of them; resamples are NaN where only one subject was scored."""

    def r2(weights: np.ndarray) -> np.ndarray:
        drawn = torch.from_numpy(weights)
        return (1 - (drawn @ error) / (drawn @ total)).numpy()

    draws = bootstrap(r2, np.zeros(len(total)), config)
    draws[1:, (total > 0).sum(dim=0).numpy() < 2] = np.nan
    return draws


def scopes_of(regions: Regions) -> list[tuple[str, str, list[int]]]:
    """(scope, name, columns) of everything, of every group and of every region."""
    groups = [("group", name, columns) for name, columns in regions.groups.items()]
    single = [("region", name, [column]) for column, name in enumerate(regions.names)]
    return [("all", "", list(range(regions.num_columns))), *groups, *single]


def by_subject(
    values: Float[Tensor, "sample region"], of_row: Int64[Tensor, "sample"], num_subjects: int
) -> Float[Tensor, "subject region"]:
    """Sums over each subject's samples."""
    sums = torch.zeros(num_subjects, values.shape[1], dtype=torch.float64)
    return sums.index_add_(0, of_row, values.double())


def report_of(rows: Sequence[RegionScore], *, loss: float, num_samples: int) -> dict[str, object]:
    """The table as metrics.json holds it: r2 of model and baselines, over everything, by group and by region."""
    groups = {row.name: numbers_of(row) for row in rows if row.scope == "group"}
    regions = {row.name: numbers_of(row) for row in rows if row.scope == "region"}
    whole = next(row for row in rows if row.scope == "all")
    return {
        **numbers_of(whole),
        "mean": MEAN_R2,
        "gain": {name: [plain(found.value), plain(found.low), plain(found.high)] for name, found in whole.gain.items()},
        "loss": loss,
        "samples": num_samples,
        "groups": groups,
        "regions": regions,
    }


def numbers_of(row: RegionScore) -> dict[str, object]:
    """A row as plain numbers: the model's r2 with its interval, and the baselines'."""
    model = row.r2[MODEL]
    numbers: dict[str, object] = {"r2": plain(model.value), "low": plain(model.low), "high": plain(model.high)}
    return (
        numbers
        | {name: plain(found.value) for name, found in row.r2.items() if name != MODEL}
        | {"subjects": row.num_subjects, "values": row.num_values}
    )


def as_csv(tables: Mapping[str, Mapping[str, Sequence[RegionScore]]], alignments: Mapping[str, str]) -> str:
    """One line per split, set and region or group: r2 of the model and of each baseline, and what the model gains."""
    lines = [
        {"split": split, "set": name, "alignment": alignments[name]} | csv_line(row)
        for split, table in tables.items()
        for name, rows in table.items()
        for row in rows
    ]
    columns = list(dict.fromkeys(column for line in lines for column in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def csv_line(row: RegionScore) -> dict[str, object]:
    """A score as columns; an empty cell where there is no value."""
    line: dict[str, object] = {"scope": row.scope, "name": row.name, "subjects": row.num_subjects}
    line |= {"values": row.num_values, "mean": MEAN_R2}
    for name, found in row.r2.items():
        key = "r2" if name == MODEL else name
        line |= {key: _decimals(found.value), f"{key}_low": _decimals(found.low), f"{key}_high": _decimals(found.high)}
    for name, found in row.gain.items():
        key = f"gain_over_{name}"
        line |= {key: _decimals(found.value), f"{key}_low": _decimals(found.low), f"{key}_high": _decimals(found.high)}
    return line


def plain(value: float) -> float | None:
    """The value as JSON and CSV hold it: None for NaN."""
    return value if math.isfinite(value) else None


def _decimals(value: float) -> str:
    """Six decimals, or nothing for NaN."""
    return f"{value:.6f}" if math.isfinite(value) else ""
