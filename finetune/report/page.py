"""One self-contained HTML page and one JSON file that say what was learned, beside what, and from which data.

Knows no model and no shard: numbers and names in, text out.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import jinja2

from finetune.report import figures
from finetune.tasks.subject_prediction.evaluation import Evaluation, Interval, Scores

MODEL = "fine-tuned model"


@dataclass(frozen=True)
class Classifier:
    """One row of the results table: scores on the test split, what was made of them, and how it came about."""

    scores: Scores
    evaluation: Evaluation
    note: str


@dataclass(frozen=True)
class ReportContents:
    """Everything the page shows. `classifiers` begins with the fine-tuned model; `lineage` is read as it is given."""

    title: str
    is_phantom: bool
    classifiers: Mapping[str, Classifier]
    losses: Mapping[str, figures.Curve]
    metrics: Mapping[str, figures.Curve]
    marks: Mapping[str, int]
    lineage: Mapping[str, str]
    overlap: tuple[str, ...] | None
    seconds: Mapping[str, float]


def as_json(contents: ReportContents) -> dict[str, object]:
    """The numbers of the page as plain values; NaN becomes null, which JSON can hold."""
    plain = {
        "classifiers": {name: dataclasses.asdict(row.evaluation) for name, row in contents.classifiers.items()},
        "overlap": None if contents.overlap is None else list(contents.overlap),
        "is_phantom": contents.is_phantom,
        "lineage": dict(contents.lineage),
        "seconds": dict(contents.seconds),
    }
    return _without_nan(plain)  # type: ignore[return-value]


def _without_nan(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(name): _without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render(contents: ReportContents) -> str:
    """The page as HTML text that needs no other file and no network."""
    first = next(iter(contents.classifiers.values()))
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["interval"] = show_interval
    environment.filters["number"] = show_number
    page = environment.from_string(
        resources.files("finetune.report").joinpath("report.html").read_text(encoding="utf-8")
    )
    drawn = {
        "losses": figures.curves(contents.losses, label="loss", marks=contents.marks),
        "metrics": figures.curves(contents.metrics, label="validation", marks=contents.marks),
        "roc": figures.roc({name: row.scores for name, row in contents.classifiers.items()}),
        "sites": figures.scores_by_site(first.scores, threshold=first.evaluation.threshold),
    }
    return page.render(contents=contents, first=first.evaluation, figures=drawn)


def write(contents: ReportContents, folder: Path) -> Path:
    """Path of the report.html written into `folder`, beside metrics.json and scores.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(as_json(contents), indent=2) + "\n", encoding="utf-8")
    (folder / "scores.csv").write_text(_scores_table(contents), encoding="utf-8")
    path = folder / "report.html"
    path.write_text(render(contents), encoding="utf-8")
    return path


def _scores_table(contents: ReportContents) -> str:
    """One line a subject and classifier, so that every number of the page can be computed again."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")  # which quotes a site's name with a comma
    writer.writerow(["classifier", "subject", "site", "is_case", "score"])
    for name, row in contents.classifiers.items():
        scores = row.scores
        for subject, site, is_case, value in zip(
            scores.subjects, scores.sites, scores.is_case, scores.values, strict=True
        ):
            writer.writerow([name, subject, site, int(is_case), f"{value:.8g}"])
    return text.getvalue()


def show_number(value: float) -> str:
    """Three decimals, or a dash where there is no value."""
    return f"{value:.3f}" if math.isfinite(value) else "–"


def show_interval(interval: Interval) -> str:
    """`0.812 [0.741, 0.880]`, or a dash where there is no value."""
    if not math.isfinite(interval.value):
        return "–"
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
