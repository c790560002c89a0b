"""Reads the bytes of one version of an S3 object. A cut or stalled answer is taken up where it stopped; another
version, or other bytes than those asked for, is an error."""

from __future__ import annotations

import hashlib
import re
import time
from typing import Any

from botocore.exceptions import IncompleteReadError

from cluster.errors import StorageError
from cluster.storage import s3_client
from cluster.storage.s3_errors import BODY_ERRORS

MD5 = re.compile(r'"?[0-9a-f]{32}"?')
BLOCK_BYTES = 1 << 20  # at most so much is read again after a cut


def open_range(
    key: dict[str, str], offset: int, size: int | None, *, where: str, version: str | None = None
) -> dict[str, Any]:
    """The answer that holds bytes [offset, offset + size) of an object, or to its end; fewer where the object ends."""
    asked: dict[str, str] = {"IfMatch": version} if version else {}
    if offset or size is not None:
        asked["Range"] = f"bytes={offset}-{'' if size is None else offset + size - 1}"
    answer: dict[str, Any] = s3_client.client().get_object(**key, **asked)
    if "Range" in asked and not answer.get("ContentRange", "").startswith(f"bytes {offset}-"):
        answer["Body"].close()
        raise StorageError(
            f"{where}: {s3_client.endpoint()} ignores ranged reads; read whole objects (reader=stream), or use "
            "another store"
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
            time.sleep(min(s3_client.backoff_s(num_failures), left_s))
            body = open_range(key, offset + num_done, len(buffer) - num_done, where=where, version=version)["Body"]
    body.close()
