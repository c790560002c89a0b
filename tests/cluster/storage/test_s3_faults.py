"""Whatever an S3 server or the way to it does, reads and writes succeed afterwards or fail with StorageError: never
wrong bytes, never part of an object, never without end."""

from __future__ import annotations

import filecmp
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from aiohttp import ClientPayloadError
from botocore.exceptions import ClientError, EndpointConnectionError, SSLError
from s3_servers import (  # noqa: F401  (running_servers is a fixture)
    BUCKET,
    Fault,
    FaultProxy,
    Server,
    fault_proxy,
    rclone_server,
    running_servers,
    use,
)

from cluster.errors import StorageError, StoreUnavailableError
from cluster.storage import remote, s3, s3_errors
from cluster.storage.s3 import Answer, S3Driver, S3Store
from cluster.storage.s3_errors import is_passing
from cluster.storage.stores import Store, store_for

FAULT_SECTION = "S3: single reads and writes"
pytestmark = pytest.mark.injected
Recorder = Callable[[str, object], None]

DATA = random.Random(0).randbytes(300_000)
LARGE = random.Random(1).randbytes(2 * s3.PART_BYTES + 54_321)


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short waits; the client is made after this."""
    monkeypatch.setattr(s3_errors, "RETRY_FOR_S", 15.0)
    monkeypatch.setitem(s3.SETTINGS, "read_timeout", 0.5)


@pytest.fixture
def proxy(
    request: pytest.FixtureRequest,
    servers: dict[str, Server],
    patience: None,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[FaultProxy]:
    """A proxy that this process's S3 calls go through, before rclone or the server a test names."""
    with fault_proxy(servers[getattr(request, "param", "rclone")].endpoint) as running:
        use(monkeypatch, running.endpoint)
        yield running


@pytest.fixture
def store(proxy: FaultProxy, tmp_path: Path) -> Store:
    store = store_for(f"s3://{BUCKET}/{tmp_path.name}")
    store.put("a", DATA)
    return store


on_both = pytest.mark.parametrize("proxy", ["rclone", pytest.param("moto", marks=pytest.mark.faults)], indirect=True)
before_moto = pytest.mark.parametrize("proxy", ["moto"], indirect=True)

PASSING_FAULTS = {
    "an internal error": [Fault("answer")],
    "slow down, twice": [Fault("answer", status=503, code="SlowDown")] * 2,
    "a closed connection": [Fault("drop")],
    "no answer": [Fault("hang")],
    "a trickle": [Fault("slow")],
    "a body cut short": [Fault("cut")],
    "bodies cut short, with errors between": [Fault("cut"), Fault("answer"), Fault("cut"), Fault("drop"), Fault("cut")],
}


@on_both
@pytest.mark.parametrize("faults", PASSING_FAULTS.values(), ids=PASSING_FAULTS)
def test_reads_survive(
    store: Store, proxy: FaultProxy, tmp_path: Path, faults: list[Fault], record_property: Recorder
) -> None:
    started = time.monotonic()
    proxy.faults = list(faults)
    assert store.read("a") == DATA
    proxy.faults = list(faults)
    buffer = bytearray(200_000)
    store.open_ranges("a").read_into(77, memoryview(buffer))
    assert buffer == DATA[77:200_077]
    proxy.faults = list(faults)
    store.get_file("a", tmp_path / "local")
    assert (tmp_path / "local").read_bytes() == DATA
    assert proxy.faults == []
    record_property("when", "in a read, a ranged read and a download")
    record_property("recovery_s", time.monotonic() - started)


def test_questions_about_objects_survive(store: Store, proxy: FaultProxy) -> None:
    proxy.faults = [Fault("answer"), Fault("cut"), Fault("drop")]
    assert store.list() == ["a"]
    for ask in (store.size, store.exists, store.delete):
        proxy.faults += [Fault(kind, method) for kind in ("answer", "drop", "drop") for method in ("HEAD", "DELETE")]
        proxy.faults = [fault for fault in proxy.faults if (fault.method == "DELETE") == (ask == store.delete)]
        ask("a")
        assert proxy.faults == []
    assert not store.exists("a")


