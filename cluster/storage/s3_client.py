"""The S3 client of a process, how long it keeps trying, and what its failures mean as a StorageError.

Settings come from the standard AWS chain alone: environment, config files, roles. Never takes, keeps or prints a
credential; never quotes more of an answer than its code and message.

boto3 rather than s3fs: 1.7 times the ranged reads a second (470 against 280, 500 kB each, one core, `rclone serve s3`),
no event loop that a fork would lose, a body that ends early is an error, and no file object whose close on an exception
publishes half an object.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import boto3
import botocore.session
import urllib3.exceptions
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore import exceptions as aws
from botocore.client import BaseClient
from botocore.config import Config
from botocore.parsers import ResponseParserError

from cluster.errors import StorageError, StoreUnavailableError

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 30.0  # of silence; a slow answer that keeps coming is read to its end
RETRY_FOR_S = 120.0  # of failures in a row: a server restarts in less
LONGEST_PAUSE_S = 5.0
WARN_AFTER_S = 3.0
MAX_CONNECTIONS = 16

PART_BYTES = 8 << 20  # objects up to this size are one request
PARTS_AT_ONCE = 4

PASSING_STATUS = {429, 500, 502, 503, 504}
PASSING_CODES = {
    "BadDigest",  # bytes were damaged on the way
    "ConditionalRequestConflict",  # another conditional write of the same name is under way
    "IncompleteBody",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "XAmzContentSHA256Mismatch",
}

ALL_ERRORS = (aws.BotoCoreError, aws.ClientError, Boto3Error, ResponseParserError, urllib3.exceptions.HTTPError)
BODY_ERRORS = (aws.HTTPClientError, aws.IncompleteReadError, urllib3.exceptions.HTTPError)  # while an answer is read
NO_CREDENTIALS = (
    aws.NoCredentialsError,
    aws.PartialCredentialsError,
    aws.CredentialRetrievalError,
    aws.MetadataRetrievalError,
    aws.NoAuthTokenError,
    aws.TokenRetrievalError,
    aws.SSOError,
    aws.LoginError,
)
NO_SUCH_KEY = {"NoSuchKey", "404", "NotFound"}
DENIED = {"AccessDenied", "AllAccessDisabled", "403"}
WRONG_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "AuthorizationHeaderMalformed"}
EXPIRED = {"ExpiredToken", "TokenRefreshRequired", "RequestExpired"}
WRONG_CLOCK = {"RequestTimeTooSkewed"}
WRONG_REGION = {"PermanentRedirect", "IllegalLocationConstraintException", "301"}
CHANGED = {"PreconditionFailed", "412"}
TOO_SHORT = {"InvalidRange", "416"}

_CLIENTS: dict[int, BaseClient] = {}

log = logging.getLogger(__name__)


def client() -> BaseClient:
    """The client of this process, made at its first use: sockets shared with a forked child would mix their answers."""
    process_id = os.getpid()
    if process_id not in _CLIENTS:
        _CLIENTS.setdefault(process_id, _make_client())
    return _CLIENTS[process_id]


def forget_clients() -> None:
    """The next call reads the AWS settings anew."""
    _CLIENTS.clear()


def endpoint() -> str:
    """scheme://host[:port] of the server in use."""
    parts = urlsplit(client().meta.endpoint_url)
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{parts.hostname}{port}"  # netloc could hold a password


def transfer_config() -> TransferConfig:
    """Multipart above PART_BYTES; parts are read from the file as they are sent."""
    return TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=PARTS_AT_ONCE)


def pause_before_retry_s(error: Exception | None, status: int | None, code: str, *, num_attempts: int) -> float | None:
    """How long to wait before the next attempt, or None when another would end the same way."""
    if error is not None:
        is_refused_certificate = "CERTIFICATE_VERIFY_FAILED" in str(error)
        is_passing = isinstance(error, aws.ConnectionError | aws.HTTPClientError) and not is_refused_certificate
    else:
        is_passing = status in PASSING_STATUS or code in PASSING_CODES
    return backoff_s(num_attempts) if is_passing else None


def backoff_s(num_attempts: int) -> float:
    """The pause after so many failures in a row: doubled each time, and spread so that readers come back apart."""
    return min(LONGEST_PAUSE_S, 0.1 * 2 ** min(num_attempts, 10)) * random.uniform(0.5, 1.0)


def _make_client() -> BaseClient:
    logging.getLogger("botocore").setLevel(logging.INFO)  # its DEBUG lines hold session tokens
    core = botocore.session.get_session()
    session = boto3.session.Session(botocore_session=core)
    settings = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": 1},  # ours are the hook below, bounded by time
        max_pool_connections=MAX_CONNECTIONS,
        tcp_keepalive=True,
    )
    try:
        made = session.client("s3", config=settings)
    except ValueError as error:
        reason = re.sub(r"//[^/@]*@", "//", str(error))  # it quotes the endpoint, which could hold a password
        raise StoreUnavailableError(f"no S3 client can be made ({reason}); check AWS_ENDPOINT_URL_S3") from None
    if not _is_aws(made.meta.endpoint_url):
        # Other stores refuse, or store as content, the checksums newer clients add unasked.
        when_required = Config(
            request_checksum_calculation="when_required", response_checksum_validation="when_required"
        )
        made = session.client("s3", config=settings.merge(when_required))
    made.meta.events.register("needs-retry.s3", _Retries(core.get_config_variable("max_attempts")))
    return made


