"""Predicting a subject's class or value from one resting run: a registered encoder, a head, and a loss on its output.

Knows windows, labels and layers; nothing of files, ranks or the loop.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from jaxtyping import Float
from torch import Tensor

from brain_models.atlas import Atlas
from brain_models.bundle import Bundle
from brain_models.heads import HeadConfig
from brain_models.run_predictor import RunPredictor, run_predictor
from data_sharding.read.reader import WindowBatch
from finetune.tasks.subject_prediction.labels import Labels
from finetune.tasks.subject_prediction.outcomes import Outcome
from finetune.tasks.subject_prediction.scores import Scores, subject_scores
from training.task import Cost, ParameterGroup, Task
from training.unfreezing import UnfreezingConfig, layer_groups, split_decay

NO_LABEL = -1


class SubjectPrediction(Task):
    """One output per run; metrics are per subject."""

    def __init__(
        self,
        model: RunPredictor,
        labels: Labels,
        outcome: Outcome,
        *,
        num_windows: int,
        head_learning_rate_scale: float,
        unfreezing: UnfreezingConfig,
        weight_decay: float,
        batch_size: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.labels = labels
        self.outcome = outcome
        self.num_windows = num_windows
        self.head_learning_rate_scale = head_learning_rate_scale
        self.unfreezing = unfreezing
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.subjects = sorted(labels.truth_of)
        self.number_of_subject = {subject: number for number, subject in enumerate(self.subjects)}

    @property
    def num_frames(self) -> int:
        """Frames of a run that one prediction is made from."""
        return self.num_windows * self.model.window_frames

    def forward(self, batch: WindowBatch) -> dict[str, Tensor]:
        """The loss: the outcome's, of labelled runs, over the constant batch size (see training.task)."""
        truth, is_labelled = self._truth(batch)
        losses = self.outcome.losses(self.outputs(batch), truth)
        return {"loss": (batch.weight * is_labelled * losses).sum() / self.batch_size}

    def outputs(self, batch: WindowBatch) -> Float[Tensor, "batch"]:
        """One number per run."""
        tokens = self.model.tokens(batch.values, batch.is_measured, batch.repetition_time_s)
        return self.model.head(tokens).float()

    def predict(self, batch: WindowBatch) -> dict[str, Tensor]:
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
        numbers |= {metric.name: metric.value(scores) for metric in self.outcome.metrics}
        return {name: value for name, value in numbers.items() if math.isfinite(value)}

    def parameter_groups(self) -> list[ParameterGroup]:
        """The head, and the encoder's layers from the top, each deeper one later and slower."""
        head = split_decay(
            "head",
            [self.model.head],
            learning_rate_scale=self.head_learning_rate_scale,
            weight_decay=self.weight_decay,
            opens_at=0,
        )
        layers = self.model.encoder.layers()
        return [*head, *layer_groups("encoder", layers, self.unfreezing, weight_decay=self.weight_decay)]

    def cost(self, batch: WindowBatch) -> Cost:
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
    def _truth(self, batch: WindowBatch) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]]:
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
