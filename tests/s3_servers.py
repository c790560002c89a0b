"""S3 servers on free loopback ports, and a proxy before them that fails on demand; stopped by process id."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import aiobotocore.session
import botocore.loaders
import pytest
import s3fs

from cluster.storage import remote, s3

BIN = Path(sys.executable).parent
ACCESS_KEY = "AKIDEXAMPLEOFTESTS"
SECRET_KEY = f"plantedSecret/{secrets.token_hex(8)}"  # of each test run its own: sources are searched for it too
BUCKET = "brains"
STARTS_WITHIN_S = 30.0
MODELS = botocore.loaders.create_loader()


@dataclass
class Server:
    """A running server; `start` may be called again after `kill`, on the same port."""

    command: list[str]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    endpoint: str = ""

    def start(self) -> None:
        known = urlsplit(self.endpoint).port or 0
        command = [part.replace("PORT", str(known)) for part in self.command]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | self.environment)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + STARTS_WITHIN_S
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", self.log.read_text())):
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, f"{self.command[0]} did not start: {self.log.read_text()}"
            time.sleep(0.02)
        self.endpoint = found.group()

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()


def rclone_server(folder: Path) -> Server:
    """rclone serve s3: real signatures, objects as files below `folder`, ignores If-None-Match."""
    (folder / "buckets" / BUCKET).mkdir(parents=True)
    (folder / "rclone.conf").touch()
    command = [str(BIN / "rclone"), "serve", "s3", "--addr", "127.0.0.1:PORT", "--config", str(folder / "rclone.conf")]
    keys = {"RCLONE_AUTH_KEY": f'"{ACCESS_KEY},{SECRET_KEY}"'}  # one CSV field
    return Server([*command, str(folder / "buckets")], folder / "rclone.log", keys)


def moto_server(folder: Path) -> Server:
    """moto: no signatures checked, objects in memory, correct conditional writes."""
    return Server([str(BIN / "moto_server"), "-H", "127.0.0.1", "-p", "PORT"], folder / "moto.log")


@pytest.fixture(scope="session", name="servers")
def running_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """Both servers, started at once because moto takes seconds to import."""
    folder = tmp_path_factory.mktemp("s3")
    started = {"rclone": rclone_server(folder), "moto": moto_server(folder)}
    with contextlib.ExitStack() as stack:
        for server in started.values():
            server.start()
            stack.callback(server.kill)
        for server in started.values():
            server.wait_until_ready()
        with pytest.MonkeyPatch.context() as monkeypatch:
            use(monkeypatch, started["moto"].endpoint)
            s3fs.S3FileSystem(skip_instance_cache=True).call_s3("create_bucket", Bucket=BUCKET)
        yield started


@pytest.fixture(scope="module", name="rclone")
def running_rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running rclone for the tests of one file."""
    server = rclone_server(tmp_path_factory.mktemp("s3"))
    server.start()
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.kill()


def aws_environment(endpoint: str) -> dict[str, str]:
    """What a user sets, and nothing of the machine's own AWS settings."""
    return {
        "AWS_ENDPOINT_URL_S3": endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
    }


def use(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """From here on this process's S3 calls go to `endpoint`."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in aws_environment(endpoint).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3, "AioSession", session_with_parsed_models)
    remote.forget_drivers()


def session_with_parsed_models() -> aiobotocore.session.AioSession:
    """As aiobotocore's own, less the tenth of a second a client that parsing the description of S3 takes."""
    session = aiobotocore.session.AioSession()
    session.register_component("data_loader", MODELS)
    return session


@dataclass
class Fault:
    """What happens to one request: answer (this status and code), drop (closed unread), hang, lost (the server does it,
    its answer is thrown away), cut (half the body, then closed), bare (the headers, then closed), slow (the body in
    small pieces), cut_upload (half the request's body reaches the server), whole (the server is told of no range)."""

    kind: str
    method: str = "GET"
    status: int = 500
    code: str = "InternalError"
    path: str = ""  # only requests whose target contains it


class FaultProxy(ThreadingHTTPServer):
    """Hands requests on to a server; each fault in `faults` befalls the first request it fits, those in `always` all,
    `every_other` half of them."""

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _ProxyHandler)
        self.upstream = urlsplit(upstream)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.faults: list[Fault] = []
        self.always: list[Fault] = []
        self.every_other: Fault | None = None
        self._num_fitting = 0
        self.requests: list[str] = []
        self.lock = threading.Lock()

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            self.requests.append(f"{method} {path}")
            for fault in [*self.faults, *self.always]:
                if fault.method == method and fault.path in path:
                    if fault in self.faults:
                        self.faults.remove(fault)
                    return fault
            fault = self.every_other
            if fault is not None and fault.method == method and fault.path in path:
                self._num_fitting += 1
                return fault if self._num_fitting % 2 else None
        return None


class _ProxyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultProxy

    def handle_any(self) -> None:
        fault = self.server.take_fault(self.command, self.path)
        kind = fault.kind if fault else ""
        self.close_connection = kind in ("drop", "hang", "lost", "cut", "bare", "cut_upload")
        if kind == "drop":
            return
        if kind == "hang":
            time.sleep(3.0)
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault is not None and kind == "answer":
            self._answer(fault)
            return
        try:
            status, headers, answer = self._ask(body, is_cut=kind == "cut_upload", hides_range=kind == "whole")
        except OSError:
            self.close_connection = True
            return
        if kind in ("lost", "cut_upload"):
            return
        self._pass_on(status, headers, answer, kind)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

    def log_message(self, format: str, *args: object) -> None:
        return None

    def _answer(self, fault: Fault) -> None:
        text = f"<Error><Code>{fault.code}</Code><Message>as ordered</Message></Error>".encode()
        self.send_response_only(fault.status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def _ask(self, body: bytes, *, is_cut: bool, hides_range: bool) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = http.client.HTTPConnection(self.server.upstream.netloc, timeout=10)
        with contextlib.closing(upstream):
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():  # Host too: it is signed
                if name != "Expect" and not (name == "Range" and hides_range):
                    upstream.putheader(name, value)
            upstream.endheaders()
            if is_cut:
                upstream.send(body[: len(body) // 2])
                return 0, [], b""
            upstream.send(body)
            answer = upstream.getresponse()
            return answer.status, answer.getheaders(), answer.read()

    def _pass_on(self, status: int, headers: list[tuple[str, str]], answer: bytes, kind: str) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = dict((name.lower(), value) for name, value in headers).get("content-length")
        self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(answer)))
        self.end_headers()
        if kind == "cut":
            self.wfile.write(answer[: len(answer) // 2])
        elif kind == "bare":
            return
        elif kind == "slow":
            for start in range(0, len(answer), 1 + len(answer) // 20):
                self.wfile.write(answer[start : start + 1 + len(answer) // 20])
                self.wfile.flush()
                time.sleep(0.02)
        else:
            self.wfile.write(answer)


@contextlib.contextmanager
def fault_proxy(upstream: str) -> Iterator[FaultProxy]:
    """A running proxy before the server at `upstream`."""
    proxy = FaultProxy(upstream)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
