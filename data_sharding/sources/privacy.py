"""What a set tells about people: keyed hashes instead of subject ids, and only what the allow-lists name.

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
from data_sharding.scans import Found, Scan, scan_id_of
from data_sharding.schema import Refusal

MIN_KEY_BYTES = 16
PSEUDONYM_LENGTH = 16  # hex digits: 64 bits
SHORT_ID = 4  # an id below this length is replaced only where it stands as an id: "01" is in many numbers


@dataclass
class PrivacyConfig:
    """What a set tells about people."""

    key_file: str | None  # secret bytes: subject ids become keyed hashes; null keeps them
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


def kept_private(found: Found, config: PrivacyConfig) -> Found:
    """What was found, with sidecar fields and participant columns by allow-list; ids hashed where there is a key."""
    for scan in found.scans:
        scan.sidecar = {name: scan.sidecar[name] for name in config.sidecar_fields if name in scan.sidecar}
    found.subjects = found.subjects.drop(columns="participant_id", errors="ignore")
    if config.participant_columns is not None:
        unknown = sorted(set(config.participant_columns) - set(found.subjects.columns))
        if unknown:
            raise SourceError(
                f"privacy.participant_columns: {', '.join(unknown)} not among {', '.join(found.subjects.columns)}"
            )
        found.subjects = found.subjects[config.participant_columns]
    return found if config.key_file is None else _with_pseudonyms(found, read_key(Path(config.key_file)))


def read_key(path: Path) -> bytes:
    """The secret in a file, without blanks around it; SourceError when it is too short to be one."""
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise SourceError(f"privacy.key_file: {path} cannot be read ({error.strerror})") from error
    if len(key) < MIN_KEY_BYTES:
        raise SourceError(
            f"privacy.key_file: {path} holds {len(key)} bytes, fewer than {MIN_KEY_BYTES}: guessing ids would undo it; "
            f"make one with 'head -c 32 /dev/urandom | base64 > {path}'"
        )
    return key


def pseudonym(subject: str, key: bytes) -> str:
    """What stands for a subject: the start of HMAC-SHA256 in hex, the same in every set that has this key."""
    return hmac.new(key, subject.encode(), hashlib.sha256).hexdigest()[:PSEUDONYM_LENGTH]


def redacted(text: str, private: list[tuple[str, str]]) -> str:
    """The text with every (id, pseudonym) applied."""
    for subject, other in private:
        if len(subject) >= SHORT_ID:
            text = text.replace(subject, other)
            unpadded = subject.lstrip("0")  # as some files of one data set are named
            text = text.replace(unpadded, other) if len(unpadded) >= SHORT_ID else text
        else:
            text = re.sub(rf"(?<![A-Za-z0-9])sub-?{re.escape(subject)}(?![A-Za-z0-9])", f"sub-{other}", text)
            text = re.sub(rf"(?<=/){re.escape(subject)}(?=/)", other, text)
    return text


def _with_pseudonyms(found: Found, key: bytes) -> Found:
    scans = [_hidden(scan, key) for scan in found.scans]
    refused = []
    for refusal in found.refused:
        private = [(name, pseudonym(name, key)) for name in re.findall(r"^sub-([^_]+)", refusal.scan_id)]
        refused.append(Refusal(*(redacted(text, private) for text in dataclasses.astuple(refusal))))
    names = [pseudonym(str(subject), key) for subject in found.subjects.index]
    subjects = found.subjects.set_axis(names, axis="index").rename_axis(found.subjects.index.name).sort_index()
    scans.sort(key=lambda scan: (scan.kind, scan.scan_id))
    return dataclasses.replace(found, scans=scans, refused=refused, subjects=subjects)


def _hidden(scan: Scan, key: bytes) -> Scan:
    subject = pseudonym(scan.subject, key)
    entities = scan.entities | {"sub": subject}
    return dataclasses.replace(
        scan,
        scan_id=scan_id_of(entities, scan.kind),
        subject=subject,
        entities=entities,
        private=[(scan.subject, subject)],
    )
