"""Registered models: bundles with their lineage, in MLflow's registry. The only module here that knows brain_models.

A registered model carries the code of `brain_models` and loads with mlflow.pyfunc where this repository is unknown.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import brain_models
from brain_models.bundle import Interface, code_commit, interface
from training.errors import RegistryError
from training.registry.card import FILE as CARD
from training.watch.tracking import experiment_id, known_server, mlflow_environment

if TYPE_CHECKING:
    import pandas
    from mlflow.models import ModelSignature

CODE_FOLDER = Path(brain_models.__file__).parent
CODE_HASH_TAG = "callosum.code_hash"
MAX_DESCRIPTION = 5000  # characters, of MLflow's database columns
CHECKPOINT_HASH_TAG = "callosum.checkpoint_hash"


def register(
    bundle: Path, *, name: str, tags: Mapping[str, str], alias: str, uri: str, run_id: str | None, experiment: str
) -> str:
    """Returns 'name@alias' of the new version, logged into the MLflow run that trained it (or a run of its own).

    A checkpoint is registered once: when this code has registered it before, the name of that version comes back.
    """
    mlflow_environment(timeout_s=60)
    import mlflow

    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    faces = interface(bundle)
    # The run is saved, and restarting its workers would not help.
    then = "everything else is saved: run the same command again to register it"
    with server_errors_named(f"{uri} did not accept the model {name}", then):
        tags = {**tags, **source_tags()}
        client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
        same = (CHECKPOINT_HASH_TAG, CODE_HASH_TAG)
        for known in client.search_model_versions(f"name='{name}'"):
            if CHECKPOINT_HASH_TAG in tags and all(known.tags.get(tag) == tags[tag] for tag in same):
                is_current = str(client.get_registered_model(name).aliases.get(alias)) == str(known.version)
                return f"{name}@{alias}" if is_current else f"{name}/{known.version}"
        mlflow.set_experiment(experiment_id=experiment_id(client, experiment, uri))
        # MLflow asks the model about the example, and warns that its files are not there.
        logging.getLogger("mlflow.models.model").setLevel(logging.ERROR)
        with mlflow.start_run(run_id=run_id, run_name=None if run_id else name):
            logged = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(CODE_FOLDER / "served.py"),
                artifacts={"bundle": str(bundle)},
                code_paths=[str(CODE_FOLDER)],
                pip_requirements=requirements(faces.packages),
                signature=signature(faces),
                input_example=example(faces),
            )
            lineage = {key: value for key, value in tags.items() if key != CHECKPOINT_HASH_TAG}
            version = str(mlflow.register_model(logged.model_uri, name, tags=lineage).version)
        if (bundle / CARD).exists():
            described = shortened((bundle / CARD).read_text(encoding="utf-8"))
            client.update_registered_model(name, described)
            client.update_model_version(name, version, described)
        client.set_registered_model_alias(name, alias, version)
        if CHECKPOINT_HASH_TAG in tags:  # last: by it the next start knows that nothing is missing
            client.set_model_version_tag(name, version, CHECKPOINT_HASH_TAG, tags[CHECKPOINT_HASH_TAG])
        return f"{name}@{alias}"


def shortened(card: str) -> str:
    """Returns a model card as MLflow's description takes it: cut at the end of a line, which then says so."""
    if len(card) <= MAX_DESCRIPTION:
        return card
    rest = f"\n\n(cut here: the model's bundle has the whole card, {CARD})"
    return card[: MAX_DESCRIPTION - len(rest)].rpartition("\n")[0] + rest


def requirements(packages: Iterable[str]) -> list[str]:
    """Returns what is installed here as versions that any package index has: without a build's name, such as +cpu."""
    return [f"{package}=={importlib.metadata.version(package).partition('+')[0]}" for package in packages]


