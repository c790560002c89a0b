"""What is done to a run between scan and stored array: the record that travels with shard sets and bundles.

Promise: plain values, so that whoever only reads shards needs no NIfTI library for it.
"""

from dataclasses import dataclass
from typing import Literal

BoldType = Literal["int8", "float16"]
UnknownOrientation = Literal["refuse", "accept_as_stored"]

UNITS_PER_SCALE = 21  # of int8
NOT_MEASURED = -128


@dataclass
class CleaningConfig:
    """What is taken out of every run, and which frames are marked."""

    confounds: list[str]  # groups (motion6, motion24, wm_csf, 36p ...), columns or patterns of fMRIPrep's table
    high_pass_hz: float | None
    low_pass_hz: float | None  # needs filter: butterworth
    filter: Literal["cosine", "butterworth"]
    detrend: bool
    non_steady_state: Literal["drop", "keep"]
    censor_above_fd_mm: float | None
    censor_above_std_dvars: float | None


@dataclass
class BoldPreprocessing:
    """What a served model must do to a run so that it looks like those it was trained on."""

    cleaning: CleaningConfig
    stored_as: BoldType
    unknown_orientation: UnknownOrientation
    needs_confounds: bool  # the numbers depend on the run's confound table


def validate_cleaning(config: CleaningConfig, key: str) -> list[str]:
    """All problems of the options; each names its key and what to give instead."""
    problems = []
    for name in ("high_pass_hz", "low_pass_hz", "censor_above_fd_mm", "censor_above_std_dvars"):
        value = getattr(config, name)
        if value is not None and value <= 0:
            problems.append(f"{key}.{name}: {value}; give a number above 0, or null for none")
    if config.low_pass_hz is not None and config.filter == "cosine":
        problems.append(f"{key}.low_pass_hz: {config.low_pass_hz} with filter=cosine; use filter=butterworth")
    if config.low_pass_hz and config.high_pass_hz and config.high_pass_hz >= config.low_pass_hz:
        problems.append(f"{key}: high_pass_hz {config.high_pass_hz} must lie below low_pass_hz {config.low_pass_hz}")
    return problems
