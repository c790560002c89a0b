"""What an S3 failure means, as a StorageError: the object, the cause, what to do. Never quotes more of an answer than
its code and message."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import urllib3.exceptions
from boto3.exceptions import Boto3Error
from botocore import exceptions as aws
from botocore.parsers import ResponseParserError

from cluster.errors import StorageError, StoreUnavailableError
from cluster.storage import s3_client

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
        return f"no secure connection to {s3_client.endpoint()} ({error}); check its certificate, or set AWS_CA_BUNDLE"
    if isinstance(error, (aws.ConnectionError, *BODY_ERRORS)):
        return (
            f"{s3_client.endpoint()} did not answer within {s3_client.RETRY_FOR_S:.0f} s of trying "
            f"({type(error).__name__}); check that the server runs and that AWS_ENDPOINT_URL_S3 and the network are "
            "right, then run again"
        )
    return f"{type(error).__name__}: {error}; check the AWS settings (aws configure list)"


def _advice_for(code: str, *, bucket: str, doing: str, said: str) -> str:
    server = s3_client.endpoint()
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
    return f"{server} answered {code}{said} after {s3_client.RETRY_FOR_S:.0f} s of trying at most; ask who runs it"


def _said(error: Exception) -> str:
    cause = error.__context__ if isinstance(error, Boto3Error) else error
    if not isinstance(cause, aws.ClientError):
        return ""
    return f" ({cause.response.get('Error', {}).get('Message', '')[:200]})".replace(" ()", "")
