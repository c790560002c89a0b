"""The quality of a scan in numbers, and the acceptance rules. Knows no file format.

An unknown number is None, never 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from brain_models.atlas import Atlas
from brain_models.cleaning import CleanedRun
from brain_models.preprocess import StandardisedRun
from data_sharding import schema
from data_sharding.config import AcceptanceConfig


@dataclass
class ScanQuality:
    """One row of quality.parquet."""

    coverage: float  # share of the space's voxels that were measured
    lowest_region_coverage: float | None  # None: the set has no atlas
    lowest_region: str
    num_frames: int
    num_dropped: int = 0  # frames before the steady state
    num_censored: int = 0
    censored: str = ""  # ranges
    mean_framewise_displacement_mm: float | None = None
    max_framewise_displacement_mm: float | None = None
    median_dvars: float | None = None  # in robust units
    tsnr: float | None = None  # median over voxels of temporal mean / robust deviation, after cleaning
    clipped_fraction: float | None = None
    conflict_mm: float = 0.0  # between the two geometries of the header; the sform is used


def region_coverage(atlases: dict[str, Atlas], is_measured: Bool[np.ndarray, "voxel"]) -> dict[str, float]:
    """The measured share of every region that has voxels, by <atlas>/<label>."""
    shares: dict[str, float] = {}
    for name, atlas in atlases.items():
        sizes = np.bincount(atlas.labels)
        measured = np.bincount(atlas.labels[is_measured], minlength=len(sizes))
        shares |= {f"{name}/{label}": float(measured[label] / sizes[label]) for label in atlas.region_ids}
    return shares


def scan_quality(
    is_measured: Bool[np.ndarray, "voxel"], regions: dict[str, float], *, num_frames: int = 1, conflict_mm: float = 0.0
) -> ScanQuality:
    """The quality numbers of every kind of scan: coverage of the space and of the worst covered region."""
    lowest = min(regions, key=lambda region: regions[region], default=None)
    return ScanQuality(
        coverage=float(is_measured.mean()),
        lowest_region_coverage=None if lowest is None else regions[lowest],
        lowest_region=lowest or "",
        num_frames=num_frames,
        conflict_mm=conflict_mm,
    )


def run_quality(run: CleanedRun, stored: StandardisedRun, dvars: np.ndarray, regions: dict[str, float]) -> ScanQuality:
    """The quality of a BOLD run: coverage, motion, DVARS, signal to noise, censored frames and clipped values."""
    moved_mm = run.framewise_displacement_mm[np.isfinite(run.framewise_displacement_mm)].astype(np.float64)
    is_measured = stored.is_measured
    tsnr = np.median(stored.mean[is_measured].astype(np.float64) / stored.scale[is_measured])
    censored = np.flatnonzero(~run.is_kept).tolist()
    quality = scan_quality(
        is_measured, regions, num_frames=len(stored.quantised), conflict_mm=run.packed.header.conflict_mm
    )
    quality.num_dropped = run.num_dropped
    quality.num_censored, quality.censored = len(censored), schema.frame_ranges(censored)
    quality.mean_framewise_displacement_mm = float(moved_mm.mean()) if len(moved_mm) else None
    quality.max_framewise_displacement_mm = float(moved_mm.max()) if len(moved_mm) else None
    quality.median_dvars = float(np.nanmedian(dvars))
    quality.tsnr = float(tsnr)
    quality.clipped_fraction = float(stored.clipped_fraction.mean())
    return quality


def why_refused(quality: ScanQuality, rules: AcceptanceConfig, *, is_run: bool) -> str | None:
    """The first acceptance rule that a scan breaks, in words, or None. An unknown number breaks no rule."""
    region = quality.lowest_region_coverage
    checks = [
        ("min_coverage", quality.coverage, rules.min_coverage, "covers {:.1%} of the space"),
        (
            "min_region_coverage",
            region,
            rules.min_region_coverage,
            f"covers {{:.1%}} of region {quality.lowest_region}",
        ),
    ]
    if is_run:
        share = quality.num_censored / quality.num_frames
        moved_mm = quality.mean_framewise_displacement_mm
        checks += [
            ("min_frames", quality.num_frames, rules.min_frames, "has {:.0f} frames"),
            ("min_tsnr", quality.tsnr, rules.min_tsnr, "has a temporal signal to noise ratio of {:.1f}"),
            ("max_mean_fd_mm", moved_mm, rules.max_mean_fd_mm, "has a mean framewise displacement of {:.2f} mm"),
            ("max_censored_fraction", share, rules.max_censored_fraction, "has {:.0%} of its frames censored"),
            ("max_clipped_fraction", quality.clipped_fraction, rules.max_clipped_fraction, "has {:.2%} values clipped"),
        ]
    for name, value, limit, words in checks:
        if value is None or limit is None:
            continue
        is_broken = value < limit if name.startswith("min_") else value > limit
        if is_broken:
            relation = "less than" if name.startswith("min_") else "more than"
            return f"{words.format(value)}, {relation} acceptance.{name}={limit}"
    return None
