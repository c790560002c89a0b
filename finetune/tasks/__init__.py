"""What can be asked of a pretrained backbone: one module per kind of task, found by its name; a new one touches nothing
else.

A module has the dataclass `Config`, which configs/task/*.yaml fills, and
- `open_study(config: FinetuneConfig) -> training.study.Study`,
- `metrics(config) -> Sequence[Metric]`, the most important first,
- `validate(config) -> list[str]`: all problems that the configuration, its shard sets and its backbone have,
- `plan(config) -> dict[str, str]`: what would happen, by subject,
- `inputs(config)`: locations that a run reads, each with an object that it holds (or None),
- `contents(config)`: hashes of what it reads now, by their names in a result's lineage;
for finetune.compare also
- `read_scores(text)`: scores as the metrics take them, with their `subjects`, of every model of scores.csv, the trained
  one first,
- `tested_subjects(config) -> list[str]`: the subjects of the test split that can be scored,
- `unscored_problems(config, metric) -> list[str]`: why the metric of this name has no value on them;
for finetune.diagnose also
- `diagnose(config: DiagnoseConfig) -> str`: whether it can learn at all, in a sentence with its numbers.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any, TypeVar

from configs.parse import ConfigError, parse
from finetune.errors import FinetuneError

Config = TypeVar("Config")


def task_module(task: Mapping[str, Any]) -> ModuleType:
    """The module that task.module names; FinetuneError when there is none."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    if task.get("module") not in names:
        raise FinetuneError(f"task.module: {task.get('module')!r} is not one of {', '.join(sorted(names))}")
    return importlib.import_module(f"{__name__}.{task['module']}")


def parse_task(task: Mapping[str, Any], schema: type[Config]) -> Config:
    """The `task` section as the module's own dataclass; FinetuneError names every key that does not fit."""
    try:
        return parse(task, schema)
    except ConfigError as error:
        raise FinetuneError(str(error).replace("\n  - ", "\n  - task.")) from error
