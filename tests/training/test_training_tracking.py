"""Metrics reach MLflow once, however often and however late they are sent, and nobody waits for them."""

from __future__ import annotations

import dataclasses
import http.server
import json
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from training_toys import ToyBatch, ToyConfig, ToySource, ToyTask, services, toy_config

from configs.entry import compose
from training.config import TrackingConfig, validate_train
from training.loop import FitResult, Services, fit
from training.task import State
from training.watch.tracking import RunLabel, Sender, Spool, Tracker, mlflow_environment, read_rows


def tracking(uri: str | None, *, drain_s: float = 60) -> TrackingConfig:
    return TrackingConfig(every_steps=1, uri=uri, experiment="toys", group_norms=False, timeout_s=2, drain_s=drain_s)


def run(config: ToyConfig) -> FitResult:
    return fit(ToyTask(), ToySource(), config, services(config))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for all tests: making its tables takes seconds."""
    mlflow_environment(timeout_s=5)
    import mlflow

    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    mlflow.MlflowClient(uri).create_experiment("toys")
    return uri


def history(uri: str, run_id: str, key: str) -> list[tuple[int, float, int]]:
    import mlflow

    rows = mlflow.MlflowClient(uri).get_metric_history(run_id, key)
    return sorted((row.step, row.value, row.timestamp) for row in rows)


def spooled(path: Path, key: str) -> list[tuple[int, float, int]]:
    return sorted((row["step"], row["value"], row["timestamp_ms"]) for row in read_rows(path) if row["key"] == key)


@pytest.fixture
def dead_server() -> Iterator[str]:
    """Accepts connections and answers 500 after a while."""

    class Broken(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(0.5)
            self.send_error(500)

        do_POST = do_GET

        def log_message(self, *parts: object) -> None:
            return

    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    threading.Thread(target=http_server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http_server.server_address[1]}"
    http_server.shutdown()
    http_server.server_close()


def test_every_metric_of_a_run_is_one_row_there_with_the_spool_s_timestamps(tmp_path: Path, server: str) -> None:
    config = dataclasses.replace(toy_config(tmp_path), tracking=tracking(server))
    result = run(config)
    assert result.mlflow_run_id is not None
    expected = spooled(Path(config.run.folder) / "metrics.jsonl", "train/loss")
    assert [step for step, _, _ in expected] == [1, 2, 3, 4, 5, 6]
    assert history(server, result.mlflow_run_id, "train/loss") == expected


def test_training_continues_while_the_server_is_down_and_a_later_run_sends_everything_once(
    tmp_path: Path, server: str, dead_server: str
) -> None:
    down = dataclasses.replace(toy_config(tmp_path), tracking=tracking(dead_server, drain_s=1))
    result = run(down)
    assert result.seconds < 20
    assert result.mlflow_run_id is None
    rows = spooled(Path(down.run.folder) / "metrics.jsonl", "train/loss")
    assert len(rows) == 6

    up = dataclasses.replace(down, tracking=tracking(server))
    first = run(up)
    second = run(up)
    assert first.mlflow_run_id is not None
    assert second.mlflow_run_id == first.mlflow_run_id
    assert history(server, first.mlflow_run_id, "train/loss") == rows


class UnhurriedSource(ToySource):
    """Steps of at least 20 ms: a hundredth of that is what tracking may take."""

    def steps(self, state: State) -> Iterator[tuple[list[ToyBatch], State]]:
        for item in super().steps(state):
            time.sleep(0.02)
            yield item


def test_tracking_takes_at_most_a_hundredth_of_the_loop_s_time_with_the_server_down(
    tmp_path: Path, dead_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent, taken = [], []  # seconds of computing, and of waiting too: the second depends on what else the machine does
    record = Tracker.record

    def timed(tracker: Tracker, step: int, metrics: Mapping[str, float]) -> None:
        computed, begun = time.thread_time(), time.perf_counter()
        record(tracker, step, metrics)
        spent.append(time.thread_time() - computed)
        taken.append(time.perf_counter() - begun)

    monkeypatch.setattr(Tracker, "record", timed)
    every_steps = compose("pretrain", [])["train"]["tracking"]["every_steps"]
    down = dataclasses.replace(tracking(dead_server, drain_s=0.1), every_steps=every_steps)
    config = dataclasses.replace(toy_config(tmp_path, steps=3 * every_steps), tracking=down)
    fit(ToyTask(), UnhurriedSource(), config, Services(config.run, {"train": {}}, None))
    assert len(spent) >= 3
    assert sum(spent) < 0.01 * 3 * every_steps * 0.02
    assert max(taken) < down.timeout_s / 2  # no request was waited for


def test_rows_the_server_has_seen_before_are_not_sent_again(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is the history of each metric read for that: of a run of weeks that would take many minutes."""
    from mlflow.tracking import MlflowClient

    histories: list[tuple[object, ...]] = []
    get_history = MlflowClient.get_metric_history

    def counted(client: MlflowClient, *arguments: str) -> object:
        histories.append(arguments)
        return get_history(client, *arguments)

    monkeypatch.setattr(MlflowClient, "get_metric_history", counted)
    label = RunLabel("toy", "key-of-a-crashed-run", {"seed": 1}, {})
    for last in (4, 6):  # the first process got to step 4; the second repeats steps 3 and 4, at another time of day
        path = tmp_path / f"{last}.jsonl"
        spool = Spool(path, start=b"")
        for step in range(1 if last == 4 else 3, last + 1):
            spool.add(step, {"loss": 1 / step})
        sender = Sender(tracking(server), path, label)
        assert sender.close(60, status="FINISHED")
        spool.close()
        time.sleep(0.01)
    assert sender.run_id is not None
    assert histories == []
    assert [(step, value) for step, value, _ in history(server, sender.run_id, "loss")] == [
        (step, 1 / step) for step in range(1, 7)
    ]


