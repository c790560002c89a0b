"""The README's commands run as they are written, one after the other, from an empty folder."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def readme_commands(heading: str) -> list[str]:
    """Returns the commands of the code block below a heading, continuation lines joined, comments dropped."""
    section = (ROOT / "README.md").read_text().split(f"## {heading}\n")[1]
    block = re.search(r"```bash\n(.*?)```", section, flags=re.DOTALL)
    assert block is not None
    lines = block.group(1).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


def environment() -> dict[str, str]:
    found = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return found | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def run(command: str, folder: Path, **extra: str) -> str:
    done = attempt(command, folder, **extra)
    assert done.returncode == 0, f"$ {command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def attempt(command: str, folder: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment() | extra,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


@pytest.mark.timeout(900)  # seven commands, two of them trainings: minutes on a busy machine
def test_every_command_of_the_readme_runs_in_order_from_an_empty_folder(folder: Path) -> None:
    commands = readme_commands("The commands, one by one")
    assert commands[0] == "source .venv/bin/activate"
    assert commands[-1].startswith("mlflow ui")
    printed = {command.split()[2]: run(command, folder) for command in commands[1:-1]}
    assert list(printed) == [
        "data_sharding.phantom",
        "data_sharding",
        "data_sharding.verify",
        "data_sharding.report",
        "pretrain",
        "finetune",
        "finetune.predict",
    ]
    assert "connectivity + logistic" in printed["finetune"]
    assert re.search(r"\b0001\s+(ADHD|control)\s+0\.\d+\s+0\.\d+\s+sub-0001\S*", printed["finetune.predict"])
    assert (folder / "out/readme/adhd/report.html").stat().st_size > 20_000


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def is_open(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def ray_head(folder: Path) -> Iterator[dict[str, str]]:
    """The environment of a user beside a Ray that was started as the README says, on free ports."""
    token, temporary = folder / "token", Path(tempfile.mkdtemp(prefix="ray-"))  # sockets need a short path
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    dashboard, agent = free_port(), free_port()
    extra = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    head = subprocess.Popen(
        [
            *("ray", "start", "--head", "--block", "--num-cpus=2", f"--temp-dir={temporary}"),
            *(f"--port={free_port()}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={free_port()}"),
            f"--dashboard-agent-listen-port={agent}",
        ],
        cwd=folder,
        env=environment() | extra,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 90
        probe = ["ray", "job", "submit", "--no-wait", "--", "true"]  # the agent that takes jobs comes up last
        while not is_open(agent) or subprocess.run(probe, env=environment() | extra, capture_output=True).returncode:
            assert head.poll() is None, "ray start --head stopped"
            assert time.monotonic() < deadline, "Ray did not come up within 90 s"
            time.sleep(1)
        yield extra
    finally:
        head.terminate()
        head.wait(timeout=60)
        shutil.rmtree(temporary, ignore_errors=True)


def test_the_readmes_ray_job_runs_on_a_started_ray_and_ends_in_a_bundle(folder: Path, ray_head: dict[str, str]) -> None:
    """Uses the shards of the commands above; the working directory holds only what a job needs."""
    start, submit = readme_commands("The same on a cluster")
    assert start == "ray start --head"
    assert submit.startswith("ray job submit --working-dir . -- python -m pretrain")
    job_folder = folder / "job"
    job_folder.mkdir()
    command = submit.replace("$PWD", str(folder)) + " train.steps=4 train.evaluation.every_steps=4"
    printed = run(command, job_folder, **ray_head)
    assert "succeeded" in printed
    assert (folder / "out/readme/submitted/bundle/model.yaml").exists()
    listed = run("python -m training.runs sqlite:///out/mlflow.db", folder)
    assert re.search(
        r"quick-bold  FINISHED  step 4\n +commit \S+/out/readme/submitted/checkpoints/step-00000004-", listed
    )


def submitted_parts(ray_head: dict[str, str]) -> list[str]:
    """The parts among the jobs that this Ray was given, by its own list."""
    headers = {"Authorization": f"Bearer {Path(ray_head['RAY_AUTH_TOKEN_PATH']).read_text()}"}
    request = urllib.request.Request(f"{ray_head['RAY_API_SERVER_ADDRESS']}/api/jobs/", headers=headers)
    with urllib.request.urlopen(request) as answer:
        entrypoints = [job["entrypoint"] for job in json.load(answer)]
    assert "true" in entrypoints, "the probe of the fixture"
    return [entrypoint for entrypoint in entrypoints if "data_sharding.phantom" in entrypoint]


def test_a_submitted_command_is_checked_followed_and_ends_with_its_own_exit_status(
    folder: Path, ray_head: dict[str, str]
) -> None:
    out = folder / "submitted-bids"

    def submit(arguments: str) -> subprocess.CompletedProcess[str]:
        return attempt(f"bash {ROOT}/cluster/submit.sh working_dir=null {arguments}", folder, **ray_head)

    misspelt = submit(f"data_sharding.phantom out={out} num_subject=2")
    assert misspelt.returncode == 2
    assert "num_subject" in misspelt.stderr
    relative = submit("data_sharding.phantom out=somewhere num_subjects=2")
    assert relative.returncode == 2
    assert "  - out=somewhere" in relative.stderr
    assert not out.exists()

    assert not submitted_parts(ray_head)

    first = submit(f"data_sharding.phantom out={out} num_subjects=2 num_frames=12")
    assert first.returncode == 0, first.stderr
    assert "submitted data-sharding" in first.stdout.replace("_", "-")
    assert ": 2 subjects, written in" in first.stdout  # the job's own log
    assert (out / "participants.tsv").exists()

    (folder / "no_folder").write_text("a file where a folder is asked for")
    assert len(submitted_parts(ray_head)) == 1
    failing = submit(f"data_sharding.phantom out={folder}/no_folder num_subjects=2 num_frames=12")
    assert failing.returncode == 2
    assert len(submitted_parts(ray_head)) == 2  # it was the job that failed
    assert f"PhantomError: {folder}/no_folder is a file" in failing.stdout + failing.stderr
