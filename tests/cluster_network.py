"""A cluster in network namespaces of this machine: Ray nodes, an S3 and an MLflow server, joined by a bridge.

Every namespace has an address of its own and processes of its own; cables can be pulled and nodes lost. The bridge lies
in a namespace too, so nothing of it is seen outside. Needs root (or CAP_SYS_ADMIN and CAP_NET_ADMIN).
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from s3_servers import ACCESS_KEY, BUCKET, SECRET_KEY, aws_environment

BIN = Path(sys.executable).parent
SUBNET = "10.77.0"  # seen by nobody outside: two test runs have a bridge each
S3_ADDRESS, MLFLOW_ADDRESS = f"{SUBNET}.240", f"{SUBNET}.241"
MLFLOW_USER, MLFLOW_PASSWORD = "admin", f"plantedPassword/{secrets.token_hex(8)}"
OBJECT_STORE_BYTES = 80_000_000
TAG = "callosumtest"
STARTS_WITHIN_S = 240.0
GCS_PORT, DASHBOARD_PORT = 6379, 8265


def why_not() -> str | None:
    """Why this machine can have no namespaces, or None when it can."""
    if shutil.which("ip") is None:
        return "needs the command ip (package iproute2)"
    name = f"probe{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"ip netns add: {made.stderr.strip()}; needs root, or a container with CAP_SYS_ADMIN and CAP_NET_ADMIN"
    bridged = subprocess.run(
        ["ip", "-n", name, "link", "add", "bridge0", "type", "bridge"], capture_output=True, text=True, check=False
    )
    subprocess.run(["ip", "netns", "del", name], check=True)
    return f"ip link add type bridge: {bridged.stderr.strip()}; load the module bridge" if bridged.returncode else None


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def processes_in(namespace: str, title: str = "") -> list[psutil.Process]:
    """The living processes of a namespace whose command line contains `title`."""
    listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
    found = []
    for pid in listed.stdout.split():
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(int(pid))
            if title in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def kill_all(namespace: str) -> None:
    while processes := processes_in(namespace):
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(processes, timeout=5)


def remove_namespace(namespace: str) -> None:
    kill_all(namespace)
    subprocess.run(["ip", "netns", "del", namespace], check=False, capture_output=True)


def remove_leftovers() -> None:
    """Remove the namespaces of test runs that were killed before they could."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    for namespace, pid in re.findall(rf"^({TAG}-(\d+)-\S+)", listed, flags=re.MULTILINE):
        if not psutil.pid_exists(int(pid)):
            remove_namespace(namespace)


