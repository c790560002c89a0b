"""The store of s3://bucket/prefix locations. Reads give the bytes of one version of an object or an error; a write is
seen whole or not at all."""

from __future__ import annotations

import errno
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from boto3.exceptions import Boto3Error
from botocore.exceptions import ClientError

from cluster.errors import StorageError
from cluster.storage import s3_create
from cluster.storage.s3_body import may_be_mixed, open_range, read_body
from cluster.storage.s3_client import PART_BYTES, PARTS_AT_ONCE, client, transfer_config
from cluster.storage.s3_errors import NO_SUCH_KEY, code_of, explained
from cluster.storage.stores import (
    CreateGuarantee,
    Names,
    checked_name,
    is_hidden,
    partial_file,
    refusal_is_an_error,
    sync_folder,
)

NUM_READS_OF_A_CHANGING_OBJECT = 5


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
            return s3_create.put_if_absent(self, name, data)

    def create_guarantee(self) -> CreateGuarantee:
        with explained(self.location, doing="write"):
            return s3_create.guarantee(self)

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
