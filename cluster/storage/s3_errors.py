"""What the failures of an S3 server mean: which may pass, and what to tell a user. Never quotes more of an answer than
its code and message.

s3fs raises an OSError of its own for an answer, whose cause is botocore's ClientError, and everything else as it is.
"""

from __future__ import annotations

from collections.abc import Callable

import aiohttp
from botocore import exceptions as aws
from botocore.parsers import ResponseParserError

from cluster.errors import StorageError, StoreUnavailableError
from cluster.storage.files import is_missing

RETRY_FOR_S = 120.0  # of failures in a row: a server restarts in less

PASSING_STATUS = {429, 500, 502, 503, 504}
PASSING_CODES = {"BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"}  # bytes were damaged on the way
PASSING_CODES |= {"ConditionalRequestConflict", "OperationAborted"}  # another write of the same name is under way
PASSING_CODES |= {"InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown"}

ALL_ERRORS = (OSError, aws.BotoCoreError, aws.ClientError, aiohttp.ClientError, ResponseParserError)
NO_ANSWER = (aws.ConnectionError, aws.HTTPClientError, aiohttp.ClientError)  # aiohttp's: a body that ends early
NO_CREDENTIALS = (aws.NoCredentialsError, aws.PartialCredentialsError, aws.CredentialRetrievalError, aws.SSOError)
NO_SUCH_KEY = {"NoSuchKey", "404", "NotFound"}
DENIED = {"AccessDenied", "AllAccessDisabled", "403"}
WRONG_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "AuthorizationHeaderMalformed"}
EXPIRED = {"ExpiredToken", "TokenRefreshRequired", "RequestExpired"}
WRONG_CLOCK = {"RequestTimeTooSkewed"}
WRONG_REGION = {"PermanentRedirect", "IllegalLocationConstraintException", "301"}
CHANGED = {"PreconditionFailed", "412"}
TOO_SHORT = {"InvalidRange", "416"}


def is_passing(error: Exception) -> bool:
    """False when another attempt would end the same way."""
    answer = answer_of(error)
    if answer is None:
        return isinstance(error, NO_ANSWER) and "CERTIFICATE_VERIFY_FAILED" not in str(error)
    status = answer.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status in PASSING_STATUS or code_of(error) in PASSING_CODES


def answer_of(error: Exception) -> aws.ClientError | None:
    """What the server answered, None when it did not."""
    found = error.__cause__ if isinstance(error, OSError) else error
    return found if isinstance(found, aws.ClientError) else None


def code_of(error: Exception) -> str:
    """The S3 error code of an exception, "" when no server gave one; HEAD answers give only a number."""
    answer = answer_of(error)
    return "" if answer is None else str(answer.response.get("Error", {}).get("Code", ""))


def storage_error(error: Exception, where: str, *, doing: str, server: Callable[[], str]) -> StorageError:
    """The error in words, of the class that says whether the object itself is at fault; `doing` is the right needed."""
    code = code_of(error)
    if code in NO_SUCH_KEY or (isinstance(error, FileNotFoundError) and not code):
        return is_missing(where)
    if code in CHANGED:
        return replaced(where)
    if code in TOO_SHORT:
        return StorageError(f"{where} ends before the bytes asked for; it is cut short, restore or rewrite it")
    advice = _advice_on_answer(error, where, doing, server()) if code else _advice(error, server)
    return StoreUnavailableError(f"{where}: {advice}")


def replaced(where: str) -> StorageError:
    return StorageError(f"{where} was replaced while it was read; read it again once its writer is done")


def _advice(error: Exception, server: Callable[[], str]) -> str:
    name = type(error).__name__
    if isinstance(error, NO_CREDENTIALS):
        return (
            "no AWS credentials were found; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run "
            f"where a role is attached ({name})"
        )
    if isinstance(error, ResponseParserError):
        return "the answer is not S3's; check AWS_ENDPOINT_URL_S3, it may point to another kind of server"
    if isinstance(error, aws.SSLError):
        return f"no secure connection to {server()} ({error}); check its certificate, or set AWS_CA_BUNDLE"
    if isinstance(error, NO_ANSWER):
        return (
            f"{server()} did not answer within {RETRY_FOR_S:.0f} s of trying ({name}); check that the server runs and "
            "that AWS_ENDPOINT_URL_S3 and the network are right, then run again"
        )
    return f"{name}: {error}; check the AWS settings (aws configure list)"


def _advice_on_answer(error: Exception, where: str, doing: str, server: str) -> str:
    code, bucket = code_of(error), where.removeprefix("s3://").partition("/")[0]
    answer = answer_of(error)
    message = answer.response["Error"].get("Message", "")[:200] if answer else ""
    said = f" ({message})" if message else ""
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
