"""The sections of the report: what was predicted, beside what was measured."""

from __future__ import annotations

import html

import numpy as np

from finetune.tasks.rdm_prediction import figures
from finetune.tasks.rdm_prediction.metrics import RdmScores
from finetune.tasks.rdm_prediction.pairs import Pairs
from reports.page import Section

LABELS = {"pearson": "1 - Pearson", "euclidean": "Euclidean distance"}


def sections(
    pairs: Pairs, rows: np.ndarray, models: dict[str, RdmScores], curve: list[tuple[int, float]]
) -> list[Section]:
    """Matrices, values, planes, pairs and learning curve; the trained model is the first."""
    trained = next(iter(models.values()))
    label, categories = LABELS[pairs.measure], pairs.stimuli.categories
    named = None if categories is None else [categories[row] for row in rows]
    matrices = {"measured": trained.true} | {name: each.predicted for name, each in models.items()}
    both = dict(list(matrices.items())[:2])
    found = [
        Section(
            "Matrices",
            text=f"{label} of {len(rows)} test images, in the same order (clustered by the measured matrix"
            f"{', inside categories' if named else ''}); colours are ranks inside each matrix.",
            figures=[figures.heatmaps(dict(list(matrices.items())[:4]), figures.order_of(trained.true, named))],
        ),
        Section(
            "Values",
            figures=[figures.distributions(trained, label), figures.scatter(trained, label)],
        ),
        Section("Multidimensional scaling", figures=figures.planes(both, named)),
        pair_section(pairs, rows, trained, label),
    ]
    if curve:
        found.append(
            Section(
                "Learning curve",
                text="Spearman of the ridge on pair features on the test split, by the number of training images.",
                figures=[figures.learning_curve(curve, "Spearman")],
            )
        )
    return found


def pair_section(pairs: Pairs, rows: np.ndarray, trained: RdmScores, label: str) -> Section:
    """The pairs with extreme values, as pictures."""
    middle = 1.0 if pairs.measure == "pearson" else float(np.median(trained.true[trained.is_pair]))
    chosen = figures.extreme_pairs(trained, middle)
    needed = sorted({image for each in chosen.values() for pair in each for image in pair})
    images = dict(zip(needed, pairs.stimuli.images([int(rows[image]) for image in needed]), strict=True))
    pictures = []
    for name, each in chosen.items():
        for one, other in each:
            true, predicted = trained.true[one, other], trained.predicted[one, other]
            said = f"{name}: {true:.3f}, predicted {predicted:.3f} ({trained.stimuli[one]}, {trained.stimuli[other]})"
            pictures.append(figures.pair_picture(images[one], images[other], label=html.escape(said)))
    return Section(f"Pairs of images, region {pairs.stimuli.region}", text=f"By measured {label}.", figures=pictures)
