"""What a registration depends on: the schema of configs/registration/*.yaml."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_sharding.registration.ants_calls import INSTALL_HINT

PACKAGED = "mni152"  # the template nilearn ships
PACKAGED_NAME = "2009aSym"
MAX_SPACING_MM = 4.0


@dataclass
class RegistrationConfig:
    """How raw scans are brought to a template."""

    kind: Literal["affine", "nonlinear"]  # affine is a preview: regions are off by several mm
    template: str  # mni152 (packaged with nilearn: the brain of ICBM 2009a symmetric), or a NIfTI file of a T1 template
    template_name: str  # what shard sets call it; for mni152: 2009aSym
    spacing_mm: float  # of the finest level
    num_starts: int
    seed: int
    min_similarity: float  # of T1 and template: correlation inside the template's brain, at 4 mm
    min_bold_similarity: float  # of mean BOLD and T1: correlation ratio over the brain and its surroundings, at 4 mm


def validate_registration(config: RegistrationConfig, key: str) -> list[str]:
    """All problems that need no scan: each names its key and what to give instead."""
    problems = []
    if config.template == PACKAGED and config.template_name != PACKAGED_NAME:
        problems.append(
            f"{key}.template_name: {config.template_name}; {PACKAGED} is ICBM 2009a symmetric: give {PACKAGED_NAME}, "
            f"or the file of another template as {key}.template"
        )
    if config.template != PACKAGED and not Path(config.template).is_file():
        problems.append(f"{key}.template: {config.template} is no file; give a NIfTI file, or {PACKAGED}")
    if not 0 < config.spacing_mm <= MAX_SPACING_MM:
        problems.append(f"{key}.spacing_mm: {config.spacing_mm}; give a spacing above 0, up to {MAX_SPACING_MM} mm")
    if config.num_starts < 1:
        problems.append(f"{key}.num_starts: {config.num_starts}; give at least 1 (several guard against bad ones)")
    for name in ("min_similarity", "min_bold_similarity"):
        if not 0 < getattr(config, name) < 1:
            problems.append(f"{key}.{name}: {getattr(config, name)}; give a number between 0 and 1")
    if importlib.util.find_spec("ants") is None:
        problems.append(f"{key}: antspyx is not installed; {INSTALL_HINT}")
    return problems