def test_a_server_that_refuses_is_told_at_once_and_once_an_outage(
    tmp_path: Path, dead_server: str, caplog: pytest.LogCaptureFixture
) -> None:
    spool = Spool(tmp_path / "rows.jsonl", start=b"")
    spool.close()
    sender = Sender(tracking(dead_server), spool.path, RunLabel("toy", "key-refused", {}, {}), retry_s=0.01)
    deadline = time.monotonic() + 30
    while "does not take rows" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not sender.close(2.5, status="FINISHED")
    assert caplog.text.count("does not take rows") == 1
    assert f"{dead_server} does not take rows (MlflowException: " in caplog.text


def test_parameters_reach_a_run_whose_server_failed_just_after_making_it(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    log_batch, failures = MlflowClient.log_batch, iter([ConnectionError("gone")])

    def failing_once(client: MlflowClient, *arguments: object, **named: object) -> None:
        for failure in failures:
            raise failure
        log_batch(client, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(MlflowClient, "log_batch", failing_once)
    spool = Spool(tmp_path / "rows.jsonl", start=b"")
    spool.add(1, {"loss": 1.0})
    spool.close()
    label = RunLabel("toy", "key-of-an-interrupted-start", {"seed": 1, "steps": 5}, {"part": "toys"})
    sender = Sender(tracking(server), spool.path, label, retry_s=0.01)
    assert sender.close(60, status="FINISHED")
    assert sender.run_id is not None
    run = MlflowClient(server).get_run(sender.run_id)
    assert run.data.params == {"seed": "1", "steps": "5"}
    assert (run.data.tags["part"], run.data.metrics) == ("toys", {"loss": 1.0})


def test_a_server_s_address_with_a_password_is_refused_without_saying_it(tmp_path: Path) -> None:
    config = toy_config(tmp_path)
    for uri in (
        "http://rater:hunter2@mlflow:5000",
        "postgresql://rater:hunter2@db/mlflow",
        "http://rater:hun/hunter2@mlflow",
    ):
        (problem,) = validate_train(dataclasses.replace(config, tracking=tracking(uri)), "train", num_workers=1)
        assert problem.startswith("tracking: ")
        assert "MLFLOW_TRACKING_PASSWORD" in problem
        assert "hunter2" not in problem
    for uri in ("http://mlflow:5000", "sqlite:////disk/a@b/mlflow.db", None):
        assert validate_train(dataclasses.replace(config, tracking=tracking(uri)), "train", num_workers=1) == []


def test_a_tracking_address_that_is_a_bare_path_is_refused(tmp_path: Path) -> None:
    config = dataclasses.replace(toy_config(tmp_path), tracking=tracking("/disk/mlflow.db"))
    (problem,) = validate_train(config, "train", num_workers=1)
    assert problem == "tracking: /disk/mlflow.db; give sqlite:///<file>, http://<server>, or null"


def test_the_spool_writes_a_key_and_step_once(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "metrics.jsonl", start=b"")
    spool.add(1, {"loss": 2.0})
    spool.add(1, {"loss": 3.0, "rate": 1.0})
    again = Spool(tmp_path / "metrics.jsonl", start=(tmp_path / "metrics.jsonl").read_bytes())
    again.add(1, {"loss": 4.0})
    spool.close()
    again.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["key"], row["step"], row["value"]) for row in rows] == [("loss", 1, 2.0), ("rate", 1, 1.0)]
