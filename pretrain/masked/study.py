"""Masked pretraining as a study: which task is trained on which samples, and what the result amounts to."""

import dataclasses
import itertools
import json
import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from brain_models import bundle
from brain_models.bundle import Bundle
from brain_models.inputs import StemSpec
from cluster.storage.stores import store_for
from data_sharding.read.joint import JointSource
from data_sharding.read.reader import BatchSource
from pretrain.masked.config import PretrainConfig
from pretrain.masked.masked_volumes import MaskedVolumes
from pretrain.masked.preparation import Preparation, prepare
from pretrain.masked.sets import OpenedSet, build_task, open_sets, open_source
from pretrain.report.scores import IntervalConfig, RegionScore, report_of, score_rows
from training.collectives import this_process
from training.evaluation import Evaluation
from training.identity import claim, config_hash
from training.loop import FitResult, Services, fit
from training.registry import models as registry
from training.registry.seen_subjects import overlap, seen_before, write_seen
from training.task import Task

WEIGHTS = "pretraining.safetensors"  # encoder and decoder; the bundle has no decoder

log = logging.getLogger(__name__)


def open_study(config: PretrainConfig) -> "MaskedStudy":
    """The study of a configuration; every rank opens its own."""
    return MaskedStudy(config, open_sets(config, scratch=config.run.scratch))


class MaskedStudy:
    """Reconstruction of hidden voxels on one or several shard sets; what is registered is the encoder."""

    def __init__(self, config: PretrainConfig, sets: Mapping[str, OpenedSet]) -> None:
        self.config = config
        self.sets = sets
        self.prepared: Preparation | None = None
        self.fingerprints = ", ".join(each.shard_set.fingerprint for each in sets.values())
        self.trained_subjects = {subject for each in sets.values() for subject in each.training_subjects}

    @property
    def tags(self) -> dict[str, str]:
        """Where the encoder comes from, for the registry; of several sets, in their order."""
        shard_sets = [each.shard_set for each in self.sets.values()]
        return {
            "callosum.part": "pretrain",
            "callosum.kind": self.config.label,
            "callosum.shards": ", ".join(each.location for each in self.sets.values()),
            "callosum.space": ", ".join(one.space.name for one in shard_sets),
            "callosum.alignment": ", ".join(str(one.manifest.preprocessing["alignment"]) for one in shard_sets),
            "callosum.space_fingerprint": ", ".join(one.space.fingerprint for one in shard_sets),
            "callosum.atlas": self.config.atlas or "none",
            "callosum.masking": f"{self.config.masking.kind} {self.config.masking.hidden_share}",
        }

    def make_task(self) -> MaskedVolumes:
        """A fresh task, the same on every rank; prepared, once the study is."""
        task = build_task(self.config, self.sets)
        if self.prepared is not None:
            self.prepared.give(task, self.config)
        return task

    def make_source(self) -> BatchSource | JointSource:
        """This rank's view of the samples."""
        return open_source(self.config, self.sets, this_process())

    def prepare(self, task: MaskedVolumes) -> None:
        """Give the task its voxel statistics, and what its evaluations stand beside, from the run folder or anew."""
        self.prepared = prepare(task, self.config, self.sets, key=preparation_key(self.config, self.fingerprints))

    def write_bundle(self, task: Task, folder: Path) -> None:
        """Write the encoder as a bundle, and beside it all weights, decoder included."""
        assert isinstance(task, MaskedVolumes)
        # First: the bundle's golden output is a forward pass, after which ZeRO 3 takes whole weights away again.
        folder.parent.mkdir(parents=True, exist_ok=True)
        weights = {name: values.detach().cpu().contiguous() for name, values in task.state_dict().items()}
        save_file(weights, folder.parent / WEIGHTS)
        first_of = {task.set_named(name).stem_name: each for name, each in reversed([*self.sets.items()])}
        bundle.save(
            folder,
            Bundle(
                kind="encoder",
                config=task.encoder.config,
                model=task.encoder,
                stems={name: stem_spec(first_of[name]) for name in task.encoder.stems},
                made_by={"part": "pretrain", "run": self.config.run.name, "set": self.fingerprints},
            ),
        )

    def conclude(self, task: MaskedVolumes, result: FitResult, weights: Path) -> dict[str, object]:
        """r2 on each final split beside the baselines, by group and region, and what the report on the weights says;
        rank 0 alone."""
        from pretrain.masked.run_report import report_run  # needs matplotlib, scikit-learn and nibabel

        scores = {
            split: score_split(task, found, split, sets=self.sets, config=self.config.report.intervals)
            for split, found in result.evaluations.items()
        }
        reports = {
            split: {
                name: report_of(own.regions, loss=own.loss, num_samples=own.num_samples) for name, own in each.items()
            }
            for split, each in scores.items()
        }
        tables = {split: {name: own.regions for name, own in each.items()} for split, each in scores.items()}
        run_id = result.mlflow_run_id
        return {
            "kind": self.config.label,
            "sets": {
                name: dataclasses.asdict(each) | {"alignment": self.sets[name].alignment}
                for name, each in self.config.named_sets.items()
            },
            "masking": dataclasses.asdict(self.config.masking),
            "reconstruction": {
                split: each if len(self.sets) > 1 else next(iter(each.values())) for split, each in reports.items()
            },
            "report": report_run(self.config, self.sets, weights=weights, tables=tables, mlflow_run_id=run_id),
            "seen_before": held_out_seen(self.config, self.sets, seen_before(store_for(self.config.run.folder))),
        }


