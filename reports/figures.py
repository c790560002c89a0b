"""What every report draws with: one style, distributions as SVG, outlined slices of a brain. Same input, same bytes."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from brain_models.space import BrainSpace, require_grid

COLOURS = ("#1f4e79", "#c0504d", "#7f9a48", "#8064a2", "#d9962b", "#4bacc6", "#777777", "#a0522d")
NUM_SLICES = 7
PIXELS_PER_SLICE = 170  # outlines are one pixel wide, so voxels are drawn as squares of several
OUTLINE = np.array([1.0, 1.0, 1.0, 0.55])


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


def new_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure of this size in inches and its one pair of axes, in the style of all reports."""
    with style():
        figure = Figure(figsize=(width, height))
        return figure, figure.add_subplot()


def curves(lines: Mapping[str, Sequence[tuple[int, float]]], *, label: str, marks: Mapping[str, int]) -> str:
    """One line per metric over steps; `marks` are steps to point out (an unfreezing, the checkpoint that was used)."""
    figure, axes = new_axes(5.0, 2.8)
    for colour, (name, points) in zip(COLOURS, lines.items(), strict=False):
        steps, values = zip(*points, strict=True) if points else ((), ())
        axes.plot(
            steps, values, color=colour, label=name, linewidth=1.2, marker="o" if len(points) < 30 else "", markersize=3
        )
    for row, (name, step) in enumerate(marks.items()):  # one row each: neighbouring steps would overprint
        axes.axvline(step, color="#999999", linewidth=0.8, linestyle=":")
        axes.annotate(
            name, (step, 1 + 0.06 * row), xycoords=("data", "axes fraction"), fontsize=7, color="#666666", ha="left"
        )
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    if lines:
        axes.legend(frameon=False, fontsize=8)
    return as_svg(figure)


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
    with style():
        figure = Figure(figsize=(9.0, 1.75), facecolor="black")
        FigureCanvasAgg(figure)
        row = figure.subplots(1, NUM_SLICES)
        heights = slice_heights(space, NUM_SLICES)
        ramp = matplotlib.colormaps[colours]
        shown = draw_slices(row, values, space, labels=outlines, heights=heights, colours=ramp, limits=(0, upper))
        figure.subplots_adjust(left=0.005, right=0.9, bottom=0.02, top=0.98, wspace=0.02)
        scale = figure.add_axes((0.915, 0.12, 0.012, 0.76))
        figure.colorbar(shown, cax=scale).ax.tick_params(colors="white", labelsize=6, length=2)
        return as_image(as_png(figure, dpi=110), label=label)


def overlay(
    values: np.ndarray, space: BrainSpace, *, labels: np.ndarray | None, name: str, caption: str, target: str
) -> str:
    """Three axial slices of a scan with region outlines, as a <figure> that `index_of` links to by its name; its
    caption links to the element `target`."""
    with style():
        figure = Figure(figsize=(2.7, 1.1), facecolor="black")
        FigureCanvasAgg(figure)
        row = figure.subplots(1, 3)
        heights, upper = slice_heights(space, 5)[1:4], float(np.nanpercentile(values, 99))
        ramp = matplotlib.colormaps["gray"]
        draw_slices(row, values, space, labels=labels, heights=heights, colours=ramp, limits=(0, upper))
        figure.subplots_adjust(left=0, right=1, bottom=0, top=1, wspace=0.02)
        image = as_image(as_png(figure, dpi=100), label=f"{caption} with region outlines")
    link = f'<a href="#{html.escape(target)}">{html.escape(caption)}</a>'
    return f'<figure id="{html.escape(name)}">{image}<figcaption>{link}</figcaption></figure>'


def index_of(names: Sequence[str]) -> str:
    """Links to the figures of these names, as a <nav>."""
    links = " ".join(f'<a href="#{html.escape(name)}">{html.escape(name)}</a>' for name in names)
    return f"<nav>{links}</nav>"


def draw_slices(
    row: Sequence[Axes],
    values: np.ndarray,
    space: BrainSpace,
    *,
    labels: np.ndarray | None,
    heights: np.ndarray,
    colours: Colormap,
    limits: tuple[float, float],
) -> AxesImage:
    """Draws one axial slice per axes, cut to the brain, with the regions of `labels` [voxel] outlined.

    `heights` count slices from low to high. Returns an image for a colour bar; voxels that are not finite stay empty.
    """
    filled = np.nonzero(on_grid(np.ones(space.num_voxels), space, outside=0))
    box = tuple(slice(indices.min(), indices.max() + 1) for indices in filled[:2])
    volume = on_grid(values, space, outside=np.nan)[box]
    regions = None if labels is None else on_grid(labels, space, outside=0)[box]
    times = max(1, PIXELS_PER_SLICE // max(volume.shape[:2]))
    for axes, height in zip(row, heights, strict=True):
        plane = np.ma.masked_invalid(_enlarged(volume[:, :, height], times))
        shown = axes.imshow(
            plane, cmap=colours, vmin=limits[0], vmax=limits[1], origin="lower", interpolation="nearest"
        )
        if regions is not None:
            is_edge = _edges(_enlarged(regions[:, :, height], times))
            axes.imshow(np.where(is_edge[..., None], OUTLINE, 0.0), origin="lower", interpolation="nearest")
        axes.set_axis_off()
    return shown


def slice_heights(space: BrainSpace, num_slices: int) -> np.ndarray:
    """The heights of evenly spread slices that hold brain, counted from low to high."""
    filled = np.flatnonzero(on_grid(np.ones(space.num_voxels), space, outside=0).any(axis=(0, 1)))
    return filled[(np.linspace(0.1, 0.92, num_slices) * (len(filled) - 1)).astype(int)]


def height_mm(height: int, space: BrainSpace) -> float:
    """The z coordinate of a slice counted from low to high."""
    affine, shape, _ = require_grid(space)
    index = height if affine[2, 2] > 0 else shape[2] - 1 - height
    return float(affine[2, 2] * index + affine[2, 3])


def on_grid(values: np.ndarray, space: BrainSpace, *, outside: float) -> np.ndarray:
    """The packed values as a volume whose axes run to the right, front and top."""
    affine, shape, indices = require_grid(space)
    volume = np.full(shape, outside, dtype=values.dtype)
    volume[tuple(indices.T)] = values
    return volume[tuple(slice(None, None, -1 if affine[axis, axis] < 0 else 1) for axis in range(3))]


def _enlarged(plane: np.ndarray, times: int) -> np.ndarray:
    """[y, x] as images are drawn, every voxel a square of pixels."""
    return plane.T.repeat(times, axis=0).repeat(times, axis=1)


def _edges(labels: np.ndarray) -> np.ndarray:
    """True where a pixel's label differs from the one right of or above it."""
    is_edge = np.zeros(labels.shape, dtype=bool)
    is_edge[:, :-1] = labels[:, :-1] != labels[:, 1:]
    is_edge[:-1] |= labels[:-1] != labels[1:]
    return is_edge


def as_svg(figure: Figure) -> str:
    """The figure as an <svg> element."""
    text = io.StringIO()
    with style():
        figure.savefig(text, format="svg", metadata={"Date": None}, bbox_inches="tight")
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def as_png(figure: Figure, *, dpi: int) -> bytes:
    """The figure as the bytes of a PNG file."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=dpi, facecolor=figure.get_facecolor(), metadata={"Software": None})
    return data.getvalue()


def as_image(png: bytes, *, label: str) -> str:
    """A PNG as an <img> that needs no other file; `label` is read aloud where it cannot be seen."""
    return f'<img alt="{html.escape(label)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
