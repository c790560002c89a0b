"""The store of s3://bucket/prefix locations. Reads give the bytes of one version of an object or an error; a write is
seen whole or not at all.

A read that is cut or stalls is resumed where it stopped; another version, or other bytes than those asked for, is an
error.

Creating an object only if its name is free, so that of several writers one wins: a store that honours
`If-None-Match: *` decides itself, exactly. A probe finds out which do. In any other store a writer puts its token into
an owner file beside the name, waits SETTLES_S, and continues only if the token is still its own and the name still free
(Fischer's lock, in Lamport 1987: over atomic reads and writes nothing beats a bound on time). What can still go wrong:
a writer that is paused, or whose request hangs, for longer than SETTLES_S between reading its token back and the end of
its write may replace what another wrote. It finds the other's claim afterwards and fails with StorageError, so that two
writers never both believe they won.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import random
import re
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from boto3.exceptions import Boto3Error
from botocore.exceptions import ClientError, IncompleteReadError

from cluster.errors import StorageError
from cluster.storage import s3_client
from cluster.storage.files import (
    PARTIAL_PREFIX,
    CreateGuarantee,
    Names,
    checked_name,
    is_hidden,
    partial_file,
    refusal_is_an_error,
    sync_folder,
)
from cluster.storage.s3_client import (
    BODY_ERRORS,
    CHANGED,
    NO_SUCH_KEY,
    PART_BYTES,
    PARTS_AT_ONCE,
    backoff_s,
    client,
    code_of,
    endpoint,
    explained,
    transfer_config,
)

NUM_READS_OF_A_CHANGING_OBJECT = 5
MD5 = re.compile(r'"?[0-9a-f]{32}"?')
BLOCK_BYTES = 1 << 20  # at most so much is read again after a cut
SETTLES_S = 2.0
WRITER = "writer"

_IS_CONDITIONAL: dict[str, bool] = {}  # by endpoint and bucket


class S3RangeReader:
    """Ranged reads of one object; all see the version the first one saw."""

    def __init__(self, store: S3Store, name: str) -> None:
        self.store = store
        self.name = name
        self.version: str | None = None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole buffer from `offset`; StorageError when the object ends before, or was replaced."""
        if len(buffer):
            self.version = self.store.fill(self.name, offset, buffer, version=self.version)

    def close(self) -> None:
        return None


