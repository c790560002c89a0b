"""A study: one question that a run answers. A task's module says what is trained, on which samples, and what the result
amounts to. Everything else, from claiming the run folder to the registered model, is the same for every study: `run`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cluster.storage.stores import Store, store_for
from configs.words import aligned
from reports.figures import curves
from reports.methods import methods
from reports.page import Notice, Origin, Page, Section, origin_of, render
from training.checkpoint import SPOOL
from training.config import RunConfig, TrainConfig
from training.errors import RegistryError
from training.evaluation import Evaluation
from training.identity import METRICS
from training.loop import FitResult, Services, fit
from training.registry import card
from training.registry import models as registry
from training.registry.card import About, model_card
from training.registry.promotion import SCORES, ChampionConfig, champion_scores, promote, reasons_against
from training.registry.results import log_results
from training.registry.seen_subjects import overlap, read_seen, seen_before, write_seen
from training.statistics import Interval
from training.task import Source, Task
from training.watch.progress import phase
from training.watch.sentinels import History, sentinel_section
from training.watch.tracking import FINAL


@dataclass
class RegisterConfig:
    """Under which name and alias a model enters the registry, and what makes it champion (null: nothing does)."""

    name: str
    alias: str
    champion: ChampionConfig | None


PHANTOM = Notice(
    "warning",
    "Phantom data: these scans were made by a program with an effect put in on purpose. The numbers show that the "
    "pipeline finds what is there; they say nothing about any person.",
)


@dataclass(frozen=True)
class Model:
    """One line of the results: the trained model, or a baseline scored on the same samples."""

    intervals: Mapping[str, Interval]  # by metric
    details: Mapping[str, object] = field(default_factory=dict)  # further numbers, for metrics.json
    note: str = ""


@dataclass(frozen=True)
class Conclusion:
    """What a finished run amounts to. Report, terminal, metrics.json, registry and promotion iterate over it."""

    verdict: str  # one sentence, first on the page and on the terminal
    metrics: Mapping[str, str]  # title by name, the most important first
    models: Mapping[str, Model]  # the trained model first, then its baselines
    tested_subjects: Collection[str]  # whom (or which images) the numbers are about
    about: About  # the model, for its card
    methods: Sequence[str] = ()  # paragraphs of a paper, citing by key (reports.methods)
    unit: str = "subject"  # what is resampled, and must not have been trained on
    notices: Sequence[Notice] = ()
    sections: Sequence[Section] = ()  # of the report, after the results
    numbers: Mapping[str, object] = field(default_factory=dict)  # further top-level entries of metrics.json
    files: Mapping[str, str] = field(default_factory=dict)  # text by name, beside metrics.json
    marks: Mapping[str, int] = field(default_factory=dict)  # steps to point out in the training curves
    curves: Mapping[str, Sequence[str]] = field(default_factory=dict)  # by chart, validation metrics; {}: all in one
    lineage: Mapping[str, str] = field(default_factory=dict)  # beside the study's tags
    tags: Mapping[str, str] = field(default_factory=dict)  # of the registered version, beside the study's
    kept_scores: str = ""  # travels with the model, so that a later one can be compared on the same subjects
    # Why the model loses by a metric to its baselines or to the champion, given the scores kept with that (None: no
    # champion yet).
    reasons_against: Callable[[str, str | None], Sequence[str]] = lambda metric, champion: ()


class Study(Protocol):
    """What `open(config)` of a task's module returns; the same on every rank."""

    title: str
    tags: Mapping[str, str]  # where the model comes from: of the MLflow run, the registered version and the report
    starts_from: Sequence[Path]  # bundles whose weights the task starts from
    trained_subjects: set[str]

    def make_task(self) -> Task:
        """A fresh task, the same on every rank."""
        ...

    def make_source(self, task: Task) -> Source:
        """This rank's view of the samples."""
        ...

    def prepare(self, task: Task, is_resuming: bool) -> None:
        """Fit what is fitted before the first step. A resumed run loads the task's parameters and buffers itself."""
        ...

    def write_bundle(self, task: Task, evaluations: Mapping[str, Evaluation], folder: Path) -> None:
        """Write what is registered; rank 0 alone, while parameters are whole. Must not wait for other ranks."""
        ...

    def conclude(self, task: Task, result: FitResult) -> Conclusion:
        """What the final splits' evaluations amount to, beside baselines; rank 0 alone, and nobody waits for it."""
        ...


