"""Which subjects a registered model has seen, as keyed hashes in its bundle: an evaluation can detect an overlap.

Hashes keep names out of registries; they do not hide a subject from someone who already has a list of names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from cluster.storage.stores import Store

FILE = "seen_subjects.txt"
BEFORE = "seen_before.txt"  # in a run folder: the subjects that the weights it started from had seen
UNKNOWN = "unknown"
KEY = b"callosum seen subjects 1"
HASH_BYTES = 10  # 80 bits: a chance match among a million subjects has odds of 1e-12


def write_seen(bundle: Path, subjects: Iterable[str], *, also: Iterable[str] = ()) -> Path:
    """Writes hashes of `subjects`, and the hashes `also` (of a backbone), into a bundle folder; returns the file."""
    hashes = sorted({hash_subject(subject) for subject in subjects} | set(also))
    path = bundle / FILE
    path.write_text("".join(f"{value}\n" for value in hashes), encoding="ascii")
    return path


def read_seen(bundle: Path) -> set[str] | None:
    """Returns the hashes in a bundle folder; None when it does not list the subjects it has seen."""
    path = bundle / FILE
    return set(path.read_text(encoding="ascii").split()) if path.exists() else None


def keep_seen(bundles: Sequence[Path], store: Store) -> None:
    """Note in a run folder whom the weights that the run starts from have seen, for what it will register."""
    of_bundles = [read_seen(bundle) for bundle in bundles]
    hashes = {UNKNOWN} if None in of_bundles else set[str]().union(*(seen for seen in of_bundles if seen))
    store.put(BEFORE, "\n".join(sorted(hashes)).encode("ascii"))


def copy_seen(theirs: Store, own: Store) -> None:
    """The same for a run that starts from a commit of another run."""
    if theirs.exists(BEFORE):
        own.put(BEFORE, theirs.read(BEFORE))


def seen_before(store: Store) -> set[str] | None:
    """Returns the hashes of the subjects a run's first weights had seen; None when that is unknown."""
    hashes = set(store.read(BEFORE).decode("ascii").split()) if store.exists(BEFORE) else set()
    return None if UNKNOWN in hashes else hashes


def overlap(subjects: Iterable[str], seen: set[str]) -> list[str]:
    """Returns the subjects whose hash is among `seen`, sorted. Equal names in different data sets count as an overlap:
    the safe side."""
    return sorted(subject for subject in set(subjects) if hash_subject(subject) in seen)


def hash_subject(subject: str) -> str:
    """Returns the keyed BLAKE2 of a subject's name, without a leading 'sub-'."""
    return hashlib.blake2b(subject.removeprefix("sub-").encode(), key=KEY, digest_size=HASH_BYTES).hexdigest()
