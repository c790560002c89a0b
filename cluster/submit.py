r"""Send one command of this project to a Ray cluster.

It is checked here, submitted and followed; this command exits as the job did.

Example:

  python -m cluster.submit pretrain kind=bold shards=s3://brains/shards run.folder=s3://runs/bold \
      tracking=http://mlflow:5000 cluster=ray cluster.num_workers=16

Required: the command (data_sharding, pretrain, finetune, ...) and its arguments
Before the command: address=<of the cluster's job server>  working_dir=<uploaded to the nodes>  wait=false

The same command again follows the job while it runs; after it ended, a new job resumes from the run's last commit.
Stopping this command (Ctrl-C) leaves the job running.
"""

from __future__ import annotations

import asyncio
import glob
import hashlib
import logging
import os
import posixpath
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.config import Needs
from cluster.errors import SubmitError
from configs.entry import Command, load, main
from configs.parse import flatten

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
STOP_WAIT = {"RAY_JOB_STOP_WAIT_TIME_S": "600"}  # Ray's 3 s until it kills are too few to finish a step and save
COMMIT_VARIABLE = "CALLOSUM_GIT_COMMIT"  # what a registered model is tagged with: the copy on a node has no history
RECONNECT_S = 120.0
QUIET_S = 600.0  # of a log, after which it is asked for anew
POLL_S = 0.5


@dataclass(frozen=True)
class Job:
    """One `python -m <part> <overrides>`, and the run it works on."""

    part: str
    overrides: tuple[str, ...]
    run: str  # where its results live

    @property
    def entrypoint(self) -> str:
        return shlex.join(["python", "-m", self.part, *self.overrides])

    @property
    def base_id(self) -> str:
        """The same for every attempt at one run."""
        scheme, separator, path = self.run.rpartition("://")
        run = f"{scheme}{separator}{posixpath.normpath(path)}"  # a folder written with a slash at its end is the same
        digest = hashlib.sha256(f"{self.part} {run}".encode()).hexdigest()[:8]
        name = re.sub(r"[^A-Za-z0-9]+", "-", run.rpartition("/")[2]).strip("-")
        return f"{self.part.replace('.', '-')}-{name}-{digest}"


@dataclass
class SubmitConfig:
    """The command, and the cluster it goes to."""

    part: str
    overrides: list[str]
    address: str | None
    working_dir: str | None
    wait: bool


def run(config: SubmitConfig) -> int:
    job = checked_job(config.part, config.overrides)
    client = connect(config.address)
    submission_id = submit(client, job, config.working_dir)
    return follow(client, submission_id) if config.wait else 0


def plan(config: SubmitConfig) -> str:
    job = checked_job(config.part, config.overrides)
    return f"submit as {job.base_id}-<attempt>: {job.entrypoint}"


def command() -> Command:
    return Command(SubmitConfig, run, plan)


def checked_job(part: str, overrides: list[str]) -> Job:
    """The job of a command that its own validation accepts; SubmitError lists locations that only this machine has."""
    command, config = load(part, overrides)
    if command.needs is None:
        raise SubmitError(f"python -m {part} has no results of its own; run it here")
    needs: Needs = command.needs(config)
    if relative := relative_locations(config, needs):
        raise SubmitError(
            "these locations are relative, and a job runs in a copy of this folder that is thrown away:\n"
            + "\n".join(f"  - {each}" for each in relative)
            + "\ngive s3://bucket/prefix, http://server, or a path (from /) on a disk that every node mounts"
        )
    return Job(part, tuple(overrides), needs.results)


def relative_locations(config: object, needs: Needs) -> list[str]:
    """What only this machine and this folder have, each with the key that names it, if any does."""
    values = {"a location": locations(needs)} | flatten(config)
    named = ((key, each) for key, value in values.items() for each in (value if isinstance(value, list) else [value]))
    key_of = {value: key for key, value in named if is_relative(value, needs)}
    return [f"{key}={value}" for value, key in key_of.items()]


def locations(needs: Needs) -> list[str]:
    """Every location that all nodes must reach."""
    return [each for each in (needs.results, *needs.inputs, needs.cache and needs.cache[0], needs.tracking) if each]


def is_relative(value: object, needs: Needs) -> bool:
    """True for a location that means something else on every machine and in every folder: one that the command says it
    needs, or a path of something that is here. What belongs to each node alone may be relative."""
    if not isinstance(value, str) or value.startswith("/"):
        return False
    if value == needs.scratch or (needs.cluster is not None and value == needs.cluster.scratch):
        return False
    scheme, separator, rest = value.partition("://")
    if separator:
        return scheme == "sqlite" and not rest.startswith("//")  # sqlite:///file is relative, sqlite:////file is not
    return value in locations(needs) or ("/" in value and bool(glob.glob(value)))


def connect(address: str | None) -> JobSubmissionClient:
    """A client of the cluster's job server; SubmitError when nothing answers there or it wants a token."""
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.ERROR)  # one line for every file it does not upload
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS", DEFAULT_ADDRESS)
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray's client would take another one there before its argument
    try:
        return JobSubmissionClient(address)
    except ConnectionError as error:
        raise SubmitError(
            f"no Ray job server answers at {address}; start one (ray start --head), forward its port "
            "(ssh -L 8265:127.0.0.1:8265 <head>), or give address="
        ) from error
    except (AuthenticationError, RuntimeError) as error:
        raise SubmitError(f"{address} refused: {error}; set RAY_AUTH_MODE=token and the cluster's token") from error


