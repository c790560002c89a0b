"""Pictures of predicted and true dissimilarities: matrices in one order, distributions, scaling, and extreme pairs."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from finetune.tasks.rdm_prediction.metrics import RdmScores
from reports.figures import COLOURS, as_image, as_png, as_svg, new_axes, style

THUMBNAIL = 64
SHOWN_PAIRS = 4
MAX_DOTS = 5000


def order_of(true: np.ndarray, categories: Sequence[str] | None) -> np.ndarray:
    """The images by category, and inside one (or all of them) as average linkage of the true matrix puts them."""
    labels = np.array(categories if categories is not None else [""] * len(true))
    order: list[int] = []
    for label in sorted(set(labels)):
        members = np.flatnonzero(labels == label)
        if len(members) > 2:
            inside = squareform(true[np.ix_(members, members)], checks=False)
            members = members[leaves_list(linkage(inside, method="average"))]
        order += members.tolist()
    return np.array(order)


def heatmaps(matrices: Mapping[str, np.ndarray], order: np.ndarray) -> str:
    """Matrices side by side, images in this order, colours by rank so that scales do not matter."""
    with style():
        figure = Figure(figsize=(3.0 * len(matrices), 3.1))
        FigureCanvasAgg(figure)
        for axes, (name, matrix) in zip(
            np.atleast_1d(figure.subplots(1, len(matrices))), matrices.items(), strict=True
        ):
            shown = matrix[np.ix_(order, order)]
            ranks = np.searchsorted(np.sort(shown, axis=None), shown) / shown.size
            axes.imshow(ranks, cmap="viridis", interpolation="nearest")
            axes.set_title(name, fontsize=9)
            axes.set_xticks([])
            axes.set_yticks([])
        figure.tight_layout()
        return as_image(as_png(figure, dpi=100), label=f"Dissimilarity matrices: {', '.join(matrices)}")


def distributions(scores: RdmScores, label: str) -> str:
    """Densities of predicted and true dissimilarities."""
    figure, axes = new_axes(4.2, 2.6)
    predicted, true = scores.pairs()
    bins = np.linspace(min(predicted.min(), true.min()), max(predicted.max(), true.max()) + 1e-9, 41)
    for colour, name, values in ((COLOURS[0], "true", true), (COLOURS[1], "predicted", predicted)):
        axes.hist(values, bins=bins.tolist(), histtype="step", color=colour, label=name, density=True)
    axes.set_xlabel(label)
    axes.set_ylabel("density")
    axes.legend(frameon=False, fontsize=8)
    return as_svg(figure)


def scatter(scores: RdmScores, label: str) -> str:
    """True against predicted dissimilarities, at most so many dots."""
    figure, axes = new_axes(3.4, 3.2)
    predicted, true = scores.pairs()
    kept = np.linspace(0, len(true) - 1, min(len(true), MAX_DOTS)).astype(int)
    axes.scatter(true[kept], predicted[kept], s=2, color=COLOURS[0], alpha=0.3, linewidths=0, rasterized=True)
    axes.set_xlabel(f"true {label}")
    axes.set_ylabel("predicted")
    return as_svg(figure)


def scaled(matrix: np.ndarray) -> np.ndarray:
    """Classical multidimensional scaling onto a plane (Torgerson 1952): float [image, 2]."""
    squares = np.square(matrix.astype(np.float64))
    centring = np.eye(len(matrix)) - 1 / len(matrix)
    values, vectors = np.linalg.eigh(-centring @ squares @ centring / 2)
    return vectors[:, :-3:-1] * np.sqrt(np.maximum(values[:-3:-1], 0))


def planes(matrices: Mapping[str, np.ndarray], categories: Sequence[str] | None) -> list[str]:
    """The images of each matrix on a plane, coloured by category."""
    pictures = []
    for name, matrix in matrices.items():
        figure, axes = new_axes(3.2, 3.0)
        places, labels = scaled(matrix), np.array(categories if categories is not None else [""] * len(matrix))
        for number, label in enumerate(sorted(set(labels))):
            colour = COLOURS[number % len(COLOURS)]
            x, y = places[labels == label].T
            axes.scatter(x, y, s=10, color=colour, label=str(label), linewidths=0)
        axes.set_title(name, fontsize=9)
        if categories is not None:
            axes.legend(frameon=False, fontsize=6)
        pictures.append(as_svg(figure))
    return pictures


def learning_curve(points: Sequence[tuple[int, float]], label: str) -> str:
    """A score by the number of training images."""
    figure, axes = new_axes(3.8, 2.4)
    axes.plot(*zip(*points, strict=True), color=COLOURS[0], marker="o", markersize=3, linewidth=1.2)
    axes.set_xlabel("training images")
    axes.set_ylabel(label)
    return as_svg(figure)


def extreme_pairs(scores: RdmScores, middle: float) -> dict[str, list[tuple[int, int]]]:
    """The pairs with the lowest true values, those nearest to `middle`, and the highest, as numbers of their images."""
    rows, columns = np.nonzero(scores.is_pair)
    true = scores.true[rows, columns]
    orders = {"lowest": true, f"nearest to {middle:g}": np.abs(true - middle), "highest": -true}
    return {
        name: [(int(rows[pair]), int(columns[pair])) for pair in np.argsort(values, kind="stable")[:SHOWN_PAIRS]]
        for name, values in orders.items()
    }


def pair_picture(first: np.ndarray, second: np.ndarray, *, label: str) -> str:
    """Two images side by side."""
    sides = [np.asarray(Image.fromarray(image).resize((THUMBNAIL, THUMBNAIL))) for image in (first, second)]
    file = io.BytesIO()
    Image.fromarray(np.concatenate(sides, axis=1)).save(file, format="PNG")
    return f"<figure>{as_image(file.getvalue(), label=label)}<figcaption>{label}</figcaption></figure>"
