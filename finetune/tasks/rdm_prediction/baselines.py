"""What a trained model has to beat: the mean, raw distances, linear models of pairs, and an encoding model.

Everything is learned on training pairs (or training images) only; a distance becomes a dissimilarity by a line with a
slope that is not negative, fitted on them too, so order is kept and R² means something.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from sklearn.svm import LinearSVR

from finetune.tasks.rdm_prediction.dissimilarity import Measure, rdm
from finetune.tasks.rdm_prediction.metrics import RdmScores, r_squared
from finetune.tasks.rdm_prediction.pairs import Pairs
from finetune.tasks.rdm_prediction.stimuli import with_fewer_training_images

PAIRS_AT_ONCE = 1 << 14
TINY = 1e-9
MEAN, PIXELS, RAW = "mean", "pixel RDM", "feature distance"
RIDGE, SVR, ENCODING = "ridge on pair features", "linear SVR", "encoding model"


@dataclass
class BaselineConfig:
    """`penalties` of the ridges, as shares of the mean diagonal of their normal matrices, are chosen on validation."""

    penalties: list[float]
    svr_pairs: int  # of a random subsample of the training pairs; 0: no SVR
    svr_cost: float
    seed: int


Predict = Callable[[np.ndarray], np.ndarray]  # rows of the set -> the matrix of their dissimilarities


@dataclass
class Learned:
    """A baseline's predictions for the images of any rows, and what to say about it."""

    predict: Predict
    note: str


def baselines(
    pairs: Pairs,
    features: Float[np.ndarray, "image feature"],
    pixels: Float[np.ndarray, "image pixel"],
    config: BaselineConfig,
) -> dict[str, Learned]:
    """Every baseline by its name, learned."""
    standard = standardised(features, pairs.images("train"))
    learned = {
        MEAN: Learned(_mean(pairs), "of the training pairs"),
        PIXELS: Learned(_line(pairs, pixels, "euclidean"), "Euclidean, of small gray images"),
        RAW: Learned(_line(pairs, features, pairs.measure), "the features as they are"),
        RIDGE: _ridge(pairs, standard, config),
    }
    if config.svr_pairs:
        learned[SVR] = _svr(pairs, standard, config)
    if pairs.stimuli.patterns is not None and pairs.dealt is None:
        learned[ENCODING] = _encoding(pairs, standard, config)
    return learned


def standardised(
    features: Float[np.ndarray, "image feature"], training: np.ndarray
) -> Float[np.ndarray, "image feature"]:
    """The features by the mean and deviation of the training images."""
    mean, scale = features[training].mean(axis=0), features[training].std(axis=0)
    return (features - mean) / np.where(scale > TINY, scale, 1)


def _training(pairs: Pairs, predict: Predict) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and true values of the training pairs."""
    rows = pairs.images("train")
    return pairs.scores(rows, "train", predict(rows)).pairs()


def _mean(pairs: Pairs) -> Predict:
    mean = _training(pairs, lambda rows: np.zeros((len(rows), len(rows))))[1].mean()
    return lambda rows: np.full((len(rows), len(rows)), mean)


def _line(pairs: Pairs, features: Float[np.ndarray, "image feature"], measure: Measure) -> Predict:
    """The features' own dissimilarity, on the line that fits the training pairs best."""

    def distances(rows: np.ndarray) -> np.ndarray:
        return rdm(torch.from_numpy(features[rows]), measure).numpy()

    return _on_a_line(distances, *_training(pairs, distances))


def _on_a_line(distances: Predict, found: np.ndarray, true: np.ndarray) -> Predict:
    variance = np.var(found)
    slope = max(float(np.cov(found, true, bias=True)[0, 1] / variance), TINY) if variance > 0 else TINY
    offset = true.mean() - slope * found.mean()
    return lambda rows: offset + slope * distances(rows)


def pair_features(
    first: Float[np.ndarray, "pair feature"], second: Float[np.ndarray, "pair feature"]
) -> Float[np.ndarray, "pair joined"]:
    """|a - b|, a*b and 1, the same for (b, a)."""
    return np.concatenate([np.abs(first - second), first * second, np.ones((len(first), 1), first.dtype)], axis=1)


