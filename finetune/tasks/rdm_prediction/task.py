"""Predicting the dissimilarity of brain responses to two images: an encoder, a head over pairs, all pairs of a step.

B images are encoded once for their B (B - 1) / 2 pairs. Knows batches and pairs; nothing of files or ranks.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from brain_models.image_encoders import ImageEncoder
from brain_models.pair_heads import PairHead
from data_sharding.splits import SPLITS
from finetune.tasks.rdm_prediction.losses import LossConfig, pair_losses
from finetune.tasks.rdm_prediction.metrics import METRICS, RdmScores
from finetune.tasks.rdm_prediction.pairs import Pairs
from finetune.tasks.rdm_prediction.source import ImageBatch
from training.task import Cost, ParameterGroup, Task
from training.unfreezing import UnfreezingConfig, layer_groups, split_decay
from training.whole_step import encoded_in_chunks, gathered, share_of_rank, symmetric_info_nce

ROWS_PER_CHUNK = 32


class RdmPrediction(Task):
    """One dissimilarity per pair of images; metrics are over all pairs of a split.

    `encoder` None: it never opens, and batches hold features that were computed before.
    """

    needs_whole_step = True

    def __init__(
        self,
        head: PairHead,
        encoder: ImageEncoder | None,
        pairs: Pairs,
        *,
        loss: LossConfig,
        both_orders: bool,
        unfreezing: UnfreezingConfig,
        weight_decay: float,
    ) -> None:
        super().__init__()
        self.head = head
        self.encoder = encoder
        self.pairs = pairs
        self.loss = loss
        self.both_orders = both_orders
        self.unfreezing = unfreezing
        self.weight_decay = weight_decay
        self.aligner: nn.Linear | None = None
        if loss.kind == "contrastive":
            assert pairs.stimuli.patterns is not None
            width = head.embed(torch.zeros(1, len(head.mean))).shape[1]
            self.aligner = nn.Linear(pairs.stimuli.patterns.shape[1], width)

    def embedded(self, batch: ImageBatch) -> Float[Tensor, "batch width"]:
        """What of each image enters its pairs."""
        if self.encoder is None:
            return self.head.embed(batch.inputs)
        chunks = encoded_in_chunks(self.encoder, batch.inputs, rows_per_chunk=ROWS_PER_CHUNK)
        return self.head.embed(chunks)

    def forward(self, batch: ImageBatch) -> dict[str, Tensor]:
        """The loss over all training pairs of the step's images, this rank's share of it."""
        embedded, weight = gathered(self.embedded(batch)), gathered(batch.weight)
        rows = gathered(batch.row)[weight > 0].cpu().numpy()
        embedded = embedded[weight > 0]
        first, second = (torch.from_numpy(each) for each in np.nonzero(self.pairs.are_in(rows, "train")))
        true = self.pairs.true(rows)[first, second].to(embedded)
        if self.both_orders:
            first, second, true = torch.cat([first, second]), torch.cat([second, first]), true.repeat(2)
        predicted = self.head(embedded[first], embedded[second])
        losses = pair_losses(predicted, true, self.loss, spread=self.head.spread)
        if self.aligner is not None:
            assert self.pairs.stimuli.patterns is not None
            responses = self.aligner(torch.from_numpy(self.pairs.stimuli.patterns[rows]).to(embedded))
            temperature = torch.full((1,), self.loss.temperature, device=embedded.device)
            aligned = symmetric_info_nce(embedded, responses, torch.ones_like(embedded[:, 0]), temperature=temperature)
            losses = losses | {"loss": losses["loss"] + self.loss.alpha * aligned, "contrastive": aligned.detach()}
        return {name: share_of_rank(value) for name, value in losses.items()}

    def predict(self, batch: ImageBatch) -> dict[str, Tensor]:
        """`embedded`, `row` of the set, and `split` by number."""
        return {"embedded": self.embedded(batch).float(), "row": batch.row, "split": batch.split}

    def scores(self, predictions: dict[str, Tensor]) -> RdmScores:
        """Predicted and true dissimilarities of the images of a split."""
        embedded = predictions["embedded"].to(self.head.centre.device)
        split = SPLITS[int(predictions["split"][0])]
        return self.pairs.scores(predictions["row"].numpy(), split, self.head.matrix(embedded).numpy())

    def metrics(self, predictions: dict[str, Tensor]) -> dict[str, float]:
        """`loss` (squared error in units of the training spread) and METRICS; undefined ones are left out."""
        scores = self.scores(predictions)
        if not scores.is_pair.any():
            return {}
        errors = np.subtract(*scores.pairs()) / float(self.head.spread)
        numbers = {metric.name: metric.value(scores) for metric in METRICS} | {"loss": float(np.mean(errors**2))}
        return {name: value for name, value in numbers.items() if math.isfinite(value)}

    def parameter_groups(self) -> list[ParameterGroup]:
        """The head, and the encoder's layers from the top, each deeper one later and slower."""
        modules: list[nn.Module | nn.Parameter] = [self.head, *([self.aligner] if self.aligner else [])]
        head = split_decay("head", modules, learning_rate_scale=1.0, weight_decay=self.weight_decay, opens_at=0)
        layers = [] if self.encoder is None else self.encoder.layers()
        return [*head, *layer_groups("encoder", layers, self.unfreezing, weight_decay=self.weight_decay)]

    def cost(self, batch: ImageBatch) -> Cost:
        """The head's products over every pair, and the encoder's over every image; convolutions count once per use."""
        num_images = len(batch.weight)
        of_pair = sum(parameter.numel() for parameter in self.head.parameters())
        of_image = sum(parameter.numel() for parameter in self.encoder.parameters()) if self.encoder else 0
        pairs = num_images * (num_images - 1) / 2
        return Cost(tokens=num_images, flops=6.0 * (pairs * of_pair + num_images * of_image))