@dataclass
class Host:
    """One namespace: a node or a server."""

    network: Network
    name: str
    address: str

    @property
    def namespace(self) -> str:
        return f"{self.network.tag}-{self.name}"

    def create(self) -> None:
        switch, cable = self.network.switch, f"p{self.name}"
        ip("netns", "add", self.namespace)
        ip("-n", switch, "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", self.namespace)
        ip("-n", switch, "link", "set", cable, "master", "bridge0", "up")
        ip("-n", self.namespace, "address", "add", f"{self.address}/24", "dev", "eth0")
        ip("-n", self.namespace, "link", "set", "lo", "up")
        ip("-n", self.namespace, "link", "set", "eth0", "up")
        ip("-n", self.namespace, "route", "add", "default", "dev", "eth0")  # by which programs find their own address

    def pull_cable(self) -> None:
        ip("-n", self.network.switch, "link", "set", f"p{self.name}", "down")

    def plug_cable(self) -> None:
        ip("-n", self.network.switch, "link", "set", f"p{self.name}", "up")

    def popen(self, *command: str, log: Path, **environment: str) -> subprocess.Popen[bytes]:
        """The command, started in this namespace with its output in `log`."""
        with log.open("ab") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *command],
                cwd=self.network.folder,
                env=self.network.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def run(self, *command: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """The finished command."""
        return subprocess.run(
            ["ip", "netns", "exec", self.namespace, *command],
            cwd=self.network.folder,
            env=self.network.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )

    def processes(self, title: str = "") -> list[psutil.Process]:
        """The processes of this namespace whose command line contains `title`."""
        return processes_in(self.namespace, title)

    def kill(self) -> None:
        """kill -9 of everything in this namespace, as when a machine loses its power."""
        kill_all(self.namespace)

    def remove(self) -> None:
        remove_namespace(self.namespace)
        # With its namespace its end of the cable goes too, but only some time later: another node may want the name.
        cable = ["ip", "-n", self.network.switch, "link", "del", f"p{self.name}"]
        subprocess.run(cable, check=False, capture_output=True)


@dataclass
class Network:
    """A switch and what is plugged into it; everything is gone after `close`."""

    folder: Path  # logs, objects, databases
    tag: str = field(default_factory=lambda: f"{TAG}-{os.getpid()}-{secrets.token_hex(2)}")
    hosts: dict[str, Host] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    ray_folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="r")))  # sockets need a short path
    servers: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def switch(self) -> str:
        return f"{self.tag}-switch"

    def open(self) -> None:
        remove_leftovers()
        self.environment = self.own_environment()
        ip("netns", "add", self.switch)
        ip("-n", self.switch, "link", "add", "bridge0", "type", "bridge")
        ip("-n", self.switch, "link", "set", "bridge0", "up")

    def own_environment(self) -> dict[str, str]:
        """What every process is given: the tools, the token, and the credentials of both servers."""
        inherited = ("PATH", "HOME", "LANG", "VIRTUAL_ENV", "PYTHONPATH")
        token = self.folder / "ray_token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        return {
            **{name: os.environ[name] for name in inherited if name in os.environ},
            "PATH": f"{BIN}:{os.environ['PATH']}",
            **aws_environment(f"http://{S3_ADDRESS}:80"),
            "NO_PROXY": "*",
            "OMP_NUM_THREADS": "1",
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{DASHBOARD_PORT}",  # else it may find a Ray of somebody else
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # Ray's default is 15: on a busy machine workers would get nothing
            "RAY_memory_monitor_refresh_ms": "0",  # the machine's memory is not ours alone
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_TRACKING_USERNAME": MLFLOW_USER,
            "MLFLOW_TRACKING_PASSWORD": MLFLOW_PASSWORD,
        }

    def close(self) -> None:
        for host in self.hosts.values():
            host.remove()
        for process in self.servers.values():
            process.wait()
        subprocess.run(["ip", "netns", "del", self.switch], check=False, capture_output=True)
        shutil.rmtree(self.ray_folder, ignore_errors=True)

    def add_host(self, name: str, address: str) -> Host:
        assert len(name) <= 12, "with its prefix a link's name has at most 15 characters"
        host = Host(self, name, address)
        self.hosts[name] = host
        host.create()
        return host

    def start_s3(self) -> None:
        """rclone serve s3 in its own namespace; objects are files below folder/s3/<bucket>. Also after `stop`."""
        host = self.hosts.get("s3") or self.add_host("s3", S3_ADDRESS)
        (self.folder / "s3" / BUCKET).mkdir(parents=True, exist_ok=True)
        (self.folder / "rclone.conf").touch()
        command = ("rclone", "serve", "s3", "--addr", f"{S3_ADDRESS}:80", "--config", "rclone.conf", "s3")
        keys = {"RCLONE_AUTH_KEY": f'"{ACCESS_KEY},{SECRET_KEY}"'}
        self.servers["s3"] = host.popen(*command, log=self.folder / "rclone.log", **keys)

    def start_mlflow(self) -> None:
        """An MLflow server with basic authentication in its own namespace; also after `stop`."""
        host = self.hosts.get("mlflow") or self.add_host("mlflow", MLFLOW_ADDRESS)
        users = self.folder / "basic_auth.ini"
        users.write_text(
            f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{self.folder}/basic_auth.db\n"
            f"admin_username = {MLFLOW_USER}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
            "auth_cache_ttl_seconds = 60\n"
        )
        users.chmod(0o600)
        command = ["mlflow", "server", "--app-name", "basic-auth", "--host", MLFLOW_ADDRESS, "--port", "5000"]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", f"s3://{BUCKET}/mlflow"]
        secret = {
            "MLFLOW_AUTH_CONFIG_PATH": str(users),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_AUTH_ADMIN_PASSWORD": MLFLOW_PASSWORD,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
        }
        self.servers["mlflow"] = host.popen(*command, log=self.folder / "mlflow.log", **secret)

    def stop(self, server: str) -> None:
        """kill -9 of a server."""
        self.hosts[server].kill()
        self.servers.pop(server).wait()

    def start_node(self, name: str, *, num_cpus: int = 1) -> Host:
        """A Ray node; the first is the head. Returns at once: `wait_for_nodes` waits."""
        is_head = name == "head"
        taken = {int(host.address.rpartition(".")[2]) for host in self.hosts.values()}
        number = next(number for number in range(1, 240) if number not in taken)
        host = self.hosts.get(name) or self.add_host(name, f"{SUBNET}.{number}")
        command = ["ray", "start", "--block", f"--node-ip-address={host.address}", f"--num-cpus={num_cpus}"]
        command += [f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats"]
        command += [f"--temp-dir={self.ray_folder}/{name}"]  # each has a disk of its own
        if is_head:
            (self.ray_folder / name / "ray_current_cluster").unlink(missing_ok=True)  # a new machine has none
            command += ["--head", f"--port={GCS_PORT}", "--dashboard-host=127.0.0.1"]
        else:
            command += [f"--address={self.hosts['head'].address}:{GCS_PORT}"]
        log = self.folder / f"{name}.log"
        log.unlink(missing_ok=True)
        self.servers[name] = host.popen(*command, log=log)
        if is_head:  # the others need its address in a file it writes first
            deadline = time.monotonic() + STARTS_WITHIN_S
            while "To add another node" not in log.read_text():
                self.check(deadline, "the head did not start")
        return host

    def lose_node(self, name: str) -> None:
        """kill -9 of every process of a node, and its namespace with it."""
        self.hosts.pop(name).remove()
        self.servers.pop(name).wait()

    def announce_end(self, name: str, *, in_s: int) -> None:
        """What a cloud's notice leads to: Ray gives the node no new work."""
        head, address = self.hosts["head"], self.hosts[name].address
        nodes = (
            f"[node['NodeID'] for node in ray.nodes() if node['Alive'] and node['NodeManagerAddress'] == '{address}']"
        )
        script = f"import ray; ray.init('auto', logging_level='ERROR'); print({nodes}[0])"
        node = head.run(sys.executable, "-c", script).stdout.split()[-1]
        words = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken back")
        drained = head.run("ray", "drain-node", "--node-id", node, *words, "--deadline-remaining-seconds", str(in_s))
        assert drained.returncode == 0, drained.stderr

    def wait_for_nodes(self) -> None:
        """Returns when every started node has joined and the head takes jobs."""
        deadline = time.monotonic() + STARTS_WITHIN_S
        for name in self.servers.keys() - {"s3", "mlflow"}:
            while "Ray runtime started" not in (self.folder / f"{name}.log").read_text():
                self.check(deadline, f"node {name} did not start")
        probe = ("ray", "job", "submit", "--no-wait", "--", "true")  # the agent that takes jobs comes up last
        while self.hosts["head"].run(*probe).returncode:
            self.check(deadline, "the head takes no jobs")

    def wait_for_servers(self) -> None:
        """Returns when both servers answer."""
        deadline = time.monotonic() + STARTS_WITHIN_S
        for server, port in (("s3", 80), ("mlflow", 5000)):
            host = self.hosts[server]
            script = f"import socket; socket.create_connection(('{host.address}', {port}), 2)"
            while host.run(sys.executable, "-S", "-c", script).returncode:
                self.check(deadline, f"{server} does not answer")

    def check(self, deadline: float, problem: str) -> None:
        """Fails with all logs after the deadline; otherwise waits a little."""
        if time.monotonic() > deadline:
            logs = "\n".join(f"== {log}\n{log.read_text()[-2000:]}" for log in sorted(self.folder.glob("*.log")))
            raise AssertionError(f"{problem} within {STARTS_WITHIN_S:.0f} s\n{logs}")
        time.sleep(0.5)

    def submit(self, name: str, *command: str) -> Job:
        """A job submitted on the head, its log followed by a process there."""
        log = self.folder / f"job-{name}.log"
        log.unlink(missing_ok=True)
        (self.folder / "job").mkdir(exist_ok=True)
        submit = ("ray", "job", "submit", "--submission-id", name, "--working-dir", "job", "--")
        return Job(name, self.hosts["head"].popen(*submit, *command, log=log), log, self.ray_folder / "head")


@dataclass
class Job:
    """A submitted job and the process that follows it."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path  # of that process
    ray_folder: Path  # of the head

    @property
    def text(self) -> str:
        """What the job printed, from the head's disk: the following process may be late, or cut off."""
        found = sorted(self.ray_folder.glob(f"session_*/logs/job-driver-{self.name}.log"))
        log = found[-1] if found else self.log
        return re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace"))

    def wait(self, timeout_s: float = 500) -> int:
        """The job's exit status."""
        return self.process.wait(timeout_s)

    def succeeded(self, timeout_s: float = 500) -> str:
        """Its log, after it ended well."""
        status = self.wait(timeout_s)
        assert status == 0, f"{self.name} ended with {status}:\n{self.text[-6000:]}"
        return self.text

    def wait_until(self, is_reached: Callable[[], bool], what: str, timeout_s: float = 500) -> None:
        """Returns, within a tenth of a second, when something is there that the running job makes."""
        deadline = time.monotonic() + timeout_s
        while not is_reached():
            ended = self.process.poll()
            assert ended is None, f"{self.name} ended with {ended} before {what}:\n{self.text[-6000:]}"
            assert time.monotonic() < deadline, f"{self.name}: no {what}:\n{self.text[-6000:]}"
            time.sleep(0.1)


@contextlib.contextmanager
def network(folder: Path) -> Iterator[Network]:
    """An empty switch, removed with everything on it however the block ends."""
    found = Network(folder)
    try:
        found.open()
        yield found
    finally:
        found.close()


@contextlib.contextmanager
def small_disk(folder: Path, size_mb: int) -> Iterator[None]:
    """A tmpfs of this size at `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
