"""The study of an alignment: opened from a configuration, concluded beside chance and shuffled partners."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from brain_models import bundle
from brain_models.bundle import Bundle
from brain_models.scan_networks import T1TokenNetwork, VolumeCnnConfig
from brain_models.t1_embedder import T1EmbedderConfig
from data_sharding.read.pairs import Pairs
from data_sharding.read.reader import BatchSource
from data_sharding.splits import SPLITS
from finetune.backbone import Backbone
from finetune.config import FinetuneConfig
from finetune.tasks.contrastive_alignment.config import FUNCTION, STRUCTURE, Config
from finetune.tasks.contrastive_alignment.connectivity import People, connectivity_section
from finetune.tasks.contrastive_alignment.report import conclusion_sections, verdict
from finetune.tasks.contrastive_alignment.retrieval import (
    METRICS,
    OF_BOTH_DIRECTIONS,
    Similarities,
    chance,
    shuffled_recall,
)
from finetune.tasks.contrastive_alignment.sides import function_tower, set_of, structure_tower
from finetune.tasks.contrastive_alignment.task import ContrastiveAlignment
from reports.page import Notice, Section
from training.collectives import this_process
from training.evaluation import Evaluation
from training.loop import FitResult
from training.registry.card import About, TrainingSet
from training.statistics import Interval
from training.study import Conclusion, Model
from training.task import Task

MODEL = "aligned model"
CHANCE = "chance"


@dataclass
class AlignmentStudy:
    """One question about subjects: can a person's fMRI be found by the T1?"""

    run: FinetuneConfig
    config: Config
    pairs: Pairs
    backbones: Mapping[str, Backbone]
    title: str = field(init=False)
    tags: Mapping[str, str] = field(init=False)
    starts_from: Sequence[Path] = field(init=False)
    trained_subjects: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.title = f"{self.run.run.name}: {self.config.name.replace('_', ' ')}"
        self.starts_from = [backbone.folder for backbone in self.backbones.values()]
        self.trained_subjects = set(self.pairs.names("train"))
        self.tags = {
            "callosum.part": "finetune",
            "callosum.task": self.config.name,
            "callosum.shards": self.run.shards,
            "callosum.set_fingerprint": set_of(self.pairs, STRUCTURE).fingerprint,
            "callosum.function_shards": self.config.function.shards,
            "callosum.function_set_fingerprint": set_of(self.pairs, FUNCTION).fingerprint,
            "callosum.encoder": self.run.encoder,
            "callosum.function_encoder": self.config.function.encoder,
        } | {f"callosum.{side}_output": backbone.golden_hash for side, backbone in self.backbones.items()}

    def make_task(self) -> ContrastiveAlignment:
        """Both towers, registered weights under fresh projection heads."""
        torch.manual_seed(self.run.train.seed)
        structure, stem = structure_tower(self.config, self.pairs, self.backbones.get(STRUCTURE))
        return ContrastiveAlignment(
            structure,
            function_tower(self.config, self.pairs, self.backbones.get(FUNCTION)),
            self.config,
            subjects=sorted(subject for split in SPLITS for subject in self.pairs.names(split)),
            stem=stem,
        )

    def make_source(self, task: Task) -> BatchSource:
        """This rank's view of the pairs; a sample is a subject."""
        process = this_process()
        return BatchSource(
            self.pairs,
            self.run.data,
            rank=process.rank,
            world_size=process.world_size,
            cuts_epochs=self.config.order == "epoch_batches",
        )

    def prepare(self, task: Task, is_resuming: bool) -> None:
        """Nothing is fitted before the first step."""

    def write_bundle(self, task: Task, evaluations: Mapping[str, Evaluation], folder: Path) -> None:
        """The T1 side: what a served model needs to embed a T1 like those of the set."""
        assert isinstance(task, ContrastiveAlignment)
        tower = task.towers[STRUCTURE]
        _, stem = structure_tower(self.config, self.pairs, self.backbones.get(STRUCTURE))
        network, cnn = tower.network, self.config.structure.network
        config = T1EmbedderConfig(
            network.encoder.config if isinstance(network, T1TokenNetwork) else None,
            cnn if isinstance(cnn, VolumeCnnConfig) else None,
            self.config.projection,
        )
        made_by = {"part": "finetune", "run": self.run.run.name, "set": self.pairs.fingerprint}
        bundle.save(folder, Bundle("t1_embedder", config, tower, {"t1": stem}, made_by))

    def conclude(self, task: Task, result: FitResult) -> Conclusion:
        """Retrieval of the test subjects beside chance, its permutation test, and how the embeddings lie."""
        assert isinstance(task, ContrastiveAlignment)
        found = {split: task.similarities(result.evaluations[split].predictions) for split in ("validation", "test")}
        tested, numbers = found["test"], result.evaluations["test"].metrics
        generator = np.random.default_rng(self.run.bootstrap.seed)
        shuffled = shuffled_recall(tested, num_permutations=self.config.num_permutations, generator=generator)
        intervals = {metric.name: metric.interval(tested, self.run.bootstrap) for metric in METRICS}
        reached = int((shuffled >= intervals["recall_1"].value - 1e-9).sum())
        p = (1 + reached) / (1 + self.config.num_permutations)
        details = {"permutation_p": p, "shuffled_recall_1": float(shuffled.mean())} | {
            name: value for name, value in numbers.items() if name not in intervals
        }
        edges, predicted = self.connectivity(result.evaluations)
        return Conclusion(
            verdict=verdict(intervals["recall_1"], numbers, num_subjects=len(tested.subjects), p=p),
            metrics={metric.name: metric.title for metric in OF_BOTH_DIRECTIONS},
            models={
                MODEL: Model(intervals, details, f"commit of step {result.step}; p {p:.3g} over partners"),
                CHANCE: Model(chances(len(tested.subjects)), {}, "knows nothing"),
            },
            tested_subjects=tested.subjects,
            about=about(self),
            notices=self.notices(),
            sections=[
                *conclusion_sections(found, {name: each.metrics for name, each in result.evaluations.items()}),
                *edges,
            ],
            numbers={
                "left_out": {split: self.pairs.incomplete(split) for split in SPLITS},
                "connectivity": predicted,
            },
            files={"similarities_test.csv": similarities_table(tested)},
            marks={"chosen": result.step},
            curves={
                "loss beside the two levels of a model that knows nothing": ["loss", "constant_level", "random_level"],
                "retrieval": ["recall_1", "recall_5"],
                "effective rank": ["rank_structure", "rank_function"],
            },
            lineage={split: self.pairs.summary(split) for split in SPLITS},
        )

    def connectivity(
        self, evaluations: Mapping[str, Evaluation]
    ) -> tuple[list[Section], dict[str, Mapping[str, float]]]:
        """How well the test subjects' matrices are predicted; nothing where the training split was not evaluated, or
        the runs are no region series."""
        if "train" not in evaluations or "edges" not in evaluations["test"].predictions:
            return [], {}
        train, test = (people(evaluations[split].predictions) for split in ("train", "test"))
        section, numbers = connectivity_section(train, test, self.run.bootstrap)
        return [section], numbers

    def notices(self) -> list[Notice]:
        """What a reader must know beside the numbers."""
        if self.config.pairing == "own":
            return []
        return [
            Notice("alarm", "A control: trained on the fMRI of other subjects. Retrieval above chance would be a leak.")
        ]


