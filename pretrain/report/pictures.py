"""The pictures of a run's report as PNG: maps on slices with region outlines, contributions as bars."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from brain_models.space import BrainSpace
from pretrain.report.contribution import Contribution
from pretrain.report.maps import VoxelMaps
from reports.figures import COLOURS, as_image, as_png, as_svg, draw_slices, height_mm, slice_heights, style

NUM_SLICES = 8
NUM_COURSES = 4
MAX_BARS = 30
LEGEND = "dark: more than controls of its size (FDR); black: interval over subjects; red: the mean of those controls"
NOTE = "grey: R² below 0, worse than the training mean; white: outside, not measured or hidden too rarely"
WORSE = "#5a5a5a"  # r2 below 0: worse than the training mean
DPI = 150


@dataclass(frozen=True)
class Example:
    """One window as a model sees and guesses it, float arrays [time, voxel] about the training mean."""

    truth: np.ndarray
    guessed: np.ndarray
    is_hidden: np.ndarray  # bool [time, voxel]; measured voxels only
    seconds: float  # per frame
    region_of: np.ndarray  # label of each voxel, 0 for none
    names: Mapping[int, str]


def draw_example(example: Example, space: BrainSpace) -> str:
    """One frame as it is, with its hidden voxels left out, and with their guesses put in, as an <img>."""
    frame = int(example.is_hidden.sum(axis=1).argmax())
    truth, is_hidden = example.truth[frame], example.is_hidden[frame]
    rows = {
        "original": truth,
        "visible": np.where(is_hidden, np.nan, truth),
        "guess": np.where(is_hidden, example.guessed[frame], truth),
    }
    limit = float(np.nanpercentile(np.abs(truth), 98)) or 1.0
    with style():
        figure = Figure(figsize=(11.0, 4.6), facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(rows), NUM_SLICES)
        figure.subplots_adjust(left=0.07, right=0.99, bottom=0.01, top=0.99, wspace=0.02, hspace=0.02)
        heights = slice_heights(space, NUM_SLICES)
        colours = matplotlib.colormaps["RdBu_r"].with_extremes(bad="#dddddd")
        for row, (caption, values) in zip(axes, rows.items(), strict=True):
            draw_slices(row, values, space, labels=None, heights=heights, colours=colours, limits=(-limit, limit))
            row[0].text(-0.05, 0.5, caption, transform=row[0].transAxes, ha="right", va="center", fontsize=9)
        return as_image(as_png(figure, dpi=DPI // 2), label="one frame: original, visible, and with the guesses")


def draw_courses(example: Example) -> str:
    """Mean time courses of the hidden voxels of the largest regions, original and guessed, as an <svg>."""
    labels, sizes = np.unique(example.region_of[example.is_hidden.any(axis=0)], return_counts=True)
    largest = [label for label in labels[np.argsort(-sizes, kind="stable")] if label][:NUM_COURSES]
    with style():
        figure = Figure(figsize=(11.0, 2.2))
        all_axes = np.atleast_1d(figure.subplots(1, max(1, len(largest)), sharey=True))
        for axes, label in zip(all_axes, largest, strict=False):
            voxels = (example.region_of == label) & example.is_hidden.any(axis=0)
            hidden = np.where(example.is_hidden[:, voxels], 1.0, np.nan)
            seconds = example.seconds * np.arange(len(example.truth))
            for values, colour, name in ((example.truth, "black", "original"), (example.guessed, COLOURS[1], "guess")):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", RuntimeWarning)  # a frame in which nothing of it is hidden
                    axes.plot(seconds, np.nanmean(values[:, voxels] * hidden, axis=1), color=colour, label=name)
            axes.set_title(example.names.get(int(label), str(label)), fontsize=8)
            axes.set_xlabel("s")
        if largest:
            all_axes[0].legend(frameon=False, fontsize=7)
            all_axes[0].set_ylabel("standard deviations")
        return as_svg(figure)


def draw_maps(maps: VoxelMaps, space: BrainSpace, labels: np.ndarray, *, title: str, path: Path) -> None:
    """Write r2 and error on axial slices; the subject's left is on the left, atlas regions are outlined."""
    with style():
        figure = Figure(figsize=(11.0, 4.2), facecolor="white")
        FigureCanvasAgg(figure)
        rows = figure.subplots(2, NUM_SLICES)
        heights = slice_heights(space, NUM_SLICES)
        figure.subplots_adjust(left=0.01, right=0.915, bottom=0.09, top=0.85, wspace=0.02, hspace=0.16)
        r2_ramp = matplotlib.colormaps["viridis"].with_extremes(under=WORSE)
        limits = ((0.0, max(float(np.nanpercentile(maps.r2, 99)), 1e-6)), tuple(np.nanpercentile(maps.rmse, [1, 99])))
        captions = ("R² about the training mean", "error (standard deviations)")
        for row, values, colours, ends, caption in zip(
            rows, (maps.r2, maps.rmse), (r2_ramp, matplotlib.colormaps["inferno"]), limits, captions, strict=True
        ):
            shown = draw_slices(row, values, space, labels=labels, heights=heights, colours=colours, limits=ends)
            top, bottom = row[0].get_position().y1, row[0].get_position().y0
            scale = figure.add_axes((0.925, bottom + 0.04, 0.012, top - bottom - 0.08))
            figure.colorbar(shown, cax=scale, extend="min" if values is maps.r2 else "neither")
            row[0].set_title(caption, loc="left", fontsize=9)
            row[0].text(0.0, 0.5, "L", transform=row[0].transAxes, ha="center", va="center", fontsize=7)
        for axes, height in zip(rows[1], heights, strict=True):
            level = f"z = {height_mm(height, space):.0f} mm"
            axes.text(0.5, -0.06, level, transform=axes.transAxes, ha="center", va="top", fontsize=7)
        figure.suptitle(title, x=0.01, y=0.985, ha="left", fontsize=10)
        figure.text(0.01, 0.01, NOTE, fontsize=7)
        figure.savefig(path, dpi=DPI, metadata={"Software": None})


def draw_contributions(rows: Sequence[Contribution], *, title: str, path: Path) -> None:
    """Write the regions that contribute most as bars with intervals, beside control sets of their size."""
    tested = [row for row in rows if math.isfinite(row.contribution.value)]
    chosen = sorted(tested, key=lambda row: -row.contribution.value)[:MAX_BARS]
    with style():
        figure = Figure(figsize=(7.5, 1.3 + 0.2 * len(chosen)), facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for height, row in enumerate(chosen):
            value, low, high = row.contribution.value, row.contribution.low, row.contribution.high
            axes.barh(height, value, height=0.7, color="#1f4e79" if row.is_significant else "#9fb6cd", zorder=2)
            if math.isfinite(low):
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
