"""How well hidden voxels were guessed: pure functions from per-sample, per-region sums to r2.

r2 = 1 - squared error / squared distance from the training split's voxel mean, over all hidden, measured values of a
split: a perfect guess scores 1, the training mean 0.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from brain_models.atlas import Atlas

MEAN_R2 = 0.0  # the mean baseline, by the definition of r2


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


def explained(error: Tensor, total: Tensor) -> float:
    """r2 of summed squared errors and totals; NaN when there is nothing to explain."""
    return float(1 - error.sum() / total.sum()) if float(total.sum()) > 0 else float("nan")


def metrics_of(predictions: dict[str, Tensor], regions: Regions, *, values_per_sample: float) -> dict[str, float]:
    """loss (as in training), r2, r2/<baseline> and r2/group/<group>, from sums [sample, region]."""
    error, total, count = (predictions[name].double().sum(dim=0) for name in ("error", "total", "count"))
    metrics = {
        "loss": float(error.sum() / (len(predictions["error"]) * values_per_sample)),
        "r2": explained(error, total),
    }
    for name, sums in predictions.items():
        if name.startswith("error_"):
            metrics[f"r2/{name.removeprefix('error_')}"] = explained(sums.double(), total)
    for group, columns in regions.groups.items():
        if count[columns].sum() > 0:
            metrics[f"r2/group/{group}"] = explained(error[columns], total[columns])
    return metrics


def report_of(predictions: dict[str, Tensor], regions: Regions, *, values_per_sample: float) -> dict[str, object]:
    """The whole table: r2 of model and baselines, over everything, by group and by region."""
    metrics = metrics_of(predictions, regions, values_per_sample=values_per_sample)
    error, total, count = (predictions[name].double().sum(dim=0) for name in ("error", "total", "count"))
    baselines = {key.removeprefix("r2/"): value for key, value in metrics.items() if key.count("/") == 1}
    return {
        "r2": metrics["r2"],
        "mean": MEAN_R2,
        **baselines,
        "loss": metrics["loss"],
        "samples": len(predictions["error"]),
        "groups": {
            key.removeprefix("r2/group/"): value for key, value in metrics.items() if key.startswith("r2/group/")
        },
        "regions": {
            name: explained(error[column], total[column])
            for column, name in enumerate(regions.names)
            if count[column] > 0
        },
    }