@on_both
@pytest.mark.parametrize(
    "kind",
    ["answer", "drop", "hang", "lost", "cut_upload"],
    ids=["an internal error", "a closed connection", "no answer", "the answer lost", "an upload cut short"],
)
def test_writes_survive(store: Store, proxy: FaultProxy, kind: str, record_property: Recorder) -> None:
    started = time.monotonic()
    proxy.faults = [Fault(kind, method="PUT")]
    store.put("a", DATA[::-1])
    assert store.read("a") == DATA[::-1]
    assert proxy.faults == []
    record_property("recovery_s", time.monotonic() - started)


@pytest.mark.parametrize("proxy", ["rclone", "moto"], indirect=True)
def test_a_multipart_upload_survives_faults_in_its_parts_and_at_its_end(
    store: Store, proxy: FaultProxy, tmp_path: Path
) -> None:
    (tmp_path / "large").write_bytes(LARGE)
    proxy.faults = [Fault("cut_upload", "PUT", path="partNumber=1"), Fault("answer", "PUT", path="partNumber=2")]
    proxy.faults += [Fault("lost", "POST", path="uploadId=")]
    store.put("large", tmp_path / "large")
    proxy.faults += [Fault("cut", path="large"), Fault("answer", path="large"), Fault("drop", path="large")]
    store.get_file("large", tmp_path / "fetched")
    assert (tmp_path / "fetched").read_bytes() == LARGE
    assert proxy.faults == []


@before_moto
def test_an_upload_that_fails_for_good_leaves_the_old_object_and_nothing_else(
    store: Store, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_errors, "RETRY_FOR_S", 0.5)
    (tmp_path / "large").write_bytes(LARGE)
    proxy.always = [Fault("answer", "PUT", path="partNumber=2")]
    with pytest.raises(
        StoreUnavailableError, match=r"/a: http://127\.0\.0\.1:\d+ answered InternalError \(as ordered\)"
    ):
        store.put("a", tmp_path / "large")
    with pytest.raises(StoreUnavailableError):
        store.put("new", tmp_path / "large")
    assert store.read("a") == DATA
    assert store.list() == ["a"]
    assert isinstance(store, S3Store)
    assert "Uploads" not in store.driver.call_s3("list_multipart_uploads", Bucket=BUCKET)


@pytest.mark.parametrize("kind", ["answer", "drop", "hang", "bare"])
def test_what_never_passes_ends_in_an_error_within_bounds(
    store: Store, proxy: FaultProxy, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_errors, "RETRY_FOR_S", 0.4)
    proxy.always = [Fault(kind), Fault(kind, "PUT")]
    started = time.monotonic()
    with pytest.raises(StoreUnavailableError, match=rf"s3://{BUCKET}/.*/a: http://127\.0\.0\.1:\d+ (answered|did not)"):
        store.read("a")
    with pytest.raises(StoreUnavailableError):
        store.get_file("a", tmp_path / "local")
    if kind != "bare":
        with pytest.raises(StoreUnavailableError):
            store.put("new", DATA)
    assert time.monotonic() - started < 3 * (0.4 + 0.5 + 1.0)  # RETRY_FOR_S, a last attempt, a slow machine
    assert not (tmp_path / "local").exists()
    proxy.always = []
    assert store.list() == ["a"]


