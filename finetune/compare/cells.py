"""The runs that a comparison is made of: one fine-tuning a cell (arm, encoder, mode, seed), each done once.

Finished cells are read, not run again; knows nothing of intervals and verdicts.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config import CompareConfig, FinetuneConfig
from training.grid import GridRun
from training.watch.tracking import mlflow_environment


@dataclass(frozen=True)
class Cell:
    """One fine-tuning. `number` counts the encoders of an arm: its pretraining seeds."""

    arm: str
    number: int
    encoder: str
    mode: str
    seed: int

    @property
    def folder(self) -> str:
        """Below the comparison's run folder."""
        return f"cells/{slug(self.arm)}-{self.number}-{self.mode}-seed{self.seed}"


def slug(text: str) -> str:
    """The text as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text.removeprefix("models:/")).strip("-")


def arms_of(config: CompareConfig) -> dict[str, list[str]]:
    """Encoders by arm, the reference first; a list is an arm for each encoder."""
    given = config.encoders
    arms = given if isinstance(given, dict) else {encoder: [encoder] for encoder in given}
    reference = next(iter(arms)) if config.encoder == "first" else config.encoder
    return {reference: arms[reference]} | arms


def cells_of(config: CompareConfig) -> list[Cell]:
    """Every cell, those of one encoder together."""
    return [
        Cell(arm, number, encoder, mode, seed)
        for arm, encoders in arms_of(config).items()
        for number, encoder in enumerate(encoders)
        for mode in config.modes
        for seed in config.seeds
    ]


def cell_config(config: CompareConfig, cell: Cell) -> FinetuneConfig:
    """The cell as a run of `python -m finetune`: its encoder, its seed everywhere, its mode, and its own folder."""
    shared: dict[str, Any] = {field.name: getattr(config, field.name) for field in dataclasses.fields(FinetuneConfig)}
    run = dataclasses.replace(config.run, name=slug(cell.folder), folder=f"{config.run.folder}/{cell.folder}")
    task = config.task
    opening = {"plateau": None} | dataclasses.asdict(config.modes[cell.mode])
    changed: dict[str, Any] = {"unfreezing": task["unfreezing"] | opening}
    if task.get("probe") is not None:
        changed["probe"] = task["probe"] | {"seed": cell.seed}
    return FinetuneConfig(
        **shared
        | {
            "encoder": cell.encoder,
            "run": run,
            "train": dataclasses.replace(config.train, seed=cell.seed),
            "data": dataclasses.replace(config.data, seed=cell.seed),
            "task": task | changed,
        }
    )


def pinned(encoder: str, uri: str | None) -> str:
    """The encoder by version, so that an alias that moves on cannot mix two encoders in one comparison."""
    if uri is None or "@" not in encoder or (Path(encoder) / "model.yaml").exists():
        return encoder
    mlflow_environment(timeout_s=60)
    import mlflow

    name, _, alias = encoder.removeprefix("models:/").partition("@")
    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    return f"models:/{name}/{client.get_model_version_by_alias(name, alias).version}"


def runs_of(config: CompareConfig) -> dict[Cell, GridRun]:
    """Every cell's run, with its encoder by version."""
    encoders = [encoder for arm in arms_of(config).values() for encoder in arm]
    versions = {encoder: pinned(encoder, config.train.tracking.uri) for encoder in encoders}
    return {
        cell: GridRun("finetune", cell_config(config, dataclasses.replace(cell, encoder=versions[cell.encoder])))
        for cell in cells_of(config)
    }