def run(
    study: Study,
    config: TrainConfig,
    run_config: RunConfig,
    *,
    identity: object,
    register: RegisterConfig | None,
) -> dict[str, Any]:
    """The numbers of <run.folder>/metrics.json; every rank calls it, those other than 0 get an empty mapping."""
    store, started = store_for(run_config.folder), time.monotonic()
    folder = Path(run_config.scratch) / f"{run_config.name}-results-{time.time_ns()}"

    def export(task: Task, evaluations: Mapping[str, Evaluation]) -> None:
        study.write_bundle(task, evaluations, folder / "bundle")
        seen = seen_before(store)
        if seen is not None:  # else the bundle says that nobody knows whom it has seen
            write_seen(folder / "bundle", study.trained_subjects, also=seen)

    task = study.make_task()
    services = Services(
        run=run_config,
        identity=identity,
        export=export,
        tags=study.tags,
        prepare=study.prepare,
        make_task=study.make_task,
        starts_from=study.starts_from,
    )
    try:
        result = fit(task, study.make_source(task), config, services)
        if not result.is_main:
            return {}
        trained = time.monotonic()
        phase("scoring, baselines, maps and report")
        conclusion = study.conclude(result.task, result)
        seconds = {"training": trained - started, "baselines and report": time.monotonic() - trained}
        return publish(
            study,
            conclusion,
            result,
            config,
            store=store,
            folder=folder,
            seconds=seconds,
            register=register,
            origin=origin_of(run_config.command),
        )
    finally:  # leave nothing on scratch: all of it is in the run folder
        shutil.rmtree(folder, ignore_errors=True)


def publish(
    study: Study,
    conclusion: Conclusion,
    result: FitResult,
    config: TrainConfig,
    *,
    store: Store,
    folder: Path,
    seconds: Mapping[str, float],
    register: RegisterConfig | None,
    origin: Origin,
) -> dict[str, Any]:
    """Write report and tables, register the bundle, and upload all of it; the numbers of metrics.json."""
    seen = seen_before(store)
    tested = None if seen is None else overlap(conclusion.tested_subjects, seen)
    tags = {**study.tags, registry.CHECKPOINT_HASH_TAG: result.checkpoint_hash}
    lineage = {
        **tags,
        **conclusion.lineage,
        "config hash": result.config_hash,
        "commit": f"step {result.step}",
        "MLflow run": result.mlflow_run_id or "none",
    }
    is_phantom = any(each.is_phantom for each in conclusion.about.sets)
    notices = [
        *([PHANTOM] if is_phantom else []),
        *conclusion.notices,
        seen_notice(tested, num_tested=len(conclusion.tested_subjects), unit=conclusion.unit),
    ]
    history = history_of(store)
    sections = [results_section(conclusion), *conclusion.sections]
    sections += [training_section(history, conclusion, seconds), sentinel_section(history, config)]
    page = Page(
        study.title, conclusion.verdict, notices, sections, lineage, origin=origin, methods=methods(conclusion.methods)
    )
    model = f"models:/{register.name}@{register.alias}" if register and config.tracking.uri else store.join("bundle")
    files = {**conclusion.files, "report.html": render(page)}
    in_bundle = {card.FILE: card_of(conclusion, folder / "bundle", model=model)}
    if conclusion.kept_scores:
        in_bundle[SCORES] = conclusion.kept_scores
    for name, text in {**files, **{f"bundle/{name}": text for name, text in in_bundle.items()}}.items():
        (folder / name).write_text(text, encoding="utf-8")
    upload(store, folder)
    log_results(
        result.mlflow_run_id,
        config.tracking,
        description=conclusion.verdict,
        tags=score_tags(conclusion, result),
        sets=conclusion.about.sets,
        files=[folder / name for name in files],
    )
    registered, against = register_model(
        conclusion, result, config, folder, tags=tags, tested=tested, register=register
    )
    numbers = without_nan(
        {
            **conclusion.numbers,
            "verdict": conclusion.verdict,
            "metrics": dict(conclusion.metrics),
            "models": {name: model_numbers(model) for name, model in conclusion.models.items()},
            "notices": [notice.text for notice in notices],
            "overlap": tested,
            "lineage": lineage,
            "seconds": dict(seconds),
            "step": result.step,
            "registered": registered,
            "not_champion": against,
        }
    )
    store.put(METRICS, (json.dumps(numbers, indent=1) + "\n").encode())
    return numbers


