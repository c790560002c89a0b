"""What a set reveals about people: keyed hashes instead of subject ids, and only what the allow-lists name.

Promise: with a key file, no subject id and nothing of the key reaches shards, tables, manifest, receipts or messages.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import re
from dataclasses import dataclass
from pathlib import Path

from data_sharding.errors import SourceError
from data_sharding.scans import Scan, SourceContents, scan_id_of
from data_sharding.schema import Refusal

MIN_KEY_BYTES = 16
PSEUDONYM_LENGTH = 16  # hex digits: 64 bits
SHORT_ID = 4  # a shorter id is replaced only where it is used as an id: "01" occurs in many numbers


@dataclass
class PrivacyConfig:
    """What a set reveals about people."""

    key_file: str | None  # secret bytes that turn subject ids into keyed hashes; null keeps the ids
    sidecar_fields: list[str]  # the only fields of JSON sidecars that reach the set
    participant_columns: list[str] | None  # the only columns of the participants table that do; null keeps all


def validate_privacy(config: PrivacyConfig) -> list[str]:
    """All problems that need no scan."""
    if config.key_file is None or Path(config.key_file).is_file():
        return []
    return [
        f"privacy.key_file: {config.key_file} is no file; make one with 'head -c 32 /dev/urandom > FILE' "
        "and keep it: sets that are used together need the same one"
    ]


def kept_private(contents: SourceContents, config: PrivacyConfig) -> SourceContents:
    """The contents with the allowed sidecar fields and participant columns only; a key turns ids into hashes."""
    for scan in contents.scans:
        scan.sidecar = {name: scan.sidecar[name] for name in config.sidecar_fields if name in scan.sidecar}
    contents.subjects = contents.subjects.drop(columns="participant_id", errors="ignore")
    if config.participant_columns is not None:
        unknown = sorted(set(config.participant_columns) - set(contents.subjects.columns))
        if unknown:
            raise SourceError(
                f"privacy.participant_columns: {', '.join(unknown)} not among {', '.join(contents.subjects.columns)}"
            )
        contents.subjects = contents.subjects[config.participant_columns]
    return contents if config.key_file is None else _with_pseudonyms(contents, read_key(Path(config.key_file)))


def read_key(path: Path) -> bytes:
    """The secret in a file, stripped of surrounding white space; SourceError when it is too short."""
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise SourceError(f"privacy.key_file: {path} cannot be read ({error.strerror})") from error
    if len(key) < MIN_KEY_BYTES:
        raise SourceError(
            f"privacy.key_file: {path} holds {len(key)} bytes, fewer than {MIN_KEY_BYTES}, so hashes could be traced "
            f"back to ids; make one with 'head -c 32 /dev/urandom | base64 > {path}'"
        )
    return key


def pseudonym(subject: str, key: bytes) -> str:
    """The name that replaces a subject id: the start of HMAC-SHA256 in hex, the same in every set with this key."""
    return hmac.new(key, subject.encode(), hashlib.sha256).hexdigest()[:PSEUDONYM_LENGTH]


def redacted(text: str, pseudonyms: list[tuple[str, str]]) -> str:
    """The text with every id replaced by its pseudonym."""
    for subject, other in pseudonyms:
        if len(subject) >= SHORT_ID:
            text = text.replace(subject, other)
            unpadded = subject.lstrip("0")  # as some files of one data set are named
            text = text.replace(unpadded, other) if len(unpadded) >= SHORT_ID else text
        else:
            text = re.sub(rf"(?<![A-Za-z0-9])sub-?{re.escape(subject)}(?![A-Za-z0-9])", f"sub-{other}", text)
            text = re.sub(rf"(?<=/){re.escape(subject)}(?=/)", other, text)
    return text


def _with_pseudonyms(contents: SourceContents, key: bytes) -> SourceContents:
    scans = [_with_pseudonym(scan, key) for scan in contents.scans]
    refused = []
    for refusal in contents.refused:
        replaced = [(name, pseudonym(name, key)) for name in re.findall(r"^sub-([^_]+)", refusal.scan_id)]
        refused.append(Refusal(*(redacted(text, replaced) for text in dataclasses.astuple(refusal))))
    names = [pseudonym(str(subject), key) for subject in contents.subjects.index]
    subjects = contents.subjects.set_axis(names, axis="index").rename_axis(contents.subjects.index.name).sort_index()
    scans.sort(key=lambda scan: (scan.kind, scan.scan_id))
    return dataclasses.replace(contents, scans=scans, refused=refused, subjects=subjects)


def _with_pseudonym(scan: Scan, key: bytes) -> Scan:
    subject = pseudonym(scan.subject, key)
    entities = scan.entities | {"sub": subject}
    return dataclasses.replace(
        scan,
        scan_id=scan_id_of(entities, scan.kind),
        subject=subject,
        entities=entities,
        pseudonyms=[(scan.subject, subject)],
    )
