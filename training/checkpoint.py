"""Checkpoints that exist only when whole: files and receipts first, COMMIT.json last, by exclusive create.

A folder without COMMIT.json does not exist to a reader, and every byte is checked against it before torch reads it.
Of two jobs in one run folder the one that started last commits.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Container, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from cluster.errors import StorageError, StoreUnavailableError
from cluster.hanging import HEARTBEAT
from cluster.storage.files import checked_name
from cluster.storage.stores import Store, store_for
from training.collectives import barrier, from_main, this_process
from training.config import CheckpointConfig, StartConfig, TrainConfig
from training.errors import CheckpointError
from training.task import State

log = logging.getLogger(__name__)

SCHEMA = 2
FOLDER = "checkpoints"
COMMIT = "COMMIT.json"
RECEIPT_TIMEOUT_S = 1800.0
SPOOL = "metrics.jsonl"
ATTEMPT = "attempt"  # names the attempt that started last; only that one commits and prunes
FULL_BYTES = 1 << 20  # less free space than this after a failed write means a full disk


@dataclass
class StoredFile:
    name: str  # below the checkpoint's folder
    size: int
    sha256: str
    rank: int  # the one that wrote it


@dataclass
class Commit:
    """COMMIT.json: what a run needs to resume exactly."""

    schema: int
    step: int  # updates done
    files: list[StoredFile]
    world_size: int
    engine: str  # plain, zero0 ... zero3
    data_state: State
    fingerprint: str
    config_hash: str
    mlflow_run_id: str | None
    metrics: dict[str, float]  # evaluated at this step
    watched: dict[str, list[tuple[int, float]]]  # all values so far of the metrics that a plateau is waited for of


@dataclass
class StartingPoint:
    """How a run starts; `location` is the store that holds the checkpoint's folder, `folder` its name there."""

    kind: str  # own, named, registered, scratch
    store: Store | None
    folder: str
    commit: Commit | None
    registered: str | None

    @property
    def step(self) -> int:
        return self.commit.step if self.commit else 0


def starting_point(store: Store, start: StartConfig) -> StartingPoint:
    """The one decision how a run starts, most recent work first. Damage is an error, never a reason to try the next
    choice."""
    # 1. The run folder's own latest commit: the same command was run before, so resume. All ranks take the one
    # that rank 0 sees: a dying attempt may still commit another while ranks look one after the other.
    folders = cast("list[str]", from_main(committed_folders(store) if this_process().is_main else None))
    if folders:
        return StartingPoint("own", store, folders[-1], read_commit(store, folders[-1]), None)
    # 2. A checkpoint named in the configuration: resume another run, with its step and data order.
    if start.checkpoint is not None:
        parent, _, name = start.checkpoint.rstrip("/").rpartition("/")
        named = store_for(parent or ".")
        if not named.exists(f"{name}/{COMMIT}"):
            raise CheckpointError(
                f"{start.checkpoint} has no {COMMIT}, so it was never finished; name a folder that has one"
            )
        return StartingPoint("named", named, name, read_commit(named, name), None)
    # 3. Registered weights: a new run that begins with another run's exported model.
    if start.registered is not None:
        return StartingPoint("registered", None, "", None, start.registered)
    # 4. The task's own initialisation.
    return StartingPoint("scratch", None, "", None, None)


def committed_folders(store: Store) -> list[str]:
    """The folders that hold a COMMIT.json, oldest step first."""
    parts = [name.split("/") for name in store.list(f"{FOLDER}/")]
    return sorted(f"{FOLDER}/{part[1]}" for part in parts if len(part) == 3 and part[2] == COMMIT)


def read_commit(store: Store, folder: str) -> Commit:
    """The parsed COMMIT.json of a folder; CheckpointError when it cannot be read."""
    where = store.join(f"{folder}/{COMMIT}")
    try:
        raw = json.loads(store.read(f"{folder}/{COMMIT}"))
        if raw["schema"] != SCHEMA:
            raise CheckpointError(
                f"{where} has schema {raw['schema']}, this code reads {SCHEMA}; finish the run with the code that "
                "began it, or start another run.folder"
            )
        commit = Commit(**{**raw, "files": [StoredFile(**file) for file in raw["files"]]})
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{where} cannot be read ({error!r}); {_older(store, folder)}") from error
    try:
        for file in commit.files:  # each is written below a folder of this node
            checked_name(file.name, where)
    except StorageError as error:
        raise CheckpointError(f"{where} was not written by a run: {error}; {_older(store, folder)}") from error
    return commit