def train(config: PretrainConfig) -> dict[str, object]:
    """The numbers of <run.folder>/metrics.json; every rank calls it, those other than 0 get an empty mapping."""
    study, store = open_study(config), store_for(config.run.folder)
    folder = Path(config.run.scratch) / f"{config.run.name}-results-{time.time_ns()}"

    def export(task: Task, evaluations: Mapping[str, Evaluation]) -> None:
        study.write_bundle(task, folder / "bundle")
        seen = seen_before(store)
        if seen is not None:  # else the bundle says that nobody knows whom it has seen
            write_seen(folder / "bundle", study.trained_subjects, also=seen)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            store.put(path.relative_to(folder).as_posix(), path)

    task, source = study.make_task(), study.make_source()
    identity = dataclasses.asdict(config)
    claim(store, identity)  # refuses the folder of another run
    study.prepare(task)
    tags = study.tags | {"callosum.set_fingerprint": source.fingerprint}
    try:
        result = fit(task, source, config.train, Services(config.run, identity, export=export, tags=tags))
        if not result.is_main:
            return {}
        summary = study.conclude(task, result, folder / WEIGHTS) | provenance(result)
        if config.register is not None and config.train.tracking.uri is not None:
            summary["registered"] = register(config, folder / "bundle", result, tags)
        store.put("metrics.json", json.dumps(summary, indent=1, sort_keys=True).encode())
        return summary
    finally:  # leave nothing on scratch: all of it is in the run folder
        shutil.rmtree(folder, ignore_errors=True)


def provenance(result: FitResult) -> dict[str, object]:
    """Where the numbers of a run come from, for metrics.json."""
    names = ("steps", "start", "fingerprint", "config_hash", "checkpoint", "checkpoint_hash", "mlflow_run_id")
    return {"seconds": round(result.seconds, 1), **{name: getattr(result, name) for name in names}}


def register(config: PretrainConfig, folder: Path, result: FitResult, tags: Mapping[str, str]) -> str:
    """The registered model as name@alias."""
    assert config.register is not None
    assert config.train.tracking.uri is not None
    hashes = {"callosum.config_hash": result.config_hash, "callosum.checkpoint_hash": result.checkpoint_hash}
    return registry.register(
        folder,
        name=config.register.names[config.label],
        alias=config.register.alias,
        tags={**tags, **hashes},
        uri=config.train.tracking.uri,
        run_id=result.mlflow_run_id,
        experiment=config.train.tracking.experiment,
    )


def preparation_key(config: PretrainConfig, fingerprints: str) -> str:
    """What the preparation of a run depends on; the sentinels' tokens are no part of the configuration's hash."""
    tokens = config.report.sentinels.tokens_per_sample
    return f"{config_hash(dataclasses.asdict(config))} {fingerprints} {tokens}"


@dataclass(frozen=True)
class SetScores:
    """How well the hidden voxels of one set's samples of a split were guessed."""

    regions: list[RegionScore]
    loss: float
    num_samples: int


def score_split(
    task: MaskedVolumes,
    evaluation: Evaluation,
    split: str,
    *,
    sets: Mapping[str, OpenedSet],
    config: IntervalConfig,
) -> dict[str, SetScores]:
    """The scores of a whole split by set, with intervals over subjects."""
    scores = {}
    for name, (is_own, rows) in task.by_set(evaluation.predictions).items():
        runs = sets[name].shard_set.runs(sets[name].kind, [split])
        subject_of = dict(zip(runs["scan_id"], runs["subject"], strict=True))
        subjects = [subject_of[scan] for scan in itertools.compress(evaluation.scan_ids, is_own.tolist())]
        regions = score_rows(rows, task.set_named(name).regions, subjects=subjects, config=config)
        scores[name] = SetScores(regions, task.split_loss(name, rows), len(subjects))
    return scores


def held_out_seen(
    config: PretrainConfig, sets: Mapping[str, OpenedSet], before: set[str] | None
) -> dict[str, int] | None:
    """How many subjects of each final split the weights that the run started from had been trained on, by split; None
    where these do not say. Where it is not 0, the split's scores are of no held-out subjects."""
    if before is None:
        return None
    found = {
        split: {subject for each in sets.values() for subject in each.shard_set.runs(each.kind, [split])["subject"]}
        for split in config.train.evaluation.final_splits
    }
    numbers = {split: len(overlap(subjects, before)) for split, subjects in found.items()}
    for split, number in numbers.items():
        if number:
            log.warning(
                "%d of %d subjects of split %s were seen by the weights that the run started from (%s): its scores are "
                "not of held-out subjects",
                number,
                len(found[split]),
                split,
                config.train.start.registered or config.train.start.checkpoint,
            )
    return numbers


def stem_spec(opened: OpenedSet) -> StemSpec:
    """What a served model must know to read scans like those of this set: of sets that share a stem, the first."""
    geometry, window = opened.geometry, opened.geometry.window
    return StemSpec(
        space=geometry.space,
        layout=geometry.layout,
        tubelet_frames=window.tubelet_frames,
        window_frames=window.window_frames,
        needs_brain_mask=opened.shard_set.needs_brain_mask(opened.kind),
        preprocessing=opened.shard_set.bold_preprocessing() if opened.kind == "bold" else None,
        atlas=geometry.atlas,
    )
