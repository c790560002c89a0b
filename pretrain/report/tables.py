"""The final scores as a table: for metrics.json, and as CSV. Knows which subject each row of an evaluation is of."""

import csv
import io
from collections.abc import Mapping

from pretrain.masked.masked_volumes import MaskedVolumes
from pretrain.masked.sets import OpenedSet
from pretrain.report.scores import MEAN_R2, MODEL, IntervalConfig, Row, report_of
from training.evaluation import Evaluation

Table = dict[str, list[Row]]  # by set


def reconstruction_table(
    task: MaskedVolumes, found: Evaluation, split: str, *, sets: Mapping[str, OpenedSet], config: IntervalConfig
) -> Table:
    """How well the hidden voxels of a split were guessed, by set, group and region, with intervals over subjects."""
    of_set = found.predictions["set"].tolist()
    subjects: dict[str, list[str]] = {}
    for number, (name, opened) in enumerate(sets.items()):
        runs = opened.shard_set.runs(opened.kind, [split])
        subject_of = dict(zip(runs["scan_id"], runs["subject"], strict=True))
        scans = [scan for scan, own in zip(found.scan_ids, of_set, strict=True) if own == number]
        subjects[name] = [subject_of[scan] for scan in scans]
    return task.score_table(found.predictions, subjects, config)


def as_report(task: MaskedVolumes, found: Evaluation, table: Table) -> dict[str, object]:
    """The table as metrics.json holds it; of several sets one each."""
    reports = {}
    for name, rows in task.by_set(found.predictions).items():
        count = len(rows["weighted"])
        loss = float(rows["weighted"].double().sum() / (count * task.set_named(name).values_per_sample))
        reports[name] = report_of(table[name], loss=loss, num_samples=count)
    return dict(reports) if len(task.names) > 1 else reports[task.names[0]]


def as_csv(tables: Mapping[str, Table], alignments: Mapping[str, str]) -> str:
    """One line a split, set and part of the brain: r2 of the model and each baseline, and what the model gains."""
    lines = [
        {"split": split, "set": name, "alignment": alignments[name]} | line_of(row)
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


def line_of(row: Row) -> dict[str, object]:
    """A row as columns; an empty cell where there is no value."""
    line: dict[str, object] = {"scope": row.scope, "name": row.name, "subjects": row.num_subjects}
    line |= {"values": row.num_values, "mean": MEAN_R2}
    for name, found in row.r2.items():
        key = "r2" if name == MODEL else name
        line |= {key: shown(found.value), f"{key}_low": shown(found.low), f"{key}_high": shown(found.high)}
    for name, found in row.gain.items():
        key = f"gain_over_{name}"
        line |= {key: shown(found.value), f"{key}_low": shown(found.low), f"{key}_high": shown(found.high)}
    return line


def shown(value: float | None) -> str:
    """Six decimals, or nothing."""
    return "" if value is None else f"{value:.6f}"
