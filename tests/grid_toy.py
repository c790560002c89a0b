"""A command whose configuration is a number: what the tests of grids run, in their process and on Ray."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from cluster.config import ClusterConfig, Needs
from cluster.storage.stores import store_for
from configs.entry import Command
from configs.parse import FREE
from training.grid import GridRun
from training.identity import METRICS, claim, config_hash

INLINE = ClusterConfig("inline", 1, 1, False, 0, 60, 60, None, "unused")


@dataclass
class GridToyConfig:
    """A negative value fails."""

    value: int
    inputs: str  # a file
    num_together: int = field(metadata=FREE)  # ends once so many runs beside it have started
    folder: str = field(metadata=FREE)
    cluster: ClusterConfig = field(metadata=FREE)


def grid_run(
    folder: Path, value: int, *, cluster: ClusterConfig = INLINE, num_together: int = 1, name: str = ""
) -> GridRun:
    run_folder = str(folder / (name or str(value)))
    return GridRun("grid_toy", GridToyConfig(value, str(folder / "inputs"), num_together, run_folder, cluster))


def contents(config: GridToyConfig) -> dict[str, str]:
    return {"inputs": Path(config.inputs).read_text() if Path(config.inputs).exists() else "none"}


def run(config: GridToyConfig) -> None:
    """Write a result, and a letter for every attempt."""
    print(f"running {config.value}")
    store = store_for(config.folder)
    claim(store, config)
    with (Path(config.folder) / "attempts").open("a") as attempts:
        attempts.write("x")
    deadline = time.monotonic() + 120
    while len([*Path(config.folder).parent.glob("*/attempts")]) < config.num_together:
        assert time.monotonic() < deadline, "the others have not started"
        time.sleep(0.05)
    if config.value < 0:
        raise ValueError(f"{config.value} is negative")
    store.put(METRICS, json.dumps({"lineage": {"config hash": config_hash(config), **contents(config)}}).encode())


def command() -> Command:
    def needs(config: GridToyConfig) -> Needs:
        inputs = {config.inputs: None}
        return Needs(config.folder, config.cluster, inputs, contents=lambda: contents(config))

    return Command(GridToyConfig, run, lambda config: f"value {config.value}", needs=needs)