def commit_hash(store: Store, folder: str) -> str:
    """Hex sha256 of COMMIT.json, which itself names the hash of every file."""
    return hashlib.sha256(store.read(f"{folder}/{COMMIT}")).hexdigest()


def check_fits(point: StartingPoint, *, engine: str, fingerprint: str, num_steps: int) -> None:
    """CheckpointError unless this run can resume from the commit: same engine and data, and steps left to do."""
    commit = point.commit
    if commit is None or point.store is None:
        return
    where = point.store.join(point.folder)
    if commit.engine != engine:
        raise CheckpointError(
            f"{where} was written by engine={commit.engine}, this run has {engine}; use engine={commit.engine}"
        )
    if commit.fingerprint != fingerprint:
        raise CheckpointError(
            f"{where} was trained on the set {commit.fingerprint[:12]}, this run reads {fingerprint[:12]}; "
            "give the same set, or start with train.start.registered"
        )
    if point.kind == "named" and commit.step >= num_steps:
        raise CheckpointError(
            f"{where} is of step {commit.step}, this run ends at train.steps={num_steps}; raise it, name an older "
            "commit, or start with train.start.registered"
        )


def fetch(point: StartingPoint, local: Path, *, ranks: Container[int]) -> None:
    """Copy the files of these ranks to `local`, each checked against COMMIT.json."""
    assert point.commit is not None
    for file in point.commit.files:
        if file.rank in ranks:
            fetch_file(point, file, local / file.name, below=point.folder)


def fetch_file(point: StartingPoint, file: StoredFile, target: Path, *, below: str) -> None:
    """Copy one file; CheckpointError when it is missing or not the one that was stored."""
    assert point.store is not None
    where = point.store.join(f"{below}/{file.name}")
    try:
        point.store.get_file(f"{below}/{file.name}", target)
    except StoreUnavailableError:
        raise
    except StorageError as error:
        if point.store.exists(f"{below}/{file.name}"):
            raise  # it is the local disk that did not take it
        raise CheckpointError(f"{where} is missing ({error}); {_instead(point, below)}") from error
    found = file_sha256(target)
    if found != file.sha256:
        raise CheckpointError(
            f"{where} is damaged: sha256 {found[:12]} over {target.stat().st_size} bytes, {COMMIT} says "
            f"{file.sha256[:12]} over {file.size}; {_instead(point, below)}"
        )


