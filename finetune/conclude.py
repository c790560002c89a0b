"""What a finished run amounts to: the chosen commit's model, scored once on the test split beside baselines, then
written, reported and registered."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from brain_models import bundle
from brain_models.bundle import Bundle
from brain_models.run_predictor import RunClassifierConfig
from cluster.storage.stores import Store, store_for
from finetune.promotion import promote, refusals
from finetune.report import page as report
from finetune.tasks.adhd_classification import AdhdClassification
from finetune.tasks.subject_prediction.baselines import fit_logistic, log_odds, site_prevalence
from finetune.tasks.subject_prediction.connectomes import read_connectomes
from finetune.tasks.subject_prediction.evaluation import Scores, choose_threshold, evaluate
from finetune.tasks.subject_prediction.probe import ProbeResult
from training.checkpoint import Commit, StartingPoint, commit_hash, committed_folders, read_commit
from training.collectives import from_main, this_process
from training.engine.elastic import fetch_state
from training.engine.engines import make_engine
from training.evaluation import evaluate as evaluate_split
from training.loop import FitResult
from training.registry import models as registry
from training.registry.seen_subjects import overlap, seen_before, write_seen

if TYPE_CHECKING:
    from finetune.train import Setup

SPLITS = ("validation", "test")


def conclude(
    setup: Setup,
    result: FitResult,
    *,
    probe: ProbeResult | None,
    tags: Mapping[str, str],
    seconds: Mapping[str, float],
) -> dict[str, object]:
    """The numbers of metrics.json (empty on other ranks than 0, which only help to evaluate)."""
    started = time.monotonic()
    store = store_for(setup.config.run.folder)
    # The one that rank 0 sees: an attempt that is not quite dead may commit another while ranks look.
    folder, commit = cast(
        "tuple[str, Commit]", from_main(choose_commit(store, setup) if this_process().is_main else None)
    )
    task = setup.task()
    source = setup.source(task)
    engine = make_engine(task, setup.config.train, num_micro_batches=source.num_micro_batches)
    local = Path(setup.config.run.scratch) / f"{setup.config.run.name}-chosen-{this_process().rank:05d}"
    fetch_state(StartingPoint("named", store, folder, commit, None), local)
    engine.load(local)
    shutil.rmtree(local)
    scores = {}
    for split in SPLITS:
        found = evaluate_split(task, source, engine, split, limit=None)
        scores[split] = task.scores(found.predictions)
    source.close()
    chosen = {registry.CHECKPOINT_HASH_TAG: commit_hash(store, folder)}
    publisher = Publisher(setup, result, commit, scores, {**tags, **chosen})
    try:
        with engine.whole_parameters():
            if this_process().is_main:
                publisher.write_bundle(task)
        engine.close()
        # From here on nobody waits for another rank, however long the baselines take.
        if not this_process().is_main:
            return {}
        return publisher.publish(probe, {**seconds, "evaluation": time.monotonic() - started})
    finally:  # leave nothing on scratch: all of it is in the run folder
        shutil.rmtree(publisher.folder, ignore_errors=True)


def choose_commit(store: Store, setup: Setup) -> tuple[str, Commit]:
    """The last commit, or the one with the best validation metric; the test split has no say."""
    commits = {folder: read_commit(store, folder) for folder in committed_folders(store)}
    rules = setup.config.train.checkpoint
    name = rules.best_metric
    scored = {folder: commit.metrics[name] for folder, commit in commits.items() if name and name in commit.metrics}
    if setup.config.choose == "last" or not scored:
        folder = max(commits, key=lambda folder: commits[folder].step)
    else:
        folder = (min if rules.best_is == "lowest" else max)(scored, key=scored.__getitem__)
    return folder, commits[folder]


class Publisher:
    """Rank 0's part: baselines, bundle, report, registry."""

    def __init__(
        self, setup: Setup, result: FitResult, commit: Commit, scores: Mapping[str, Scores], tags: dict[str, str]
    ) -> None:
        self.setup = setup
        self.result = result
        self.commit = commit
        self.scores = scores
        self.tags = tags
        self.folder = Path(setup.config.run.scratch) / f"{setup.config.run.name}-results-{time.time_ns()}"
        self.threshold = cut(setup.config.threshold, scores)

    def publish(self, probe: ProbeResult | None, seconds: Mapping[str, float]) -> dict[str, object]:
        """Write and register everything, the bundle written before; the numbers of metrics.json."""
        started = time.monotonic()
        rows = {report.MODEL: self._classifier(self.scores, self.threshold, self._chosen(probe))} | self.baselines()
        seconds = {**seconds, "baselines": time.monotonic() - started}
        contents = report.ReportContents(
            title=f"{self.setup.config.run.name}: {self.setup.config.task.name.replace('_', ' ')}",
            is_phantom=is_phantom(self.setup),
            classifiers=rows,
            **self._history(),
            lineage=self._lineage(),
            overlap=self._overlap(),
            seconds=seconds,
        )
        report.write(contents, self.folder)
        numbers = report.as_json(contents) | {"step": self.commit.step, "registered": self._register(contents)}
        (self.folder / "metrics.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
        self._upload()
        return numbers

    def _chosen(self, probe: ProbeResult | None) -> str:
        started = f"; the head started from a probe of {probe.num_subjects} subjects" if probe else ""
        return f"commit of step {self.commit.step} ({self.setup.config.choose}){started}"

    def _classifier(self, scores: Mapping[str, Scores], threshold: float, note: str) -> report.Classifier:
        found = evaluate(scores["test"], threshold=threshold, config=self.setup.config.bootstrap)
        return report.Classifier(scores["test"], found, note)

    def baselines(self) -> dict[str, report.Classifier]:
        """Connectivity + logistic and site alone, scored on the subjects that the model was scored on (a run may be too
        short for it); learned on the train split only."""
        config, labels = self.setup.config, self.setup.labels
        table = read_connectomes(self.setup.shard_set, config.task.atlas, ["train", *SPLITS], data=config.data)
        known = {split: list(scores.subjects) for split, scores in self.scores.items()}
        known["train"] = [subject for subject in table.subjects_of("train") if subject in labels.is_case_of]
        is_case, sites = labels.rows(known["train"])
        fit = fit_logistic(table.rows(known["train"]), is_case, sites=sites, config=config.baselines)
        connectivity, site_only = {}, {}
        for split in SPLITS:
            truth, split_sites = labels.rows(known[split])
            names = tuple(known[split])
            values = fit.score(table.rows(known[split]), split_sites)
            connectivity[split] = Scores(names, values, truth, split_sites)
            odds = log_odds(site_prevalence(sites, is_case, split_sites))
            site_only[split] = Scores(names, odds, truth, split_sites)
        note = f"{table.num_regions} regions, C = {fit.strength:g} chosen on training subjects"
        rows = {"connectivity + logistic": (connectivity, note), "site alone": (site_only, "the site's share of cases")}
        return {
            name: self._classifier(scores, cut(config.threshold, scores), note) for name, (scores, note) in rows.items()
        }

    def write_bundle(self, task: AdhdClassification) -> None:
        """Write the bundle, locally; call it where parameters are whole."""
        setup = self.setup
        backbone = setup.backbone.load(setup.shard_set.space)
        stem = backbone.stems["bold"]
        stem.needs_brain_mask = setup.shard_set.needs_brain_mask("bold")
        stem.preprocessing = setup.shard_set.bold_preprocessing()
        stem.atlas = setup.shard_set.atlases[setup.config.task.atlas]
        label = setup.config.task.label
        model = task.model
        config = RunClassifierConfig(
            encoder=model.encoder.config,
            head=setup.config.task.head,
            segment_frames=task.num_frames,
            positive=label.cases[0],
            negative=label.controls[0],
            threshold=1 / (1 + math.exp(-self.threshold)),
        )
        made_by = {"part": "finetune", "run": setup.config.run.name, "set": setup.shard_set.fingerprint}
        saved = Bundle("run_classifier", config, model, backbone.stems, made_by)
        folder = bundle.save(self.folder / "bundle", saved)
        before = seen_before(store_for(setup.config.run.folder))
        if before is not None:  # else the bundle says that nobody knows whom it has seen
            write_seen(folder, set(setup.shard_set.runs("bold", ["train"])["subject"]), also=before)

    def _overlap(self) -> tuple[str, ...] | None:
        """Test subjects that the weights the run started from were trained on; None when these do not say."""
        seen = seen_before(store_for(self.setup.config.run.folder))
        return None if seen is None else tuple(overlap(self.scores["test"].subjects, seen))

    def _history(self) -> dict[str, dict]:
        """The run's curves and the steps to point out in them."""
        rows = read_history(store_for(self.setup.config.run.folder))
        task = self.setup.config.task
        return {
            "losses": {name: rows[name] for name in ("train/loss", "validation/loss") if name in rows},
            "metrics": {
                name.removeprefix("validation/"): points
                for name, points in rows.items()
                if name.startswith("validation/") and name != "validation/loss"
            },
            "marks": {"encoder opens": task.unfreezing.first_block_opens_at_step, "chosen": self.commit.step},
        }

    def _lineage(self) -> dict[str, str]:
        runs = {split: self.setup.shard_set.runs("bold", [split]) for split in ["train", *SPLITS]}
        return self.tags | {
            "subjects": ", ".join(f"{split} {table['subject'].nunique()}" for split, table in runs.items()),
            "subjects without a label, never used": str(self.setup.labels.num_unlabelled),
            "config hash": self.result.config_hash,
            "commit": f"step {self.commit.step}",
            "MLflow run": self.result.mlflow_run_id or "none",
        }

    def _register(self, contents: report.ReportContents) -> list[str]:
        """The registered model as name@alias, and as name@champion when nothing speaks against it; or none."""
        config = self.setup.config
        if config.register is None or config.train.tracking.uri is None:
            return []
        found = contents.classifiers[report.MODEL].evaluation
        reasons = refusals(found, contents.overlap, needed_low=config.register.champion_within_site_low)
        numbers = {
            "callosum.config_hash": self.result.config_hash,
            "callosum.test_within_site_auroc": report.show_interval(found.within_site_auroc),
            "callosum.test_subjects": str(found.num_subjects),
            "callosum.overlap": "unknown" if contents.overlap is None else str(len(contents.overlap)),
        }
        registered = registry.register(
            self.folder / "bundle",
            name=config.register.name,
            tags=self.tags | numbers | {"callosum.champion": "refused: " + "; ".join(reasons) if reasons else "yes"},
            alias=config.register.alias,
            uri=config.train.tracking.uri,
            run_id=self.result.mlflow_run_id,
            experiment=config.train.tracking.experiment,
        )
        is_passed_over = "@" not in registered  # registered before, and the alias has moved on to another version
        if reasons or is_passed_over:
            return [registered]
        return [registered, promote(registered, uri=config.train.tracking.uri)]

    def _upload(self) -> None:
        store = store_for(self.setup.config.run.folder)
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            store.put(path.relative_to(self.folder).as_posix(), path)


def cut(rule: Literal["validation", "half"], scores: Mapping[str, Scores]) -> float:
    """The logit above which a subject is called a case: best on validation subjects, or 0 (even odds)."""
    if rule == "half":
        return 0.0
    return choose_threshold(scores["validation"].values, scores["validation"].is_case)


def is_phantom(setup: Setup) -> bool:
    """True when the set's manifest says that its scans were made by a program."""
    manifest = setup.shard_set.manifest
    return any("phantom" in text.lower() for text in [manifest.name, *manifest.notes])


def read_history(store: Store) -> dict[str, list[tuple[int, float]]]:
    """Every tracked metric of a run over its steps."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in store.read("metrics.jsonl").splitlines():
        row = json.loads(line)
        curves.setdefault(row["key"], []).append((int(row["step"]), float(row["value"])))
    return curves
