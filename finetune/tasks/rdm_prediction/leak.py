"""What splitting pairs instead of images would have been worth: one memorising head, trained and scored both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from brain_models.pair_heads import PairHead, PairHeadConfig, make_head
from finetune.tasks.rdm_prediction.metrics import METRICS, RdmScores
from finetune.tasks.rdm_prediction.pairs import Pairs, make_pairs
from reports.page import Section

HONEST, LEAKY = "split by image", "pairs dealt out (leaky)"


@dataclass
class LeakConfig:
    """A small training of its own, on frozen features, the same for both splits."""

    head: PairHeadConfig
    steps: int
    batch_size: int  # images of a step
    learning_rate: float
    weight_decay: float
    seed: int


def leaky_and_honest(
    pairs: Pairs, features: Float[np.ndarray, "image feature"], config: LeakConfig
) -> dict[str, RdmScores]:
    """Test scores of the same head when images are split and when pairs are, with equal numbers of pairs."""
    scores = {}
    for name, split_by in ((HONEST, "images"), (LEAKY, "leaky_pairs")):
        own = make_pairs(pairs.stimuli, pairs.measure, split_by, seed=config.seed)  # type: ignore[arg-type]
        head, rows = trained_head(own, features, config), own.images("test")
        matrix = head.matrix(head.embed(torch.from_numpy(features[rows]))).numpy()
        scores[name] = own.scores(rows, "test", matrix)
    return scores


def trained_head(pairs: Pairs, features: Float[np.ndarray, "image feature"], config: LeakConfig) -> PairHead:
    """A head trained on the training pairs of random images, in evaluation mode."""
    generator, numbers = torch.Generator().manual_seed(config.seed), np.random.default_rng(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(1 << 30, (1,), generator=generator)))
        head = make_head(features.shape[1], config.head)
        training = pairs.images("train")
        head.standardise(torch.from_numpy(features[training]), training_dissimilarities(pairs))
        optimizer = torch.optim.AdamW(head.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
        for _ in range(config.steps):
            rows = numbers.permutation(training)[: config.batch_size]
            first, second = (torch.from_numpy(each) for each in np.nonzero(pairs.are_in(rows, "train")))
            embedded = head.embed(torch.from_numpy(features[rows]))
            errors = (head(embedded[first], embedded[second]) - pairs.true(rows)[first, second]) / head.spread
            optimizer.zero_grad()
            errors.square().mean().backward()
            optimizer.step()
    return head.eval()


def training_dissimilarities(pairs: Pairs) -> torch.Tensor:
    """The true values of the training pairs."""
    rows = pairs.images("train")
    return torch.from_numpy(pairs.stimuli.true_rdm(rows, pairs.measure)[pairs.are_in(rows, "train")])


def leak_section(scores: Mapping[str, RdmScores]) -> Section:
    """Honest and leaky side by side."""
    rows = [["", "test pairs", *(metric.title for metric in METRICS)]]
    for name, each in scores.items():
        values = (f"{metric.value(each):.3f}" for metric in METRICS)
        rows.append([name, f"{int(each.is_pair.sum()):,}", *values])
    return Section(
        "How much of a score would be the leak",
        table=rows,
        text="The same head on the same features, with as many pairs to train on and to test on. Where pairs are dealt "
        "out before the split, nearly every image of a tested pair has been trained on, and what the head has "
        "memorised of it counts as prediction.",
    )
