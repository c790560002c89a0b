"""Where scans come from: one module per data set, imported by its name, so that adding one changes no other file.

A module has `find(config, space, *, accepts_raw) -> SourceContents` and a dataclass `Options` for `source.options`.
With `accepts_raw` scans may lie in their own space: they will be registered.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal, TypeVar

from brain_models.space import BrainSpace
from configs.parse import ConfigError, parse
from data_sharding.errors import SourceError
from data_sharding.scans import SourceContents
from data_sharding.sources.privacy import PrivacyConfig, kept_private

Options = TypeVar("Options")

REFUSALS_SHOWN = 5


@dataclass
class SourceConfig:
    """Where scans come from and which of them to use."""

    kind: str  # a module of data_sharding/sources
    root: str
    kinds: list[Literal["bold", "t1", "parcels", "response"]]
    subjects: list[str] | None  # labels without sub-; null uses all
    tasks: list[str] | None  # task entities; null uses all
    allow_template_mix: bool  # also use scans in another template than the space's
    options: dict[str, str | int | float | bool | list[str] | None]  # of this kind of source: its class Options


def find(source: SourceConfig, privacy: PrivacyConfig, space: BrainSpace, *, accepts_raw: bool) -> SourceContents:
    """The scans of the source that suit the space, the refused ones, and what privacy allows about the subjects."""
    contents = kept_private(source_module(source.kind).find(source, space, accepts_raw=accepts_raw), privacy)
    if contents.scans:
        return contents
    shown = "\n".join(f"  {refusal.scan_id}: {refusal.reason}" for refusal in contents.refused[:REFUSALS_SHOWN])
    more = f"\n  and {len(contents.refused) - REFUSALS_SHOWN} more" if len(contents.refused) > REFUSALS_SHOWN else ""
    raise SourceError(f"{source.root}: every scan was refused ({len(contents.refused)}):\n{shown}{more}")


def kinds_of_source() -> list[str]:
    """The names that `source.kind` may have."""
    modules = pkgutil.iter_modules(__path__)
    return sorted(module.name for module in modules if hasattr(_imported(module.name), "find"))


def source_module(kind: str) -> ModuleType:
    """The module of a kind of source; SourceError for an unknown kind."""
    if not kind.isidentifier() or kind not in {module.name for module in pkgutil.iter_modules(__path__)}:
        raise SourceError(f"source.kind: {kind!r} is not one of {', '.join(kinds_of_source())}")
    return _imported(kind)


def parse_options(config: SourceConfig, options: type[Options]) -> Options:
    """`source.options` as the source's own dataclass; SourceError names every key that does not fit."""
    try:
        return parse(config.options, options)
    except ConfigError as error:
        raise SourceError(str(error).replace("\n  - ", "\n  - source.options.")) from error


def validate_source(config: SourceConfig) -> list[str]:
    """All problems that need no scan."""
    problems = []
    if "://" not in config.root and not Path(config.root).is_dir():
        problems.append(f"source.root: {config.root} is not a folder; give the one that holds the scans")
    try:
        parse_options(config, source_module(config.kind).Options)
    except SourceError as error:
        problems.append(str(error))
    return problems


def _imported(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")