class S3Store:
    """A bucket's prefix. Holds no client, so it travels to other processes."""

    def __init__(self, location: str) -> None:
        self.bucket, _, prefix = location.removeprefix("s3://").rstrip("/").partition("/")
        self.location = f"s3://{self.bucket}/{prefix}".rstrip("/")
        self.root = f"{prefix}/" if prefix else ""
        if not self.bucket:
            raise StorageError(f"{location!r} names no bucket; give s3://<bucket>/<prefix>")

    def join(self, name: str) -> str:
        return f"{self.location}/{checked_name(name, self.location)}"

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        if size == 0:
            self.size(name)
            return b""
        where = self.join(name)
        answer, data = self._read(name, offset, size)
        if size is not None and len(data) != size:
            raise _ends_early(where, offset + size)
        for _ in range(NUM_READS_OF_A_CHANGING_OBJECT):
            if offset or size is not None or not may_be_mixed(answer, data):
                return data
            first = data
            answer, data = self._read(name, offset, size)
            if data == first:
                return data
        raise StorageError(f"{where} was replaced again and again while it was read; read it when its writer is done")

    def _read(self, name: str, offset: int, size: int | None) -> tuple[dict[str, Any], bytes]:
        where = self.join(name)
        with explained(where, doing="read"):
            answer = open_range(self.key(name), offset, size, where=where)
            data = bytearray(answer["ContentLength"])
            read_body(self.key(name), answer, offset, memoryview(data), where=where)
        return answer, bytes(data)

    def fill(self, name: str, offset: int, buffer: memoryview, *, version: str | None) -> str:
        """The version read; `buffer` is then filled from `offset`. StorageError when the object is another version."""
        where = self.join(name)
        with explained(where, doing="read"):
            answer = open_range(self.key(name), offset, len(buffer), where=where, version=version)
            if answer["ContentLength"] != len(buffer):
                raise _ends_early(where, offset + len(buffer))
            read_body(self.key(name), answer, offset, buffer, where=where)
        return str(answer["ETag"])

    def open_ranges(self, name: str) -> S3RangeReader:
        return S3RangeReader(self, name)

    def get_file(self, name: str, local: Path) -> None:
        """Copy an object to a local file, which appears whole or not at all; holds PARTS_AT_ONCE parts in memory."""
        head = self._head(name)
        size, version = int(head["ContentLength"]), str(head["ETag"])
        with refusal_is_an_error(local):
            local.parent.mkdir(parents=True, exist_ok=True)
            with partial_file(local.parent) as partial, partial.open("wb") as file:

                def copy_part(offset: int) -> None:
                    part = memoryview(bytearray(min(PART_BYTES, size - offset)))
                    self.fill(name, offset, part, version=version)
                    if os.pwrite(file.fileno(), part, offset) < len(part):  # a disk that has just become full
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

                with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
                    list(pool.map(copy_part, range(0, size, PART_BYTES)))
                os.fsync(file.fileno())
                os.replace(partial, local)
        sync_folder(local.parent)

    def put(self, name: str, source: bytes | Path) -> None:
        """One request, or a multipart upload that is given up whole when it fails."""
        where = self.join(name)
        with explained(where, doing="write"):
            try:
                self._upload(name, source)
            except (ClientError, Boto3Error) as error:
                if code_of(error) != "NoSuchUpload":
                    raise
                self._upload(name, source)  # it was completed, and the answer lost: an upload can only end once

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """True when this call created the object, False when it was there; `create_guarantee` says how surely."""
        with explained(self.join(name), doing="write"):
            return put_if_absent(self, name, data)

    def create_guarantee(self) -> CreateGuarantee:
        with explained(self.location, doing="write"):
            return create_guarantee(self)

    def list(self, prefix: str = "") -> Names:
        names: Names = []
        with explained(self.location, doing="list"):
            pages = client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.root + prefix)
            for page in pages:
                names += [entry["Key"].removeprefix(self.root) for entry in page.get("Contents", [])]
        return sorted(name for name in names if not is_hidden(name) and not name.endswith("/"))

    def exists(self, name: str) -> bool:
        with explained(self.join(name), doing="read"):
            try:
                client().head_object(**self.key(name))
            except ClientError as error:
                if code_of(error) not in NO_SUCH_KEY:
                    raise
                return False
        return True

    def size(self, name: str) -> int:
        return int(self._head(name)["ContentLength"])

    def delete(self, name: str) -> None:
        with explained(self.join(name), doing="delete"):
            client().delete_object(**self.key(name))

    def _head(self, name: str) -> dict[str, Any]:
        with explained(self.join(name), doing="read"):
            try:
                return client().head_object(**self.key(name))
            except ClientError as error:
                if code_of(error) in NO_SUCH_KEY:
                    client().list_objects_v2(
                        Bucket=self.bucket, MaxKeys=1
                    )  # says when it is the bucket that is missing
                raise

    def _upload(self, name: str, source: bytes | Path) -> None:
        if isinstance(source, Path):
            client().upload_file(str(source), *self.key(name).values(), Config=transfer_config())
        elif len(source) <= PART_BYTES:
            client().put_object(**self.key(name), Body=source)
        else:
            client().upload_fileobj(io.BytesIO(source), *self.key(name).values(), Config=transfer_config())

    def key(self, name: str) -> dict[str, str]:
        """The name as boto3 wants it."""
        return {"Bucket": self.bucket, "Key": self.root + checked_name(name, self.location)}


def _ends_early(where: str, end: int) -> StorageError:
    return StorageError(f"{where} ends before byte {end}; it is cut short, restore or rewrite it")


def open_range(
    key: dict[str, str], offset: int, size: int | None, *, where: str, version: str | None = None
) -> dict[str, Any]:
    """The answer that holds bytes [offset, offset + size) of an object, or to its end; fewer where the object ends."""
    asked: dict[str, str] = {"IfMatch": version} if version else {}
    if offset or size is not None:
        asked["Range"] = f"bytes={offset}-{'' if size is None else offset + size - 1}"
    answer: dict[str, Any] = client().get_object(**key, **asked)
    if "Range" in asked and not answer.get("ContentRange", "").startswith(f"bytes {offset}-"):
        answer["Body"].close()
        raise StorageError(
            f"{where}: {endpoint()} ignores ranged reads; read whole objects (reader=stream), or use another store"
        )
    if version and answer["ETag"] != version:  # some stores ignore If-Match
        answer["Body"].close()
        raise StorageError(f"{where} was replaced while it was read; read it again once its writer is done")
    return answer


def may_be_mixed(answer: dict[str, Any], data: bytes | bytearray) -> bool:
    """True when a whole object is not what its ETag says: `rclone serve s3` sends one version's size with another's
    bytes when an object is replaced just then. Also True where an ETag only looks like an MD5: a second read tells.
    """
    is_md5 = MD5.fullmatch(answer["ETag"]) and answer.get("ServerSideEncryption", "AES256") == "AES256"
    return bool(is_md5) and hashlib.md5(data, usedforsecurity=False).hexdigest() != answer["ETag"].strip('"')


