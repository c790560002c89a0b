"""Masked pretraining as a study: which task is trained on which samples, and what the result amounts to."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from brain_models import bundle
from brain_models.bundle import Bundle
from brain_models.inputs import StemSpec
from data_sharding.read.joint import JointSource
from data_sharding.read.reader import BatchSource
from pretrain.masked.config import PretrainConfig
from pretrain.masked.masked_volumes import MaskedVolumes
from pretrain.masked.methods import pretraining_methods
from pretrain.masked.preparation import Preparation, prepare
from pretrain.masked.sets import OpenedSet, build_task, open_sets, open_source
from pretrain.report.scores import MODEL, UNKNOWN, RegionScore, report_of, score_rows
from training.collectives import this_process
from training.evaluation import Evaluation
from training.identity import config_hash
from training.loop import FitResult
from training.registry.card import About, TrainingSet
from training.statistics import BootstrapConfig
from training.study import Conclusion, Model, RegisterConfig, run
from training.task import Task
from training.watch.progress import phase

WEIGHTS = "pretraining.safetensors"  # encoder and decoder; the bundle has no decoder

PROVENANCE = ("steps", "start", "fingerprint", "config_hash", "checkpoint", "checkpoint_hash", "mlflow_run_id")


@dataclass(frozen=True)
class SetScores:
    """How well the hidden voxels of one set's samples of a split were guessed."""

    regions: list[RegionScore]
    loss: float
    num_samples: int


def open_study(config: PretrainConfig) -> "MaskedStudy":
    """The study of a configuration; every rank opens its own."""
    phase(f"opening {', '.join(each.shards for each in config.named_sets.values())}")
    return MaskedStudy(config, open_sets(config, scratch=config.run.scratch))


class MaskedStudy:
    """Reconstruction of hidden voxels on one or several shard sets; what is registered is the encoder."""

    def __init__(self, config: PretrainConfig, sets: Mapping[str, OpenedSet]) -> None:
        self.config = config
        self.sets = sets
        self.title = f"Masked pretraining: {config.label}"
        self.starts_from: Sequence[Path] = ()
        self.weights = Path()  # of the whole task, once the bundle is written
        self.prepared: Preparation | None = None
        self.fingerprints = ", ".join(each.shard_set.fingerprint for each in sets.values())
        self.tags: Mapping[str, str] = lineage(config, sets) | {"callosum.set_fingerprint": self.fingerprints}
        self.trained_subjects = {subject for each in sets.values() for subject in each.training_subjects}

    def make_task(self) -> MaskedVolumes:
        """A fresh task, the same on every rank; prepared, once the study is."""
        task = build_task(self.config, self.sets)
        if self.prepared is not None:
            self.prepared.give(task, self.config)
        return task

    def make_source(self, task: Task) -> BatchSource | JointSource:
        """This rank's view of the samples."""
        return open_source(self.config, self.sets, this_process())

    def prepare(self, task: Task, is_resuming: bool) -> None:
        """Give the task its voxel statistics, and what its evaluations stand beside: from the run folder, or anew."""
        assert isinstance(task, MaskedVolumes)
        self.prepared = prepare(task, self.config, self.sets, key=preparation_key(self.config, self.fingerprints))

    def write_bundle(self, task: Task, evaluations: Mapping[str, Evaluation], folder: Path) -> None:
        """Write the encoder as a bundle, and beside it all weights, decoder included."""
        assert isinstance(task, MaskedVolumes)
        # First: the bundle's golden output is a forward pass, after which ZeRO 3 takes whole weights away again.
        folder.parent.mkdir(parents=True, exist_ok=True)
        weights = {name: values.detach().cpu().contiguous() for name, values in task.state_dict().items()}
        self.weights = folder.parent / WEIGHTS
        save_file(weights, self.weights)
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

    def conclude(self, task: Task, result: FitResult) -> Conclusion:
        """r2 of model and baselines on the first final split; all final splits, by group and region, in the numbers."""
        from pretrain.masked.run_report import report_run  # needs matplotlib, scikit-learn and nibabel

        assert isinstance(task, MaskedVolumes)
        config = self.config
        scores = {
            split: score_split(task, found, split, sets=self.sets, config=config.report.intervals)
            for split, found in result.evaluations.items()
        }
        tables = {split: {name: own.regions for name, own in each.items()} for split, each in scores.items()}
        report, sections = report_run(
            config, self.sets, weights=self.weights, tables=tables, mlflow_run_id=result.mlflow_run_id
        )
        numbers = {
            "kind": config.label,
            "sets": {
                name: dataclasses.asdict(each) | {"alignment": self.sets[name].alignment}
                for name, each in config.named_sets.items()
            },
            "masking": dataclasses.asdict(config.masking),
            "reconstruction": {split: reconstruction(each) for split, each in scores.items()},
            "report": report,
            **{name: getattr(result, name) for name in PROVENANCE},
        }
        splits = list(scores)[:1]
        whole = {name: own.regions[0] for split in splits for name, own in scores[split].items()}
        runs = [each.shard_set.runs(each.kind, list(scores)) for each in self.sets.values()]
        found = models(whole)
        return Conclusion(
            verdict=" ".join(verdict(score, name, splits[0]) for name, score in whole.items()) or "Nothing was scored.",
            metrics={f"r2_{name}": f"R² of {name}, split {splits[0]}" for name in whole},
            models=found,
            tested_subjects=sorted({subject for each in runs for subject in each["subject"]}),
            sections=sections,
            curves=charts(whole),
            about=about(config, self.sets),
            methods=pretraining_methods(
                config, self.sets, self.make_task(), baselines=[*found][1:], step=result.step
            ),  # a fresh task: parameters of the trained one may be divided among ranks
            numbers=numbers,
        )


