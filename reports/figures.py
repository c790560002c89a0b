"""The report's pictures: distributions as SVG, slices as PNG inside the page. Arrays in, text out, reproducibly."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from contextlib import AbstractContextManager

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from brain_models.space import BrainSpace, require_grid

COLOURS = ("#1f4e79", "#c0504d", "#7f9a48", "#8064a2", "#d9962b", "#4bacc6", "#777777", "#a0522d")
NUM_SLICES = 7
PIXELS_A_VOXEL = 4  # outlines are a pixel wide, so voxels are drawn larger


def style() -> AbstractContextManager[None]:
    """How every figure of a report looks, the same bytes every time."""
    return matplotlib.rc_context(
        {
            "svg.hashsalt": "callosum",  # otherwise element ids are random and no two reports are equal
            "svg.fonttype": "none",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )


def distribution(groups: Mapping[str, np.ndarray], *, label: str, limit: float | None) -> str:
    """Stacked counts of a number by group, as SVG; a dotted line where an acceptance rule would refuse."""
    with style():
        figure = Figure(figsize=(3.6, 2.2))
        axes = figure.add_subplot()
        known = {name: values for name, values in groups.items() if len(values)}
        if known:
            names = list(known)
            colours = [COLOURS[number % len(COLOURS)] for number in range(len(names))]
            shown = np.concatenate([*known.values(), [] if limit is None else [limit]])
            ends = (float(shown.min()), float(shown.max()))
            reach = ends if ends[0] < ends[1] else (ends[0] - 0.5, ends[1] + 0.5)
            axes.hist([known[name] for name in names], bins=24, range=reach, stacked=True, color=colours, label=names)
        if limit is not None:
            axes.axvline(limit, color="#c0504d", linewidth=0.9, linestyle=":")
        if len(known) > 1:
            axes.legend(frameon=False, fontsize=7)
        axes.set_xlabel(label)
        axes.set_ylabel("scans")
        return as_svg(figure)


def slices(
    values: np.ndarray, space: BrainSpace, *, label: str, outlines: np.ndarray | None, colours: str, upper: float
) -> str:
    """Axial slices from low to high as an <img>; the subject's left is on the left. `outlines` are labels [voxel]."""
    volume = _on_grid(values, space, outside=np.nan)
    labels = None if outlines is None else _on_grid(outlines, space, outside=0)
    heights = np.flatnonzero(_on_grid(np.ones(space.num_voxels), space, outside=0).any(axis=(0, 1)))
    chosen = heights[(np.linspace(0.12, 0.9, NUM_SLICES) * (len(heights) - 1)).astype(int)]
    with style():
        figure = Figure(figsize=(9.0, 1.75), facecolor="black")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, NUM_SLICES)
        for place, height in zip(axes, chosen, strict=True):
            shown = place.imshow(_enlarged(volume[:, :, height]), cmap=colours, vmin=0, vmax=upper, origin="lower")
            if labels is not None:
                edges = _edges(_enlarged(labels[:, :, height]))
                place.imshow(np.where(edges > 0, 0.5, np.nan), cmap="autumn", alpha=0.7, vmin=0, vmax=1, origin="lower")
            place.set_axis_off()
        figure.subplots_adjust(left=0.005, right=0.9, bottom=0.02, top=0.98, wspace=0.02)
        scale = figure.add_axes((0.915, 0.12, 0.012, 0.76))
        figure.colorbar(shown, cax=scale).ax.tick_params(colors="white", labelsize=6, length=2)
        return _as_image(figure, label)


def _on_grid(values: np.ndarray, space: BrainSpace, *, outside: float) -> np.ndarray:
    """The packed values as a volume whose axes run to the right, front and top."""
    affine, shape, indices = require_grid(space)
    volume = np.full(shape, outside, dtype=values.dtype)
    volume[tuple(indices.T)] = values
    return volume[tuple(slice(None, None, -1 if affine[axis, axis] < 0 else 1) for axis in range(3))]


def _enlarged(plane: np.ndarray) -> np.ndarray:
    """[y, x] as images are drawn, every voxel a square of pixels."""
    return plane.T.repeat(PIXELS_A_VOXEL, axis=0).repeat(PIXELS_A_VOXEL, axis=1)


def _edges(labels: np.ndarray) -> np.ndarray:
    """1 where a pixel's label differs from the one right of or above it."""
    edges = np.zeros(labels.shape)
    edges[:, :-1] = labels[:, :-1] != labels[:, 1:]
    edges[:-1] = np.maximum(edges[:-1], labels[:-1] != labels[1:])
    return edges


def as_svg(figure: Figure) -> str:
    """The figure as an <svg> element."""
    text = io.StringIO()
    with style():
        figure.savefig(text, format="svg", metadata={"Date": None}, bbox_inches="tight")
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _as_image(figure: Figure, label: str) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110, facecolor="black", metadata={"Software": None})
    encoded = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="{label}" src="data:image/png;base64,{encoded}">'
