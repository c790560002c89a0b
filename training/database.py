"""The SQLite file of a `sqlite:///` tracking address: it appears whole or not at all, and is looked at before a run
trains.

MLflow makes its tables in place, one migration after the other: a run killed meanwhile would leave a file that no later
run can use.
"""

from __future__ import annotations

import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

from cluster.storage.stores import LocalStore

PREFIX = "sqlite:///"


def create_database(uri: str) -> None:
    """Makes the file of a `sqlite:///` address where there is none; of several runs one makes it. Nothing for another
    address."""
    if not uri.startswith(PREFIX) or (file := Path(uri.removeprefix(PREFIX))).exists():
        return
    from mlflow.tracking import MlflowClient

    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "mlflow.db"
        MlflowClient(tracking_uri=f"{PREFIX}{made}").search_experiments(max_results=1)  # makes the tables
        LocalStore(file.parent).put_if_absent(file.name, made.read_bytes())


def database_problems(uri: str) -> list[str]:
    """What is wrong with the file of a `sqlite:///` address, where there is one."""
    if not uri.startswith(PREFIX) or not (file := Path(uri.removeprefix(PREFIX))).exists():
        return []
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as database:
            revisions = database.execute("select version_num from alembic_version").fetchall()
        reason = "" if len(revisions) == 1 else "its tables were never finished"
    except sqlite3.DatabaseError as error:
        reason = "" if "locked" in str(error) else str(error)
    if not reason:
        return []
    return [f"tracking: {file} is not a whole MLflow database ({reason}); move it away, and the run makes a new one"]
