"""What is handed to clusters is well formed: YAML against schemas, scripts by shellcheck, units against their program.

Of KubeRay's own fields only the names and their nesting are checked, against the list below (its API reference, v1,
operator 1.5); everything inside pod templates and core objects is checked against Kubernetes' own schemas.
"""

from __future__ import annotations

import configparser
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import mlflow.cli
import psutil
import pytest
import yaml

from configs.entry import compose

ROOT = Path(__file__).parents[2]
SPECS = ROOT / "cluster" / "specs"
OPERATIONS = ROOT / "docs" / "operations.md"
BIN = Path(sys.executable).parent
KUBERNETES = "1.34"

RAYJOB = {
    "entrypoint", "submissionMode", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished",
    "activeDeadlineSeconds", "runtimeEnvYAML", "rayClusterSpec",
}  # fmt: skip
RAYCLUSTER = {
    "rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs",
}  # fmt: skip
AUTOSCALER = {"upscalingMode", "idleTimeoutSeconds", "resources", "image", "env", "envFrom"}
HEAD = {"serviceType", "rayStartParams", "template"}
WORKERS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}

SCRIPTS = sorted(
    path
    for pattern in ("cluster/**/*.sh", "cluster/**/*.sbatch", "*/launch/*.sh", "examples/*.sh")
    for path in ROOT.glob(pattern)
)


