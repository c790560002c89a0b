"""Creating an object only if its name is free, so that of several writers one wins.

A store that honours `If-None-Match: *` decides itself: exact. Any other store is found out by a probe. There a writer
puts its token into an owner file beside the name, waits SETTLES_S, and goes on only if the token is still its own and
the name still free (Fischer's lock, in Lamport 1987: over atomic reads and writes nothing beats a bound on time). What
can still go wrong: a writer that is paused, or whose request hangs, for longer than SETTLES_S between reading its token
back and the end of its write may replace what another wrote. It finds the other's claim afterwards and fails with
StorageError, so that never two writers believe they won.
"""

from __future__ import annotations

import random
import time
import uuid
from typing import TYPE_CHECKING

from botocore.exceptions import ClientError

from cluster.errors import StorageError
from cluster.storage.s3_client import client, endpoint
from cluster.storage.s3_errors import CHANGED, NO_SUCH_KEY, code_of
from cluster.storage.stores import PARTIAL_PREFIX, CreateGuarantee

if TYPE_CHECKING:
    from cluster.storage.s3 import S3Store

SETTLES_S = 2.0
WRITER = "writer"

_IS_CONDITIONAL: dict[str, bool] = {}  # by endpoint and bucket


def forget_probes() -> None:
    """The next call finds out anew what each store honours."""
    _IS_CONDITIONAL.clear()


def guarantee(store: S3Store) -> CreateGuarantee:
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
    place = f"{endpoint()}/{store.bucket}"
    if place not in _IS_CONDITIONAL:
        probe = f"{PARTIAL_PREFIX}probe-{uuid.uuid4().hex}"
        store.put(probe, b"1")
        try:
            _IS_CONDITIONAL[place] = not _create(store, probe, b"2")
        finally:
            store.delete(probe)
    return _IS_CONDITIONAL[place]


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
