"""The store of s3://bucket/prefix locations, on s3fs. Reads give the bytes of one version of an object or an error.

Two things s3fs cannot promise are done here, on the client it holds. It counts attempts, and multiplies them where a
read calls a request: `S3Driver` bounds the time instead. Its reads ask for no version: `S3Driver._cat_file` does, so
that fsspec's `cat_ranges` never mixes two. Settings come from the standard AWS chain alone: environment, config files,
roles. Never takes, keeps or prints a credential.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
import random
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from aiobotocore.session import AioSession
from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem

from cluster.errors import StorageError, StoreUnavailableError
from cluster.storage import s3_errors
from cluster.storage.files import whole_file
from cluster.storage.remote import RemoteStore, Versions, ignores_ranges
from cluster.storage.s3_errors import ALL_ERRORS, CHANGED, code_of, is_passing, replaced, storage_error

SETTINGS = {
    "connect_timeout": 5.0,
    "read_timeout": 30.0,  # of silence; a slow answer that keeps coming is read to its end
    "retries": {"mode": "standard", "total_max_attempts": 1},  # ours are bounded by time
    "max_pool_connections": 16,
}
# Other stores refuse, or store as content, the checksums newer clients add unasked.
NOT_AWS = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
LONGEST_PAUSE_S = 5.0
WARN_AFTER_S = 3.0

PART_BYTES = 8 << 20  # objects of less than two parts are one request
PARTS_AT_ONCE = 4
MAX_PARTS = 10_000

NUM_READS_OF_A_CHANGING_OBJECT = 5
MD5 = re.compile(r'"?[0-9a-f]{32}"?')
WRITER = "writer"

Answer = dict[str, Any]
Result = TypeVar("Result")

log = logging.getLogger(__name__)


class S3Driver(S3FileSystem):
    """s3fs that tries for RETRY_FOR_S, and whose ranged reads see one version."""

    retries = 1  # of s3fs's own

    async def _call_s3(self, method: str, *arguments: object, **named: object) -> Any:
        return await self._patiently(functools.partial(super()._call_s3, method, *arguments, **named))

    call_s3 = sync_wrapper(_call_s3)  # s3fs's own is bound to its own

    async def _cat_file(self, path: str, version_id: None = None, start: int = 0, end: int = 0, **named: Any) -> bytes:
        """Bytes [start, end) of the version that `versions` notes for this path; the first read makes the note."""
        versions: Versions = named["versions"]
        asked = {"Range": f"bytes={start}-{end - 1}"}
        if path in versions:
            asked["IfMatch"] = versions[path]
        answer, data = await self._patiently(functools.partial(self._answer, path, asked))
        if versions.setdefault(path, answer["ETag"]) != answer["ETag"]:  # first reads may be several at once
            raise replaced(path)
        return data

    async def _whole(self, path: str) -> tuple[Answer, bytes]:
        """What is said of an object, and its bytes where they are one part at most, else b""."""
        return await self._patiently(functools.partial(self._answer, path, {}, max_bytes=PART_BYTES))

    whole = sync_wrapper(_whole)

    async def _answer(self, path: str, asked: dict[str, str], max_bytes: int = 1 << 62) -> tuple[Answer, bytes]:
        bucket, key, _ = self.split_path(path)
        answer = await super()._call_s3("get_object", Bucket=bucket, Key=key, **asked)
        async with answer["Body"] as body:
            first = asked.get("Range", "").replace("=", " ").partition("-")[0]  # "bytes 123"
            if first and not answer.get("ContentRange", "").startswith(f"{first}-"):
                raise ignores_ranges(path)
            return answer, await body.read() if answer["ContentLength"] <= max_bytes else b""

    async def _patiently(self, attempt: Callable[[], Awaitable[Result]]) -> Result:
        """The result of the first attempt that succeeds; the last error once RETRY_FOR_S have passed in failures."""
        failing_since, num_attempts, is_warned = None, 0, False
        while True:
            try:
                return await attempt()
            except ALL_ERRORS as error:
                now, num_attempts = time.monotonic(), num_attempts + 1
                failing_since = failing_since or now
                left_s = s3_errors.RETRY_FOR_S - (now - failing_since)
                if not is_passing(error) or left_s <= 0 or num_attempts == self.max_attempts:
                    raise
                if now - failing_since > WARN_AFTER_S and not is_warned:
                    is_warned, reason = True, code_of(error) or type(error).__name__
                    log.warning("%s keeps failing (%s); trying for another %.0f s", self.server, reason, left_s)
            await asyncio.sleep(min(backoff_s(num_attempts), left_s))

    @functools.cached_property
    def max_attempts(self) -> int | None:
        """Of the AWS settings, where a site sets it."""
        return self.session.get_config_variable("max_attempts")

    @property
    def server(self) -> str:
        """scheme://host[:port] of the server in use."""
        parts = urlsplit(self.s3.meta.endpoint_url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"  # before the @ could be a password


class S3Store(RemoteStore):
    """A bucket's prefix."""

    errors = ALL_ERRORS

    def make_driver(self) -> S3Driver:
        for name in ("botocore", "aiobotocore"):
            logging.getLogger(name).setLevel(logging.WARNING)  # INFO names credentials, DEBUG holds tokens
        session = AioSession()
        options = {"session": session, "max_concurrency": PARTS_AT_ONCE, "use_listings_cache": False}
        try:
            driver = S3Driver(config_kwargs=SETTINGS, skip_instance_cache=True, **options)
            driver.connect()
            if not driver.server.endswith((".amazonaws.com", ".amazonaws.com.cn")):
                driver = S3Driver(config_kwargs=SETTINGS | NOT_AWS, skip_instance_cache=True, **options)
                driver.connect()
        except ValueError as error:
            reason = re.sub(r"//[^/@]*@", "//", str(error))  # it quotes the endpoint, which could hold a password
            raise StoreUnavailableError(f"no S3 client can be made ({reason}); check AWS_ENDPOINT_URL_S3") from None
        return driver

    def get_file(self, name: str, local: Path) -> None:
        """Copy an object to a local file, which appears whole or not at all; holds PARTS_AT_ONCE parts in memory."""
        where = self.join(name)
        with self.explained(where, doing="read"):
            info = self.info(where)
        with whole_file(local) as partial, partial.open("wb") as file:
            for first in range(0, info["size"], PARTS_AT_ONCE * PART_BYTES):
                size = min(PARTS_AT_ONCE * PART_BYTES, info["size"] - first)
                with self.explained(where, doing="read"):
                    parts = self.parts(where, first, size, {where: info["ETag"]})
                while parts:
                    file.write(parts.pop(0))  # and free it, before the next are fetched

    def read_whole(self, where: str) -> bytes:
        first = None
        for _ in range(NUM_READS_OF_A_CHANGING_OBJECT):
            answer, data = self.driver.whole(where)
            if len(data) < answer["ContentLength"]:
                data = b"".join(self.parts(where, 0, answer["ContentLength"], {where: answer["ETag"]}))
            if data == first or not may_be_mixed(answer, data):
                return data
            first = data
        raise StorageError(f"{where} was replaced again and again while it was read; read it when its writer is done")

    def parts(self, where: str, offset: int, size: int, versions: Versions) -> list[bytes]:
        starts = range(offset, offset + size, PART_BYTES)
        ends = [min(start + PART_BYTES, offset + size) for start in starts]
        options = {"on_error": "raise", "batch_size": PARTS_AT_ONCE, "versions": versions}
        return list(self.driver.cat_ranges([where] * len(starts), starts, ends, **options))

    def upload(self, where: str, source: bytes | Path, **_: int) -> None:
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        options = {"chunksize": max(PART_BYTES, -(-size // MAX_PARTS)), "max_concurrency": PARTS_AT_ONCE}
        try:
            super().upload(where, source, **options)
        except ALL_ERRORS as error:
            if code_of(error) != "NoSuchUpload":
                raise
            super().upload(where, source, **options)  # its end was asked for twice: the first answer was lost

    def create(self, where: str, data: bytes) -> bool:
        token = uuid.uuid4().hex
        try:
            self.driver.pipe_file(where, data, mode="create", Metadata={WRITER: token})
        except ALL_ERRORS as error:
            if code_of(error) not in CHANGED:
                raise
            # An answer lost on the way was asked for again: then it is this call's own object that is in the way.
            return bool(self.driver.metadata(where).get(WRITER) == token)
        return True

    def in_words(self, error: Exception, where: str, *, doing: str) -> StorageError:
        return storage_error(error, where, doing=doing, server=lambda: self.driver.server)


def backoff_s(num_attempts: int) -> float:
    """The pause after so many failures in a row: doubled each time, and spread so that readers come back apart."""
    return min(LONGEST_PAUSE_S, 0.1 * 2 ** min(num_attempts, 10)) * random.uniform(0.5, 1.0)


def may_be_mixed(answer: Answer, data: bytes) -> bool:
    """True when a whole object is not what its ETag says: `rclone serve s3` sends one version's size with another's
    bytes when an object is replaced just then. Also True where an ETag only looks like an MD5: a second read tells.
    """
    is_md5 = MD5.fullmatch(answer["ETag"]) and answer.get("ServerSideEncryption", "AES256") == "AES256"
    return bool(is_md5) and hashlib.md5(data, usedforsecurity=False).hexdigest() != answer["ETag"].strip('"')