def rayjob() -> tuple[dict[str, Any], dict[str, Any]]:
    """The RayJob and the NetworkPolicy."""
    job, policy = yaml.safe_load_all((SPECS / "rayjob.yaml").read_text())
    return job, policy


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """(group, pod) of head and workers."""
    cluster = rayjob()[0]["spec"]["rayClusterSpec"]
    groups = {"head": cluster["headGroupSpec"]} | {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    for name, group in groups.items():
        template = group["template"]
        metadata = template["metadata"] | {"name": name}
        yield name, {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def test_every_pod_and_policy_holds_against_kubernetes_own_schemas() -> None:
    for _, pod in pods():
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    kubernetes_validate.validate(rayjob()[1], KUBERNETES, strict=True)
    _, pod = next(pods())
    pod["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="volumeMount"):
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_every_field_of_the_rayjob_is_one_of_kuberays() -> None:
    job, _ = rayjob()
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert set(job["spec"]) <= RAYJOB
    assert set(cluster) <= RAYCLUSTER
    assert set(cluster["autoscalerOptions"]) <= AUTOSCALER
    assert set(cluster["headGroupSpec"]) <= HEAD
    assert all(set(group) <= WORKERS for group in cluster["workerGroupSpecs"])
    assert all(isinstance(value, str) for value in cluster["headGroupSpec"]["rayStartParams"].values())


def test_the_cluster_is_closed_and_its_workers_have_what_a_run_asks_for() -> None:
    job, _ = rayjob()
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    ray_pin = next(line for line in project()["dependencies"] if line.startswith("ray["))
    assert ray_pin.endswith(f"=={cluster['rayVersion']}")
    limits = {name: pod["spec"]["containers"][0]["resources"]["limits"] for name, pod in pods()}
    assert "nvidia.com/gpu" not in limits.pop("head")
    most = {group["groupName"]: group["maxReplicas"] for group in cluster["workerGroupSpecs"]}
    num_gpus = sum(int(limits[name]["nvidia.com/gpu"]) * replicas for name, replicas in most.items())
    (num_workers,) = re.findall(r"cluster\.num_workers=(\d+)", job["spec"]["entrypoint"])
    assert num_gpus >= int(num_workers)
    preemptible = dict(pods())["preemptible"]["spec"]
    assert len(preemptible["tolerations"]) == 2
    for _, pod in pods():
        container = pod["spec"]["containers"][0]
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        assert "livenessProbe" not in container, "KubeRay's own probes know Ray's token"
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/nvme", "/dev/shm"}
        assert all("value" in variable for variable in container["env"])
        assert not any("SECRET" in variable["name"] or "TOKEN" in variable["name"] for variable in container["env"])


def commands(text: str) -> Iterator[list[str]]:
    """The part and the overrides of every submit, preflight and checked.sh in a text."""
    command = re.compile(r"(?:python -m cluster\.(?:submit|preflight)|bash \S*cluster/checked\.sh) ([a-z_]+ .*)")
    for line in text.replace("\\\n", " ").splitlines():
        if found := command.search(line):
            yield shlex.split(found.group(1), comments=True)


def test_commands_in_specs_and_operations_are_ones_the_project_takes() -> None:
    comments = [line.lstrip("# ") for line in (SPECS / "slurm.sbatch").read_text().splitlines() if line.startswith("#")]
    texts = [rayjob()[0]["spec"]["entrypoint"], "\n".join(comments), OPERATIONS.read_text()]
    found = [words for text in texts for words in commands(text)]
    assert len(found) == 5
    for part, *overrides in found:
        assert compose(part, overrides)["cluster"]["kind"] == "ray"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_hold_against_shellcheck(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    found = subprocess.run([BIN / "shellcheck", script], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_dockerfile_copies_what_is_there_and_installs_what_is_pinned() -> None:
    text = (SPECS / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    images = [rest for word, rest in lines if word == "FROM"]
    assert images == ["python:3.11-slim"]
    assert project()["requires-python"].startswith(">=3.11")
    copied = {source for word, rest in lines if word == "COPY" for source in rest.split()[:-1]}
    assert all((ROOT / source).exists() for source in copied)
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {name.rstrip("*") for name in setuptools["packages"]["find"]["include"]}
    assert packages | {"pyproject.toml", "constraints.txt"} <= copied
    (install,) = [rest for word, rest in lines if word == "RUN" and "pip install" in rest]
    assert "-c constraints.txt" in install
    (extra,) = re.findall(r"\.\[(\w+)\]", install)
    assert extra in project()["optional-dependencies"]
    assert [rest for word, rest in lines if word == "USER"] == ["1000"]
    assert not re.search(r"(?i)(secret|password|token)\w*\s*=", text)


def test_the_mlflow_unit_starts_what_mlflow_knows() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(SPECS / "mlflow.service")
    words = shlex.split(unit["Service"]["ExecStart"])
    assert words[1] == "server"
    known = {option for parameter in mlflow.cli.server.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert options["--host"] == "127.0.0.1"
    assert options["--app-name"] == "basic-auth"
    assert options["--artifacts-destination"].startswith("s3://")
    assert unit["Service"]["NoNewPrivileges"] == "true"
    from mlflow.server.auth.config import read_auth_config

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_AUTH_CONFIG_PATH", str(SPECS / "mlflow-auth.ini"))
        found = read_auth_config()
    assert (found.default_permission, found.admin_username, found.admin_password) == ("READ", "admin", None)
    assert found.database_uri.startswith("sqlite:////")


# Like Slurm's: passes USR1 on, and kills its task when it gets TERM.
SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
setsid "$@" &
task=$!
trap 'kill -USR1 -- -"$task"' USR1
trap 'pkill -KILL -s "$task"' TERM
while kill -0 "$task" 2>/dev/null; do wait "$task"; status=$?; done
exit "$status"
"""
SCONTROL = """#!/usr/bin/env bash
[[ "$*" == "show hostnames node0" ]] || exit 9
echo node0
"""
HOSTNAME = """#!/usr/bin/env bash
echo "127.0.0.1 "
"""
COMMAND = """
import os, signal, stat, sys, time, ray

FAULT_SECTION = "A Slurm job"
signal.signal(signal.SIGUSR1, lambda number, frame: (print("SAVED", flush=True), sys.exit(75)))
ray.init(address="auto", logging_level="ERROR", log_to_driver=False)
mode = stat.S_IMODE(os.stat(os.environ["RAY_AUTH_TOKEN_PATH"]).st_mode)
print("RAN", len(ray.nodes()), int(ray.cluster_resources()["CPU"]), oct(mode), *sys.argv[1:], flush=True)
time.sleep(float(sys.argv[1]))
sys.exit(3)
"""


@pytest.fixture
def allocation() -> Iterator[dict[str, str]]:
    """The environment of an allocation of one node, this machine, with Slurm's commands as shims."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:  # short: Ray's sockets lie below
        shims = Path(folder) / "bin"
        shims.mkdir()
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "hostname": HOSTNAME}.items():
            (shims / name).write_text(text)
            (shims / name).chmod(0o755)
        (Path(folder) / "command.py").write_text(COMMAND)
        yield os.environ | {
            "PATH": f"{shims}:{BIN}:{os.environ['PATH']}",
            "CALLOSUM_VENV": str(BIN.parent),
            "CALLOSUM_PRIVATE": f"{folder}/private",
            "SLURM_TMPDIR": folder,
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_JOB_NODELIST": "node0",
            "SLURM_CPUS_PER_TASK": "2",
        }


def left_of(folder: str) -> list[str]:
    """Command lines of processes that name a folder."""
    lines = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    return [line for line in lines if folder in line]


@pytest.mark.cluster
def test_the_slurm_script_runs_its_command_on_ray_and_leaves_nothing(allocation: dict[str, str]) -> None:
    folder = allocation["SLURM_TMPDIR"]
    script = ["bash", SPECS / "slurm.sbatch", "python", f"{folder}/command.py", "0", "two words"]
    done = subprocess.run(script, env=allocation, capture_output=True, text=True, timeout=240, check=False)
    assert "RAN 1 2 0o600 0 two words" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 3
    assert not Path(allocation["CALLOSUM_PRIVATE"], allocation["SLURM_JOB_ID"]).exists()
    assert left_of(folder) == []
    assert list(Path(folder).glob("ray-*")) == []


@pytest.mark.cluster
@pytest.mark.faults
def test_a_preempted_slurm_job_lets_its_command_save_and_ends_ray_and_leaves_nothing(
    allocation: dict[str, str],
) -> None:
    """On a node whose own disk has a name too long for the sockets of Ray."""
    folder = allocation["SLURM_TMPDIR"]
    allocation["SLURM_TMPDIR"] = f"{folder}/{'long' * 12}"
    Path(allocation["SLURM_TMPDIR"]).mkdir()
    script = ["bash", SPECS / "slurm.sbatch", "python", f"{folder}/command.py", "300"]
    with subprocess.Popen(script, env=allocation, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        said = next(line for line in job.stdout if line.startswith("RAN"))
        assert said.split()[3] == oct(stat.S_IRUSR | stat.S_IWUSR)
        job.send_signal(signal.SIGTERM)
        started = time.monotonic()
        rest = job.stdout.read()
    assert "asked to end" in rest
    assert "SAVED" in rest
    assert job.returncode == 143
    assert time.monotonic() - started < 60
    assert left_of(folder) == []
    assert not Path(f"/tmp/ray-{allocation['SLURM_JOB_ID']}").exists()


def test_the_slurm_script_wants_an_allocation_and_a_command(allocation: dict[str, str]) -> None:
    script = ["bash", str(SPECS / "slurm.sbatch")]
    outside = {name: value for name, value in allocation.items() if not name.startswith("SLURM_")}
    for environment, words in ((outside, "start this with sbatch"), (allocation, "give the command to run")):
        done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert words in done.stderr
