"""What a comparison says: rows of estimates and of paired differences, as CSV, Markdown, figure and MLflow run.

Numbers in, files out; runs nothing.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cluster.storage.stores import Store
from finetune.compare.cells import Cell, arms_of, slug
from finetune.compare.paired import Readings, differences, estimate, resampled_metrics, subject_freedom
from finetune.config import CompareConfig
from finetune.errors import FinetuneError
from finetune.tasks import task_module
from reports.figures import COLOURS, style
from training.statistics import Metric
from training.study import METRICS
from training.watch.tracking import experiment_id, mlflow_environment

GREY = "#999999"
FOLDER_TAG = "callosum.comparison"
FILES = ("comparison.csv", "cells.csv", "comparison.md", "comparison.png")


@dataclass(frozen=True)
class Answer:
    """What a finished cell said: scores on the test split by model, as the task's metrics take them, its own first."""

    scores: Mapping[str, Any]
    num_seen: int | None  # test subjects its encoder was pretrained on; None: the encoder does not say

    @property
    def trained(self) -> Any:
        return next(iter(self.scores.values()))


@dataclass(frozen=True)
class ComparisonRow:
    """A line of comparison.csv: an arm's own metric, or an arm less the reference. `p` of an arm is against chance."""

    kind: Literal["arm", "difference"]
    mode: str
    arm: str
    reference: str
    value: float
    low: float
    high: float
    p: float
    p_corrected: float  # differences only: Holm, over all modes and pairs
    verdict: str  # of an arm: what its encoders saw of the test subjects


@dataclass(frozen=True)
class Comparison:
    """Everything that is written. `cells` are (mode, arm, encoder, seed, metric)."""

    title: str
    metric: Metric
    confidence: float
    num_subjects: int
    num_encoders: int
    num_seeds: int
    rows: list[ComparisonRow]
    cells: list[tuple[str, str, str, int, float]]


def read_answer(store: Store, config: CompareConfig) -> Answer:
    """What a finished cell wrote."""
    scores = task_module(config.task).read_scores(store.read("scores.csv").decode())
    overlap = json.loads(store.read(METRICS))["overlap"]
    return Answer(scores, None if overlap is None else len(overlap))


def metric_of(config: CompareConfig) -> Metric:
    """The metric that is compared: one of those that the task declares."""
    declared = task_module(config.task).metrics(config)
    return declared[0] if config.metric == "first" else next(one for one in declared if one.name == config.metric)


def readings(found: Mapping[Cell, Answer], mode: str) -> Readings:
    """A mode's scores of every arm: units are encoders, or seeds where an arm has one."""
    first = next(iter(found.values())).trained
    arms: dict[str, dict[int, list[Any]]] = {}
    for cell, answer in found.items():
        if cell.mode == mode:
            scores = answer.trained
            if scores.subjects != first.subjects:
                raise FinetuneError(
                    f"{cell.folder}: was scored on other subjects than the first cell ({len(scores.subjects)} and "
                    f"{len(first.subjects)}); delete the run folder and compare on one shard set"
                )
            arms.setdefault(cell.arm, {}).setdefault(cell.number, []).append(scores)
    if all(len(encoders) == 1 for encoders in arms.values()):
        return {arm: [[scores] for scores in encoders[0]] for arm, encoders in arms.items()}
    return {arm: [*encoders.values()] for arm, encoders in arms.items()}


def compare(config: CompareConfig, found: Mapping[Cell, Answer]) -> Comparison:
    """Estimates of every arm in every mode and of the baselines, differences from the reference, corrected for all of
    them together."""
    metric, arms, first = metric_of(config), arms_of(config), next(iter(found.values()))
    reference, confidence = next(iter(arms)), config.bootstrap.confidence
    freedom = subject_freedom(metric.strata(first.trained))
    baselines = {name: [[scores]] for name, scores in [*first.scores.items()][1:]}  # which know no encoder and no seed
    every = [(mode, readings(found, mode)) for mode in config.modes] + [("baseline", baselines)]
    draws = {
        (mode, arm): each
        for mode, of_mode in every
        for arm, each in resampled_metrics(of_mode, metric, config.bootstrap).items()
    }
    rows = []
    for (mode, arm), numbers in draws.items():
        own = estimate(numbers, subject_freedom=freedom, confidence=confidence, null=metric.chance)
        seen = seen_by(arm, found) if arm in arms else ""
        rows.append(ComparisonRow("arm", mode, arm, "", **asdict(own), p_corrected=own.p, verdict=seen))
    pairs = [((mode, arm), (mode, reference)) for mode in config.modes for arm in arms if arm != reference]
    between = differences(draws, pairs, metric, subject_freedom=freedom, confidence=confidence)
    for ((mode, arm), _), one in zip(pairs, between, strict=True):
        said = asdict(one.estimate) | {"p_corrected": one.p_corrected, "verdict": one.verdict}
        rows.append(ComparisonRow("difference", mode, arm, reference, **said))
    return Comparison(
        title=config.run.name,
        metric=metric,
        confidence=confidence,
        num_subjects=len(first.trained.subjects),
        num_encoders=len(arms[reference]),
        num_seeds=len(config.seeds),
        rows=rows,
        cells=[
            (cell.mode, cell.arm, cell.encoder, cell.seed, metric.value(one.trained)) for cell, one in found.items()
        ],
    )


def seen_by(arm: str, found: Mapping[Cell, Answer]) -> str:
    """The mark in an arm's row when its encoder does not say whom it saw; one that saw test subjects was refused."""
    is_known = all(answer.num_seen is not None for cell, answer in found.items() if cell.arm == arm)
    return "" if is_known else "NOT KNOWN whether its encoder saw test subjects"