def submit(client: JobSubmissionClient, job: Job, working_dir: str | None) -> str:
    """The id of the job that works on this run: the one that runs already, or a new one."""
    earlier = [each for each in client.list_jobs() if attempt_of(each, job) is not None]
    if running := [each for each in earlier if not each.status.is_terminal()]:
        return adopt(running[0], job)
    attempt = 1 + max((attempt_of(each, job) or 0 for each in earlier), default=0)
    submission_id = f"{job.base_id}-{attempt:03d}"
    try:
        client.submit_job(
            entrypoint=job.entrypoint,
            submission_id=submission_id,
            runtime_env=runtime_environment(working_dir),
            metadata={"part": job.part, "run": job.run},
        )
    except RuntimeError as error:
        others = [each for each in client.list_jobs() if each.submission_id == submission_id]
        if not others:  # otherwise somebody else submitted the same run a moment ago
            raise SubmitError(f"the cluster did not take {job.entrypoint}: {error}") from error
        return adopt(others[0], job)
    print(f"submitted {submission_id}: {job.entrypoint}", flush=True)
    return submission_id


def runtime_environment(working_dir: str | None) -> dict[str, object]:
    """What a job gets: the folder, which commit it is of, and time to save when it is stopped. Readable for everyone
    who may list jobs: no secret belongs here."""
    if working_dir is None:
        return {"env_vars": STOP_WAIT}
    return {"working_dir": working_dir, "env_vars": STOP_WAIT | commit_of(working_dir)}


def commit_of(folder: str) -> dict[str, str]:
    """The variable that names the git commit of a folder, '+' when files differ from it; empty outside a checkout, or
    without git."""
    command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    try:
        described = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return {}
    return {COMMIT_VARIABLE: described.stdout.strip()}


def attempt_of(known: JobDetails, job: Job) -> int | None:
    """The number of the attempt that a job of the cluster is at this run; None for jobs of other runs."""
    base, _, attempt = (known.submission_id or "").rpartition("-")
    return int(attempt) if base == job.base_id and attempt.isdecimal() else None


def adopt(running: JobDetails, job: Job) -> str:
    """The id of a job that works on this run already; SubmitError when it does so with other values."""
    assert running.submission_id is not None
    if running.entrypoint != job.entrypoint:
        raise SubmitError(
            f"job {running.submission_id} works on {job.run} with another command:\n  there {running.entrypoint}\n"
            f"  here  {job.entrypoint}\nstop it (ray job stop {running.submission_id}), or choose another folder"
        )
    print(f"{running.submission_id} is running already; following it", flush=True)
    return running.submission_id


def follow(client: JobSubmissionClient, submission_id: str) -> int:
    """The exit status of the job, after printing its log to the end."""
    try:
        asyncio.run(print_log(client, submission_id))
        job = ended_job(client, submission_id)
    except KeyboardInterrupt:
        print(
            f"\n{submission_id} still runs; the same command follows it again, 'ray job stop {submission_id}' ends it",
            file=sys.stderr,
        )
        return 130
    print(f"{submission_id} {job.status.value.lower()}" + (f": {job.message}" if job.message else ""), file=sys.stderr)
    if job.status.value == "SUCCEEDED":
        return 0
    return job.driver_exit_code or 1


def ended_job(client: JobSubmissionClient, submission_id: str) -> JobDetails:
    """What became of the job, once it has ended."""
    lost_at = None
    while True:
        try:
            job = client.get_job_info(submission_id)
            if job.status.is_terminal():
                return job
            lost_at = None
        except (RuntimeError, OSError) as error:
            lost_at = lost_at or time.monotonic()
            give_up_in_time(lost_at, error, submission_id)
        time.sleep(POLL_S)


async def print_log(client: JobSubmissionClient, submission_id: str) -> None:
    """Print the job's log as it grows; after a lost connection continue behind what was printed."""
    from aiohttp import ClientError

    num_printed, lost_at = 0, None
    while True:
        num_seen = 0
        try:
            log = client.tail_job_logs(submission_id)
            while (text := await asyncio.wait_for(anext(log, None), QUIET_S)) is not None:
                lost_at = None
                new = text[max(num_printed - num_seen, 0) :]
                num_seen += len(text)
                num_printed = max(num_printed, num_seen)
                print(new, end="", flush=True)
            return
        except (RuntimeError, OSError, ClientError) as error:
            if isinstance(error, TimeoutError) and answers(client, submission_id):
                continue  # nothing was printed, or this connection is dead
            lost_at = lost_at or time.monotonic()
            give_up_in_time(lost_at, error, submission_id)
            await asyncio.sleep(POLL_S)


def answers(client: JobSubmissionClient, submission_id: str) -> bool:
    """True when the job server still knows the job."""
    try:
        client.get_job_info(submission_id)
    except (RuntimeError, OSError):
        return False
    return True


def give_up_in_time(lost_at: float, error: Exception, submission_id: str) -> None:
    """SubmitError when the job server has been lost for too long."""
    if time.monotonic() - lost_at > RECONNECT_S:
        raise SubmitError(
            f"the job server has not answered for {RECONNECT_S:.0f} s ({error}); {submission_id} may still run: the "
            "same command follows it again"
        ) from error


if __name__ == "__main__":
    main("cluster.submit", __doc__, command, positional=("part", "overrides..."))
