"""Pictures of predictions for subjects, as SVG text: ROC curves, scores by site, predicted against true values."""

from __future__ import annotations

from collections.abc import Mapping

from finetune.tasks.subject_prediction.scores import AUROC, Scores, roc_curve
from reports.figures import COLOURS, as_svg, new_axes


def roc(models: Mapping[str, Scores]) -> str:
    """One ROC curve per model, all on the same split."""
    figure, axes = new_axes(3.4, 3.2)
    axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=0.8)
    for colour, (name, scores) in zip(COLOURS, models.items(), strict=False):
        false_rate, true_rate = roc_curve(scores.values, scores.truth)
        label = f"{name} ({AUROC.value(scores):.2f})"
        axes.plot(false_rate, true_rate, color=colour, linewidth=1.2, label=label)
    axes.set_xlabel("false positive rate")
    axes.set_ylabel("true positive rate")
    axes.legend(frameon=False, fontsize=7, loc="lower right")
    return as_svg(figure)


def scores_by_site(scores: Scores) -> str:
    """Every subject's score as a dot, controls beside cases, one column per site; the line is the threshold."""
    figure, axes = new_axes(5.0, 2.8)
    sites = sorted(set(map(str, scores.sites)))
    for column, site in enumerate(sites):
        for is_case, colour, shift in ((False, COLOURS[0], -0.15), (True, COLOURS[1], 0.15)):
            values = scores.values[(scores.sites == site) & (scores.truth == is_case)]
            spread = [column + shift + 0.08 * (index % 5 - 2) / 2 for index in range(len(values))]
            label = ("case" if is_case else "control") if column == 0 else None
            axes.scatter(spread, values, s=9, color=colour, alpha=0.7, linewidths=0, label=label)
    axes.axhline(scores.reference, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(sites)), sites)
    axes.set_ylabel("score (logit)")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return as_svg(figure)


def predicted_against_true(models: Mapping[str, Scores], *, label: str) -> str:
    """One dot per subject and model; the line is where predictions are right."""
    figure, axes = new_axes(3.8, 3.4)
    truth = next(iter(models.values())).truth
    ends = [float(truth.min()), float(truth.max())]
    axes.plot(ends, ends, color="#bbbbbb", linewidth=0.8)
    for colour, (name, scores) in zip(COLOURS, models.items(), strict=False):
        axes.scatter(scores.truth, scores.values, s=9, color=colour, alpha=0.7, linewidths=0, label=name)
    axes.set_xlabel(f"true {label}")
    axes.set_ylabel("predicted")
    axes.legend(frameon=False, fontsize=7)
    return as_svg(figure)
