"""The sections of a pretraining run's page: scores beside baselines, regions, an example, maps. Knows no model."""

import math
from collections.abc import Mapping, Sequence

from pretrain.report.scores import MEAN_R2, MODEL, RegionScore
from reports.page import Section

NUM_REGIONS = 10  # at either end of the table
ABOUT_RIDGE = (
    "Ridge regression predicts every hidden voxel linearly from the visible ones, with a penalty chosen on held-out "
    "training windows. Where the signal is linear in a few shared courses, as in a phantom, little better is possible "
    "with as many subjects; a model below it has not learnt all that a linear map knows of these scans."
)


def score_section(tables: Mapping[str, Mapping[str, Sequence[RegionScore]]]) -> Section:
    """R² of hidden voxels by split and set: the model, every baseline, and the gain over each."""
    whole = [(split, name, rows[0]) for split, by_set in tables.items() for name, rows in by_set.items()]
    table = [["split", "set", "prediction", "R²", "gain of the model", "subjects"]]
    for split, name, score in whole:
        for key, found in score.r2.items():
            gain = "" if key == MODEL else score.gain[key].signed()
            table.append([split, name, key, str(found), gain, str(score.num_subjects)])
        table.append([split, name, "training mean", f"{MEAN_R2:.3f}", "", str(score.num_subjects)])
    ridge_wins = any("ridge" in score.gain and score.gain["ridge"].high < 0 for _, _, score in whole)
    return Section(
        "Reconstruction of hidden voxels",
        table=table,
        text="R² is about the training split's voxel mean, over all hidden, measured values of the split; brackets are "
        "bootstrap intervals over subjects, gains are paired." + (f" {ABOUT_RIDGE}" if ridge_wins else ""),
    )


def region_section(name: str, rows: Sequence[RegionScore]) -> Section:
    """The regions of a set that are predicted best and worst, with their gain over the best baseline."""
    regions = [row for row in rows if row.scope == "region" and math.isfinite(row.r2[MODEL].value)]
    ordered = sorted(regions, key=lambda row: -row.r2[MODEL].value)
    shown = ordered if len(ordered) <= 2 * NUM_REGIONS else [*ordered[:NUM_REGIONS], *ordered[-NUM_REGIONS:]]
    table = [["region", "R²", "best baseline", "gain over it"]]
    for row in shown:
        best = max(row.gain, key=lambda baseline: row.r2[baseline].value, default=None)
        compared = ["none", ""] if best is None else [f"{best} {row.r2[best]}", row.gain[best].signed()]
        table.append([row.name, str(row.r2[MODEL]), *compared])
    left_out = len(ordered) - len(shown)
    text = f"The {NUM_REGIONS} best and worst of {len(ordered)} regions; all are in report/reconstruction.csv."
    return Section(f"Regions of {name}", table=table, text=text if left_out else "")
