"""What a source returns: scans, subjects, refusals. Knows no file format."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import pandas as pd

from brain_models.atlas import Atlas
from data_sharding.hashing import hash_name
from data_sharding.schema import Event, Refusal

NEVER_IN_A_KEY = re.compile(r"[^A-Za-z0-9_-]+")
MAX_ID_LENGTH = 80  # leaves room in a tar member's name for the position and the extension


@dataclass
class Scan:
    """One scan that can be sharded, in plain values that go to the process that packs it as JSON."""

    scan_id: str  # the tar key's start: letters, digits, - and _
    kind: str  # "bold", "t1", "parcels" or "response"
    path: str
    repetition_time_s: float  # 0 for a T1
    num_frames: int  # of the file; 1 for a T1
    entities: dict[str, str]
    subject: str
    session: str = ""
    task: str = ""
    run: str = ""
    site: str = ""
    brain_mask: str | None = None
    confounds: str | None = None  # fMRIPrep's desc-confounds_timeseries.tsv of a run
    files: dict[str, str] = field(default_factory=dict)  # the other files of the scan, by role
    events: list[Event] = field(default_factory=list)
    sidecar: dict[str, object] = field(default_factory=dict)  # fields that privacy.sidecar_fields allows
    stimulus: str = ""  # of a response: the image, which is what splits keep together
    row: int = 0  # of a response: its row in the files of responses
    pseudonyms: list[tuple[str, str]] = field(default_factory=list)  # (id, what replaces it in every message)
    is_raw: bool = False  # in its own space: sampled through its transform; a run is registered through files["t1w"]
    is_fmriprep: bool = False  # registered to its template by fMRIPrep, as its folder's description states
    transform: str | None = None  # of a raw scan that is being packed

    @property
    def unit(self) -> str:
        """The unit that is never divided between splits: the stimulus of a response, the subject of anything else."""
        return self.stimulus or self.subject


@dataclass
class SourceContents:
    """What a source holds: `subjects` is indexed by subject_id; `notes` report the choices that were made.

    A set of responses also has `stimuli`, indexed by stimulus_id, which are split instead of the subjects.
    """

    scans: list[Scan]
    subjects: pd.DataFrame
    refused: list[Refusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stimuli: pd.DataFrame | None = None
    atlases: list[Atlas] = field(default_factory=list)  # that belong to the data set

    @property
    def units(self) -> pd.DataFrame:
        """The table that splits divide: stimuli where there are any, else subjects."""
        return self.subjects if self.stimuli is None else self.stimuli


def scan_id_of(entities: dict[str, str], kind: str) -> str:
    """The name of a scan inside its set: its identifying entities and its kind, safe as a file name and tar key."""
    identifying = ("sub", "ses", "task", "acq", "ce", "rec", "dir", "run", "echo")
    name = "_".join([*(f"{entity}-{entities[entity]}" for entity in identifying if entities.get(entity)), kind])
    safe = NEVER_IN_A_KEY.sub("", name)
    if safe == name and len(safe) <= MAX_ID_LENGTH:
        return safe
    return f"{safe[: MAX_ID_LENGTH - 17]}-{hash_name(name):016x}"  # so that different names stay different