def register_model(
    conclusion: Conclusion,
    result: FitResult,
    config: TrainConfig,
    folder: Path,
    *,
    tags: Mapping[str, str],
    tested: Sequence[str] | None,
    register: RegisterConfig | None,
) -> tuple[list[str], list[str]]:
    """The registered model as name@alias, and as name@champion when nothing speaks against it, or none; and what
    speaks against it."""
    uri = config.tracking.uri
    if register is None or uri is None:
        return [], []
    trained = next(iter(conclusion.models.values()))
    against = reasons_against(register.champion, trained.intervals, tested)
    if register.champion is not None:
        try:
            champion = champion_scores(register.name, uri=uri, checkpoint_hash=result.checkpoint_hash)
            against += conclusion.reasons_against(register.champion.metric, champion)
        except RegistryError as error:  # the run is done: nothing is promoted, and the reason is told
            against.append(str(error))
    about = {
        "callosum.config_hash": result.config_hash,
        "callosum.test_subjects": str(len(conclusion.tested_subjects)),
        "callosum.overlap": "unknown" if tested is None else str(len(tested)),
        "callosum.champion": "refused: " + "; ".join(against) if against else "yes",
    }
    phase(f"registering {register.name}")
    name = registry.register(
        folder / "bundle",
        name=register.name,
        alias=register.alias,
        tags={**tags, **about, **score_tags(conclusion, result), **conclusion.tags},
        uri=uri,
        run_id=result.mlflow_run_id,
        experiment=config.tracking.experiment,
    )
    has_moved_on = "@" not in name  # registered before, and the alias names another version by now
    return [name] if against or has_moved_on else [name, promote(name, uri=uri)], against if register.champion else []


def score_tags(conclusion: Conclusion, result: FitResult) -> dict[str, str]:
    """The trained model's test scores with their intervals, and its metrics of the other final splits."""
    trained = next(iter(conclusion.models.values()))
    tested = {f"test_{name}": str(interval) for name, interval in trained.intervals.items()}
    others = {key.replace("/", "_"): f"{value:.4f}" for key, value in result.metrics.items() if key.count("/") == 1}
    return {f"callosum.{name}": text for name, text in (others | tested).items()}


def card_of(conclusion: Conclusion, bundle: Path, *, model: str) -> str:
    """The card of the trained model, which `model` will name."""
    seen = read_seen(bundle)
    return model_card(
        conclusion.about,
        model=model,
        verdict=conclusion.verdict,
        results=results_table(conclusion),
        num_tested=len(conclusion.tested_subjects),
        num_seen=None if seen is None else len(seen),
    )


def model_numbers(model: Model) -> dict[str, object]:
    """A line of the results as plain values."""
    return {**model.details, **{name: dataclasses.asdict(interval) for name, interval in model.intervals.items()}}


