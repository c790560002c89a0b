"""`python -m training.pull <name>@champion <folder>`: a registered model's bundle as a local folder.

`brain_models.bundle.load` reads it (model.yaml, weights.safetensors, spaces); `mlflow.pyfunc.load_model` takes the
registered model itself.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from cluster.errors import StorageError
from cluster.storage.stores import refusal_is_an_error
from training.errors import RegistryError
from training.registry import models as registry


def pull_to(model: str, folder: Path, *, uri: str) -> Path:
    """The folder, now holding the bundle of 'name@alias', 'name/version' or 'models:/...'; nothing when it fails."""
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


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.pull", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="name@alias, name/version or models:/...")
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--uri", default="sqlite:///out/mlflow.db", help="tracking server (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        tags = registry.version_tags(arguments.model, uri=arguments.uri)
        folder = pull_to(arguments.model, arguments.folder, uri=arguments.uri)
    except (RegistryError, StorageError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{arguments.model} is in {folder}", *(f"  {key} {value}" for key, value in sorted(tags.items())), sep="\n")


if __name__ == "__main__":
    main()
