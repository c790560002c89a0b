"""The pictures of a run's report as PNG: maps on slices with region outlines, contributions as bars."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from brain_models.space import BrainSpace, require_grid
from pretrain.report.contribution import Contribution
from pretrain.report.maps import VoxelMaps

NUM_SLICES = 8
MAX_BARS = 30
LEGEND = "dark: more than controls of its size (FDR); black: interval over subjects; red: the mean of those controls"
PIXELS_A_SLICE = 170  # outlines are one pixel wide, so coarse voxels are drawn larger
NOTE = "grey: R² below 0, worse than the training mean; white: outside, not measured or hidden too rarely"
WORSE = "#5a5a5a"  # r2 below 0: worse than the training mean
DPI = 150


def draw_maps(maps: VoxelMaps, space: BrainSpace, labels: np.ndarray, *, title: str, path: Path) -> None:
    """Write r2 and error on axial slices; the subject's left is on the left, atlas regions are outlined."""
    with _style():
        figure = Figure(figsize=(11.0, 4.2), facecolor="white")
        FigureCanvasAgg(figure)
        rows = figure.subplots(2, NUM_SLICES)
        heights = _heights(space)
        limits = ((0.0, np.nanpercentile(maps.r2, 99)), np.nanpercentile(maps.rmse, [1, 99]))
        captions = ("R² about the training mean", "error (standard deviations)")
        for row, values, colours, ends, caption in zip(
            rows, (maps.r2, maps.rmse), ("viridis", "inferno"), limits, captions, strict=True
        ):
            shown = _draw_row(row, values, space, labels, colours=colours, ends=ends, heights=heights)
            top, bottom = row[0].get_position().y1, row[0].get_position().y0
            scale = figure.add_axes((0.925, bottom + 0.04, 0.012, top - bottom - 0.08))
            figure.colorbar(shown, cax=scale, extend="min" if values is maps.r2 else "neither")
            row[0].set_title(caption, loc="left", fontsize=9)
            row[0].text(0.0, 0.5, "L", transform=row[0].transAxes, ha="center", va="center", fontsize=7)
        millimetres = require_grid(space)[0]
        for axes, height in zip(rows[1], heights, strict=True):
            level = millimetres[2, 2] * _index(height, space) + millimetres[2, 3]
            axes.text(0.5, -0.06, f"z = {level:.0f} mm", transform=axes.transAxes, ha="center", va="top", fontsize=7)
        figure.suptitle(title, x=0.01, y=0.985, ha="left", fontsize=10)
        figure.text(0.01, 0.01, NOTE, fontsize=7)
        figure.savefig(path, dpi=DPI, metadata={"Software": None})


def _draw_row(
    row: Sequence[Axes],
    values: np.ndarray,
    space: BrainSpace,
    labels: np.ndarray,
    *,
    colours: str,
    ends: Sequence[float],
    heights: np.ndarray,
) -> matplotlib.image.AxesImage:
    filled = np.nonzero(_volume(np.ones(space.num_voxels), space, 0))
    box = tuple(slice(indices.min(), indices.max() + 1) for indices in filled[:2])
    volume, regions = _volume(values, space, np.nan)[box], _volume(labels, space, 0)[box]
    enlarge = max(1, PIXELS_A_SLICE // max(volume.shape[:2]))
    ramp = matplotlib.colormaps[colours]
    if ends[0] == 0:  # r2
        ramp = ramp.with_extremes(under=WORSE)
    for axes, height in zip(row, heights, strict=True):
        plane = np.ma.masked_invalid(_enlarged(volume[:, :, height], enlarge))
        shown = axes.imshow(
            plane, cmap=ramp, vmin=ends[0], vmax=max(ends[1], ends[0] + 1e-6), origin="lower", interpolation="nearest"
        )
        edges = _edges(_enlarged(regions[:, :, height], enlarge))
        outline = np.where(edges[..., None], np.array([1.0, 1.0, 1.0, 0.55]), 0.0)
        axes.imshow(outline, origin="lower", interpolation="nearest")
        axes.set_axis_off()
    row[0].figure.subplots_adjust(left=0.01, right=0.915, bottom=0.09, top=0.85, wspace=0.02, hspace=0.16)
    return shown


def draw_contributions(rows: Sequence[Contribution], *, title: str, path: Path) -> None:
    """Write the regions that contribute most as bars with intervals, beside control sets of their size."""
    tested = [row for row in rows if row.contribution.value is not None]
    chosen = sorted(tested, key=lambda row: -(row.contribution.value or 0))[:MAX_BARS]
    with _style():
        figure = Figure(figsize=(7.5, 1.3 + 0.2 * len(chosen)), facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for height, row in enumerate(chosen):
            value, low, high = row.contribution.value or 0.0, row.contribution.low, row.contribution.high
            axes.barh(height, value, height=0.7, color="#1f4e79" if row.is_significant else "#9fb6cd", zorder=2)
            if low is not None and high is not None:
                axes.plot([low, high], [height, height], color="black", linewidth=1, zorder=3)
            if row.control_mean is not None:
                axes.plot(
                    [row.control_mean] * 2, [height - 0.35, height + 0.35], color="#c0504d", linewidth=2, zorder=4
                )
        axes.set_yticks(range(len(chosen)), [f"{row.region} ({row.num_patches})" for row in chosen], fontsize=7)
        axes.invert_yaxis()
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xlabel("what hiding the region takes off R² of the hidden rest (patches in brackets)")
        figure.suptitle(f"{title}\n{LEGEND}", x=0.01, ha="left", fontsize=8)
        figure.savefig(path, dpi=DPI, metadata={"Software": None})


def _style() -> "matplotlib.AbstractContextManager[None]":
    return matplotlib.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})


def _heights(space: BrainSpace) -> np.ndarray:
    """Slices from low to high, of those that hold brain."""
    filled = np.flatnonzero(_volume(np.ones(space.num_voxels), space, 0).any(axis=(0, 1)))
    return filled[np.unique((np.linspace(0.1, 0.92, NUM_SLICES) * (len(filled) - 1)).astype(int))]


def _index(height: int, space: BrainSpace) -> int:
    """The grid's own index of a slice counted from low to high."""
    affine, shape, _ = require_grid(space)
    return height if affine[2, 2] > 0 else shape[2] - 1 - height


def _volume(values: np.ndarray, space: BrainSpace, outside: float) -> np.ndarray:
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
    edges = np.zeros(labels.shape, dtype=bool)
    edges[:, :-1] = labels[:, :-1] != labels[:, 1:]
    edges[:-1] |= labels[:-1] != labels[1:]
    return edges