def train(config: PretrainConfig) -> dict[str, Any]:
    """The numbers of <run.folder>/metrics.json; every rank calls it, those other than 0 get an empty mapping."""
    own = config.register
    register = None if own is None else RegisterConfig(own.names[config.label], own.alias, champion=None)
    return run(
        open_study(config),
        config.train,
        config.run,
        identity=config,
        register=register,
    )


def lineage(config: PretrainConfig, sets: Mapping[str, OpenedSet]) -> dict[str, str]:
    """Where the encoder comes from, for the registry; of several sets, in their order."""
    shard_sets = [each.shard_set for each in sets.values()]
    return {
        "callosum.part": "pretrain",
        "callosum.kind": config.label,
        "callosum.shards": ", ".join(each.location for each in sets.values()),
        "callosum.space": ", ".join(one.space.name for one in shard_sets),
        "callosum.alignment": ", ".join(str(one.manifest.preprocessing["alignment"]) for one in shard_sets),
        "callosum.space_fingerprint": ", ".join(one.space.fingerprint for one in shard_sets),
        "callosum.atlas": config.atlas or "none",
        "callosum.masking": f"{config.masking.kind} {config.masking.hidden_share}",
    }


def about(config: PretrainConfig, sets: Mapping[str, OpenedSet]) -> About:
    """What the encoder is, for its card."""
    kinds = " and ".join(
        {"bold": "BOLD runs", "t1": "T1 scans"}[kind] for kind in sorted({s.kind for s in sets.values()})
    )
    return About(
        what=f"An encoder of {kinds} with {config.model.encoder.depth} layers of width {config.model.encoder.width}, "
        f"pretrained to reconstruct hidden voxels ({config.masking.kind} masking, {config.masking.hidden_share:g} "
        "hidden). It gives embeddings of scans, regions and tokens.",
        use="Research: as the start of fine-tuning, or as fixed features of scans that were acquired and preprocessed "
        "like those below.",
        limits="Not for decisions about a person. An embedding also tells site and repetition time. Scanners, "
        "populations or preprocessing other than below were not tested.",
        sets=[
            TrainingSet(
                f"{name}: {each.shard_set.manifest.name}",
                each.location,
                each.shard_set.fingerprint,
                each.shard_set.facts(each.kind) | {"atlas": each.geometry.atlas.name},
                is_phantom=each.shard_set.is_phantom,
            )
            for name, each in sets.items()
        ],
    )


def models(whole: Mapping[str, RegionScore]) -> dict[str, Model]:
    """The model and every baseline with the r2 of everything, by set; NaN for a baseline that a set does without."""
    names = dict.fromkeys([MODEL, *(name for score in whole.values() for name in score.r2)])
    return {name: Model({f"r2_{key}": score.r2.get(name, UNKNOWN) for key, score in whole.items()}) for name in names}


def charts(whole: Mapping[str, RegionScore]) -> dict[str, list[str]]:
    """Which validation metrics a chart shows together; names of several sets start with the set's."""
    shown: dict[str, list[str]] = {"R²": [], "effective rank": []}
    for name, score in whole.items():
        prefix = f"{name}/" if len(whole) > 1 else ""
        shown["R²"] += [f"{prefix}r2", *(f"{prefix}r2/{baseline}" for baseline in score.gain)]
        shown["effective rank"] += [f"{prefix}embedding_rank", f"{prefix}token_rank"]
    return shown


def verdict(score: RegionScore, name: str, split: str) -> str:
    """How the model compares with its best baseline on a set, in a sentence."""
    best = max((name for name in score.gain), key=lambda baseline: score.r2[baseline].value)
    gain = score.gain[best]
    compared = "better than" if gain.low > 0 else "worse than" if gain.high < 0 else "not clearly different from"
    return (
        f"Hidden voxels of {name}, split {split}, are predicted with R² {score.r2[MODEL]}: {compared} the {best} "
        f"baseline, by {gain}."
    )


def reconstruction(scores: Mapping[str, SetScores]) -> dict[str, object]:
    """A split's scores as metrics.json holds them; of several sets by set."""
    reports = {name: report_of(own.regions, loss=own.loss, num_samples=own.num_samples) for name, own in scores.items()}
    return dict(reports) if len(reports) > 1 else next(iter(reports.values()))


def preparation_key(config: PretrainConfig, fingerprints: str) -> str:
    """What the preparation of a run depends on; the sentinels' tokens are no part of the configuration's hash."""
    tokens = config.report.sentinels.tokens_per_sample
    return f"{config_hash(config)} {fingerprints} {tokens}"


def score_split(
    task: MaskedVolumes,
    evaluation: Evaluation,
    split: str,
    *,
    sets: Mapping[str, OpenedSet],
    config: BootstrapConfig,
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
