"""The store of s3://bucket/prefix locations, on s3fs. Credentials come from the standard AWS chain only."""

from __future__ import annotations

import errno
import os
import time
import uuid
from functools import cached_property
from pathlib import Path

import s3fs

from cluster.errors import StorageError
from cluster.storage import Names, checked_name

OWNER_SUFFIX = ".owner"
OWNER_SETTLES_S = 1.0  # longer than the round trips of two writers that race


class S3RangeReader:
    """Ranged reads of one object."""

    def __init__(self, store: S3Store, name: str) -> None:
        self.store = store
        self.name = name

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.store.read(self.name, offset, len(buffer))

    def close(self) -> None:
        return None


class S3Store:
    """A bucket's prefix. The client is made at first use, in the process that uses it: s3fs does not survive a fork."""

    def __init__(self, location: str) -> None:
        self.location = location.rstrip("/")
        self._client: s3fs.S3FileSystem | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"location": self.location, "_client": None}

    @property
    def client(self) -> s3fs.S3FileSystem:
        if self._client is None:
            # Stores that are not AWS reject the checksums newer clients add unasked.
            config = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
            self._client = s3fs.S3FileSystem(
                config_kwargs=config, use_listings_cache=False, skip_instance_cache=True, max_concurrency=2
            )
        return self._client

    def join(self, name: str) -> str:
        return f"{self.location}/{checked_name(name, self.location)}"

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        end = None if size is None else offset + size
        try:
            data = self.client.cat_file(self.join(name), start=offset or None, end=end)
        except FileNotFoundError as error:
            raise self._missing(name) from error
        if size is not None and len(data) != size:
            raise StorageError(f"{self.join(name)} ends before byte {end}; it is cut short, restore or rewrite it")
        return data

    def open_ranges(self, name: str) -> S3RangeReader:
        return S3RangeReader(self, name)

    def get_file(self, name: str, local: Path) -> None:
        local.parent.mkdir(parents=True, exist_ok=True)
        partial = local.parent / f".partial-{uuid.uuid4().hex}"
        try:
            self.client.get_file(self.join(name), str(partial))
            os.replace(partial, local)
        except FileNotFoundError as error:
            raise self._missing(name) from error
        finally:
            partial.unlink(missing_ok=True)

    def put(self, name: str, source: bytes | Path) -> None:
        """One request or one multipart upload: an interrupted one leaves nothing. A file object would not do: its close
        on an exception publishes half of it."""
        if isinstance(source, bytes):
            self.client.pipe_file(self.join(name), source)
        else:
            self.client.put_file(str(source), self.join(name))

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """True when this call created the object. A store that ignores If-None-Match is found out by a probe; there the
        writers leave an owner file one after the other, and only the one whose token stays goes on."""
        if self.exists(name):
            return False
        if not self.is_conditional:
            token = uuid.uuid4().hex.encode()
            owner = self.join(f"{name}{OWNER_SUFFIX}")
            self.client.pipe_file(owner, token)
            time.sleep(OWNER_SETTLES_S)
            if self.client.cat_file(owner) != token or self.exists(name):
                return False
        return self._create(name, data)

    @cached_property
    def is_conditional(self) -> bool:
        """True when the store refuses to create an object that exists."""
        probe = f".probe-{uuid.uuid4().hex}"
        self.client.pipe_file(self.join(probe), b"1")
        try:
            return not self._create(probe, b"2")
        finally:
            self.client.rm_file(self.join(probe))

    def _create(self, name: str, data: bytes) -> bool:
        try:
            self.client.pipe_file(self.join(name), data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno == errno.EINVAL:  # how s3fs passes on a 412 whose answer names no condition
                return False
            raise
        return True

    def list(self, prefix: str = "") -> Names:
        folder = prefix.rpartition("/")[0]
        start = f"{self.location}/{folder}".rstrip("/")
        root = self.location.removeprefix("s3://") + "/"
        names = (found.removeprefix(root) for found in self.client.find(start))
        return sorted(name for name in names if name.startswith(prefix) and not name.endswith(OWNER_SUFFIX))

    def exists(self, name: str) -> bool:
        return bool(self.client.exists(self.join(name)))

    def size(self, name: str) -> int:
        try:
            return int(self.client.info(self.join(name))["size"])
        except FileNotFoundError as error:
            raise self._missing(name) from error

    def delete(self, name: str) -> None:
        for stored in (name, f"{name}{OWNER_SUFFIX}"):
            if self.exists(stored):
                self.client.rm_file(self.join(stored))

    def _missing(self, name: str) -> StorageError:
        return StorageError(f"{self.join(name)} does not exist; check the location, or write it first")
