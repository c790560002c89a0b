"""Metrics, written once to a local file and sent to MLflow by a thread that may fail, wait and try again.

Promise: training never waits for, and never dies of, the tracking server. Every (key, step) is one row, there and here.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from training.config import TrackingConfig
from training.errors import RegistryError

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)

FINAL = ".final"  # ends the names of metrics of a whole split at the end: beside those of the curve
RUN_KEY_TAG = "callosum.run_key"
ROWS_PER_REQUEST = 1000  # MLflow's limits for one log_batch
PARAMS_PER_REQUEST = 100
PARAM_LENGTH = 6000
RETRY_S = 5.0


def known_server(uri: str) -> str:
    """The address itself; RegistryError for a database file that is not there: MLflow would make an empty one."""
    scheme, separator, path = uri.partition("://")
    if not separator:
        raise RegistryError(f"{uri} is not an address; give sqlite:///<file> or http://<server>")
    file = Path(path.removeprefix("/"))
    if scheme == "sqlite" and not file.exists():
        raise RegistryError(f"{uri}: there is no file {file}; check the address and the folder you are in")
    return uri


def last_steps(run: Run) -> dict[str, int]:
    """The last step of each metric: its newest row comes with the run, so that no history has to be read."""
    return {row.key: row.step for row in run.data.to_proto().metrics}


def mlflow_environment(timeout_s: float) -> None:
    """Make MLflow fail fast and quietly: by default one unreachable server blocks a call for minutes."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK", "true")
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(max(1, int(timeout_s)))  # longer for a model than for metrics
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_ENABLE_ASYNC_LOGGING", "false")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


def experiment_id(client: MlflowClient, name: str, uri: str) -> str:
    """The id of an experiment, created if it does not exist. With an SQLite file its artifacts are stored in the file's
    folder (MLflow would put them below the current one)."""
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return experiment.experiment_id
    location = None
    if uri.startswith("sqlite:///"):
        location = (Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlflow-artifacts" / name).as_uri()
    return client.create_experiment(name, artifact_location=location)


class Spool:
    """metrics.jsonl: one line per row {key, step, value, timestamp_ms}; no (key, step) is written twice."""

    def __init__(self, path: Path, *, start: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(start)
        self.path = path
        self.written = {(row["key"], row["step"]) for row in read_rows(path)}
        self.file = path.open("ab")

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        timestamp_ms = time.time_ns() // 1_000_000
        for key, value in metrics.items():
            if (key, step) not in self.written:
                row = {"key": key, "step": step, "value": value, "timestamp_ms": timestamp_ms}
                self.file.write(json.dumps(row).encode() + b"\n")
                self.written.add((key, step))
        self.file.flush()

    @property
    def position(self) -> int:
        return self.file.tell()

    def close(self) -> None:
        self.file.close()


def read_rows(path: Path, position: int = 0) -> list[dict]:
    """The complete rows from byte `position` on."""
    with path.open("rb") as file:
        file.seek(position)
        data = file.read()
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]


def last_step(path: Path) -> int:
    """The last step in a spool, even one that an earlier attempt left behind; 0 when there is none."""
    return max((row["step"] for row in read_rows(path)), default=0) if path.exists() else 0


class Ending(Enum):
    """How a run ended, in MLflow's words."""

    FINISHED = "FINISHED"
    FAILED = "FAILED"
    KILLED = "KILLED"  # asked to stop, and saved


@dataclass
class RunLabel:
    """What the run is called on the server."""

    name: str
    run_key: str  # the run folder's own id: a resumed run finds its MLflow run by it
    params: dict[str, object]
    tags: dict[str, str]


class Sender:
    """The thread that brings a spool to MLflow: same timestamps however late, only steps the server lacks."""

    def __init__(self, config: TrackingConfig, spool_path: Path, label: RunLabel, *, retry_s: float = RETRY_S) -> None:
        self.config = config
        self.spool_path = spool_path
        self.label = label
        self.retry_s = retry_s
        self.run_id: str | None = None
        self.position = 0  # bytes of the spool the server has
        self.last_steps: dict[str, int] = {}  # of each key, on the server before this process
        self.last_error: str | None = None
        self.status = "RUNNING"
        self.is_closing = threading.Event()
        self.wake = threading.Event()
        self.thread = threading.Thread(target=self._run, name="metric-sender", daemon=True)
        self.thread.start()

    def notice(self) -> None:
        """There may be new rows."""
        self.wake.set()

    def close(self, wait_s: float, *, status: str) -> bool:
        """True when the server has every row and knows how the run ended; waits at most `wait_s`."""
        self.status = status
        self.is_closing.set()
        self.wake.set()
        self.thread.join(wait_s)
        is_done = not self.thread.is_alive() and self.position == self.spool_path.stat().st_size
        if not is_done:
            log.warning(
                "tracking: %s did not take everything (%s); the rows are in %s and go there when the same command "
                "runs again",
                self.config.uri,
                self.last_error or "still sending",
                self.spool_path,
            )
        return is_done

    def _run(self) -> None:
        client: MlflowClient | None = None
        is_away = False
        while True:
            is_last = self.is_closing.is_set()
            try:
                client = client or self._connect()
                self._send(client)
                if is_last:
                    self._finish(client)
                    return
                is_away = False
                self.wake.wait(1.0)
                self.wake.clear()
            except Exception as error:  # noqa: BLE001 - whatever the server does, training continues; retried below
                self.last_error = f"{type(error).__name__}: {error}"[:300]
                if not is_away and not is_last:  # once an outage: a wrong password should not show after three weeks
                    log.warning("tracking: %s does not take rows (%s); retrying", self.config.uri, self.last_error)
                is_away = True
                self.is_closing.wait(self.retry_s)
                if is_last:
                    time.sleep(min(self.retry_s, 1.0))

    def _connect(self) -> MlflowClient:
        mlflow_environment(self.config.timeout_s)
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=self.config.uri)
        assert self.config.uri is not None
        experiment = experiment_id(client, self.config.experiment, self.config.uri)
        found = client.search_runs([experiment], filter_string=f"tags.`{RUN_KEY_TAG}` = '{self.label.run_key}'")
        if found:
            run = found[0]
            self.last_steps = last_steps(run)
            client.set_terminated(run.info.run_id, "RUNNING")
        else:
            tags = {**self.label.tags, RUN_KEY_TAG: self.label.run_key}
            run = client.create_run(experiment, tags=tags, run_name=self.label.name)
        # Of a run that was found too: the server may have failed between making it and taking these.
        lacking = self.label.params.keys() - run.data.params.keys()
        params = [Param(key, str(self.label.params[key])[:PARAM_LENGTH]) for key in sorted(lacking)]
        for first in range(0, len(params), PARAMS_PER_REQUEST):
            client.log_batch(run.info.run_id, params=params[first : first + PARAMS_PER_REQUEST])
        self.run_id = run.info.run_id
        return client

    def _send(self, client: MlflowClient) -> None:
        from mlflow.entities import Metric

        assert self.run_id is not None
        while self.position < (size := self.spool_path.stat().st_size):
            with self.spool_path.open("rb") as file:
                file.seek(self.position)
                data = file.read(min(size - self.position, 200 * ROWS_PER_REQUEST))
            lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)[:ROWS_PER_REQUEST]
            if not lines:
                return
            rows = [json.loads(line) for line in lines]
            metrics = [
                Metric(row["key"], row["value"], row["timestamp_ms"], row["step"])
                for row in rows
                if row["step"] > self.last_steps.get(row["key"], -1)
            ]
            if metrics:
                client.log_batch(self.run_id, metrics=metrics)
            self.position += sum(map(len, lines))

    def _finish(self, client: MlflowClient) -> None:
        assert self.run_id is not None
        client.set_terminated(self.run_id, self.status)