def blocks_of_pairs(
    pairs: Pairs, features: Float[np.ndarray, "image feature"], split: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pair features and true dissimilarities of a split, a block at a time."""
    rows = pairs.images(split)
    true, is_pair = pairs.stimuli.true_rdm(rows, pairs.measure), pairs.are_in(rows, split)
    first, second = np.nonzero(is_pair)
    for start in range(0, len(first), PAIRS_AT_ONCE):
        one, other = first[start : start + PAIRS_AT_ONCE], second[start : start + PAIRS_AT_ONCE]
        yield pair_features(features[rows[one]], features[rows[other]]), true[one, other]


def linear_predictions(features: Float[np.ndarray, "image feature"], weights: np.ndarray) -> Predict:
    """The matrix of a linear model of pair features."""

    def predict(rows: np.ndarray) -> np.ndarray:
        matrix = np.zeros((len(rows), len(rows)))
        first, second = np.triu_indices(len(rows), k=1)
        for start in range(0, len(first), PAIRS_AT_ONCE):
            one, other = first[start : start + PAIRS_AT_ONCE], second[start : start + PAIRS_AT_ONCE]
            matrix[one, other] = pair_features(features[rows[one]], features[rows[other]]) @ weights
        return matrix + matrix.T

    return predict


def ridge_weights(
    pairs: Pairs, features: Float[np.ndarray, "image feature"], penalties: Sequence[float]
) -> list[np.ndarray]:
    """The exact ridge on the pair features of all training pairs for every penalty, out of core: only the normal
    matrix is held. The last feature, the constant, is not penalised."""
    width = 2 * features.shape[1] + 1
    normal, moments = np.zeros((width, width)), np.zeros(width)
    for joined, true in blocks_of_pairs(pairs, features, "train"):
        normal += joined.T @ joined
        moments += joined.T @ true
    ridge = np.full(width, np.trace(normal) / width)
    ridge[-1] = 0
    return [np.linalg.solve(normal + np.diag(penalty * ridge), moments) for penalty in penalties]


def _chosen(pairs: Pairs, candidates: Sequence[tuple[float, Predict]]) -> tuple[float, Predict]:
    """The candidate with the highest R² on validation."""

    def r2(candidate: tuple[float, Predict]) -> float:
        rows = pairs.images("validation")
        scores = pairs.scores(rows, "validation", candidate[1](rows)).pairs()
        return float(r_squared(*scores)(np.ones((1, len(scores[0]))))[0])

    return max(candidates, key=r2)


def _ridge(pairs: Pairs, features: Float[np.ndarray, "image feature"], config: BaselineConfig) -> Learned:
    solved = ridge_weights(pairs, features, config.penalties)
    candidates = [
        (penalty, linear_predictions(features, weights))
        for penalty, weights in zip(config.penalties, solved, strict=True)
    ]
    penalty, predict = _chosen(pairs, candidates)
    return Learned(predict, f"|a-b| and a*b, solved exactly, penalty {penalty:g} chosen on validation")


def _svr(pairs: Pairs, features: Float[np.ndarray, "image feature"], config: BaselineConfig) -> Learned:
    """A linear support vector regression (squared loss, solved in the primal) on a random subsample of the pairs."""
    rows = pairs.images("train")
    true, is_pair = pairs.stimuli.true_rdm(rows, pairs.measure), pairs.are_in(rows, "train")
    first, second = np.nonzero(is_pair)
    drawn = np.random.default_rng(config.seed).permutation(len(first))[: config.svr_pairs]
    first, second = first[drawn], second[drawn]
    joined = pair_features(features[rows[first]], features[rows[second]])
    scale = joined.std(axis=0)
    scale[scale <= TINY] = 1
    model = LinearSVR(C=config.svr_cost, loss="squared_epsilon_insensitive", dual=False)
    fitted = model.fit(joined / scale, true[first, second])
    weights = fitted.coef_ / scale
    weights[-1] += fitted.intercept_.item()
    return Learned(linear_predictions(features, weights), f"trained on {len(drawn):,} of {int(is_pair.sum()):,} pairs")


def encoding_weights(
    pairs: Pairs, features: Float[np.ndarray, "image feature"], penalty: float
) -> Float[np.ndarray, "joined vertex"]:
    """The exact ridge from standardised features and a constant, which is not penalised, to every vertex."""
    assert pairs.stimuli.patterns is not None
    training = pairs.images("train")
    joined = with_constant(features[training])
    normal, moments = joined.T @ joined, joined.T @ pairs.stimuli.patterns[training]
    ridge = np.full(len(normal), np.trace(normal) / len(normal))
    ridge[-1] = 0
    return np.linalg.solve(normal + np.diag(penalty * ridge), moments)


def with_constant(features: Float[np.ndarray, "image feature"]) -> Float[np.ndarray, "image joined"]:
    """The features in float64, and a last one that is 1."""
    return np.concatenate([features, np.ones((len(features), 1))], axis=1)


def chosen_encoding(
    pairs: Pairs, features: Float[np.ndarray, "image feature"], config: BaselineConfig
) -> tuple[float, Predict]:
    """The penalty of the ridge from features to vertices that is best on validation, and the RDM of what it predicts
    (on a line that fits validation pairs, because predicted patterns vary less than measured ones)."""
    candidates = []
    for penalty in config.penalties:
        weights = encoding_weights(pairs, features, penalty)

        def distances(rows: np.ndarray, weights: np.ndarray = weights) -> np.ndarray:
            return rdm(torch.from_numpy(with_constant(features[rows]) @ weights), pairs.measure).numpy()

        rows = pairs.images("validation")
        found, true = pairs.scores(rows, "validation", distances(rows)).pairs()
        candidates.append((penalty, _on_a_line(distances, found, true)))
    return _chosen(pairs, candidates)


def _encoding(pairs: Pairs, features: Float[np.ndarray, "image feature"], config: BaselineConfig) -> Learned:
    penalty, predict = chosen_encoding(pairs, features, config)
    return Learned(predict, f"ridge from features to vertices, then the RDM of its predictions; penalty {penalty:g}")


def learning_curve(
    pairs: Pairs,
    features: Float[np.ndarray, "image feature"],
    config: BaselineConfig,
    score: Callable[[RdmScores], float],
) -> list[tuple[int, float]]:
    """The score of the ridge on the test split by the number of training images, which are halved three times."""
    points = []
    training, tested = pairs.images("train"), pairs.images("test")
    for number in sorted({len(training) // parts for parts in (8, 4, 2, 1)}):
        if number < 5:
            continue
        fewer = Pairs(with_fewer_training_images(pairs.stimuli, number, seed=config.seed), pairs.measure, None)
        learned = _ridge(fewer, standardised(features, fewer.images("train")), config)
        points.append((number, score(pairs.scores(tested, "test", learned.predict(tested)))))
    return points
