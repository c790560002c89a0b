"""Fetch the bundle of a registered model into a local folder.

Example:
  python -m training.pull callosum-bold@champion out/bold tracking=sqlite:///out/mlflow.db

Required: the model (name@alias, name/version or models:/...) and a new folder

`brain_models.bundle.load` reads the folder (model.yaml, weights.safetensors, spaces); `mlflow.pyfunc.load_model` takes
the registered model itself.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from configs.entry import Command, main
from configs.words import aligned
from training.errors import RegistryError


def pull_to(model: str, folder: Path, *, uri: str) -> Path:
    """Returns the folder, now holding the bundle of 'name@alias', 'name/version' or 'models:/...'; none if it fails."""
    from cluster.storage.files import refusal_is_an_error
    from training.registry import models as registry

    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise RegistryError(f"{folder} is a file or not empty; give a new folder, nothing is overwritten")
    with refusal_is_an_error(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=folder.parent) as partial:
        bundle = registry.pull(model, Path(partial) / "model", uri=uri)
        if folder.exists():
            folder.rmdir()
        shutil.move(bundle, folder)
    return folder


@dataclass
class PullConfig:
    """Which model, and where to."""

    name: str
    folder: str
    tracking: str


def run(config: PullConfig) -> None:
    from training.registry import models as registry

    tags = registry.version_tags(config.name, uri=config.tracking)
    folder = pull_to(config.name, Path(config.folder), uri=config.tracking)
    print(
        f"{config.name} is in {folder}", aligned([(f"  {key}", value) for key, value in sorted(tags.items())]), sep="\n"
    )
    print(f"next, in Python: callosum.load({str(folder)!r})")


def command() -> Command:
    return Command(PullConfig, run, lambda config: f"fetch {config.name} from {config.tracking} into {config.folder}")


if __name__ == "__main__":
    main("training.pull", __doc__, command, positional=("name", "folder"))
