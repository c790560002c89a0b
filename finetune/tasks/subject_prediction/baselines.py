"""What a fine-tuned model is read against: the site alone, and a penalised linear model of connectivity.

Everything that is learned here (means, spreads, strength of the penalty) is learned from training subjects only.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold, StratifiedKFold

from finetune.errors import FinetuneError

# Of a calibration: held-out logits that point the wrong way are made small, not turned round.
SMALLEST_SLOPE = 0.05


@dataclass
class LinearConfig:
    """`strengths` are the inverse penalties (scikit-learn's C) tried by inner cross-validation on training subjects."""

    strengths: list[float]
    num_folds: int
    regress_out_site: bool
    seed: int


@dataclass(frozen=True)
class Standardiser:
    """Numbers of the training subjects by which any subject's features are centred and scaled."""

    mean: np.ndarray
    site_means: dict[str, np.ndarray]
    spread: np.ndarray

    def apply(self, features: np.ndarray, sites: np.ndarray) -> np.ndarray:
        """Centred by the site's mean (by the overall mean at an unknown site), scaled; missing values become 0."""
        centres = np.stack([self.site_means.get(str(site), self.mean) for site in sites])
        return np.nan_to_num((features - centres) / self.spread, nan=0.0)


def standardiser(features: np.ndarray, sites: np.ndarray, *, by_site: bool) -> Standardiser:
    """Means and spreads over subjects, NaN left out; with `by_site`, one mean a site."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a feature nobody has: mean of nothing, becomes 0 below
        mean = np.nan_to_num(np.nanmean(features, axis=0))
        names = np.unique(sites).tolist() if by_site else []
        means = {str(site): np.nanmean(features[sites == site], axis=0) for site in names}
        means = {site: np.where(np.isfinite(values), values, mean) for site, values in means.items()}
        centres = np.stack([means.get(str(site), mean) for site in sites])
        spread = np.nanstd(features - centres, axis=0)
    return Standardiser(mean, means, np.where(spread > 1e-8, np.nan_to_num(spread, nan=1.0), 1.0))


def connectivity(series: np.ndarray) -> np.ndarray:
    """Fisher z of the Pearson correlation of every pair of regions, upper triangle row by row; NaN where not measured.

    `series` is [time, region]; a region that is NaN or constant has no correlation.
    """
    if series.shape[0] < 3:
        raise FinetuneError(f"connectivity needs at least 3 frames, the run has {series.shape[0]}; leave the run out")
    centred = series.astype(np.float64) - series.mean(axis=0)
    length = np.sqrt((centred**2).sum(axis=0))
    with np.errstate(invalid="ignore", divide="ignore"):
        unit = np.where(length > 1e-8, centred / length, np.nan)
    correlation = unit.T @ unit
    rows, columns = np.triu_indices(series.shape[1], k=1)
    return np.arctanh(np.clip(correlation[rows, columns], -0.999999, 0.999999))


@dataclass(frozen=True)
class LinearFit:
    """A penalised linear model of standardised features, with the penalty it chose and its score in the inner folds."""

    standardise: Standardiser
    weights: np.ndarray
    bias: float
    strength: float
    inner_score: float

    def score(self, features: np.ndarray, sites: np.ndarray) -> np.ndarray:
        """The model's output for each subject."""
        return self.standardise.apply(features, sites) @ self.weights + self.bias


def fit_logistic(features: np.ndarray, is_case: np.ndarray, *, sites: np.ndarray, config: LinearConfig) -> LinearFit:
    """L2 logistic regression whose strength had the best AUROC in stratified inner folds; ties: the strongest penalty.

    Its logits are then scaled and shifted to fit the inner folds' held-out subjects (Platt 1999), both classes counting
    alike: a fit that separates few subjects with many features is overconfident. Standardisation is redone inside every
    fold, so no fold's test subject touches its training.
    """
    smallest = int(min(is_case.sum(), (~is_case).sum()))
    if smallest < 2:
        raise FinetuneError(f"the training split has {smallest} subjects of its rarer class; at least 2 are needed")
    folds = StratifiedKFold(min(config.num_folds, smallest), shuffle=True, random_state=config.seed)
    held_out = np.zeros((len(config.strengths), len(is_case)))
    for train, test in folds.split(features, is_case):
        scale = standardiser(features[train], sites[train], by_site=config.regress_out_site)
        known, asked = scale.apply(features[train], sites[train]), scale.apply(features[test], sites[test])
        for index, strength in enumerate(sorted(config.strengths)):
            weights, bias = _solve(known, is_case[train], strength)
            held_out[index, test] = asked @ weights + bias
    quality = [roc_auc_score(is_case, values) for values in held_out]
    best = int(np.argmax(quality))
    slope, shift = _calibration(held_out[best], is_case)
    scale = standardiser(features, sites, by_site=config.regress_out_site)
    strength = sorted(config.strengths)[best]
    weights, bias = _solve(scale.apply(features, sites), is_case, strength)
    return LinearFit(scale, slope * weights, slope * bias + shift, strength, float(quality[best]))


def _calibration(values: np.ndarray, is_case: np.ndarray) -> tuple[float, float]:
    """Slope (kept above 0, so ranks stay) and shift that make held-out logits fit, both classes counting alike."""
    model = LogisticRegression(C=1e3, class_weight="balanced", max_iter=2000).fit(values[:, None], is_case)
    return max(float(model.coef_[0, 0]), SMALLEST_SLOPE), float(model.intercept_[0])


def _solve(features: np.ndarray, is_case: np.ndarray, strength: float) -> tuple[np.ndarray, float]:
    """Weights and bias, solved in the span of the subjects: exact for a ridge penalty, small with many features."""
    basis, sizes, axes = np.linalg.svd(features, full_matrices=False)
    kept = sizes > 1e-8 * max(float(sizes[0]), 1e-8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        model = LogisticRegression(C=strength, max_iter=2000).fit((basis * sizes)[:, kept], is_case)
    return model.coef_[0] @ axes[kept], float(model.intercept_[0])


def fit_ridge(features: np.ndarray, truth: np.ndarray, *, sites: np.ndarray, config: LinearConfig) -> LinearFit:
    """Ridge regression whose strength had the smallest squared error in inner folds; ties: the strongest penalty."""
    if len(truth) < config.num_folds:
        raise FinetuneError(
            f"the training split has {len(truth)} subjects for {config.num_folds} inner folds; lower num_folds"
        )
    held_out = np.zeros((len(config.strengths), len(truth)))
    for train, test in KFold(config.num_folds, shuffle=True, random_state=config.seed).split(features):
        scale = standardiser(features[train], sites[train], by_site=config.regress_out_site)
        known, asked = scale.apply(features[train], sites[train]), scale.apply(features[test], sites[test])
        for index, strength in enumerate(sorted(config.strengths)):
            weights, bias = _solve_ridge(known, truth[train], strength)
            held_out[index, test] = asked @ weights + bias
    quality = [1 - np.square(values - truth).sum() / np.square(truth - truth.mean()).sum() for values in held_out]
    best = int(np.argmax(quality))
    strength = sorted(config.strengths)[best]
    scale = standardiser(features, sites, by_site=config.regress_out_site)
    weights, bias = _solve_ridge(scale.apply(features, sites), truth, strength)
    return LinearFit(scale, weights, bias, strength, float(quality[best]))


def _solve_ridge(features: np.ndarray, truth: np.ndarray, strength: float) -> tuple[np.ndarray, float]:
    model = Ridge(alpha=1 / strength, solver="svd").fit(features, truth)
    return model.coef_, float(model.intercept_)


def site_means(train_sites: np.ndarray, train_values: np.ndarray, sites: np.ndarray) -> np.ndarray:
    """Mean of the training subjects of each subject's site, and of all of them where the site is unknown: what a model
    can score from the site alone."""
    means = {str(site): float(train_values[train_sites == site].mean()) for site in np.unique(train_sites)}
    return np.array([means.get(str(site), float(train_values.mean())) for site in sites])
