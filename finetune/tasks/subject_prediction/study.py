"""The study of subject prediction: opened from a configuration, concluded with intervals beside baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from brain_models import bundle
from brain_models.bundle import Bundle
from brain_models.run_predictor import RunClassifierConfig, RunRegressorConfig
from data_sharding.read.reader import BatchSource, ShardSet, Windows
from finetune.backbone import Backbone
from finetune.config import FinetuneConfig
from finetune.tasks.subject_prediction.champion import kept_scores, reasons_against
from finetune.tasks.subject_prediction.config import Config
from finetune.tasks.subject_prediction.connectomes import read_connectomes
from finetune.tasks.subject_prediction.labels import ClassLabel, Labels
from finetune.tasks.subject_prediction.methods import prediction_methods
from finetune.tasks.subject_prediction.outcomes import ClassOutcome, Outcome, ValueOutcome
from finetune.tasks.subject_prediction.probe import start_head
from finetune.tasks.subject_prediction.scores import Scores, intervals, scores_table
from finetune.tasks.subject_prediction.task import SubjectPrediction, build_model
from training.collectives import this_process
from training.engine.base import own_device
from training.evaluation import Evaluation
from training.loop import FitResult
from training.registry.card import About, TrainingSet
from training.statistics import Metric, paired_verdict
from training.study import Conclusion, Model
from training.task import Task
from training.watch.progress import phase

MODEL = "fine-tuned model"
SPLITS = ("validation", "test")
RUN_PREDICTORS = {"run_classifier": RunClassifierConfig, "run_regressor": RunRegressorConfig}


@dataclass
class SubjectStudy:
    """One question about subjects, answered from their BOLD runs by a pretrained backbone."""

    run: FinetuneConfig
    config: Config
    shard_set: ShardSet
    labels: Labels
    backbone: Backbone
    title: str = field(init=False)
    tags: Mapping[str, str] = field(init=False)
    starts_from: Sequence[Path] = field(init=False)
    trained_subjects: set[str] = field(init=False)
    outcome: Outcome = field(init=False)

    def __post_init__(self) -> None:
        self.title = f"{self.run.run.name}: {self.config.name.replace('_', ' ')}"
        self.tags = lineage(self)
        self.starts_from = [self.backbone.folder]
        self.trained_subjects = set(self.shard_set.runs("bold", ["train"])["subject"])
        self.outcome = make_outcome(self.config, self.labels, sorted(self.trained_subjects))

    def make_task(self) -> SubjectPrediction:
        """The backbone under an untrained head."""
        torch.manual_seed(self.run.train.seed)
        backbone = self.backbone.load(self.shard_set.space)
        return SubjectPrediction(
            build_model(backbone, self.config.head, self.shard_set.atlases[self.config.atlas]),
            self.labels,
            self.outcome,
            num_windows=self.config.num_windows,
            head_learning_rate_scale=self.config.head_learning_rate_scale,
            unfreezing=self.config.unfreezing,
            weight_decay=self.config.weight_decay,
            batch_size=self.run.data.batch_size,
        )

    def marks(self, chosen: int) -> dict[str, int]:
        """Steps to point out in the learning curves."""
        opens_at = self.config.unfreezing.first_layer_opens_at_step
        return ({} if opens_at is None else {"encoder opens": opens_at}) | {"chosen": chosen}

    def make_source(self, task: Task) -> BatchSource:
        """This rank's view of the runs; a sample is as many frames as one prediction is made from."""
        assert isinstance(task, SubjectPrediction)
        windows, process = Windows(self.shard_set, kind="bold", window_frames=task.num_frames), this_process()
        return BatchSource(windows, self.run.data, rank=process.rank, world_size=process.world_size)

    def prepare(self, task: Task, is_resuming: bool) -> None:
        """Start the head by a probe of the frozen encoder, unless it is to start at zero."""
        if is_resuming or self.config.probe is None:
            return
        assert isinstance(task, SubjectPrediction)
        phase("fitting the head on the frozen encoder's features")
        task.model.to(own_device())
        source = self.make_source(task)
        try:
            batches = source.evaluation("train", limit=None)
            start_head(task.model, batches, labels=self.labels, outcome=self.outcome, config=self.config.probe)
        finally:
            source.close()

    def write_bundle(self, task: Task, evaluations: Mapping[str, Evaluation], folder: Path) -> None:
        """Encoder and head, with what a served model must know to read scans like those of the set."""
        assert isinstance(task, SubjectPrediction)
        backbone = self.backbone.load(self.shard_set.space)
        stem = backbone.stems["bold"]
        stem.needs_brain_mask = self.shard_set.needs_brain_mask("bold")
        stem.preprocessing = self.shard_set.bold_preprocessing()
        stem.atlas = self.shard_set.atlases[self.config.atlas]
        reference = self._scores(task, evaluations)["test"].reference
        kind, said = self.outcome.model_kind, self.outcome.model_fields(reference)
        config = RUN_PREDICTORS[kind](task.model.encoder.config, self.config.head, task.num_frames, **said)
        made_by = {"part": "finetune", "run": self.run.run.name, "set": self.shard_set.fingerprint}
        bundle.save(folder, Bundle(kind, config, task.model, backbone.stems, made_by))

    def conclude(self, task: Task, result: FitResult) -> Conclusion:
        """The model on the test split, beside connectivity and the site alone on the same subjects."""
        assert isinstance(task, SubjectPrediction)
        trained = self._scores(task, result.evaluations)
        scored = {MODEL: (trained["test"], self.what_was_trained(result.step))} | self.baselines(trained)
        models = {
            name: Model(intervals(scores, self.outcome.metrics, self.run.bootstrap), self.outcome.details(scores), note)
            for name, (scores, note) in scored.items()
        }
        of_models = {name: scores for name, (scores, _) in scored.items()}
        is_phantom = self.shard_set.is_phantom
        metric = self.outcome.metrics[0]
        draws = {name: metric.draws(scores, self.run.bootstrap) for name, scores in of_models.items()}
        compared = paired_verdict(metric, draws, self.run.bootstrap.confidence)
        return Conclusion(
            verdict=f"The {MODEL} is {compared}. {metric.title} on {len(trained['test'].subjects)} test subjects: "
            + ", ".join(f"{name} {model.intervals[metric.name]}" for name, model in models.items())
            + ".",
            metrics={metric.name: metric.title for metric in self.outcome.metrics},
            models=models,
            tested_subjects=trained["test"].subjects,
            about=about(self),
            methods=prediction_methods(
                self.run,
                self.config,
                self.shard_set,
                encoder=task.model.encoder.config,
                num_frames=task.num_frames,
                metrics=self.outcome.metrics,
                step=result.step,
            ),
            sections=self.outcome.sections(of_models, models[MODEL].details),
            numbers={"is_phantom": is_phantom},
            files={"scores.csv": scores_table(of_models)},
            marks=self.marks(result.step),
            kept_scores=kept_scores(trained["test"]),
            reasons_against=lambda metric, champion: reasons_against(
                self.metric_named(metric), of_models, champion, self.run.bootstrap
            ),
            lineage=self._counts(),
        )

    def what_was_trained(self, chosen: int) -> str:
        """The chosen commit, how its head began, and whether its encoder had opened by then."""
        opens_at = self.config.unfreezing.first_layer_opens_at_step
        parts = [f"commit of step {chosen} ({self.run.train.choose})"]
        parts += ["the head started from a probe of the frozen encoder"] * (self.config.probe is not None)
        if opens_at is not None and chosen <= opens_at:
            parts.append("only the head was trained: the encoder is as registered")
        return "; ".join(parts)

    def baselines(self, trained: Mapping[str, Scores]) -> dict[str, tuple[Scores, str]]:
        """(test scores, note) of each baseline: learned on the train split only, scored on the subjects that the model
        was scored on (a run may be too short for it)."""
        config, labels, outcome = self.config, self.labels, self.outcome
        table = read_connectomes(self.shard_set, config.atlas, ["train", *SPLITS], data=self.run.data)
        known = {split: list(scores.subjects) for split, scores in trained.items()}
        known["train"] = [subject for subject in table.subjects_of("train") if subject in labels.truth_of]
        truth, sites = labels.rows(known["train"])
        fit = outcome.fit(table.rows(known["train"]), truth, sites=sites, config=config.baselines)
        connectivity, site_only = {}, {}
        for split in SPLITS:
            split_truth, split_sites = labels.rows(known[split])
            names = tuple(known[split])
            values = outcome.predicted(fit.score(table.rows(known[split]), split_sites))
            connectivity[split] = Scores(names, values, split_truth, split_sites)
            values = outcome.predicted(outcome.from_sites(sites, truth, split_sites))
            site_only[split] = Scores(names, values, split_truth, split_sites)
        note = f"{table.num_regions} regions, C = {fit.strength:g} chosen on training subjects"
        return {
            outcome.baseline_name: (outcome.with_reference(config.threshold, connectivity)["test"], note),
            "site alone": (outcome.with_reference(config.threshold, site_only)["test"], "knows nothing but the site"),
        }

    def metric_named(self, name: str) -> Metric:
        """The metric of the outcome with this name."""
        return next(metric for metric in self.outcome.metrics if metric.name == name)

    def _scores(self, task: SubjectPrediction, evaluations: Mapping[str, Evaluation]) -> dict[str, Scores]:
        scores = {split: task.scores(evaluations[split].predictions) for split in SPLITS}
        return self.outcome.with_reference(self.config.threshold, scores)

    def _counts(self) -> dict[str, str]:
        runs = {split: self.shard_set.runs("bold", [split]) for split in ["train", *SPLITS]}
        return {
            "subjects": ", ".join(f"{split} {table['subject'].nunique()}" for split, table in runs.items()),
            "subjects without a label, never used": str(self.labels.num_unlabelled),
        }