def read_body(key: dict[str, str], answer: dict[str, Any], offset: int, buffer: memoryview, *, where: str) -> None:
    """Fills the buffer from an answer that starts at `offset`; the last error when no byte came for RETRY_FOR_S."""
    version, body = answer["ETag"], answer["Body"]
    num_done = num_failures = 0
    last_byte_at = time.monotonic()
    while num_done < len(buffer):
        try:
            num_read = body.readinto(buffer[num_done : num_done + BLOCK_BYTES])
            if num_read == 0:
                raise IncompleteReadError(actual_bytes=num_done, expected_bytes=len(buffer))
            num_done += num_read
            num_failures, last_byte_at = 0, time.monotonic()
        except BODY_ERRORS:
            body.close()
            num_failures += 1
            left_s = s3_client.RETRY_FOR_S - (time.monotonic() - last_byte_at)
            if left_s <= 0:
                raise
            time.sleep(min(backoff_s(num_failures), left_s))
            body = open_range(key, offset + num_done, len(buffer) - num_done, where=where, version=version)["Body"]
    body.close()


def forget_probes() -> None:
    """The next call finds out anew what each store honours."""
    _IS_CONDITIONAL.clear()


def create_guarantee(store: S3Store) -> CreateGuarantee:
    """What put_if_absent promises at this store; writes and deletes a probe at the first call."""
    if _is_conditional(store):
        return CreateGuarantee(True, "exactly one writer creates a name: the store honours If-None-Match (probed)")
    return CreateGuarantee(
        False,
        f"one writer creates a name while every request takes less than {SETTLES_S:g} s: the store ignores "
        "If-None-Match (probed), so writers leave an owner file and read it back; a slower one fails with an error, "
        "but may have replaced the object: start only one run that writes here",
    )


def put_if_absent(store: S3Store, name: str, data: bytes) -> bool:
    """True when this call created the object, False when it was there before."""
    if store.exists(name):
        return False
    return _create(store, name, data) if _is_conditional(store) else _create_as_owner(store, name, data)


def _is_conditional(store: S3Store) -> bool:
    """True when the store refuses to create an object that exists."""
    bucket = f"{endpoint()}/{store.bucket}"
    if bucket not in _IS_CONDITIONAL:
        probe = f"{PARTIAL_PREFIX}probe-{uuid.uuid4().hex}"
        store.put(probe, b"1")
        try:
            _IS_CONDITIONAL[bucket] = not _create(store, probe, b"2")
        finally:
            store.delete(probe)
    return _IS_CONDITIONAL[bucket]


def _create(store: S3Store, name: str, data: bytes) -> bool:
    """True when the store let this call create the object."""
    token = uuid.uuid4().hex
    key = store.key(name)
    try:
        client().put_object(**key, Body=data, IfNoneMatch="*", Metadata={WRITER: token})
    except ClientError as error:
        if code_of(error) not in CHANGED:
            raise
        # An answer lost on the way was asked for again: then it is this call's own object that is in the way.
        return client().head_object(**key)["Metadata"].get(WRITER) == token
    return True


def _create_as_owner(store: S3Store, name: str, data: bytes) -> bool:
    """True when this call created the object in a store that decides nothing."""
    token = uuid.uuid4().hex.encode()
    while not store.exists(name):
        store.put(_owner_name(name), token)
        time.sleep(SETTLES_S)
        settled_at = time.monotonic()
        if not _owns(store, name, token):
            time.sleep(SETTLES_S * random.uniform(1.0, 2.0))  # the other goes first; if it died, this one tries again
        elif not store.exists(name) and time.monotonic() - settled_at < SETTLES_S / 2:
            store.put(name, data)
            is_late = time.monotonic() - settled_at > SETTLES_S
            if not _owns(store, name, token) and is_late:
                raise StorageError(_both_may_have_written(store, name))
            store.delete(_owner_name(name))
            return True
    if _owns(store, name, token):
        store.delete(_owner_name(name))
    return False


def _both_may_have_written(store: S3Store, name: str) -> str:
    return (
        f"{store.join(name)}: another writer claimed this name while its store did not answer for {SETTLES_S:g} s, and "
        "either may have written it; stop all but one run that writes there, delete the object and run again"
    )


def _owner_name(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{PARTIAL_PREFIX}owner-{base}"


def _owns(store: S3Store, name: str, token: bytes) -> bool:
    try:
        return bool(client().get_object(**store.key(_owner_name(name)))["Body"].read() == token)
    except ClientError as error:
        if code_of(error) in NO_SUCH_KEY:
            return False
        raise