def as_markdown(found: Comparison) -> str:
    """Both tables, with what they were made from and how to read them."""
    per_cent = f"{found.confidence:.0%}"
    lines = [
        f"# {found.title}",
        "",
        f"{found.metric.title} ({found.metric.best_is} is best) on {found.num_subjects} test subjects, "
        f"{found.num_encoders} pretraining and {found.num_seeds} fine-tuning seeds per arm, {per_cent} intervals over "
        "seeds and subjects.",
        "",
        "| mode | arm | estimate | |",
        "|---|---|---|---|",
    ]
    shown = "{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]"
    lines += [
        f"| {row.mode} | {row.arm} | {shown.format(row=row)} | {row.verdict} |"
        for row in found.rows
        if row.kind == "arm"
    ]
    lines += ["", "| mode | pair | difference | p (Holm) | verdict |", "|---|---|---|---|---|"]
    signed = "{row.value:+.3f} [{row.low:+.3f}, {row.high:+.3f}] | {row.p_corrected:.3f}"
    lines += [
        f"| {row.mode} | {row.arm} - {row.reference} | {signed.format(row=row)} | {row.verdict} |"
        for row in found.rows
        if row.kind == "difference"
    ]
    if found.num_encoders == 1:
        lines += ["", "One pretraining seed an arm: this is about these encoders, not about how they were pretrained."]
    if found.num_encoders * found.num_seeds == 1:
        lines += ["", "One seed: intervals are over subjects only."]
    return "\n".join(lines) + "\n"


def write(found: Comparison, folder: Path) -> None:
    """comparison.csv, cells.csv, comparison.md and comparison.png."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [asdict(row) for row in found.rows]
    (folder / "comparison.csv").write_text(
        _table(list(rows[0]), [list(row.values()) for row in rows]), encoding="utf-8"
    )
    header = ["mode", "arm", "encoder", "seed", found.metric.name]
    (folder / "cells.csv").write_text(_table(header, [list(cell) for cell in found.cells]), encoding="utf-8")
    (folder / "comparison.md").write_text(as_markdown(found), encoding="utf-8")
    (folder / "comparison.png").write_bytes(draw(found))


def _table(header: list[str], rows: list[list[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([[f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows])
    return text.getvalue()


def log_to_mlflow(found: Comparison, folder: Path, config: CompareConfig) -> None:
    """One MLflow run a comparison folder, the same one when the comparison is made again."""
    tracking = config.train.tracking
    if tracking.uri is None:
        return
    mlflow_environment(timeout_s=60)
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=tracking.uri)
    experiment = experiment_id(client, tracking.experiment, tracking.uri)
    earlier = client.search_runs([experiment], filter_string=f"tags.`{FOLDER_TAG}` = '{config.run.folder}'")
    tags = {FOLDER_TAG: config.run.folder, "callosum.part": "compare", "callosum.shards": config.shards}
    run = earlier[0] if earlier else client.create_run(experiment, tags=tags, run_name=config.run.name)
    for row in found.rows:
        name = re.sub(r"[^\w./ -]", "_", f"{row.kind}/{row.mode}/{row.arm}")
        for end in ("value", "low", "high"):
            client.log_metric(run.info.run_id, f"{name}/{end}", getattr(row, end))
        if row.kind == "difference":
            client.set_tag(run.info.run_id, f"verdict/{row.mode}/{slug(row.arm)}", row.verdict)
    for name in FILES:
        client.log_artifact(run.info.run_id, str(folder / name))
    client.set_terminated(run.info.run_id)


def draw(found: Comparison) -> bytes:
    """The figure as PNG: left every arm's estimate over its cells, right every difference; one colour per mode."""
    arms = [row for row in found.rows if row.kind == "arm"]
    pairs = [row for row in found.rows if row.kind == "difference"]
    modes = list(dict.fromkeys(row.mode for row in arms))
    colour_of = dict(zip(modes, COLOURS, strict=False))
    with style():
        figure = Figure(figsize=(9.0, 1.4 + 0.34 * max(len(arms), len(pairs))), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        _intervals(left, arms, [f"{row.arm} ({row.mode})" for row in arms], colour_of)
        for mode, arm, _, _, value in found.cells:
            position = next(index for index, row in enumerate(arms) if (row.mode, row.arm) == (mode, arm))
            left.plot(value, position - 0.25, ".", color=colour_of[mode], alpha=0.5, markersize=4)
        if found.metric.chance is not None:
            left.axvline(found.metric.chance, color=GREY, linewidth=0.8, linestyle=":")
        left.set_xlabel(f"{found.metric.title}, {found.num_subjects} test subjects")
        _intervals(right, pairs, [f"{row.arm} - {row.reference} ({row.mode})" for row in pairs], colour_of)
        right.axvline(0.0, color=GREY, linewidth=0.8)
        right.set_xlabel(f"paired difference, {found.confidence:.0%} interval")
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=130, metadata={"Software": None})
    return data.getvalue()


def _intervals(axes: Axes, rows: list[ComparisonRow], labels: list[str], colour_of: dict[str, str]) -> None:
    for position, row in enumerate(rows):
        axes.plot([row.low, row.high], [position, position], color=colour_of[row.mode], linewidth=1.4)
        axes.plot(row.value, position, "o", color=colour_of[row.mode], markersize=5)
    axes.set_yticks(range(len(rows)), [label if len(label) < 40 else f"...{label[-37:]}" for label in labels])
    axes.set_ylim(len(rows) - 0.5, -0.7)
