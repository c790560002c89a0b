"""Temporal cleaning of packed runs: first frames dropped, drifts and confounds regressed out, bad frames marked.

Promise: the sharder and the served model clean alike, because both call `clean_bold`. Conventions are nilearn's
(`nilearn.signal.clean`): cosines and confounds in one regression, or a Butterworth filter of signals and confounds
before it. The temporal mean stays, so stored units remain those of the scan.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Float64

from brain_models.confounds import FRAMEWISE_DISPLACEMENT, STD_DVARS, ConfoundTable, read_confounds
from brain_models.errors import ScanError
from brain_models.preprocess import Cleaner, PackedScan
from brain_models.recipe import CleaningConfig

BUTTERWORTH_ORDER = 5  # nilearn's

Projection = tuple[Float32[np.ndarray, "time basis"], Float32[np.ndarray, "basis fitted"]]


@dataclass(frozen=True)
class CleanedRun:
    """A run after cleaning; True in `is_kept`: not censored. Frames dropped at its start are gone from everything."""

    packed: PackedScan
    framewise_displacement_mm: Float32[np.ndarray, "time"]  # NaN: unknown
    is_kept: Bool[np.ndarray, "time"]
    num_dropped: int
    regressors: list[str]


def clean_bold(
    packed: PackedScan,
    config: CleaningConfig,
    *,
    repetition_time_s: float,
    confounds: Path | str | None,
    framewise_displacement_mm: np.ndarray | None = None,
) -> CleanedRun:
    """Returns the run with its cleaning, which is done where the values are computed.

    `confounds` is the run's table, needed when columns are regressed; `framewise_displacement_mm` of a registration
    serves where the table has none. ScanError: no table, a column missing, too few frames left.
    """
    path, num_frames = packed.header.path, packed.num_frames
    table = None if confounds is None else read_confounds(confounds, num_frames=num_frames)
    if config.confounds and table is None:
        raise ScanError(
            f"{path}: no confound table, but preprocessing regresses {', '.join(config.confounds)}; give its "
            "desc-confounds_timeseries.tsv"
        )
    num_dropped = table.num_non_steady() if table is not None and config.non_steady_state == "drop" else 0
    if num_frames - num_dropped < 2:
        raise ScanError(f"{path}: {num_dropped} of {num_frames} frames are not in steady state; nothing is left")
    moved_mm = _displacement(table, framewise_displacement_mm, num_frames)[num_dropped:]
    is_kept = _kept(table, moved_mm, config, num_dropped)
    packed = replace(packed, held=replace(packed.held, rows=packed.held.rows[:, num_dropped:]))
    names: list[str] = []
    columns = np.empty((num_frames - num_dropped, 0))
    if config.confounds:
        assert table is not None
        names, columns = table.regressors(config.confounds)
        columns = columns[num_dropped:]
    # Drifts alone are fitted to all frames: a run without its table then gets the same numbers.
    is_fitted = is_kept if names else np.ones_like(is_kept)
    if is_fitted.sum() < 2:
        raise ScanError(f"{path}: {is_fitted.sum()} of {len(is_kept)} frames are not censored; too few to regress")
    cleaner = _cleaner(packed, columns, is_fitted, config=config, repetition_time_s=repetition_time_s)
    packed = replace(packed, cleaner=cleaner)
    packed.block(packed.held.pieces[0])  # what cannot be cleaned is refused here
    return CleanedRun(packed, moved_mm, is_kept, num_dropped, names)


def cosine_drifts(
    num_frames: int, *, repetition_time_s: float, high_pass_hz: float
) -> Float64[np.ndarray, "time drift"]:
    """Returns the discrete cosines slower than `high_pass_hz`, without a constant; none for a short run.

    The convention of SPM, fMRIPrep and nilearn: floor(2 x duration x frequency) terms.
    """
    order = min(num_frames - 1, int(np.floor(2 * num_frames * high_pass_hz * repetition_time_s + 1e-9)))
    frames, terms = np.arange(num_frames), np.arange(1, order + 1)
    return np.sqrt(2 / num_frames) * np.cos(np.pi / num_frames * (frames[:, None] + 0.5) * terms)


def _displacement(table: ConfoundTable | None, registered_mm: np.ndarray | None, num_frames: int) -> np.ndarray:
    stated = None if table is None else table.optional(FRAMEWISE_DISPLACEMENT)
    known_mm = registered_mm if stated is None else stated
    return np.full(num_frames, np.nan, np.float32) if known_mm is None else np.asarray(known_mm, dtype=np.float32)


def _kept(table: ConfoundTable | None, moved_mm: np.ndarray, config: CleaningConfig, num_dropped: int) -> np.ndarray:
    """True where no measure says the frame is bad; an unknown one says nothing."""
    is_kept = np.ones(len(moved_mm), dtype=bool)
    if config.censor_above_fd_mm is not None:
        is_kept &= ~(moved_mm > config.censor_above_fd_mm)
    changed = None if table is None else table.optional(STD_DVARS)
    if config.censor_above_std_dvars is not None and changed is not None:
        is_kept &= ~(changed[num_dropped:] > config.censor_above_std_dvars)
    return is_kept


def _cleaner(
    packed: PackedScan,
    columns: Float64[np.ndarray, "time column"],
    is_fitted: Bool[np.ndarray, "time"],
    *,
    config: CleaningConfig,
    repetition_time_s: float,
) -> Cleaner | None:
    """Returns what cleans a block; None when nothing is to be done."""
    sections = None
    is_filtered = config.filter == "butterworth"
    if is_filtered:
        sections = _butterworth(config, repetition_time_s, packed)
        columns = _filtered(columns, sections, is_fitted, config.detrend, packed)
    else:
        columns = np.concatenate([columns, _slow_columns(packed.num_frames, config, repetition_time_s)], axis=1)
    projection = _projection(columns, is_fitted, packed)
    if projection is None and sections is None and not (config.detrend and is_filtered):
        return None

    def clean(voxels: Float32[np.ndarray, "voxel time"]) -> Float32[np.ndarray, "voxel time"]:
        if not is_filtered:
            return _regressed(voxels, projection, is_fitted)
        mean = voxels.mean(axis=1, keepdims=True)
        series = (voxels - mean).T.astype(np.float64)
        filtered = _filtered(series, sections, is_fitted, config.detrend, packed).T
        return _regressed(np.ascontiguousarray(filtered, dtype=np.float32), projection, is_fitted) + mean

    return clean


def _regressed(
    voxels: Float32[np.ndarray, "voxel time"], projection: Projection | None, is_fitted: Bool[np.ndarray, "time"]
) -> Float32[np.ndarray, "voxel time"]:
    """Returns the voxels without their projection, in place."""
    if projection is None:
        return voxels
    basis, weights = projection
    first = voxels[:, :1].copy()  # any constant projects to nothing: without it, sums in float32 lose nothing
    voxels -= first
    fitted = voxels if is_fitted.all() else voxels[:, is_fitted]
    voxels -= (fitted @ weights.T) @ basis.T
    voxels += first
    return voxels


def _slow_columns(num_frames: int, config: CleaningConfig, repetition_time_s: float) -> np.ndarray:
    """Returns what is regressed out beside confounds: cosines below the high-pass frequency, and the trend."""
    columns = np.empty((num_frames, 0))
    if config.high_pass_hz is not None:
        columns = cosine_drifts(num_frames, repetition_time_s=repetition_time_s, high_pass_hz=config.high_pass_hz)
    if config.detrend:
        columns = np.concatenate([columns, np.linspace(-1, 1, num_frames)[:, None]], axis=1)
    return columns


def _projection(
    columns: Float64[np.ndarray, "time column"], is_fitted: Bool[np.ndarray, "time"], packed: PackedScan
) -> Projection | None:
    """Returns the basis of the columns over all frames, and what gives its coefficients from the fitted frames."""
    if columns.shape[1] == 0:
        return None
    centred = columns - columns[is_fitted].mean(axis=0)
    spread = centred[is_fitted].std(axis=0)
    centred = centred[:, spread > 1e-12] / spread[spread > 1e-12]
    left, sizes, right = np.linalg.svd(centred[is_fitted], full_matrices=False)
    is_independent = sizes > 1e-10 * sizes.max(initial=1e-300)
    rank, num_fitted = int(is_independent.sum()), int(is_fitted.sum())
    if rank >= num_fitted - 1:
        raise ScanError(
            f"{packed.header.path}: {rank} regressors for {num_fitted} frames that are not censored leave nothing; "
            "regress fewer confounds, or censor less"
        )
    basis = centred @ right.T[:, is_independent] / sizes[is_independent]
    return basis.astype(np.float32), left[:, is_independent].T.astype(np.float32)


def _butterworth(config: CleaningConfig, repetition_time_s: float, packed: PackedScan) -> np.ndarray | None:
    """Returns the filter as second-order sections; None when nothing is to be filtered."""
    from scipy import signal

    nyquist_hz = 0.5 / repetition_time_s
    high = config.high_pass_hz
    low = config.low_pass_hz if config.low_pass_hz is not None and config.low_pass_hz < nyquist_hz else None
    if high is not None and high >= nyquist_hz:
        raise ScanError(
            f"{packed.header.path}: high_pass_hz={high} is not below {nyquist_hz:.3g} Hz, half the frame rate; lower it"
        )
    if high is None and low is None:
        return None
    edges = [edge for edge in (high, low) if edge is not None]
    kind = "band" if len(edges) == 2 else "high" if high is not None else "low"
    frequency = edges if len(edges) == 2 else edges[0]
    return signal.butter(BUTTERWORTH_ORDER, frequency, btype=kind, output="sos", fs=1 / repetition_time_s)


def _filtered(
    series: Float64[np.ndarray, "time column"],
    sections: np.ndarray | None,
    is_fitted: Bool[np.ndarray, "time"],
    detrend: bool,
    packed: PackedScan,
) -> Float64[np.ndarray, "time column"]:
    """Returns the series without trend and filtered forwards and backwards; censored frames are bridged by a spline."""
    from scipy import interpolate, signal

    if series.shape[1] == 0:
        return series
    frames = np.arange(len(series))
    if not is_fitted.all():
        series = series.copy()
        bridge = interpolate.CubicSpline(frames[is_fitted], series[is_fitted])
        series[~is_fitted] = bridge(frames[~is_fitted])
    if detrend:
        series = signal.detrend(series, axis=0)
    if sections is None:
        return series
    try:
        return signal.sosfiltfilt(sections, series, axis=0)
    except ValueError as error:
        raise ScanError(
            f"{packed.header.path}: {len(series)} frames are too few for the Butterworth filter ({error}); use "
            "filter=cosine, or drop the run"
        ) from error
