"""A step learns from all pairs of its images; baselines are what they are called; nothing depends on the way there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge

from brain_models.pair_heads import PairHeadConfig, make_head
from finetune.tasks.rdm_prediction.baselines import (
    BaselineConfig,
    baselines,
    blocks_of_pairs,
    ridge_weights,
    standardised,
)
from finetune.tasks.rdm_prediction.leak import HONEST, LEAKY, LeakConfig, leaky_and_honest
from finetune.tasks.rdm_prediction.losses import LossConfig
from finetune.tasks.rdm_prediction.metrics import METRICS
from finetune.tasks.rdm_prediction.pairs import Pairs, SplitBy, make_pairs
from finetune.tasks.rdm_prediction.source import ImageBatch, InMemory
from finetune.tasks.rdm_prediction.stimuli import Stimuli
from finetune.tasks.rdm_prediction.task import RdmPrediction
from training.unfreezing import UnfreezingConfig

NUM_IMAGES, NUM_FEATURES = 120, 6
SPEARMAN = METRICS[0]
CONFIG = BaselineConfig(penalties=[1e-4, 1e-2, 1.0], svr_pairs=500, svr_cost=0.1, seed=0)
NEVER = UnfreezingConfig(1000, 0, None, 1.0, 1.0)


def features() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(NUM_IMAGES, NUM_FEATURES)).astype(np.float32)


def stimuli(*, noise: float = 0.5, splits: tuple[int, int, int] = (60, 20, 40)) -> Stimuli:
    """Responses that are linear in the features, and noise."""
    numbers = np.random.default_rng(1)
    patterns = features() @ numbers.normal(size=(NUM_FEATURES, 50)) + noise * numbers.normal(size=(NUM_IMAGES, 50))
    named = [name for name, size in zip(("train", "validation", "test"), splits, strict=True) for _ in range(size)]
    return Stimuli(
        location="nowhere",
        name="made",
        fingerprint="f",
        images_fingerprint="i",
        names=[f"image{number:03d}" for number in range(NUM_IMAGES)],
        splits=named,
        images=lambda rows: iter(()),
        patterns=patterns.astype(np.float32),
        matrix=None,
        categories=None,
        region="all",
        is_phantom=True,
        subjects=["one"],
    )


def pairs_of(split_by: SplitBy = "images", **changes: object) -> Pairs:
    return make_pairs(stimuli(**changes), "pearson", split_by, seed=0)  # type: ignore[arg-type]


def batch(rows: list[int], weight: list[float]) -> ImageBatch:
    taken = InMemory(pairs_of(), features()).fetch(np.array(rows))
    return ImageBatch(
        taken.inputs,
        torch.tensor(rows),
        torch.zeros(len(rows), dtype=torch.int64),
        torch.tensor(weight),
        torch.zeros(len(rows), dtype=torch.int64),
        [str(row) for row in rows],
        [0] * len(rows),
    )


def task(*, loss: str = "mse", both_orders: bool = False, kind: str = "projection") -> RdmPrediction:
    torch.manual_seed(0)
    head = make_head(NUM_FEATURES, PairHeadConfig(kind, 4, 1, 0.0, "euclidean", "linear"))  # type: ignore[arg-type]
    head.standardise(torch.from_numpy(features()), torch.tensor([0.7, 1.0, 1.3]))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    config = LossConfig(loss, 0.5, 0.1)  # type: ignore[arg-type]
    return RdmPrediction(
        head, None, pairs_of(), loss=config, both_orders=both_orders, unfreezing=NEVER, weight_decay=0.0
    )


def test_the_loss_of_a_step_is_the_error_of_all_pairs_of_its_images_and_padding_has_none() -> None:
    made = task()
    rows = [3, 40, 7, 22]
    true = np.corrcoef(made.pairs.stimuli.patterns[rows])  # type: ignore[index]
    embedded = made.head.embed(torch.from_numpy(features()[rows]))
    errors = [
        float(made.head(embedded[one : one + 1], embedded[other : other + 1])) - (1 - true[one, other])
        for one in range(4)
        for other in range(one + 1, 4)
    ]
    expected = np.mean(np.square(errors)) / float(made.head.spread) ** 2
    assert float(made(batch(rows, [1, 1, 1, 1]))["loss"]) == pytest.approx(expected, rel=1e-5)
    assert float(made(batch([*rows, 9], [1, 1, 1, 1, 0]))["loss"]) == pytest.approx(expected, rel=1e-5)


def test_images_of_another_split_make_no_training_pair() -> None:
    made = task()
    with_test = made(batch([3, 40, 7, 100, 110], [1] * 5))
    torch.testing.assert_close(with_test["loss"], made(batch([3, 40, 7], [1] * 3))["loss"])


def test_a_concatenation_trained_on_both_orders_does_not_care_how_a_batch_is_ordered() -> None:
    one_order, both = (task(kind="concatenation", both_orders=both) for both in (False, True))
    for made, agrees in ((one_order, False), (both, True)):
        forwards, backwards = made(batch([3, 40, 7], [1] * 3))["loss"], made(batch([7, 40, 3], [1] * 3))["loss"]
        assert torch.isclose(forwards, backwards, rtol=1e-5) == agrees


def test_the_contrastive_loss_pulls_images_and_responses_together() -> None:
    made = task(loss="contrastive")
    parts = made(batch(list(range(30)), [1] * 30))
    assert float(parts["loss"]) == pytest.approx(
        0.5 * float(parts["mse"]) + 0.5 * float(parts["contrastive"]), rel=1e-5
    )
    assert made.aligner is not None
    optimizer = torch.optim.Adam(made.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        made(batch(list(range(30)), [1] * 30))["loss"].backward()
        optimizer.step()
    assert float(made(batch(list(range(30)), [1] * 30))["contrastive"]) < 0.5 * float(parts["contrastive"])


def test_metrics_are_those_of_the_whole_matrix_of_a_split() -> None:
    made = task()
    rows = list(range(80, 120))
    predictions = made.predict(batch(rows, [1] * 40)) | {"split": torch.full((40,), 2)}
    predictions = {name: values.detach() for name, values in predictions.items()}
    found = made.metrics(predictions)
    upper = np.triu_indices(40, 1)
    true = 1 - np.corrcoef(made.pairs.stimuli.patterns[rows])  # type: ignore[index]
    matrix = made.head.matrix(predictions["embedded"]).numpy()
    assert found["spearman"] == pytest.approx(spearmanr(matrix[upper], true[upper])[0], abs=1e-4)


def test_the_ridge_out_of_core_is_scikit_learns_on_all_pairs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.tasks.rdm_prediction.baselines.PAIRS_AT_ONCE", 100)
    pairs = pairs_of()
    blocks = list(blocks_of_pairs(pairs, features(), "train"))
    joined, true = np.concatenate([one for one, _ in blocks]), np.concatenate([one for _, one in blocks])
    assert joined.shape == (60 * 59 / 2, 2 * NUM_FEATURES + 1)
    (weights,) = ridge_weights(pairs, features(), [0.01])
    penalty = 0.01 * np.trace(joined.T.astype(float) @ joined) / joined.shape[1]
    fitted = Ridge(alpha=penalty).fit(joined[:, :-1].astype(float), true)
    np.testing.assert_allclose(weights[:-1], fitted.coef_, rtol=1e-3, atol=1e-6)
    assert weights[-1] == pytest.approx(fitted.intercept_, rel=1e-4)


def scores_of(pairs: Pairs, given: np.ndarray) -> dict[str, float]:
    rows = pairs.images("test")
    learned = baselines(pairs, given, np.random.default_rng(5).random((NUM_IMAGES, 9), dtype=np.float32), CONFIG)
    return {name: SPEARMAN.value(pairs.scores(rows, "test", each.predict(rows))) for name, each in learned.items()}


def test_the_encoding_model_finds_linear_responses_and_permuted_features_find_nothing() -> None:
    found = scores_of(pairs_of(), features())
    assert list(found) == [
        "mean",
        "pixel RDM",
        "feature distance",
        "ridge on pair features",
        "linear SVR",
        "encoding model",
    ]
    assert found["encoding model"] > 0.9
    assert found["encoding model"] > found["feature distance"] > 0.4
    assert found["ridge on pair features"] > 0.4
    assert np.isnan(found["mean"])
    assert abs(found["pixel RDM"]) < 0.15
    permuted = scores_of(pairs_of(), np.random.default_rng(2).permutation(features()))
    assert max(abs(value) for value in permuted.values() if np.isfinite(value)) < 0.2


def test_baselines_never_see_the_test_split() -> None:
    pairs, changed = pairs_of(), pairs_of()
    assert changed.stimuli.patterns is not None
    changed.stimuli.patterns[changed.images("test")] *= -3
    rows = pairs.images("test")
    for one, other in zip(
        *(baselines(each, features(), features(), CONFIG).values() for each in (pairs, changed)), strict=True
    ):
        np.testing.assert_array_equal(one.predict(rows), other.predict(rows))
    given = features()
    again = given.copy()
    again[rows] += 10
    training = pairs.images("train")
    np.testing.assert_array_equal(standardised(given, training)[training], standardised(again, training)[training])


def test_a_memorising_head_gains_from_leaky_pairs_what_it_cannot_from_honest_ones() -> None:
    pairs = pairs_of(noise=2.0, splits=(80, 10, 30))
    unrelated = np.random.default_rng(3).normal(size=(NUM_IMAGES, 40)).astype(np.float32)
    config = LeakConfig(PairHeadConfig("concatenation", 64, 1, 0.0, "euclidean", "linear"), 150, 60, 3e-3, 0.0, 0)
    found = leaky_and_honest(pairs, unrelated, config)
    assert found[HONEST].is_pair.sum() == found[LEAKY].is_pair.sum() == 30 * 29 / 2
    assert abs(SPEARMAN.value(found[HONEST])) < 0.12
    assert SPEARMAN.value(found[LEAKY]) > SPEARMAN.value(found[HONEST]) + 0.05


def one_rank(rank: int, folder: str) -> None:
    """Saves the gradients of one of two ranks, each of which holds half of a step's images and a padded row."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    made = task(loss="correlation")
    share = batch([*STEP[rank::2], 0], [1] * (len(STEP) // 2) + [0])
    loss = made(share)["loss"]
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in made.named_parameters()}
    torch.save({"loss": loss.detach(), **gradients}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


STEP = [3, 40, 7, 22, 51, 18, 9, 33]


def test_the_shares_of_two_ranks_add_up_to_the_loss_and_gradient_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    made = task(loss="correlation")
    loss = made(batch(STEP, [1] * len(STEP)))["loss"]
    loss.backward()
    torch.testing.assert_close(shares[0]["loss"] + shares[1]["loss"], loss.detach())
    for name, parameter in made.named_parameters():
        torch.testing.assert_close(shares[0][name] + shares[1][name], parameter.grad, rtol=1e-4, atol=1e-6)