class Tracker:
    """What the loop writes to: the spool always, a Sender when there is a server. Ranks other than 0 write nothing."""

    def __init__(self, spool: Spool | None, sender: Sender | None, config: TrackingConfig) -> None:
        self.spool = spool
        self.sender = sender
        self.config = config

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row per key at `step` (updates done)."""
        if self.spool is not None:
            self.spool.add(step, metrics)
        if self.sender is not None:
            self.sender.notice()

    @property
    def run_id(self) -> str | None:
        return self.sender.run_id if self.sender else None

    @property
    def position(self) -> int:
        return self.spool.position if self.spool else 0

    def snapshot(self, path: Path) -> None:
        """Copy what was recorded so far into a checkpoint's folder."""
        if self.spool is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.spool.path.read_bytes()[: self.position])

    def close(self, ending: Ending) -> None:
        if self.spool is not None:
            self.spool.close()
        if self.sender is not None:
            self.sender.close(self.config.drain_s, status=ending.value)


def log_folder(folder: Path, *, name: str, run_id: str | None, config: TrackingConfig) -> bool:
    """True when every file below `folder` is an artifact of the run, below `name`; False where there is no server, no
    run on it, or it did not take them."""
    if config.uri is None or run_id is None:
        return False
    mlflow_environment(config.timeout_s)
    from mlflow.tracking import MlflowClient

    try:
        MlflowClient(tracking_uri=config.uri).log_artifacts(run_id, str(folder), artifact_path=name)
    except Exception as error:  # noqa: BLE001 - whatever the server or its artifact store does, the run is finished
        log.warning(
            "tracking: %s did not take the files of %s (%s: %s); they are in the run folder below %s",
            config.uri,
            folder,
            type(error).__name__,
            str(error)[:300],
            name,
        )
        return False
    return True