def make_outcome(config: Config, labels: Labels, train_subjects: Sequence[str]) -> Outcome:
    """The outcome that the label's kind asks for."""
    if isinstance(config.label, ClassLabel):
        return ClassOutcome(config.label, labels, train_subjects, is_balanced=config.balance_classes)
    return ValueOutcome(config.label, labels, train_subjects)


def about(study: SubjectStudy) -> About:
    """What the model is, for its card."""
    shard_set, label = study.shard_set, study.config.label
    says = f"{label.cases[0]} or {label.controls[0]}" if isinstance(label, ClassLabel) else f"a value in {label.unit}"
    facts = shard_set.facts("bold") | {"atlas": study.config.atlas}
    return About(
        what=f"A model that says {says} ({label.column}) from one BOLD run: {study.run.encoder}, fine-tuned "
        f"with a head for {study.config.name.replace('_', ' ')}.",
        use="Research on groups: as a baseline, as a start for further training, or to compare encoders on scans that "
        "were acquired and preprocessed like those below.",
        limits="Not a diagnosis, and not for decisions about a person. Sites, scanners, repetition times, ages or "
        "preprocessing other than below were not tested. The label is what the data set's table says.",
        sets=[
            TrainingSet(
                shard_set.manifest.name, study.run.shards, shard_set.fingerprint, facts, is_phantom=shard_set.is_phantom
            )
        ],
    )


def lineage(study: SubjectStudy) -> dict[str, str]:
    """Where a fine-tuned model comes from, for the registry and the report."""
    shard_set, backbone = study.shard_set, study.backbone
    tags = {
        "callosum.part": "finetune",
        "callosum.task": study.config.name,
        "callosum.shards": study.run.shards,
        "callosum.set_fingerprint": shard_set.fingerprint,
        "callosum.space": shard_set.space.name,
        "callosum.alignment": str(shard_set.manifest.preprocessing["alignment"]),
        "callosum.space_fingerprint": shard_set.space.fingerprint,
        "callosum.atlas": study.config.atlas,
        "callosum.backbone": study.run.encoder,
        "callosum.backbone_output": backbone.golden_hash,
    }
    inherited = ("set_fingerprint", "checkpoint_hash", "git_commit", "masking")
    theirs = {name: backbone.tags.get(f"callosum.{name}") for name in inherited}
    return tags | {f"callosum.backbone_{name}": value for name, value in theirs.items() if value is not None}
