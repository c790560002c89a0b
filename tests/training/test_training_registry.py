"""A registered bundle comes back as the bundle it was, with its lineage."""

from __future__ import annotations

import runpy
import socket
from pathlib import Path

import pytest
from boto3.exceptions import S3UploadFailedError
from botocore.exceptions import NoCredentialsError
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from requests import HTTPError

from cluster.errors import StorageError
from tests.bundles import save_tiny_encoder
from training.errors import RegistryError
from training.pull import pull_to
from training.registry import models as registry
from training.runs import RunsConfig, list_models, list_runs, run


def test_a_registered_bundle_is_pulled_byte_for_byte_with_its_lineage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    bundle = save_tiny_encoder(tmp_path / "bundle")

    def register(alias: str, checkpoint: str = "a") -> str:
        return registry.register(
            bundle,
            name="toy-encoder",
            tags={"callosum.fingerprint": "abc", registry.CHECKPOINT_HASH_TAG: checkpoint},
            alias=alias,
            uri=uri,
            run_id=None,
            experiment="toys",
        )

    assert register("candidate") == "toy-encoder@candidate"
    for model in ("toy-encoder@candidate", "toy-encoder/1", "models:/toy-encoder/1"):
        pulled = registry.pull(model, tmp_path / "pulled", uri=uri)
        assert {path.name: path.read_bytes() for path in pulled.iterdir()} == {
            path.name: path.read_bytes() for path in bundle.iterdir()
        }
    tags = registry.version_tags("toy-encoder@candidate", uri=uri)
    assert tags["callosum.fingerprint"] == "abc"
    assert tags[registry.CODE_HASH_TAG] == registry.code_hash(registry.CODE_FOLDER)
    assert not (tmp_path / "mlruns").exists()
    assert list_models(uri) == ["toy-encoder/1 @candidate"]
    assert list_runs(uri)[0] == "toy-encoder  FINISHED"

    assert register("candidate") == "toy-encoder@candidate"  # of the same checkpoint: nothing new
    assert list_models(uri) == ["toy-encoder/1 @candidate"]

    def refuse(*arguments: str) -> None:
        raise MlflowException("503")

    with monkeypatch.context() as patch:  # the server fails half-way: the same command makes up for it
        patch.setattr(MlflowClient, "set_registered_model_alias", refuse)
        with pytest.raises(RegistryError, match="run the same command again"):
            register("candidate", "b")
    assert register("candidate", "b") == "toy-encoder@candidate"
    assert "toy-encoder/3 @candidate" in list_models(uri)
    assert register("candidate") == "toy-encoder/1"
    assert sorted(list_models(uri)) == ["toy-encoder/1", "toy-encoder/2", "toy-encoder/3 @candidate"]

    folder = pull_to("toy-encoder@candidate", tmp_path / "some" / "folder", uri=uri)
    weights = "weights.safetensors"
    assert (folder / weights).read_bytes() == (bundle / weights).read_bytes()
    assert [path.name for path in (tmp_path / "some").iterdir()] == ["folder"]
    with pytest.raises(RegistryError, match=r"folder is a file or not empty; give a new folder"):
        pull_to("toy-encoder@candidate", folder, uri=uri)

    with pytest.raises(RegistryError, match=r"models:/toy-encoder@champion cannot be read .* lists what is registered"):
        registry.pull("toy-encoder@champion", tmp_path / "none", uri=uri)
    with pytest.raises(RegistryError, match="no registry is configured"):
        registry.pull("toy-encoder@candidate", tmp_path / "none", uri=None)
    with monkeypatch.context() as patch:
        patch.setattr("mlflow.artifacts.download_artifacts", lambda **_: str(tmp_path))
        with pytest.raises(RegistryError, match=r"holds no bundle .* name a model that this project registered"):
            registry.pull("toy-encoder@candidate", tmp_path / "none", uri=uri)


@pytest.mark.parametrize(
    ("module", "arguments", "told"),
    [
        ("training.runs", ["sqlite:///no/such.db"], "sqlite:///no/such.db: there is no file no/such.db; check"),
        ("training.runs", ["out/mlflow.db"], "out/mlflow.db is not an address; give sqlite:///<file>"),
        ("training.pull", ["toy", "new"], "toy names no version; give toy@<alias> or toy/<version>"),
        ("training.pull", ["toy@x", "new", "tracking=sqlite:///no/such.db"], "there is no file no/such.db"),
    ],
)
def test_a_database_or_version_that_is_not_there_is_named_and_none_is_made(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *,
    module: str,
    arguments: list[str],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [module, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert ended.value.code == 2
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_never_taken_for_a_new_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("kept")
    with pytest.raises(RegistryError, match=r"notes.txt is a file or not empty"):
        pull_to("toy@x", tmp_path / "notes.txt", uri="sqlite:///unused.db")
    with pytest.raises(StorageError, match="a file lies where a folder is needed"):
        pull_to("toy@x", tmp_path / "notes.txt" / "new", uri="sqlite:///unused.db")
    assert (tmp_path / "notes.txt").read_text() == "kept"


def test_a_server_that_takes_no_model_is_named_with_what_to_do(tmp_path: Path) -> None:
    """An error of ours: the workers of a run that is done are not started again."""
    save_tiny_encoder(tmp_path)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(RegistryError, match=rf"{uri} did not accept the model toy .* run the same command again"):
            registry.register(tmp_path, name="toy", tags={}, alias="x", uri=uri, run_id=None, experiment="toys")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (HTTPError("500 Server Error"), "500 Server Error"),
        (PermissionError(13, "Permission denied", "/disk/mlflow-artifacts"), "Permission denied"),
        (NoCredentialsError(), "Unable to locate credentials"),
        (S3UploadFailedError("Failed to upload model.yaml"), "Failed to upload"),
    ],
)
def test_an_artifact_store_that_fails_behind_the_server_is_an_error_of_ours_too(error: Exception, words: str) -> None:
    """Of the server's own kind it is not: MLflow passes on what its HTTP library, the disk or boto3 raises."""
    refused = pytest.raises(RegistryError, match=rf"did not accept the model toy \(.*{words}")
    with refused, registry.server_errors_named("the server did not accept the model toy", "run again"):
        raise error


def test_an_error_in_our_own_code_stays_as_it_is() -> None:
    with (
        pytest.raises(KeyError, match="missing"),
        registry.server_errors_named("the server did not answer", "run again"),
    ):
        raise KeyError("missing")


def test_a_server_that_does_not_answer_is_an_error_for_the_user() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(RegistryError, match=f"{uri} cannot be read"):
            run(RunsConfig(uri))


def test_a_card_longer_than_a_description_is_cut_at_a_line_and_says_where_the_rest_is() -> None:
    card = "".join(f"line {number:04d}\n" for number in range(600))
    described = registry.shortened(card)
    assert len(described) <= 5000
    assert described.endswith("\n\n(cut here: the model's bundle has the whole card, MODEL_CARD.md)")
    assert described.splitlines()[-3].startswith("line 04")
    assert registry.shortened("short\n") == "short\n"