@contextlib.contextmanager
def full_disk_is_an_error(folder: Path) -> Iterator[None]:
    """CheckpointError when writing below `folder` fails for want of space; torch does not say why a write failed."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        free = shutil.disk_usage(next(each for each in (folder, *folder.parents) if each.exists())).free
        if free >= FULL_BYTES and getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CheckpointError(
            f"rank {this_process().rank}: {folder} cannot be written: its disk is full ({free} bytes are free); free "
            "some, or give another run.scratch, and run again to resume from the last commit"
        ) from error


class Checkpoints:
    """The checkpoints one run writes: local save, barrier, upload in the background, COMMIT.json last."""

    def __init__(self, store: Store, scratch: Path, config: CheckpointConfig, *, attempt: str) -> None:
        self.store = store
        self.rank = this_process().rank  # the upload thread may outlive the process group
        self.scratch = scratch / f"rank-{self.rank:05d}"
        self.config = config
        self.attempt = (
            attempt  # in every folder's name: a receipt of a run that died here can never be mistaken for ours
        )
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-upload")
        self.pending: Future[None] | None = None
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.latest: str | None = None
        if self.rank == 0:
            store.put(ATTEMPT, attempt.encode())

    def local_folder(self, step: int) -> Path:
        return self.scratch / f"step-{step:08d}"

    def commit_later(self, local: Path, commit: Commit) -> None:
        """Upload what this rank wrote below `local` and, on rank 0, commit it once all ranks' receipts are there."""
        self.wait()
        folder = f"{FOLDER}/step-{commit.step:08d}-{self.attempt}"
        barrier()  # every rank has saved: from here on an upload is of a whole checkpoint
        self.pending = self.thread.submit(self._upload, folder, local, commit)
        self.latest = folder

    def wait(self) -> None:
        """Returns when the upload under way is committed; raises its error."""
        if self.pending is not None:
            self.pending.result()
            self.pending = None

    def close(self) -> None:
        self.wait()
        self.thread.shutdown()
        shutil.rmtree(self.scratch, ignore_errors=True)
        barrier()  # no rank returns before rank 0 has committed

    def _upload(self, folder: str, local: Path, commit: Commit) -> None:
        files = []
        for path in sorted(path for path in local.rglob("*") if path.is_file()):
            name = path.relative_to(local).as_posix()
            files.append(StoredFile(name, path.stat().st_size, file_sha256(path), self.rank))
            self.store.put(f"{folder}/{name}", path)
        shutil.rmtree(local)
        receipt = json.dumps([asdict(file) for file in files]).encode()
        self.store.put(f"{folder}/receipts/rank-{self.rank:05d}.json", receipt)
        if self.rank == 0:
            commit.files = self._all_receipts(folder, commit.world_size)
            self._check_is_newest()
            self.store.put_if_absent(f"{folder}/{COMMIT}", json.dumps(asdict(commit), indent=1).encode())
            HEARTBEAT.saved = folder
            self._prune()

    def _check_is_newest(self) -> None:
        """CheckpointError when another job has started in this folder: it prunes what it does not know."""
        newest = self.store.read(ATTEMPT).decode()
        if newest != self.attempt:
            raise CheckpointError(
                f"another job started later in this folder: {self.store.join(ATTEMPT)} names attempt {newest}, this is "
                f"{self.attempt}; that one resumes from the last commit, this one ends: run one job per folder"
            )

    def _all_receipts(self, folder: str, num_ranks: int) -> list[StoredFile]:
        names = [f"{folder}/receipts/rank-{rank:05d}.json" for rank in range(num_ranks)]
        deadline, pause_s = time.monotonic() + RECEIPT_TIMEOUT_S, 0.05
        while missing := sorted({*names}.difference(self.store.list(f"{folder}/receipts/"))):  # one request for all
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{self.store.join(missing[0])} did not appear within {RECEIPT_TIMEOUT_S:.0f} s; look for the "
                    "error of that rank, and whether it can write there"
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 1.0)
        return [StoredFile(**file) for name in names for file in json.loads(self.store.read(name))]

    def _prune(self) -> None:
        """Delete what no rule keeps, COMMIT.json first, and what was never committed, but no unreadable commit."""
        commits, unreadable = {}, set()
        for folder in committed_folders(self.store):
            try:
                commits[folder] = read_commit(self.store, folder)
            except CheckpointError as error:  # an old one, which no run is about to resume from
                log.warning("%s; it is kept", error)
                unreadable.add(folder)
        keep = kept(self.config, commits) | unreadable
        for name in self.store.list(f"{FOLDER}/"):
            folder = "/".join(name.split("/")[:2])
            if folder not in keep and name == f"{folder}/{COMMIT}":
                self.store.delete(name)
        for name in self.store.list(f"{FOLDER}/"):
            if "/".join(name.split("/")[:2]) not in keep:
                self.store.delete(name)


def kept(config: CheckpointConfig, commits: dict[str, Commit]) -> set[str]:
    """The folders the keep rules hold on to: the last k, every n-th, the best."""
    ordered = sorted(commits)
    keep = set(ordered[-config.keep_last :])
    if config.keep_every_steps:
        keep |= {folder for folder in ordered if commits[folder].step % config.keep_every_steps == 0}
    return keep | {folder for folder in [best_commit(config, commits)] if folder is not None}


def best_commit(config: CheckpointConfig, commits: Mapping[str, Commit]) -> str | None:
    """The folder with the best value of `best_metric`, the earliest of equals; None where no commit has one."""
    name = config.best_metric
    scores = {
        folder: commits[folder].metrics[name]
        for folder in sorted(commits)
        if name is not None and math.isfinite(commits[folder].metrics.get(name, math.nan))
    }
    choose = min if config.best_is == "lowest" else max
    return choose(scores, key=scores.__getitem__) if scores else None


def chosen_commit(store: Store, config: TrainConfig) -> tuple[str, Commit]:
    """What a finished run is judged by: the last commit, or under train.choose=best the best one if any has a score."""
    folders = committed_folders(store)
    if config.choose == "best":
        commits = {folder: read_commit(store, folder) for folder in folders}
        if (best := best_commit(config.checkpoint, commits)) is not None:
            return best, commits[best]
    return folders[-1], read_commit(store, folders[-1])


def _instead(point: StartingPoint, below: str) -> str:
    """What to do about a bad file of the commit, or of the whole state that was made from it."""
    assert point.store is not None
    if below == point.folder:
        return _older(point.store, point.folder)
    return f"delete {point.store.join(below)} and run again to make it again"


def _older(store: Store, folder: str) -> str:
    older = [name for name in committed_folders(store) if name < folder]
    if not older:
        return f"no older commit is left; delete {store.join(folder)} to start over"
    return f"delete {store.join(folder)} and run again to resume from the older {store.join(older[-1])}"


def file_sha256(path: Path) -> str:
    """Hex digest of a local file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
