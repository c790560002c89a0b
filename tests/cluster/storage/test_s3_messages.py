"""What a user is told when a store cannot be used, and that no secret is ever among it."""

from __future__ import annotations

import errno
import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from botocore.exceptions import ClientError
from s3_servers import ACCESS_KEY, BUCKET, SECRET_KEY, Fault, FaultProxy, Server, fault_proxy, running_rclone, use  # noqa: F401

from cluster.errors import StorageError, StoreUnavailableError
from cluster.storage import files, remote, s3_errors
from cluster.storage.s3 import S3Store
from cluster.storage.stores import Store, store_for

DATA = random.Random(0).randbytes(300_000)


@pytest.fixture
def proxy(rclone: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    monkeypatch.setattr(s3_errors, "RETRY_FOR_S", 15.0)
    with fault_proxy(rclone.endpoint) as running:
        use(monkeypatch, running.endpoint)
        yield running


@pytest.fixture
def store(proxy: FaultProxy, tmp_path: Path) -> Store:
    store = store_for(f"s3://{BUCKET}/{tmp_path.name}")
    store.put("a", DATA)
    return store


def test_another_secret_is_refused_with_what_to_do(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    remote.forget_drivers()
    for attempt in (store.read, store.exists, store.size, lambda name: store.put(name, b"")):
        with pytest.raises(StoreUnavailableError, match=r"/a: .*(not accept these credentials|access denied)"):
            attempt("a")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    remote.forget_drivers()
    with pytest.raises(StoreUnavailableError, match=r"no AWS credentials were found; set AWS_PROFILE"):
        store.read("a")


def test_a_local_disk_that_becomes_full_during_a_download_is_named(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_the_disk(_: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "sync", fill_the_disk)
    with pytest.raises(StorageError, match=r"scratch/a cannot be written: No space left on device; free some"):
        store.get_file("a", tmp_path / "scratch" / "a")
    assert os.listdir(tmp_path / "scratch") == []


def test_an_endpoint_that_cannot_be_one_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "http://rater:hunter2@bad host:9000")
    with pytest.raises(StoreUnavailableError, match=r"http://bad host:9000\); check AWS_ENDPOINT_URL_S3") as caught:
        store_for("s3://brains/run").read("a")
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_missing_bucket_is_named(store: Store) -> None:
    elsewhere = store_for("s3://no-such-bucket/set")
    for attempt in (
        elsewhere.read,
        elsewhere.size,
        elsewhere.list,
        lambda name: elsewhere.put(name, b""),
        lambda name: elsewhere.put_if_absent(name, b""),
    ):
        with pytest.raises(StoreUnavailableError, match=r"there is no bucket 'no-such-bucket' at http.*create it"):
            attempt("a")
    with pytest.raises(StorageError, match="names no bucket; give s3://<bucket>/<prefix>"):
        store_for("s3://")


def test_wrong_settings_are_named(store: Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    remote.forget_drivers()
    with pytest.raises(StoreUnavailableError, match=r"profile \(nobody\) could not be found; check the AWS settings"):
        store.read("a")
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "minio:9000")
    remote.forget_drivers()
    with pytest.raises(StoreUnavailableError, match=r"no S3 client can be made \(.*minio:9000.*AWS_ENDPOINT_URL_S3"):
        store.read("a")


def refusal(code: str, status: int = 403) -> ClientError:
    answer = {"Error": {"Code": code, "Message": "so it says"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(answer, "GetObject")  # type: ignore[arg-type]


REFUSALS = {
    "AccessDenied": r"may not read there \(so it says\); have that right granted",
    "403": "may not read there",
    "ExpiredToken": "have expired; renew them",
    "RequestTimeTooSkewed": "clock is more than minutes off that of http.*; synchronise it",
    "PermanentRedirect": "another region; set AWS_DEFAULT_REGION",
    "QuotaExceeded": r"answered QuotaExceeded \(so it says\)",
}


def test_each_refusal_says_what_to_do(proxy: FaultProxy) -> None:
    for code, words in REFUSALS.items():
        store = S3Store("s3://brains/set")
        with (
            pytest.raises(StoreUnavailableError, match=f"^s3://brains/set/a: .*{words}"),
            store.explained("s3://brains/set/a", doing="read"),
        ):
            raise refusal(code)


def test_checksums_nobody_asked_for_go_to_aws_only(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = S3Store("s3://brains/set").driver
    assert driver.s3.meta.config.request_checksum_calculation == "when_required"
    assert driver.s3.meta.config.response_checksum_validation == "when_required"
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    remote.forget_drivers()
    driver = S3Store("s3://brains/set").driver
    assert driver.server == "https://s3.amazonaws.com"
    assert driver.s3.meta.config.request_checksum_calculation == "when_supported"


def test_no_secret_is_written_or_logged(
    store: Store,
    proxy: FaultProxy,
    rclone: Server,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    token = "plantedSessionToken4711"
    monkeypatch.setenv("AWS_SESSION_TOKEN", token)
    remote.forget_drivers()
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(remote, "SETTLES_S", 1.0)
    messages = []
    store.put_if_absent("COMMIT.json", DATA)
    store.create_guarantee()
    for fault in (Fault("answer"), Fault("cut"), Fault("drop")):
        proxy.faults = [fault]
        store.read("a")
    monkeypatch.setattr(s3_errors, "RETRY_FOR_S", 0.2)
    proxy.always = [Fault("answer", status=403, code="SignatureDoesNotMatch"), Fault("drop", "PUT")]
    for attempt in (lambda: store.read("a"), lambda: store.put("a", b""), lambda: store.read("missing")):
        with pytest.raises(StorageError) as caught:
            attempt()
        messages += [str(caught.value), repr(caught.value.__cause__)]
    written = b"".join(path.read_bytes() for path in rclone.log.parent.rglob("*") if path.is_file())
    printed = "".join(capfd.readouterr())
    for secret in (SECRET_KEY, token):
        assert secret.encode() not in written
        assert secret not in printed + caplog.text + "".join(messages) + repr(vars(store))
    assert ACCESS_KEY not in "".join(messages)
    assert len(caplog.text) > 1000  # something was logged, at DEBUG
