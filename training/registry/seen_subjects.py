"""Which subjects a registered model has seen, as keyed hashes in its bundle; so that an evaluation can tell an overlap.

Hashes keep names out of registries; they do not hide a subject from someone who already has a list of names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from cluster.storage.stores import Store

FILE = "seen_subjects.txt"
BEFORE = "seen_before.txt"  # of a run folder: whom the weights it started from had seen
UNKNOWN = "unknown"
KEY = b"callosum seen subjects 1"
HASH_BYTES = 10  # 80 bits: a chance match among a million subjects has odds of 1e-12


def write_seen(bundle: Path, subjects: Iterable[str], *, also: Iterable[str] = ()) -> Path:
    """Path of the list written into a bundle folder: hashes of `subjects`, and the hashes `also` (of a backbone)."""
    hashes = sorted({hash_subject(subject) for subject in subjects} | set(also))
    path = bundle / FILE
    path.write_text("".join(f"{value}\n" for value in hashes), encoding="ascii")
    return path


def read_seen(bundle: Path) -> set[str] | None:
    """The hashes in a bundle folder; None when it does not say whom it has seen."""
    path = bundle / FILE
    return set(path.read_text(encoding="ascii").split()) if path.exists() else None


def keep_seen(bundle: Path, store: Store) -> None:
    """Note in a run folder whom the weights that the run starts from have seen, for what it will register."""
    seen = read_seen(bundle)
    store.put(BEFORE, "\n".join([UNKNOWN] if seen is None else sorted(seen)).encode("ascii"))


def copy_seen(theirs: Store, own: Store) -> None:
    """The same for a run that starts from a commit of another one: what that one's weights had seen before it."""
    if theirs.exists(BEFORE):
        own.put(BEFORE, theirs.read(BEFORE))


def seen_before(store: Store) -> set[str] | None:
    """The hashes of those a run's first weights had seen; None when these do not say."""
    hashes = set(store.read(BEFORE).decode("ascii").split()) if store.exists(BEFORE) else set()
    return None if UNKNOWN in hashes else hashes


def overlap(subjects: Iterable[str], seen: set[str]) -> list[str]:
    """The subjects whose hash is among `seen`, sorted; equal names of different data sets count, better so than not."""
    return sorted(subject for subject in set(subjects) if hash_subject(subject) in seen)


def hash_subject(subject: str) -> str:
    """Keyed BLAKE2 of a subject's name, without a leading 'sub-'."""
    return hashlib.blake2b(subject.removeprefix("sub-").encode(), key=KEY, digest_size=HASH_BYTES).hexdigest()
