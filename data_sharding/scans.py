"""What a source hands to the plan: scans, subjects, refusals. Knows no file format."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from data_sharding.hashing import hash_name
from data_sharding.schema import Refusal

NEVER_IN_A_KEY = re.compile(r"[^A-Za-z0-9_-]+")
MAX_ID_LENGTH = 80  # leaves room in a tar member's name for the position and the extension


@dataclass
class Scan:
    """One scan that can be sharded."""

    scan_id: str  # the tar key's start: letters, digits, - and _
    kind: str  # "bold" or "t1"
    path: Path
    brain_mask: Path | None
    subject: str
    session: str
    task: str
    run: str
    site: str
    repetition_time_s: float  # 0 for a T1
    num_frames: int  # 1 for a T1
    entities: dict[str, str]


@dataclass
class Found:
    """What a source holds: `subjects` is indexed by subject_id; `notes` tell which choices were made."""

    scans: list[Scan]
    subjects: pd.DataFrame
    refused: list[Refusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def scan_id_of(entities: dict[str, str], kind: str) -> str:
    """The name of a scan inside its set: its identifying entities and its kind, safe as a file name and tar key."""
    identifying = ("sub", "ses", "task", "acq", "dir", "run", "echo")
    name = "_".join([*(f"{entity}-{entities[entity]}" for entity in identifying if entities.get(entity)), kind])
    safe = NEVER_IN_A_KEY.sub("", name)
    if safe == name and len(safe) <= MAX_ID_LENGTH:
        return safe
    return f"{safe[: MAX_ID_LENGTH - 17]}-{hash_name(name):016x}"  # two names never become one
