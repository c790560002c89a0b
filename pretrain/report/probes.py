"""How much of site and repetition time a frozen encoder's pooled embedding gives away. Knows no model and no file.

One row a subject: the mean embedding of the subject's windows. A linear discriminant (Ledoit-Wolf shrinkage and equal
priors: nothing to choose) is cross-validated over subjects; every subject is called once, by a fit that has not seen
it, and the balanced accuracy is of all of them together. Chance is one over the number of classes; the permutation
interval is what the same procedure gives when the labels are shuffled over subjects.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.report.config import ConfoundProbeConfig

CONFIDENCE_TAIL = 0.025  # of the permutation interval, on each side


@dataclass(frozen=True)
class Probe:
    """The result for one label; None throughout where it cannot be asked, and `reason` says why."""

    num_subjects: int
    classes: list[str]
    balanced_accuracy: float | None
    chance: float | None
    permuted_low: float | None
    permuted_high: float | None
    p: float | None
    reason: str | None


def by_subject(rows: np.ndarray, subjects: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Subjects in order, and the mean of each one's rows."""
    names, of_row = np.unique(np.asarray(subjects), return_inverse=True)
    sums = np.zeros((len(names), rows.shape[1]))
    np.add.at(sums, of_row, rows)
    return names.tolist(), sums / np.bincount(of_row)[:, None]


def probe(embeddings: np.ndarray, labels: Sequence[str | None], config: ConfoundProbeConfig) -> Probe:
    """How well labels can be read from embeddings [subject, width]; subjects without a label (None) are left out."""
    known = np.array([label is not None for label in labels], dtype=bool)
    truth = np.array([str(label) for label in labels if label is not None])
    names, counts = np.unique(truth, return_counts=True)
    large = names[counts >= config.num_folds]
    kept = np.isin(truth, large)
    if len(large) < 2:
        return unknown(int(known.sum()), names.tolist(), too_few(names, counts, config.num_folds))
    left_out = [str(name) for name in names if name not in large]
    rows, truth = embeddings[known][kept], truth[kept]
    number = np.searchsorted(large, truth)
    value = cross_validated(rows, number, config)
    generator = np.random.default_rng((config.seed, 1))
    permuted = np.array(
        [cross_validated(rows, generator.permutation(number), config) for _ in range(config.num_permutations)]
    )
    low, high = np.quantile(permuted, [CONFIDENCE_TAIL, 1 - CONFIDENCE_TAIL])
    return Probe(
        num_subjects=len(truth),
        classes=large.tolist(),
        balanced_accuracy=value,
        chance=1 / len(large),
        permuted_low=float(low),
        permuted_high=float(high),
        p=float((1 + (permuted >= value).sum()) / (1 + len(permuted))),
        reason=f"left out, with fewer subjects than folds: {', '.join(left_out)}" if left_out else None,
    )


def too_few(names: np.ndarray, counts: np.ndarray, num_folds: int) -> str:
    """Why there is nothing to tell apart."""
    if len(names) == 0:
        return "not known of any subject"
    if len(names) == 1:
        return f"one value only: {names[0]}"
    found = ", ".join(f"{name} ({count})" for name, count in zip(names, counts, strict=True))
    return f"fewer than two values with {num_folds} subjects or more: {found}"


def unknown(num_subjects: int, classes: list[str], reason: str) -> Probe:
    """A probe that could not be made."""
    return Probe(num_subjects, classes, None, None, None, None, None, reason)


def cross_validated(rows: np.ndarray, number: np.ndarray, config: ConfoundProbeConfig) -> float:
    """Balanced accuracy over all subjects, each called by the fold that left it out; every class is in every fold."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.model_selection import StratifiedKFold

    num_classes = int(number.max()) + 1
    called = np.empty(len(number), dtype=int)
    folds = StratifiedKFold(config.num_folds, shuffle=True, random_state=config.seed)
    for train, held_out in folds.split(rows, number):
        discriminant = LinearDiscriminantAnalysis(
            solver="lsqr", shrinkage="auto", priors=np.full(num_classes, 1 / num_classes)
        )
        called[held_out] = discriminant.fit(rows[train], number[train]).predict(rows[held_out])
    return float(np.mean([(called[number == one] == one).mean() for one in range(num_classes)]))


def same_question(labels: Mapping[str, Sequence[str | None]]) -> bool:
    """True when two labels divide the subjects alike, so that their probes cannot be told apart."""
    codes = [np.unique([str(label) for label in each], return_inverse=True)[1] for each in labels.values()]
    pairs = {tuple(pair) for pair in zip(*(code.tolist() for code in codes), strict=True)}
    return len(pairs) == len(set(codes[0].tolist())) == len(set(codes[1].tolist()))
