"""The report's figures as SVG text: curves, ROC, score distributions. Numbers in, text out, reproducibly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from finetune.tasks.subject_prediction.evaluation import Scores, auroc, roc_curve
from reports.figures import COLOURS, as_svg, style

Curve = Sequence[tuple[int, float]]


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    with style():
        figure = Figure(figsize=(width, height))
        return figure, figure.add_subplot()


def curves(lines: Mapping[str, Curve], *, label: str, marks: Mapping[str, int]) -> str:
    """One line a metric over steps; `marks` are steps to point out (an unfreezing, the checkpoint that was used)."""
    figure, axes = _axes(5.0, 2.8)
    for colour, (name, points) in zip(COLOURS, lines.items(), strict=False):
        steps, values = zip(*points, strict=True) if points else ((), ())
        axes.plot(
            steps, values, color=colour, label=name, linewidth=1.2, marker="o" if len(points) < 30 else "", markersize=3
        )
    for row, (name, step) in enumerate(marks.items()):  # one row each: neighbouring steps would overprint
        axes.axvline(step, color="#999999", linewidth=0.8, linestyle=":")
        place = (step, 1 + 0.06 * row)
        axes.annotate(name, place, xycoords=("data", "axes fraction"), fontsize=7, color="#666666", ha="left")
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    if lines:
        axes.legend(frameon=False, fontsize=8)
    return as_svg(figure)


def roc(classifiers: Mapping[str, Scores]) -> str:
    """One ROC curve a classifier, all on the same split."""
    figure, axes = _axes(3.4, 3.2)
    axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=0.8)
    for colour, (name, scores) in zip(COLOURS, classifiers.items(), strict=False):
        false_rate, true_rate = roc_curve(scores.values, scores.is_case)
        area = auroc(scores.values, scores.is_case)
        axes.plot(false_rate, true_rate, color=colour, linewidth=1.2, label=f"{name} ({area:.2f})")
    axes.set_xlabel("false positive rate")
    axes.set_ylabel("true positive rate")
    axes.legend(frameon=False, fontsize=7, loc="lower right")
    return as_svg(figure)


def scores_by_site(scores: Scores, *, threshold: float) -> str:
    """Every subject's score as a dot, controls and cases beside each other, one column a site."""
    figure, axes = _axes(5.0, 2.8)
    sites = sorted(set(map(str, scores.sites)))
    for column, site in enumerate(sites):
        for is_case, colour, shift in ((False, COLOURS[0], -0.15), (True, COLOURS[1], 0.15)):
            values = scores.values[(scores.sites == site) & (scores.is_case == is_case)]
            spread = [column + shift + 0.08 * (index % 5 - 2) / 2 for index in range(len(values))]
            label = ("case" if is_case else "control") if column == 0 else None
            axes.scatter(spread, values, s=9, color=colour, alpha=0.7, linewidths=0, label=label)
    axes.axhline(threshold, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(sites)), sites)
    axes.set_ylabel("score (logit)")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return as_svg(figure)
