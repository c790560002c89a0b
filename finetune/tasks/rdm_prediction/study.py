"""The study of RDM prediction: opened from a configuration, concluded beside its baselines and the leak."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from brain_models import bundle
from brain_models.bundle import Bundle
from brain_models.image_encoders import ImageEncoder, ImageEncoderConfig
from brain_models.image_rdm import ImageRdm, ImageRdmConfig
from brain_models.images import ImageInput
from brain_models.pair_heads import PairHeadConfig, ProjectionHead, make_head
from data_sharding.read.reader import BatchSource
from data_sharding.splits import SPLITS
from finetune.config import FinetuneConfig
from finetune.tasks.rdm_prediction.baselines import (
    BaselineConfig,
    Learned,
    baselines,
    chosen_encoding,
    encoding_weights,
    learning_curve,
    standardised,
)
from finetune.tasks.rdm_prediction.dissimilarity import Measure
from finetune.tasks.rdm_prediction.encoders import (
    ImageConfig,
    encoded,
    features_of,
    inputs_of,
    model_hash,
)
from finetune.tasks.rdm_prediction.leak import (
    HONEST,
    LEAKY,
    LeakConfig,
    leak_section,
    leaky_and_honest,
    training_dissimilarities,
)
from finetune.tasks.rdm_prediction.losses import LossConfig
from finetune.tasks.rdm_prediction.metrics import METRICS, RdmScores, permutation_p
from finetune.tasks.rdm_prediction.pairs import Pairs, SplitBy
from finetune.tasks.rdm_prediction.report import sections
from finetune.tasks.rdm_prediction.source import InMemory
from finetune.tasks.rdm_prediction.stimuli import Stimuli, split_warnings
from finetune.tasks.rdm_prediction.task import RdmPrediction
from reports.page import Notice, Section
from training.collectives import this_process
from training.evaluation import Evaluation
from training.loop import FitResult
from training.registry.card import About, TrainingSet
from training.registry.promotion import ChampionConfig
from training.statistics import paired_verdict
from training.study import Conclusion, Model
from training.task import Task
from training.unfreezing import UnfreezingConfig

MODEL = "trained model"
SPEARMAN = METRICS[0]


@dataclass
class Config:
    """configs/task/*.yaml of this module."""

    name: str
    module: Literal["rdm_prediction"]
    region: str  # all, an atlas of the set, a region, or what names of regions begin with
    measure: Measure
    num_training_images: int | None  # drawn at random from the training split; null: all
    split_by: SplitBy  # leaky_pairs: a demonstration, whose model is never registered
    image: ImageConfig
    head: PairHeadConfig
    starts_from_encoding: bool  # a projection starts as the encoding model, where there are responses
    both_orders: bool  # train on (b, a) too: for a concatenation
    loss: LossConfig
    weight_decay: float
    unfreezing: UnfreezingConfig
    baselines: BaselineConfig
    baseline_pixels: int  # side of the small gray images of the pixel RDM
    leak: LeakConfig | None  # null: the report does not show what leaky pairs would have scored
    num_permutations: int  # of image labels, for p
    champion: ChampionConfig | None


@dataclass
class RdmStudy:
    """One question about images: how dissimilar are the brain's responses to every two of them?"""

    run: FinetuneConfig
    config: Config
    pairs: Pairs
    encoder: ImageEncoder
    title: str = field(init=False)
    tags: Mapping[str, str] = field(init=False)
    starts_from: Sequence[Path] = field(init=False)
    trained_subjects: set[str] = field(init=False)

    def __post_init__(self) -> None:
        stimuli = self.pairs.stimuli
        self.title = f"{self.run.run.name}: {self.config.measure} RDM of {stimuli.region}, {stimuli.name}"
        self.tags = {
            "callosum.part": "finetune",
            "callosum.task": self.config.name,
            "callosum.shards": self.run.shards,
            "callosum.set_fingerprint": stimuli.fingerprint,
            "callosum.encoder": self.run.encoder,
            "callosum.encoder_layer": self.config.image.layer,
            "callosum.encoder_hash": model_hash(self.encoder),
        }
        from_scratch = self.encoder.config.kind in ("cnn", "pixels")
        self.starts_from = [] if from_scratch else [Path(self.run.encoder)]  # which does not say what it has seen
        self.trained_subjects = {stimuli.names[row] for row in self.pairs.images("train")}

    @property
    def opens(self) -> bool:
        """True when the encoder is trained too."""
        opens_at = self.config.unfreezing.first_layer_opens_at_step
        is_in_time = opens_at is None or opens_at < self.run.train.steps
        return is_in_time and any(True for _ in self.encoder.parameters())

    @cached_property
    def features(self) -> np.ndarray:
        """float32 [image, feature] of the encoder as it was opened."""
        return features_of(self.pairs.stimuli, self.encoder)

    def make_task(self) -> RdmPrediction:
        """A fresh head, on the encoder if that opens."""
        torch.manual_seed(self.run.train.seed)
        head = make_head(self.encoder.num_features(), self.config.head)
        return RdmPrediction(
            head,
            copy.deepcopy(self.encoder) if self.opens else None,
            self.pairs,
            loss=self.config.loss,
            both_orders=self.config.both_orders,
            unfreezing=self.config.unfreezing,
            weight_decay=self.config.weight_decay,
        )

    def make_source(self, task: Task) -> BatchSource:
        """This rank's view of the images, all in memory."""
        spec = self.encoder.config.input
        inputs = inputs_of(self.pairs.stimuli, spec) if self.opens else self.features
        process = this_process()
        in_a_thread = replace(self.run.data, num_workers=0)  # loader processes would copy what is in memory
        return BatchSource(InMemory(self.pairs, inputs), in_a_thread, rank=process.rank, world_size=process.world_size)

    def prepare(self, task: Task, is_resuming: bool) -> None:
        """Standardise the head's inputs and outputs by training images and their pairs; a projection starts where the
        encoding model ends."""
        assert isinstance(task, RdmPrediction)
        training, head = self.pairs.images("train"), task.head
        given = torch.from_numpy(self.features[training])  # also where resuming: rank 0 concludes from them alone
        if is_resuming:
            return
        head.standardise(given, training_dissimilarities(self.pairs))
        has_responses = self.pairs.stimuli.patterns is not None and self.pairs.dealt is None
        if self.config.starts_from_encoding and has_responses and isinstance(head, ProjectionHead):
            features = standardised(self.features, training)
            penalty, _ = chosen_encoding(self.pairs, features, self.config.baselines)
            head.start_from(torch.from_numpy(encoding_weights(self.pairs, features, penalty)[:-1]).float())
            rows = self.pairs.images("validation")  # training patterns are fitted too well to say how far to trust them
            head.fit_line(torch.from_numpy(self.features[rows]), self.pairs.true(rows))

    def write_bundle(self, task: Task, evaluations: Mapping[str, Evaluation], folder: Path) -> None:
        """Encoder and head: images in, the matrix of their dissimilarities out."""
        assert isinstance(task, RdmPrediction)
        encoder = task.encoder or self.encoder
        config = ImageRdmConfig(
            encoder.config, self.config.head, len(task.head.mean), self.config.measure, self.config.region
        )
        made_by = {"part": "finetune", "run": self.run.run.name, "set": self.pairs.stimuli.fingerprint}
        bundle.save(folder, Bundle("image_rdm", config, ImageRdm(encoder, task.head), {}, made_by))

    def conclude(self, task: Task, result: FitResult) -> Conclusion:
        """The model on the test images, beside baselines on the same pairs, and what a leak would have given."""
        assert isinstance(task, RdmPrediction)
        predictions = result.evaluations["test"].predictions
        rows = predictions["row"].numpy()
        trained = task.scores(predictions)
        learned = self.baselines()
        scores = {MODEL: trained} | {
            name: self.pairs.scores(rows, "test", each.predict(rows)) for name, each in learned.items()
        }
        notes = {MODEL: f"commit of step {result.step}"} | {name: each.note for name, each in learned.items()}
        models = {name: self.model(each, notes[name]) for name, each in scores.items()}
        leak = self.leak()
        return Conclusion(
            verdict=self.verdict(scores, leak),
            metrics={metric.name: metric.title for metric in METRICS},
            models=models,
            tested_subjects=trained.stimuli,
            unit="image",
            about=about(self),
            notices=self.notices(),
            sections=[*([leak_section(leak)] if leak else []), *self.sections(rows, scores)],
            numbers={
                "is_phantom": self.pairs.stimuli.is_phantom,
                "noise_ceiling": None,
                "leak": {name: {metric.name: metric.value(each) for metric in METRICS} for name, each in leak.items()},
            },
            files={"rdm_test.csv": rdm_table(trained)},
            marks={"chosen": result.step},
            lineage={"images": ", ".join(f"{split} {len(self.pairs.images(split))}" for split in SPLITS)},
        )

    def baselines(self) -> dict[str, Learned]:
        """Every baseline, learned on the training split."""
        side = self.config.baseline_pixels
        spec = ImageInput(side, None, True, [0.0], [1.0], uses_min_max=False)
        gray = ImageEncoder(ImageEncoderConfig("pixels", spec, "projected", side * side))
        return baselines(self.pairs, self.features, encoded(self.pairs.stimuli, gray), self.config.baselines)

    def model(self, scores: RdmScores, note: str) -> Model:
        """A line of the results."""
        intervals = {metric.name: metric.interval(scores, self.run.bootstrap) for metric in METRICS}
        details: dict[str, object] = {}
        if self.pairs.dealt is None and np.isfinite(intervals[SPEARMAN.name].value):
            generator = np.random.default_rng(self.run.bootstrap.seed)
            p = permutation_p(scores, num_permutations=self.config.num_permutations, generator=generator)
            details, note = {"permutation_p": p}, f"{note}; p {p:.3g} over image labels"
        return Model(intervals, details, note)

    def leak(self) -> dict[str, RdmScores]:
        """Honest and leaky scores of a memorising head; empty where none is asked for."""
        if self.config.leak is None or self.pairs.dealt is not None:
            return {}
        return leaky_and_honest(self.pairs, self.features, self.config.leak)

    def verdict(self, scores: Mapping[str, RdmScores], leak: Mapping[str, RdmScores]) -> str:
        """The model beside the best baseline, and what of a score would have been the leak."""
        draws = {name: SPEARMAN.draws(each, self.run.bootstrap) for name, each in scores.items()}
        said = paired_verdict(SPEARMAN, draws, self.run.bootstrap.confidence)
        trained = scores[MODEL]
        verdict = (
            f"The {MODEL} is {said}. Spearman over {int(trained.is_pair.sum()):,} pairs of "
            f"{len(trained.stimuli)} test images: "
            + ", ".join(f"{name} {values[0]:.3f}" for name, values in draws.items() if np.isfinite(values[0]))
            + "."
        )
        if self.pairs.dealt is not None:
            return f"A demonstration of a leak, no result: pairs were dealt out before the split. {verdict}"
        if leak:
            honest, leaky = SPEARMAN.value(leak[HONEST]), SPEARMAN.value(leak[LEAKY])
            verdict += (
                f" A memorising head scores {leaky:.3f} when pairs are dealt out before the split and {honest:.3f} "
                f"when images are: {leaky - honest:+.3f} is the leak."
            )
        return verdict

    def notices(self) -> list[Notice]:
        """What a reader must know beside the numbers."""
        ceiling = "The noise ceiling is unknown: responses are averages over repetitions, or the matrix was given."
        return [
            *(Notice("warning", said) for said in split_warnings(self.pairs.stimuli)[1]),
            Notice("remark", ceiling),
        ]

    def sections(self, rows: np.ndarray, scores: dict[str, RdmScores]) -> list[Section]:
        """What the report shows after the results."""
        if self.pairs.dealt is not None:
            return []
        curve = learning_curve(self.pairs, self.features, self.config.baselines, SPEARMAN.value)
        return sections(self.pairs, rows, scores, curve)


def rdm_table(scores: RdmScores) -> str:
    """rdm_test.csv: a line per test pair, so that every number of the report can be computed again."""
    rows, columns = np.nonzero(scores.is_pair)
    predicted, true = scores.pairs()
    lines = ["image,other_image,true,predicted"]
    for row, column, truth, value in zip(rows, columns, true, predicted, strict=True):
        lines.append(f"{scores.stimuli[row]},{scores.stimuli[column]},{truth:.8g},{value:.8g}")
    return "\n".join(lines) + "\n"


def about(study: RdmStudy) -> About:
    """What the model is, for its card."""
    stimuli: Stimuli = study.pairs.stimuli
    facts = {
        "subjects": ", ".join(stimuli.subjects),
        "images": str(len(stimuli.names)),
        "region": stimuli.region,
        "dissimilarity": study.config.measure,
        "head": str(asdict(study.config.head)),
    }
    return About(
        what=f"A model that says how dissimilar the responses of {stimuli.region} to two images are "
        f"({study.config.measure}): {study.run.encoder} under a head over pairs.",
        use="Research on visual representations: to compare encoders and regions on images like those below.",
        limits="One subject's responses to one kind of pictures; nothing is known of other subjects, or other images.",
        sets=[TrainingSet(stimuli.name, stimuli.location, stimuli.fingerprint, facts, is_phantom=stimuli.is_phantom)],
    )