def test_max_attempts_of_the_aws_settings_is_a_limit_too(
    store: Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    remote.forget_drivers()
    proxy.always = [Fault("answer")]
    proxy.requests.clear()
    with pytest.raises(StoreUnavailableError):
        store.read("a")
    assert len(proxy.requests) == 2


@before_moto
def test_a_server_that_ignores_ranges_is_found_out(store: Store, proxy: FaultProxy) -> None:
    proxy.always = [Fault("whole")]
    with pytest.raises(StorageError, match=r"ignores ranged reads; read whole objects \(reader=stream\)"):
        store.read("a", 10, 5)


@before_moto
def test_parts_of_two_versions_are_never_joined(
    store: Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first reads of a large range go out at once: none can ask for the version that another sees."""
    store.put("large", LARGE)
    answer_as_it_is, versions = S3Driver._answer, iter("123")

    async def answer_of_another_version(driver: S3Driver, path: str, asked: dict[str, str]) -> tuple[Answer, bytes]:
        answer, data = await answer_as_it_is(driver, path, asked)
        return answer | {"ETag": next(versions)}, data

    monkeypatch.setattr(S3Driver, "_answer", answer_of_another_version)
    with pytest.raises(StorageError, match=r"/large was replaced while it was read; read it again"):
        store.read("large", 0, len(LARGE))


@before_moto
def test_the_writer_whose_answer_was_lost_still_knows_it_won(store: Store, proxy: FaultProxy) -> None:
    assert store.create_guarantee().is_exact
    proxy.faults = [Fault("lost", "PUT", path="COMMIT")]
    assert store.put_if_absent("COMMIT.json", b"mine")
    assert proxy.faults == []
    assert not store.put_if_absent("COMMIT.json", b"mine")


class SlowStore(S3Store):
    """A store whose final write hangs for longer than the owner file's bound on time."""

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self.is_writing = threading.Event()

    def put(self, name: str, source: bytes | Path) -> None:
        if name == "COMMIT.json":
            self.is_writing.set()
            time.sleep(4 * remote.SETTLES_S)
        super().put(name, source)


def test_a_writer_that_hangs_beyond_the_bound_fails_instead_of_winning_too(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "SETTLES_S", 0.4)
    slow = SlowStore(store.location)
    outcomes: list[str] = []

    def write_slowly() -> None:
        try:
            outcomes.append(str(slow.put_if_absent("COMMIT.json", b"slow")))
        except StorageError as error:
            outcomes.append(str(error))

    writer = threading.Thread(target=write_slowly)
    writer.start()
    assert slow.is_writing.wait(10)
    assert store.put_if_absent("COMMIT.json", b"quick")
    writer.join()
    assert "COMMIT.json: another writer claimed this name" in outcomes[0]
    assert "stop all but one run that writes there" in outcomes[0]


def test_what_a_killed_writer_claimed_is_free_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "SETTLES_S", 0.2)
    store.put(".partial-owner-COMMIT.json", b"token of the dead")
    assert store.put_if_absent("COMMIT.json", b"alive")
    assert not store.exists(".partial-owner-COMMIT.json")


def test_a_server_that_dies_and_returns_interrupts_nothing(
    tmp_path: Path,
    patience: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    record_property: Recorder,
) -> None:
    record_property("fault", "rclone, SIGKILL, started again after 0.6 s")
    record_property("when", "before a write, and before a read")
    server = rclone_server(tmp_path)
    server.start()
    try:
        server.wait_until_ready()
        use(monkeypatch, server.endpoint)
        monkeypatch.setattr(s3, "WARN_AFTER_S", 0.3)
        store = store_for(f"s3://{BUCKET}/set")
        for attempt in (lambda: store.put("a", DATA), lambda: store.read("a")):
            attempt()
            server.kill()
            killed = time.monotonic()
            revival = threading.Timer(0.6, server.start)
            revival.start()
            attempt()
            record_property("recovery_s", time.monotonic() - killed)
            revival.join()
        assert store.read("a") == DATA
        assert "keeps failing (EndpointConnectionError); trying for another" in caplog.text
    finally:
        server.kill()
    monkeypatch.setattr(s3_errors, "RETRY_FOR_S", 0.5)
    with pytest.raises(StoreUnavailableError, match=r"did not answer within 0 s.*check that the server runs"):
        store.read("a")


def test_only_what_may_pass_is_tried_again() -> None:
    def is_tried(status: int, code: str = "") -> bool:
        answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
        return is_passing(ClientError(answer, "GetObject"))  # type: ignore[arg-type]

    assert all(is_tried(status) for status in (429, 500, 502, 503, 504))
    assert all(is_tried(409, code) for code in ("OperationAborted", "ConditionalRequestConflict"))
    assert not any(is_tried(status) for status in (200, 206, 301, 400, 403, 404, 412, 416))
    assert is_passing(EndpointConnectionError(endpoint_url="http://a"))
    assert is_passing(ClientPayloadError("cut short"))
    assert not is_passing(SSLError(endpoint_url="https://a", error="CERTIFICATE_VERIFY_FAILED"))
    assert not is_passing(FileNotFoundError("a local file"))
    pauses = [s3.backoff_s(num_attempts) for num_attempts in range(1, 30)]
    assert 0.1 <= pauses[0] <= 0.2
    assert max(pauses) <= s3.LONGEST_PAUSE_S


LARGE_TRANSFER = """
import re, sys
from pathlib import Path
from cluster.storage.stores import store_for
def peak_kib():  # not ru_maxrss, which starts at the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))
store, folder = store_for(sys.argv[1]), Path(sys.argv[2])
store.put("small", b"1")
before = peak_kib()
store.put("large", folder / "large")
store.get_file("large", folder / "fetched")
print((peak_kib() - before) / 1024)
"""


@pytest.mark.faults
def test_memory_stays_bounded_for_an_object_of_any_size(
    servers: dict[str, Server],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    use(monkeypatch, servers["rclone"].endpoint)
    with (tmp_path / "large").open("wb") as file:
        for number in range(300):
            file.write(random.Random(number).randbytes(1 << 20))
    command = [sys.executable, "-c", LARGE_TRANSFER, f"s3://{BUCKET}/{tmp_path.name}", str(tmp_path)]
    growth_mib = float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    assert filecmp.cmp(tmp_path / "large", tmp_path / "fetched", shallow=False)
    print(f"peak memory grew by {growth_mib:.0f} MiB for 300 MiB")
    assert growth_mib < 100


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["rclone", "moto"])
def test_a_writer_killed_at_any_moment_leaves_the_old_object_or_the_new(
    kind: str,
    servers: dict[str, Server],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    use(monkeypatch, servers[kind].endpoint)
    store = store_for(f"s3://{BUCKET}/{tmp_path.name}")
    (tmp_path / "large").write_bytes(LARGE)
    script = "import sys; from pathlib import Path\n"
    script += "from cluster.storage.stores import store_for; s = store_for(sys.argv[1])\n"
    script += "s.exists('a'); print(flush=True); s.put('a', Path(sys.argv[2])); s.put('new', Path(sys.argv[2]))"
    command = [sys.executable, "-c", script, store.location, str(tmp_path / "large")]
    outcomes, takes_s = set(), None
    for number in range(13):
        store.put("a", DATA)
        store.delete("new")
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            started = time.monotonic()
            if takes_s is None:
                writer.wait()  # the first is not killed: it tells how long a write takes here and now
                takes_s = time.monotonic() - started
            else:
                time.sleep(number / 10 * takes_s)
                writer.kill()
        content = store.read("a")
        assert content in (DATA, LARGE)
        assert not store.exists("new") or store.read("new") == LARGE
        outcomes.add(len(content))
    assert len(outcomes) == 2, "no kill came before the end"


@pytest.mark.faults
@pytest.mark.parametrize("proxy", ["rclone", "moto"], indirect=True)
def test_a_storm_of_faults_never_changes_a_byte(store: Store, proxy: FaultProxy, tmp_path: Path) -> None:
    generator = random.Random(4)
    expected = {"a": DATA}
    for number in range(120):
        kinds = generator.choices(["answer", "drop", "cut", "slow", "lost", "cut_upload"], k=generator.randint(0, 3))
        proxy.faults = [Fault(kind, generator.choice(["GET", "PUT", "HEAD", "POST"])) for kind in kinds]
        name = generator.choice("abc")
        action = generator.choice(["put", "read", "range", "fetch", "list", "delete"])
        if action == "put":
            expected[name] = generator.randbytes(generator.choice([0, 1, 1000, 300_000, 2 * s3.PART_BYTES + 1]))
            store.put(name, expected[name])
        elif action == "delete":
            store.delete(name)
            expected.pop(name, None)
        elif action == "list":
            assert store.list() == sorted(expected)
        elif name not in expected:
            assert not store.exists(name)
        elif action == "read":
            assert store.read(name) == expected[name]
        elif action == "fetch":
            store.get_file(name, tmp_path / str(number))
            assert (tmp_path / str(number)).read_bytes() == expected[name]
        elif len(expected[name]) > 1:
            first, last = sorted(generator.sample(range(len(expected[name])), 2))
            assert store.read(name, first, last - first) == expected[name][first:last]
