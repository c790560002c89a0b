"""What a finished run prints: one table of the fine-tuned model beside its baselines, and where the report is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from finetune.report.page import show_interval
from finetune.tasks.subject_prediction.evaluation import Interval


def show(numbers: Mapping[str, object], *, folder: str) -> str:
    """Lines for a terminal from the numbers of metrics.json."""
    rows = cast(Mapping[str, Mapping[str, object]], numbers["classifiers"])
    table: list[tuple[str, ...]] = [("", "AUROC within sites", "AUROC", "balanced accuracy")]
    table += [
        (name, *(_interval(row[key]) for key in ("within_site_auroc", "auroc", "balanced_accuracy")))
        for name, row in rows.items()
    ]
    widths = [max(len(row[column]) for row in table) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    first = next(iter(rows.values()))
    overlap = numbers["overlap"]
    seen = "not known" if overlap is None else str(len(cast(list, overlap)))
    people = f"{first['num_subjects']} subjects, {first['num_cases']} cases"
    lines.append(f"test split: {people}; seen by the backbone: {seen}")
    if numbers["is_phantom"]:
        lines.append("phantom data: the effect was put in on purpose; nothing here is about a person")
    registered = ", ".join(cast(list, numbers["registered"]))
    lines.append(f"registered: {registered or 'no (register=null or train.tracking.uri=null)'}")
    lines.append(f"report: {folder.rstrip('/')}/report.html")
    return "\n".join(lines)


def _interval(values: object) -> str:
    """NaN comes back from JSON values as None."""
    plain = cast(Mapping[str, float | None], values)
    filled = {name: float("nan") if value is None else value for name, value in plain.items()}
    return show_interval(Interval(**filled))
