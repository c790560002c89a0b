"""The task of telling cases from controls by one resting run: a registered encoder, a head, cross-entropy.

Knows windows, labels and layers; nothing of files, ranks or the loop.
"""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from brain_models.atlas import Atlas
from brain_models.bundle import Bundle
from brain_models.heads import HeadConfig
from brain_models.run_predictor import RunPredictor, run_predictor
from data_sharding.read.reader import Batch
from finetune.tasks.subject_prediction.evaluation import (
    Scores,
    auroc,
    balanced_accuracy,
    subject_scores,
    within_site_auroc,
)
from finetune.tasks.subject_prediction.labels import LabelConfig, Labels
from finetune.tasks.subject_prediction.probe import ProbeConfig
from training.task import Cost, ParameterGroup, Task
from training.unfreezing import split_decay

NO_LABEL = -1
METRICS = ("loss", "auroc", "within_site_auroc", "balanced_accuracy")


@dataclass
class UnfreezingConfig:
    """When encoder blocks open, counted from the top, and learning rates as shares of the run's, falling with depth."""

    head_learning_rate_scale: float
    first_block_opens_at_step: int
    steps_per_block: int
    encoder_learning_rate_scale: float
    depth_decay: float


@dataclass
class AdhdConfig:
    """configs/task/adhd_classification.yaml."""

    name: Literal["adhd_classification"]
    label: LabelConfig
    num_windows: int
    atlas: str
    balance_classes: bool
    weight_decay: float
    head: HeadConfig
    probe: ProbeConfig | None
    unfreezing: UnfreezingConfig


