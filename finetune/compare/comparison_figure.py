"""The picture of a comparison: arms with their intervals and cells, paired differences about zero. Bytes of a PNG."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from reports.figures import COLOURS, style

if TYPE_CHECKING:
    from finetune.compare.comparison import Comparison, Row

GREY = "#999999"


def draw(found: Comparison) -> bytes:
    """Left every arm's estimate over its cells, right every difference; one colour a mode."""
    arms = [row for row in found.rows if row.kind == "arm"]
    pairs = [row for row in found.rows if row.kind == "difference"]
    modes = list(dict.fromkeys(row.mode for row in arms))
    colour_of = dict(zip(modes, COLOURS, strict=False))
    with style():
        figure = Figure(figsize=(9.0, 1.4 + 0.34 * max(len(arms), len(pairs))), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        _intervals(left, arms, [f"{row.arm} ({row.mode})" for row in arms], colour_of)
        for mode, arm, _, _, value in found.cells:
            place = next(index for index, row in enumerate(arms) if (row.mode, row.arm) == (mode, arm))
            left.plot(value, place - 0.25, ".", color=colour_of[mode], alpha=0.5, markersize=4)
        left.axvline(0.5, color=GREY, linewidth=0.8, linestyle=":")
        left.set_xlabel(f"{found.metric.replace('_', ' ')}, {found.num_subjects} test subjects")
        _intervals(right, pairs, [f"{row.arm} - {row.reference} ({row.mode})" for row in pairs], colour_of)
        right.axvline(0.0, color=GREY, linewidth=0.8)
        right.set_xlabel(f"paired difference, {found.confidence:.0%} interval")
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=130, metadata={"Software": None})
    return data.getvalue()


def _intervals(axes: Axes, rows: list[Row], labels: list[str], colour_of: dict[str, str]) -> None:
    for place, row in enumerate(rows):
        axes.plot([row.low, row.high], [place, place], color=colour_of[row.mode], linewidth=1.4)
        axes.plot(row.value, place, "o", color=colour_of[row.mode], markersize=5)
    axes.set_yticks(range(len(rows)), [label if len(label) < 40 else f"...{label[-37:]}" for label in labels])
    axes.set_ylim(len(rows) - 0.5, -0.7)