def _is_aws(endpoint_url: str) -> bool:
    return (urlsplit(endpoint_url).hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn"))


class _Retries:
    """Called by botocore after every attempt; a number is the pause before the next one, None ends the trying."""

    def __init__(self, max_attempts: int | None) -> None:
        self.max_attempts = max_attempts  # AWS_MAX_ATTEMPTS or max_attempts in the AWS config, when a site sets it

    def __call__(
        self,
        response: tuple[Any, dict[str, Any]] | None,
        attempts: int,
        caught_exception: Exception | None,
        request_dict: dict[str, Any],
        **_: object,
    ) -> float | None:
        http_response, parsed = response if response is not None else (None, {})
        code = str(parsed.get("Error", {}).get("Code", ""))
        status = None if http_response is None else http_response.status_code
        pause_s = pause_before_retry_s(caught_exception, status, code, num_attempts=attempts)
        now = time.monotonic()
        waited_s = now - request_dict["context"].setdefault("first_answer_at", now)
        if pause_s is None or waited_s >= RETRY_FOR_S or attempts >= (self.max_attempts or attempts + 1):
            return None
        if waited_s > WARN_AFTER_S and "is_warned" not in request_dict["context"]:
            request_dict["context"]["is_warned"] = True
            reason = code or status or type(caught_exception).__name__
            log.warning("%s keeps failing (%s); trying for another %.0f s", endpoint(), reason, RETRY_FOR_S - waited_s)
        return min(pause_s, RETRY_FOR_S - waited_s)


@contextlib.contextmanager
def explained(where: str, *, doing: str) -> Iterator[None]:
    """Turns what boto3 raises inside into a StorageError about `where`; `doing` is the right needed: read, write ..."""
    try:
        yield
    except ALL_ERRORS as error:
        raise storage_error(error, where, doing=doing) from error


def code_of(error: Exception) -> str:
    """The S3 error code of an exception, "" when no server gave one; HEAD answers give only a number."""
    cause = error.__context__ if isinstance(error, Boto3Error) else error  # upload_file hides the answer one level down
    return str(cause.response.get("Error", {}).get("Code", "")) if isinstance(cause, aws.ClientError) else ""


def storage_error(error: Exception, where: str, *, doing: str) -> StorageError:
    """The error in words, of the class that says whether the object itself is at fault."""
    bucket = where.removeprefix("s3://").partition("/")[0]
    code = code_of(error)
    if code in NO_SUCH_KEY:
        return StorageError(f"{where} does not exist; check the location, or write it first")
    if code in CHANGED:
        return StorageError(f"{where} was replaced while it was read; read it again once its writer is done")
    if code in TOO_SHORT:
        return StorageError(f"{where} ends before the bytes asked for; it is cut short, restore or rewrite it")
    return StoreUnavailableError(f"{where}: {_cause_and_advice(error, code, bucket=bucket, doing=doing)}")


def _cause_and_advice(error: Exception, code: str, *, bucket: str, doing: str) -> str:
    if isinstance(error, NO_CREDENTIALS):
        return (
            "no AWS credentials were found; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run "
            f"where a role is attached ({type(error).__name__})"
        )
    if isinstance(error, ResponseParserError):
        return "the answer is not S3's; check AWS_ENDPOINT_URL_S3, it may point to another kind of server"
    if code:
        return _advice_for(code, bucket=bucket, doing=doing, said=_said(error))
    if isinstance(error, aws.SSLError):
        return f"no secure connection to {endpoint()} ({error}); check its certificate, or set AWS_CA_BUNDLE"
    if isinstance(error, (aws.ConnectionError, *BODY_ERRORS)):
        return (
            f"{endpoint()} did not answer within {RETRY_FOR_S:.0f} s of trying "
            f"({type(error).__name__}); check that the server runs and that AWS_ENDPOINT_URL_S3 and the network are "
            "right, then run again"
        )
    return f"{type(error).__name__}: {error}; check the AWS settings (aws configure list)"


def _advice_for(code: str, *, bucket: str, doing: str, said: str) -> str:
    server = endpoint()
    if code == "NoSuchBucket":
        return f"there is no bucket {bucket!r} at {server}; create it, or check the name and AWS_ENDPOINT_URL_S3"
    if code in DENIED:
        return f"access denied: these credentials may not {doing} there{said}; have that right granted, or use others"
    if code in WRONG_CREDENTIALS:
        return f"{server} does not accept these credentials{said}; check the AWS profile, keys and region"
    if code in EXPIRED:
        return "the credentials have expired; renew them (aws sso login, or a new token) and run again"
    if code in WRONG_CLOCK:
        return f"this machine's clock is more than minutes off that of {server}; synchronise it (NTP)"
    if code in WRONG_REGION:
        return f"bucket {bucket!r} lies in another region; set AWS_DEFAULT_REGION to it"
    return f"{server} answered {code}{said} after {RETRY_FOR_S:.0f} s of trying at most; ask who runs it"


def _said(error: Exception) -> str:
    cause = error.__context__ if isinstance(error, Boto3Error) else error
    if not isinstance(cause, aws.ClientError):
        return ""
    return f" ({cause.response.get('Error', {}).get('Message', '')[:200]})".replace(" ()", "")
