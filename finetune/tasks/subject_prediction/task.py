"""Predicting a subject's class or value from one resting run: a registered encoder, a head, and a loss on its output.

Knows windows, labels and layers; nothing of files, ranks or the loop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from brain_models.atlas import Atlas
from brain_models.bundle import Bundle
from brain_models.heads import HeadConfig
from brain_models.run_predictor import RunPredictor, run_predictor
from data_sharding.read.reader import Batch
from finetune.tasks.subject_prediction.labels import Labels
from finetune.tasks.subject_prediction.outcomes import Outcome
from finetune.tasks.subject_prediction.scores import Scores, subject_scores
from training.task import Cost, ParameterGroup, Task
from training.unfreezing import split_decay

NO_LABEL = -1


@dataclass
class UnfreezingConfig:
    """When encoder blocks open, counted from the top, and learning rates as shares of the run's, falling with depth."""

    head_learning_rate_scale: float
    first_block_opens_at_step: int
    steps_per_block: int
    encoder_learning_rate_scale: float
    depth_decay: float


class SubjectPrediction(Task):
    """One output per run; metrics are per subject."""

    def __init__(
        self,
        model: RunPredictor,
        labels: Labels,
        outcome: Outcome,
        *,
        num_windows: int,
        unfreezing: UnfreezingConfig,
        weight_decay: float,
        batch_size: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.labels = labels
        self.outcome = outcome
        self.num_windows = num_windows
        self.unfreezing = unfreezing
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.subjects = sorted(labels.truth_of)
        self.number_of_subject = {subject: number for number, subject in enumerate(self.subjects)}

    @property
    def num_frames(self) -> int:
        """Frames of a run that one prediction is made from."""
        return self.num_windows * self.model.window_frames

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The loss: the outcome's, of labelled runs, over the constant batch size (see training.task)."""
        truth, is_labelled = self._truth(batch)
        losses = self.outcome.losses(self.outputs(batch), truth)
        return {"loss": (batch.weight * is_labelled * losses).sum() / self.batch_size}

    def outputs(self, batch: Batch) -> Float[Tensor, "batch"]:
        """One number per run; while the whole encoder is frozen, no gradient is kept for it."""
        is_frozen = not any(parameter.requires_grad for parameter in self.model.encoder.parameters())
        with torch.no_grad() if is_frozen else contextlib.nullcontext():
            tokens = self.model.tokens(batch.values, batch.is_measured, batch.repetition_time_s)
        return self.model.head(tokens).float()

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """`output`, and `subject`: the number of the run's subject among the labelled ones, NO_LABEL for the others."""
        numbers = [self.number_of_subject.get(subject, NO_LABEL) for subject in batch.subjects]
        return {"output": self.outputs(batch), "subject": torch.tensor(numbers, device=batch.values.device)}

    def scores(self, predictions: dict[str, Tensor]) -> Scores:
        """One score per labelled subject: the mean over its runs."""
        is_labelled = predictions["subject"] != NO_LABEL
        values = self.outcome.predicted(predictions["output"][is_labelled].double().numpy())
        subjects = [self.subjects[number] for number in predictions["subject"][is_labelled].tolist()]
        truth, sites = self.labels.rows(subjects)
        return subject_scores(values, subjects, truth=truth, sites=sites)

    def metrics(self, predictions: dict[str, Tensor]) -> dict[str, float]:
        """`loss` and the outcome's metrics over subjects; undefined ones are left out."""
        scores = self.scores(predictions)
        if not scores.subjects:
            return {}
        numbers = {"loss": self.outcome.mean_loss(scores)}
        numbers |= {metric.name: metric.function(scores) for metric in self.outcome.metrics}
        return {name: value for name, value in numbers.items() if math.isfinite(value)}

    def parameter_groups(self) -> list[ParameterGroup]:
        """The head first, then blocks from the top, each deeper one later and slower; stem and positions last."""
        encoder, unfreezing = self.model.encoder, self.unfreezing
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
            weight_decay=self.weight_decay,
            opens_at=0,
        )
        for depth, (name, modules) in enumerate(layers):
            groups += split_decay(
                name,
                modules,
                learning_rate_scale=unfreezing.encoder_learning_rate_scale * unfreezing.depth_decay**depth,
                weight_decay=self.weight_decay,
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
        num_windows = len(batch.weight) * self.num_windows
        return Cost(tokens=num_windows * tokens, flops=passes * num_windows * forward)

    def checkpoint_activations(self) -> None:
        self.model.encoder.recomputes_activations = True

    @torch.compiler.disable  # names looked up in a dict: compiled, it would be compiled anew for every batch
    def _truth(self, batch: Batch) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]]:
        """The truth of each run's subject (1 for a case), 0 without a label; and 1 where there is a label."""
        known = [self.labels.truth_of.get(subject) for subject in batch.subjects]
        device = batch.values.device
        rows = [[float(truth or 0) for truth in known], [float(truth is not None) for truth in known]]
        # Pinned, because a copy from pageable memory waits until the device has done what it was asked to before.
        truth, is_labelled = torch.tensor(rows, pin_memory=device.type == "cuda").to(device, non_blocking=True)
        return truth, is_labelled


def build_model(backbone: Bundle, head: HeadConfig, atlas: Atlas) -> RunPredictor:
    """The backbone's encoder under a fresh head that pools over the atlas's own regions."""
    return run_predictor(backbone.encoder, dataclasses.replace(backbone.stems["bold"], atlas=atlas), head)