def results_table(conclusion: Conclusion) -> list[list[str]]:
    """All models, the trained one first, with their intervals, below the head."""
    rows = [
        [name, *(str(model.intervals[metric]) for metric in conclusion.metrics), model.note]
        for name, model in conclusion.models.items()
    ]
    return [["", *conclusion.metrics.values(), ""], *rows]


def results_section(conclusion: Conclusion) -> Section:
    """The table of all models."""
    return Section(
        f"Results on held-out {conclusion.unit}s",
        table=results_table(conclusion),
        text=f"Brackets are bootstrap intervals over {conclusion.unit}s. Every metric is computed once over the whole "
        "split.",
    )


def seen_notice(tested: Sequence[str] | None, *, num_tested: int, unit: str = "subject") -> Notice:
    """What the weights that the run started from had seen of the held-out subjects, or images."""
    if tested is None:
        return Notice(
            "warning",
            f"The pretrained weights do not say which {unit}s they were trained on, so an overlap with the held-out "
            f"{unit}s cannot be excluded, and this model cannot be promoted.",
        )
    if tested:
        named = ", ".join(tested[:8]) + (", ..." if len(tested) > 8 else "")
        return Notice(
            "alarm",
            f"The pretrained weights have seen {len(tested)} of the {num_tested} held-out {unit}s ({named}). These are "
            f"not results on new {unit}s, and this model cannot be promoted.",
        )
    return Notice("remark", f"None of the {num_tested} held-out {unit}s was seen in pretraining.")


def history_of(store: Store) -> History:
    """The tracked (step, value) of every metric of a run folder."""
    history: dict[str, list[tuple[int, float]]] = {}
    for line in store.read(SPOOL).splitlines():
        row = json.loads(line)
        history.setdefault(row["key"], []).append((int(row["step"]), float(row["value"])))
    return history


def training_section(history: History, conclusion: Conclusion, seconds: Mapping[str, float]) -> Section:
    """Loss and validation metrics over steps, and where the time went."""
    losses = {name: points for name, points in history.items() if name in ("train/loss", "validation/loss")}
    scores = {
        name.removeprefix("validation/"): points
        for name, points in history.items()
        if name.startswith("validation/") and name != "validation/loss" and not name.endswith(FINAL)
    }
    text = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    charts = {"loss": losses} | {
        label: {name: scores[name] for name in names if name in scores}
        for label, names in (conclusion.curves or {"validation": list(scores)}).items()
    }
    figures = [curves(lines, label=label, marks=conclusion.marks) for label, lines in charts.items() if lines]
    return Section("Training", text=text, figures=figures)


def upload(store: Store, folder: Path) -> None:
    """Put every file below `folder` into the run folder under the same name."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        store.put(path.relative_to(folder).as_posix(), path)


def without_nan(value: Any) -> Any:
    """Plain values with None for NaN, which JSON cannot hold."""
    if isinstance(value, Mapping):
        return {str(name): without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary(numbers: Mapping[str, Any], *, folder: str, following: str | None) -> str:
    """What the terminal shows of a finished run: verdict, results, where the rest is, and the command that follows."""
    titles: Mapping[str, str] = numbers["metrics"]
    table = [["", *titles.values()]]
    for name, model in numbers["models"].items():
        table.append([name, *(str(interval_of(model[metric])) for metric in titles)])
    registered = ", ".join(numbers["registered"]) or "no (register=null or tracking=null)"
    return "\n".join(
        [
            numbers["verdict"],
            aligned(table),
            *numbers["notices"],
            f"registered: {registered}",
            *(f"no champion: {reason}" for reason in numbers["not_champion"]),
            f"report: {folder.rstrip('/')}/report.html",
            *([following] if following else []),
        ]
    )


def interval_of(values: Mapping[str, float | None]) -> Interval:
    """An interval of metrics.json, where NaN is null."""
    return Interval(**{key: math.nan if value is None else value for key, value in values.items()})