def people(predictions: Mapping[str, torch.Tensor]) -> People:
    """What is known of the subjects of a split."""
    names = (STRUCTURE, FUNCTION, "patches", "edges")
    return People(*(predictions[name].double().numpy() for name in names))


def chances(num_subjects: int) -> dict[str, Interval]:
    """What knows nothing, by metric; exact."""
    return {metric.name: Interval(chance(metric.name, num_subjects), np.nan, np.nan) for metric in METRICS}


def similarities_table(found: Similarities) -> str:
    """similarities_test.csv: a line per T1 and fMRI, so that every number of the report can be computed again."""
    lines = ["t1_subject,fmri_subject,cosine"]
    for subject, row in zip(found.subjects, found.cosines, strict=True):
        lines += [f"{subject},{other},{cosine:.6f}" for other, cosine in zip(found.subjects, row, strict=True)]
    return "\n".join(lines) + "\n"


def about(study: AlignmentStudy) -> About:
    """What the model is, for its card."""
    kinds = {side: windows.kind for side, windows in study.pairs.sides.items()}
    sets = {side: set_of(study.pairs, side) for side in kinds}
    return About(
        what="A model that embeds a T1 so that it lies near the same person's resting fMRI: "
        f"{study.run.encoder}, aligned with {study.config.function.encoder} by InfoNCE.",
        use="Research on structure and function: to compare encoders, or as features of anatomy that go with function.",
        limits="Not a diagnosis, and not for decisions about a person. Scanners, ages and preprocessing other than "
        "below were not tested.",
        sets=[
            TrainingSet(
                shard_set.manifest.name,
                shard_set.location,
                shard_set.fingerprint,
                shard_set.facts(kinds[side]),
                is_phantom=shard_set.is_phantom,
            )
            for side, shard_set in sets.items()
        ],
    )