def signature(faces: Interface) -> ModelSignature:
    """Returns MLflow's description of the served table and its answers.

    It has all columns a model may read, because MLflow drops what a signature lacks. A scan is described as the string
    of its path: a packed array passes too.
    """
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, DataType, Schema

    given = {str: DataType.string, float: DataType.double}
    inputs = Schema([ColSpec(given[type(each.example)], name, each.is_required) for name, each in faces.inputs.items()])
    answered = {np.str_: DataType.string, np.float32: DataType.float, np.float64: DataType.double}
    named = [ColSpec(DataType.string, name, required=False) for name in ("subject", "session")]
    outputs = [ColSpec(answered[dtype.type], name) for name, dtype in faces.outputs.items()]
    return ModelSignature(inputs=inputs, outputs=Schema([*named, *outputs]))


def example(faces: Interface) -> pandas.DataFrame:
    """Returns a table as the model reads it, with paths that show how files are named; no transform, because these
    lie in the template's space."""
    import pandas

    return pandas.DataFrame({name: [each.example] for name, each in faces.inputs.items() if name != "transform"})


@contextlib.contextmanager
def server_errors_named(what: str, then: str) -> Iterator[None]:
    """Turns what MLflow raises into a RegistryError that says what failed, and what to do then. It raises errors of its
    own, of its HTTP library and the disk (both OSError), and of its S3 client."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except Exception as error:
        is_of_bucket = type(error).__module__.partition(".")[0] in ("boto3", "botocore")
        if is_of_bucket or isinstance(error, MlflowException | OSError):
            raise RegistryError(f"{what} ({error}); {then}") from error
        raise


def pull(model: str, folder: Path, *, uri: str | None) -> Path:
    """Returns the local bundle folder of 'name@alias', 'name/version' or 'models:/...', downloaded below `folder`."""
    if uri is None:
        raise RegistryError(f"{model}: no registry is configured; give tracking=<address>")
    mlflow_environment(timeout_s=60)
    import mlflow

    mlflow.set_tracking_uri(known_server(uri))
    mlflow.set_registry_uri(uri)
    location = model if model.startswith("models:/") else f"models:/{model}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    then = f"'python -m training.runs {uri}' lists what is registered"
    with server_errors_named(f"{location} cannot be read from {uri}", then):
        local = Path(mlflow.artifacts.download_artifacts(artifact_uri=location, dst_path=str(folder)))
    bundle = next((path.parent for path in (local / "artifacts").glob("*/model.yaml")), None)
    if bundle is None:
        raise RegistryError(
            f"{location} holds no bundle (no model.yaml in its artifacts); name a model that this project registered"
        )
    return bundle


def version_tags(model: str, *, uri: str) -> dict[str, str]:
    """Returns the lineage tags of 'name@alias' or 'name/version'."""
    mlflow_environment(timeout_s=60)
    import mlflow
    from mlflow.exceptions import MlflowException

    name, at, alias = model.removeprefix("models:/").partition("@")
    if not at and "/" not in name:
        raise RegistryError(f"{model} names no version; give {name}@<alias> or {name}/<version>")
    try:
        client = mlflow.MlflowClient(tracking_uri=known_server(uri), registry_uri=uri)
        if at:
            return dict(client.get_model_version_by_alias(name, alias).tags)
        name, _, version = name.partition("/")
        return dict(client.get_model_version(name, version).tags)
    except MlflowException as error:
        listing = f"'python -m training.runs {uri}' lists what is registered"
        raise RegistryError(f"{model} is not registered at {uri} ({error}); {listing}") from error


def source_tags() -> dict[str, str]:
    """Returns the git commit of this repository ('unknown' outside one) and the hash of the code that travels along."""
    return {"callosum.git_commit": code_commit(), CODE_HASH_TAG: code_hash(CODE_FOLDER)}


def origin_tags(command: str | None) -> dict[str, str]:
    """Returns MLflow's own tags of a run for this repository's git commit and the command line (None: called by
    Python)."""
    commit = {"mlflow.source.git.commit": code_commit(), "mlflow.source.type": "LOCAL"}
    return commit if command is None else commit | {"mlflow.source.name": command}


def code_hash(folder: Path) -> str:
    """Returns the hexadecimal SHA-256 over names and bytes of a package's Python files."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