class AdhdClassification(Task):
    """Binary classification of runs; what it reports is per subject."""

    class_weights: Tensor

    def __init__(
        self, config: AdhdConfig, model: RunPredictor, labels: Labels, *, train_subjects: list[str], batch_size: int
    ) -> None:
        super().__init__()
        self.config = config
        self.model = model
        self.labels = labels
        self.batch_size = batch_size
        self.subjects = sorted(labels.is_case_of)
        self.number_of_subject = {subject: number for number, subject in enumerate(self.subjects)}
        weights = class_weights(labels, train_subjects) if config.balance_classes else (1.0, 1.0)
        self.register_buffer("class_weights", torch.tensor(weights), persistent=False)

    @property
    def num_frames(self) -> int:
        """Frames of a run that one decision is made from."""
        return self.config.num_windows * self.model.window_frames

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The loss: class-weighted cross-entropy of labelled runs over the constant batch size (see training.task)."""
        is_case, is_labelled = self._truth(batch)
        losses = functional.binary_cross_entropy_with_logits(self.logits(batch), is_case, reduction="none")
        weights = batch.weight * is_labelled * self.class_weights[is_case.long()]
        return {"loss": (weights * losses).sum() / self.batch_size}

    def logits(self, batch: Batch) -> Float[Tensor, "batch"]:
        """One logit a run; while the whole encoder is frozen, no gradient is kept for it."""
        is_frozen = not any(parameter.requires_grad for parameter in self.model.encoder.parameters())
        with torch.no_grad() if is_frozen else contextlib.nullcontext():
            tokens = self.model.tokens(batch.values, batch.is_measured, batch.repetition_time_s)
        return self.model.head(tokens).float()

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """`logit`, and `subject`: the number of the run's subject among the labelled ones, NO_LABEL for the others."""
        numbers = [self.number_of_subject.get(subject, NO_LABEL) for subject in batch.subjects]
        return {"logit": self.logits(batch), "subject": torch.tensor(numbers, device=batch.values.device)}

    def scores(self, predictions: dict[str, Tensor]) -> Scores:
        """One score a labelled subject: the mean logit of its runs."""
        is_labelled = predictions["subject"] != NO_LABEL
        logits = predictions["logit"][is_labelled].double().numpy()
        subjects = [self.subjects[number] for number in predictions["subject"][is_labelled].tolist()]
        is_case, sites = self.labels.rows(subjects)
        return subject_scores(logits, subjects, is_case=is_case, sites=sites)

    def metrics(self, predictions: dict[str, Tensor]) -> dict[str, float]:
        """METRICS over subjects, balanced accuracy at logit 0; undefined ones left out."""
        scores = self.scores(predictions)
        if not scores.subjects:
            return {}
        losses = np.logaddexp(0, np.where(scores.is_case, -scores.values, scores.values))
        numbers = (
            float(losses.mean()),
            auroc(scores.values, scores.is_case),
            within_site_auroc(scores.values, scores.is_case, scores.sites),
            balanced_accuracy(scores.values > 0, scores.is_case),
        )
        return {name: value for name, value in zip(METRICS, numbers, strict=True) if np.isfinite(value)}

    def parameter_groups(self) -> list[ParameterGroup]:
        """The head first, then blocks from the top, each deeper one later and slower; stem and positions last."""
        encoder, unfreezing = self.model.encoder, self.config.unfreezing
        layers: list[tuple[str, list[nn.Module]]] = [
            (f"encoder.{index}", [block]) for index, block in reversed(list(enumerate(encoder.blocks)))
        ]
        top_name, top = layers[0]
        layers[0] = (top_name, [*top, encoder.norm])
        layers.append(("encoder.stem", [encoder.stems, encoder.embed_position]))
        groups = split_decay(
            "head",
            [self.model.head],
            learning_rate_scale=unfreezing.head_learning_rate_scale,
            weight_decay=self.config.weight_decay,
            opens_at=0,
        )
        for depth, (name, modules) in enumerate(layers):
            groups += split_decay(
                name,
                modules,
                learning_rate_scale=unfreezing.encoder_learning_rate_scale * unfreezing.depth_decay**depth,
                weight_decay=self.config.weight_decay,
                opens_at=unfreezing.first_block_opens_at_step + depth * unfreezing.steps_per_block,
            )
        return groups

    def cost(self, batch: Batch) -> Cost:
        """The encoder over every window (backward only once a block is open); head and positions are left out."""
        encoder = self.model.encoder
        stem, width = encoder.stem("bold"), encoder.config.width
        tokens = self.model.window_frames // stem.tubelet_frames * stem.num_patches  # of a window
        matrices = sum(parameter.numel() for parameter in encoder.blocks.parameters() if parameter.ndim == 2)
        attention = 2 * encoder.config.depth * tokens * width  # a token's scores with all others, and their mixture
        forward = 2.0 * tokens * (matrices + stem.num_features * width + attention)
        passes = 3 if any(parameter.requires_grad for parameter in encoder.parameters()) else 1
        num_windows = len(batch.weight) * self.config.num_windows
        return Cost(tokens=num_windows * tokens, flops=passes * num_windows * forward)

    def checkpoint_activations(self) -> None:
        self.model.encoder.recomputes_activations = True

    @torch.compiler.disable  # names looked up in a dict: compiled, it would be compiled anew for every batch
    def _truth(self, batch: Batch) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]]:
        """1 for a case; 1 where the subject has a label."""
        known = [self.labels.is_case_of.get(subject) for subject in batch.subjects]
        device = batch.values.device
        rows = [[float(bool(label)) for label in known], [float(label is not None) for label in known]]
        # Pinned, because a copy from pageable memory waits until the device has done what it was asked to before.
        is_case, is_labelled = torch.tensor(rows, pin_memory=device.type == "cuda").to(device, non_blocking=True)
        return is_case, is_labelled


def class_weights(labels: Labels, train_subjects: list[str]) -> tuple[float, float]:
    """(control, case) weights by which both classes of the training split count alike and the mean weight is 1."""
    is_case = np.array([labels.is_case_of[subject] for subject in train_subjects if subject in labels.is_case_of])
    share = float(np.clip(is_case.mean(), 1e-6, 1 - 1e-6)) if len(is_case) else 0.5
    return 0.5 / (1 - share), 0.5 / share


def build_model(backbone: Bundle, config: AdhdConfig, atlas: Atlas) -> RunPredictor:
    """The backbone's encoder under a fresh head that pools over the atlas's own regions."""
    return run_predictor(backbone.encoder, dataclasses.replace(backbone.stems["bold"], atlas=atlas), config.head)
