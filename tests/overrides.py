"""Overrides of a parsed configuration: as on the command line, without composing it again for each of many cases."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TypeVar

import yaml

Config = TypeVar("Config")


def overridden(config: Config, overrides: Iterable[str]) -> Config:
    """A copy of the configuration with `part.key=value` set for every override, in dataclasses and dicts."""
    changed = copy.deepcopy(config)
    for override in overrides:
        path, _, value = override.partition("=")
        *parts, name = path.split(".")
        owner: object = changed
        for part in parts:
            owner = owner[part] if isinstance(owner, dict) else getattr(owner, part)
        if isinstance(owner, dict):
            owner[name] = yaml.safe_load(value)
        else:
            setattr(owner, name, yaml.safe_load(value))
    return changed
