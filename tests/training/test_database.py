"""The SQLite file of MLflow: a kill while it is made leaves none, and a broken one is named before anything trains."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mlflow import MlflowClient
from training_toys import toy_config

from training.config import TrackingConfig, validate_train
from training.database import create_database, database_problems

MAKE = "import sys; from training.database import create_database; create_database(sys.argv[1])"


def test_a_process_killed_while_it_makes_the_database_leaves_none_and_the_next_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, scratch = f"sqlite:///{tmp_path}/out/mlflow.db", tmp_path / "tmp"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    with subprocess.Popen([sys.executable, "-c", MAKE, uri]) as making:
        until = time.monotonic() + 200
        while not any(path.stat().st_size for path in scratch.glob("*/mlflow.db")):  # a first table is there
            assert making.poll() is None
            assert time.monotonic() < until
            time.sleep(0.01)
        making.kill()
    assert not (tmp_path / "out" / "mlflow.db").exists()
    create_database(uri)
    assert database_problems(uri) == []
    assert MlflowClient(tracking_uri=uri).create_experiment("after") == "1"


def test_of_several_runs_that_start_at_once_one_makes_the_database_and_all_use_it(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(create_database, [uri] * 2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db"]
    before = (tmp_path / "mlflow.db").read_bytes()
    create_database(uri)
    assert (tmp_path / "mlflow.db").read_bytes() == before


def unfinished(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("create table alembic_version (version_num text)")
        database.execute("create table experiments (name text)")


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (unfinished, "its tables were never finished"),
        (lambda path: path.write_bytes(b"x" * 5000), "file is not a database"),
        (lambda path: path.write_bytes(b""), "no such table: alembic_version"),
    ],
    ids=["unfinished", "garbage", "empty"],
)
def test_a_broken_database_is_named_before_anything_trains(
    tmp_path: Path, write: Callable[[Path], object], reason: str
) -> None:
    write(tmp_path / "mlflow.db")
    config = toy_config(tmp_path)
    config.tracking = TrackingConfig(**{**vars(config.tracking), "uri": f"sqlite:///{tmp_path}/mlflow.db"})
    (problem,) = validate_train(config, "train", num_workers=1)
    assert problem == (
        f"tracking: {tmp_path}/mlflow.db is not a whole MLflow database ({reason}); move it away, and the run makes a "
        "new one"
    )
