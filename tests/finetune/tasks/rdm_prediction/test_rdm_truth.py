"""On responses that are known to follow from the pixels, what is found is what is there, and a leak is more."""

from __future__ import annotations

import functools

import numpy as np
import torch

from brain_models.pair_heads import PairHeadConfig, ProjectionHead, make_head
from data_sharding.phantoms import algonauts2023 as phantom
from finetune.tasks.rdm_prediction.baselines import (
    ENCODING,
    BaselineConfig,
    baselines,
    chosen_encoding,
    encoding_weights,
    standardised,
)
from finetune.tasks.rdm_prediction.leak import HONEST, LEAKY, LeakConfig, leaky_and_honest, training_dissimilarities
from finetune.tasks.rdm_prediction.metrics import METRICS, RdmScores
from finetune.tasks.rdm_prediction.pairs import Pairs, make_pairs
from finetune.tasks.rdm_prediction.stimuli import Stimuli
from finetune.tasks.rdm_prediction.stimuli import standardised as standardised_vertices

NUM_IMAGES, SPLITS = 300, (200, 40, 60)
SPEARMAN = METRICS[0]
CONFIG = BaselineConfig([1e-4, 1e-3, 1e-2, 1e-1], 0, 0.01, 0)


@functools.cache
def pairs() -> Pairs:
    """V1 of the phantom's first subject."""
    return make_pairs(stimuli(phantom.NOISE), "pearson", "images", seed=0)


def stimuli(noise: float) -> Stimuli:
    in_v1 = [np.isin(phantom._labels(size), [1, 2]) for size in phantom.SIDES.values()]
    sides = [phantom.responses(1, side, NUM_IMAGES, 0, noise=noise) for side in phantom.SIDES]
    patterns = np.concatenate([side[:, inside] for side, inside in zip(sides, in_v1, strict=True)], axis=1)
    splits = [name for name, size in zip(("train", "validation", "test"), SPLITS, strict=True) for _ in range(size)]
    is_training = np.array(splits) == "train"
    names = [f"image{number:03d}" for number in range(NUM_IMAGES)]
    return Stimuli(
        *("", "phantom", "f", "i", names, splits, lambda rows: iter(())),
        *(standardised_vertices(patterns, is_training), None, None, "V1", True, ["subj01"]),
    )


def right_features() -> np.ndarray:
    """What the phantom's own extractor says of the images."""
    return phantom.features_of_images(1, NUM_IMAGES, 0).astype(np.float32)


def ceiling() -> float:
    """How well the RDM without noise, which no model can beat but by luck, predicts the measured one."""
    rows = pairs().images("test")
    return SPEARMAN.value(pairs().scores(rows, "test", stimuli(0.0).true_rdm(rows, "pearson")))


def trained(features: np.ndarray) -> RdmScores:
    """Test scores of a projection that started from the encoding model, after fifty steps over all training pairs."""
    torch.manual_seed(0)
    training, tested = pairs().images("train"), pairs().images("test")
    head = make_head(features.shape[1], PairHeadConfig("projection", 16, 0, 0.0, "pearson", "linear"))
    assert isinstance(head, ProjectionHead)
    head.standardise(torch.from_numpy(features[training]), training_dissimilarities(pairs()))
    standard = standardised(features, training)
    penalty, _ = chosen_encoding(pairs(), standard, CONFIG)
    head.start_from(torch.from_numpy(encoding_weights(pairs(), standard, penalty)[:-1]).float())
    rows = pairs().images("validation")
    head.fit_line(torch.from_numpy(features[rows]), pairs().true(rows))
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    first, second = np.triu_indices(len(training), 1)
    true = pairs().true(training)[first, second]
    for _ in range(50):
        embedded = head.embed(torch.from_numpy(features[training]))
        optimizer.zero_grad()
        (head(embedded[first], embedded[second]) - true).square().mean().backward()
        optimizer.step()
    matrix = head.matrix(head.embed(torch.from_numpy(features[tested]))).numpy()
    return pairs().scores(tested, "test", matrix)


def test_the_right_features_reach_four_fifths_of_the_ceiling_and_permuted_ones_nothing() -> None:
    assert 0.4 < ceiling() < 0.7
    assert SPEARMAN.value(trained(right_features())) > 0.8 * ceiling()
    permuted = np.random.default_rng(0).permutation(right_features())
    assert abs(SPEARMAN.value(trained(permuted))) < 0.1


def test_the_encoding_model_is_shown_where_it_wins() -> None:
    rows = pairs().images("test")
    found = {
        name: SPEARMAN.value(pairs().scores(rows, "test", each.predict(rows)))
        for name, each in baselines(pairs(), right_features(), right_features(), CONFIG).items()
    }
    assert max((value, name) for name, value in found.items() if np.isfinite(value))[1] == ENCODING
    assert found[ENCODING] > 0.8 * ceiling()
    assert 0.1 < found["feature distance"] < found[ENCODING]


def test_a_memorising_head_scores_when_pairs_are_dealt_out_and_knows_nothing_when_images_are() -> None:
    unrelated = np.random.default_rng(0).normal(size=(NUM_IMAGES, NUM_IMAGES)).astype(np.float32)
    head = PairHeadConfig("projection", 16, 0, 0.0, "pearson", "linear")
    found = leaky_and_honest(pairs(), unrelated, LeakConfig(head, 80, 64, 1e-2, 0.0, 0))
    assert abs(SPEARMAN.value(found[HONEST])) < 0.08
    assert SPEARMAN.value(found[LEAKY]) > 0.3
