"""Write a tiny phantom in the exact layout of one data set.

It serves to try the data set's source without the restricted data.

Example:
  python -m data_sharding.source_phantoms layout=adhd200 out=out/adhd200

Required: layout=bids|adhd200|mica_mics|hcp_motor|algonauts2023  out=<new folder>
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path

from cluster.config import Needs
from configs.entry import Command, main
from configs.words import counted
from data_sharding import phantoms
from data_sharding.errors import SourceError
from data_sharding.hints import after_source_phantom

NO_DATASET = ("fields", "study")


@dataclass
class SourcePhantomConfig:
    """Which phantom, and where."""

    layout: str
    out: str
    num_subjects: int
    num_images: int  # of algonauts2023
    seed: int


def datasets() -> list[str]:
    """The data sets that have a phantom."""
    names = (module.name for module in pkgutil.iter_modules(phantoms.__path__))
    return sorted(name for name in names if name not in NO_DATASET)


def validate(config: SourcePhantomConfig) -> list[str]:
    """All problems of a configuration."""
    problems = []
    if config.layout not in datasets():
        problems.append(f"layout: {config.layout!r} is not one of {', '.join(datasets())}")
    if config.num_subjects < 2:
        problems.append(f"num_subjects: {config.num_subjects}; give at least 2")
    if config.num_images < 12:
        problems.append(f"num_images: {config.num_images}; give at least 12")
    return problems


def run(config: SourcePhantomConfig) -> None:
    """Writes the folder and says what comes next."""
    out = Path(config.out)
    if out.exists() and any(out.iterdir()):
        raise SourceError(f"{out} is not empty; give a new out=")
    out.mkdir(parents=True, exist_ok=True)
    own = {"num_images": config.num_images} if config.layout == "algonauts2023" else {}
    importlib.import_module(f"{phantoms.__name__}.{config.layout}").write(out, config.num_subjects, config.seed, **own)
    print(f"{out}: {counted(config.num_subjects, 'subject')} in the layout of {config.layout}")
    print(after_source_phantom(config.layout, config.out))


def plan(config: SourcePhantomConfig) -> str:
    """Returns what would be written."""
    return f"a {config.layout} phantom of {config.num_subjects} subjects into {config.out}, seed {config.seed}"


def command() -> Command:
    return Command(SourcePhantomConfig, run, plan, validate, lambda config: Needs(results=config.out))


if __name__ == "__main__":
    main("data_sharding.source_phantoms", __doc__, command)
