"""One run is one job, however its folder is written; a lost job server ends the submitter with what to do."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from aiohttp import ClientResponseError, RequestInfo
from multidict import CIMultiDict, CIMultiDictProxy
from ray.job_submission import JobSubmissionClient
from yarl import URL

from cluster import submit
from cluster.config import ClusterConfig, Needs
from cluster.errors import SubmitError
from cluster.submit import Job, connect, follow, relative_locations, runtime_environment
from configs.entry import compose
from configs.parse import ConfigError

LOCAL = ClusterConfig(**compose("pretrain", ["cluster=local"])["cluster"])


@pytest.mark.parametrize(
    ("written", "same"),
    [("s3://runs/bold", "s3://runs/bold/"), ("/project/runs/bold", "/project//runs/./bold/")],
)
def test_a_folder_written_in_another_way_is_the_same_run(written: str, same: str) -> None:
    assert Job("pretrain", (), written).base_id == Job("pretrain", (), same).base_id
    assert Job("pretrain", (), written).base_id != Job("pretrain", (), f"{written}2").base_id
    assert Job("pretrain", (), written).base_id != Job("finetune", (), written).base_id


def test_a_location_that_only_this_folder_has_is_told_from_the_names_of_models_and_arms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("out/bundle", "first", "out/scratch", "pretrain"):
        Path(name).mkdir(parents=True)
    Path("out/atlas.nii").touch()
    config = {
        "encoder": "out/bundle",
        "encoders": {"a": ["first", "models:/b@x"], "b": ["s3://models/c", "/project/d"]},
        "classifier": "models:/c@champion",
        "atlas": ["aal3", "out/atlas.nii"],
        "scans": ["out/*.nii", "/project/*.nii"],
        "run": {"name": "pretrain", "folder": "out/run", "scratch": "out/scratch"},
        "data": {"cache_folder": "cache"},
        "tracking": {"uri": "sqlite:///out/mlflow.db"},
    }
    needs = Needs(
        results="out/run",
        cluster=replace(LOCAL, scratch="out/scratch"),
        inputs={"out/bundle": "model.yaml", "first": "model.yaml"},
        scratch="out/scratch",
        cache=("cache", 5),
        tracking="sqlite:///out/mlflow.db",
    )
    assert sorted(relative_locations(config, needs)) == sorted(
        [
            "encoder=out/bundle",
            "encoders.a=first",
            "atlas=out/atlas.nii",
            "scans=out/*.nii",
            "run.folder=out/run",
            "data.cache_folder=cache",
            "tracking.uri=sqlite:///out/mlflow.db",
        ]
    )
    grid = relative_locations({"part": "pretrain", "overrides": ["run.folder=out/run"]}, Needs(results="out/run"))
    assert grid == ["a location=out/run"]


def test_a_job_that_is_stopped_gets_minutes_to_save_with_and_without_git(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    for folder in (None, str(tmp_path)):
        assert runtime_environment(folder)["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "600"}


class LostServer:
    """A job server that stands for one lost in the middle: a proxy answers for it, or nobody."""

    def __init__(self, error: Exception, *, in_log: bool) -> None:
        self.error = error
        self.is_in_log = in_log

    async def tail_job_logs(self, submission_id: str) -> AsyncIterator[str]:
        if self.is_in_log:
            raise self.error
        yield "step 1\n"

    def get_job_info(self, submission_id: str) -> SimpleNamespace:
        raise self.error


class SilentConnections:
    """A job server whose first connections die without a word, as those through a tunnel do."""

    def __init__(self) -> None:
        self.num_connections = 0

    async def tail_job_logs(self, submission_id: str) -> AsyncIterator[str]:
        self.num_connections += 1
        yield "step 1\n"
        if self.num_connections < 3:
            await asyncio.sleep(60)
        yield "step 2\n"

    def get_job_info(self, submission_id: str) -> SimpleNamespace:
        status = SimpleNamespace(value="SUCCEEDED", is_terminal=lambda: True)
        return SimpleNamespace(status=status, message="", driver_exit_code=0)


def test_a_log_that_falls_silent_is_asked_for_anew_and_each_line_printed_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submit, "QUIET_S", 0.05)
    server = SilentConnections()
    assert follow(cast(JobSubmissionClient, server), "one-001") == 0
    assert server.num_connections == 3
    assert capsys.readouterr().out == "step 1\nstep 2\n"


def bad_gateway() -> ClientResponseError:
    url = URL("http://head/api/jobs/one-001/logs/tail")
    return ClientResponseError(RequestInfo(url, "GET", CIMultiDictProxy(CIMultiDict()), url), (), status=502)


@pytest.mark.parametrize(
    ("error", "in_log"),
    [(bad_gateway(), True), (ConnectionError("refused"), False), (RuntimeError("status code 500"), False)],
)
def test_a_job_server_that_is_lost_while_following_is_named_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: Exception, *, in_log: bool
) -> None:
    monkeypatch.setattr(submit, "RECONNECT_S", 0.05)
    monkeypatch.setattr(submit, "POLL_S", 0.01)
    client = cast(JobSubmissionClient, LostServer(error, in_log=in_log))
    with pytest.raises(SubmitError, match=r"the job server has not answered .* the same command follows it again"):
        follow(client, "one-001")


def test_the_address_given_is_asked_and_not_the_one_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as nobody, socket.socket() as other:
        for each in (nobody, other):
            each.bind(("127.0.0.1", 0))
        other.listen()
        other.settimeout(0.5)
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{other.getsockname()[1]}")
        with pytest.raises(SubmitError, match=f"no Ray job server answers at .*:{nobody.getsockname()[1]};"):
            connect(f"http://127.0.0.1:{nobody.getsockname()[1]}")
        with pytest.raises(TimeoutError):
            other.accept()  # nobody called


def test_a_command_that_writes_no_results_and_one_that_is_unknown_are_refused() -> None:
    with pytest.raises(SubmitError, match=r"python -m training\.runs has no results of its own; run it here"):
        submit.checked_job("training.runs", ["tracking=http://a"])
    with pytest.raises(ConfigError, match=r"pretrian: unknown command, did you mean pretrain\?"):
        submit.checked_job("pretrian", [])
