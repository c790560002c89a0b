"""From a configuration to a registered backbone: wires the shard set, the task, the loop and the registry together.

`train` is an ordinary function; under several workers each rank calls it.
"""

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
from pretrain.masked.config import PretrainConfig
from pretrain.masked.masked_volumes import MaskedVolumes
from pretrain.masked.preparation import prepare
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


def train(config: PretrainConfig) -> dict[str, object]:
    """What the run led to, as in <run.folder>/metrics.json; every rank calls it and gets the same."""
    sets = open_sets(config, scratch=config.run.scratch)
    task = build_task(config, sets)
    source = open_source(config, sets, this_process())
    exporter = Exporter(config, sets)
    claim(exporter.store, identity(config))  # refuses the folder of another run
    prepare(task, config, sets, key=preparation_key(config, source.fingerprint))
    tags = lineage(config, sets) | {"callosum.set_fingerprint": source.fingerprint}
    services = Services(identity=identity(config), export=exporter.export, tags=tags)
    result = fit(task, source, config.train, services)
    scores = {
        split: score_split(task, evaluation, split, sets=sets, config=config.report.intervals)
        for split, evaluation in result.evaluations.items()
    }
    summary = summarise(config, result, scores=scores, sets=sets)
    if result.is_main:
        try:
            summary["report"] = exporter.report(result, scores)
            summary["seen_before"] = held_out_seen(config, sets, seen_before(exporter.store))
            exporter.publish(result, summary, tags)
        finally:
            exporter.clear()
    return summary


def preparation_key(config: PretrainConfig, fingerprint: str) -> str:
    """What the preparation of a run depends on; the sentinels' tokens are no part of the configuration's hash."""
    tokens = config.report.sentinels.tokens_per_sample
    return f"{config_hash(identity(config))} {fingerprint} {tokens}"


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


def identity(config: PretrainConfig) -> dict[str, object]:
    """The configuration as plain mappings; `run` is there once, as train.run."""
    return {key: value for key, value in dataclasses.asdict(config).items() if key != "run"}


def lineage(config: PretrainConfig, sets: Mapping[str, OpenedSet]) -> dict[str, str]:
    """Where a backbone comes from, for the registry; of several sets, in their order."""
    shard_sets = [each.shard_set for each in sets.values()]
    return {
        "callosum.part": "pretrain",
        "callosum.kind": config.label,
        "callosum.shards": ", ".join(each.location for each in sets.values()),
        "callosum.space": ", ".join(shard_set.space.name for shard_set in shard_sets),
        "callosum.alignment": ", ".join(str(one.manifest.preprocessing["alignment"]) for one in shard_sets),
        "callosum.space_fingerprint": ", ".join(shard_set.space.fingerprint for shard_set in shard_sets),
        "callosum.atlas": config.atlas,
        "callosum.masking": f"{config.masking.kind} {config.masking.hidden_share}",
    }


def summarise(
    config: PretrainConfig,
    result: FitResult,
    *,
    scores: Mapping[str, Mapping[str, SetScores]],
    sets: Mapping[str, OpenedSet],
) -> dict[str, object]:
    """metrics.json: r2 on each final split beside the baselines, by group and region, and where it came from."""
    reconstruction: dict[str, object] = {}
    for split, by_set in scores.items():
        reports = {
            name: report_of(own.regions, loss=own.loss, num_samples=own.num_samples) for name, own in by_set.items()
        }
        reconstruction[split] = reports if len(sets) > 1 else reports[next(iter(sets))]
    return {
        "kind": config.label,
        "sets": {
            name: dataclasses.asdict(each) | {"alignment": sets[name].alignment}
            for name, each in config.named_sets.items()
        },
        "masking": dataclasses.asdict(config.masking),
        "reconstruction": reconstruction,
        "steps": result.steps,
        "seconds": round(result.seconds, 1),
        "start": result.start,
        "fingerprint": result.fingerprint,
        "config_hash": result.config_hash,
        "checkpoint": result.checkpoint,
        "checkpoint_hash": result.checkpoint_hash,
        "mlflow_run_id": result.mlflow_run_id,
    }


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


class Exporter:
    """Writes the bundle while the loop still holds whole weights, and registers it afterwards. Used on rank 0."""

    def __init__(self, config: PretrainConfig, sets: Mapping[str, OpenedSet]) -> None:
        self.config = config
        self.sets = sets
        self.store = store_for(config.run.folder)
        self.folder = Path(config.run.scratch) / f"{config.run.name}-bundle-{time.time_ns()}"
        self.weights = self.folder.with_suffix(".safetensors")  # of the whole task

    def export(self, task: Task) -> None:
        """Write the encoder as a bundle, locally and into the run folder."""
        assert isinstance(task, MaskedVolumes)
        # First: the bundle's golden output is a forward pass, after which ZeRO 3 takes whole weights away again.
        weights = {name: values.detach().cpu().contiguous() for name, values in task.state_dict().items()}
        save_file(weights, self.weights)
        self.store.put(WEIGHTS, self.weights)
        first_of = {task.set_named(name).stem_name: each for name, each in reversed([*self.sets.items()])}
        fingerprints = ", ".join(each.shard_set.fingerprint for each in self.sets.values())
        bundle.save(
            self.folder,
            Bundle(
                kind="encoder",
                config=task.encoder.config,
                model=task.encoder,
                stems={name: stem_spec(first_of[name]) for name in task.encoder.stems},
                made_by={"part": "pretrain", "run": self.config.run.name, "set": fingerprints},
            ),
        )
        before = seen_before(self.store)
        if before is not None:  # else the bundle says that nobody knows whom it has seen
            trained = {subject for each in self.sets.values() for subject in each.training_subjects}
            write_seen(self.folder, trained, also=before)
        for path in sorted(self.folder.iterdir()):
            self.store.put(f"bundle/{path.name}", path)

    def report(self, result: FitResult, scores: Mapping[str, Mapping[str, SetScores]]) -> dict[str, object]:
        """What the run says about itself: numbers for metrics.json, files in the run folder and in MLflow."""
        from pretrain.masked.run_report import report_run  # needs matplotlib, scikit-learn and nibabel

        run_id = result.mlflow_run_id
        tables = {split: {name: own.regions for name, own in by_set.items()} for split, by_set in scores.items()}
        return report_run(self.config, self.sets, weights=self.weights, tables=tables, mlflow_run_id=run_id)

    def publish(self, result: FitResult, summary: dict[str, object], tags: Mapping[str, str]) -> None:
        """Register the bundle with its lineage and write metrics.json, last."""
        config = self.config
        if config.register is not None and config.train.tracking.uri is not None:
            hashes = {
                "callosum.config_hash": result.config_hash,
                "callosum.checkpoint_hash": result.checkpoint_hash,
            }
            summary["registered"] = registry.register(
                self.folder,
                name=config.register.names[config.label],
                alias=config.register.alias,
                tags={**tags, **hashes},
                uri=config.train.tracking.uri,
                run_id=result.mlflow_run_id,
                experiment=config.train.tracking.experiment,
            )
        self.store.put("metrics.json", json.dumps(summary, indent=1, sort_keys=True).encode())

    def clear(self) -> None:
        """Leave nothing on scratch: all of it is in the run folder."""
        shutil.rmtree(self.folder)
        self.weights.unlink()


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
