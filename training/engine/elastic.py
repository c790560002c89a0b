"""Resuming on another number of ranks: the state of all ranks as one file of whole tensors, kept beside its commit.

Rank 0 makes it once, by DeepSpeed's own converter; it exists from the moment its COMMIT.json is written. Nothing in it
depends on ranks or on the ZeRO stage: weights, moments and step counts by parameter, and buffers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from cluster.errors import StorageError
from configs.words import counted, size_of
from training.checkpoint import COMMIT, SPOOL, Commit, StartingPoint, StoredFile, fetch, fetch_file, file_sha256
from training.collectives import from_main, this_process
from training.engine.deepspeed import TAG
from training.engine.zero_state import BUFFER, MOMENTS, STEP, WEIGHT, WHOLE
from training.errors import CheckpointError
from training.watch.spikes import FILE as SPIKES
from training.watch.spikes import RECENT

FOLDER = "whole"
COPIES_ON_DISK = 3  # the fetched files, DeepSpeed's fragments, and the whole tensors


def has_other_ranks(commit: Commit) -> bool:
    """True when the commit divides the state among another number of ranks than this run has."""
    return commit.world_size != this_process().world_size and commit.engine in ("zero1", "zero2", "zero3")


def fetch_state(point: StartingPoint, local: Path) -> None:
    """Fetch into `local` what this rank needs to resume, and check it: its own files, or the whole state when the
    number of ranks has changed."""
    assert point.commit is not None
    shutil.rmtree(local, ignore_errors=True)
    if not has_other_ranks(point.commit):
        fetch(point, local, ranks={0, this_process().rank})
        return
    problem: Exception | None = None
    if this_process().is_main:
        try:
            make_whole(point, local)
        except (CheckpointError, StorageError) as error:  # every rank raises it: they wait here
            problem = error
    problem = cast("Exception | None", from_main(problem))
    if problem is not None:
        raise problem
    fetch_whole(point, local)


def make_whole(point: StartingPoint, local: Path) -> None:
    """Convert the commit and store the result beside it, unless that was done before."""
    assert point.store is not None
    assert point.commit is not None
    name = f"{point.folder}/{FOLDER}"
    if point.store.exists(f"{name}/{COMMIT}"):
        return
    check_space(point.commit, local.parent)
    fetch(point, local, ranks=range(point.commit.world_size))
    convert(local / TAG, local / WHOLE)
    stored = StoredFile(WHOLE, (local / WHOLE).stat().st_size, file_sha256(local / WHOLE), rank=0)
    point.store.put(f"{name}/{WHOLE}", local / WHOLE)
    point.store.put_if_absent(f"{name}/{COMMIT}", json.dumps(asdict(stored)).encode())
    shutil.rmtree(local)


def check_space(commit: Commit, scratch: Path) -> None:
    """CheckpointError unless the scratch disk has room for a conversion."""
    scratch.mkdir(parents=True, exist_ok=True)
    needed = COPIES_ON_DISK * sum(file.size for file in commit.files)
    free = shutil.disk_usage(scratch).free
    if free < needed:
        raise CheckpointError(
            f"{scratch} has {size_of(free)} free; resuming on {counted(this_process().world_size, 'rank')} "
            f"from a checkpoint written by {commit.world_size} needs {size_of(needed)} there: free some, give "
            f"another run.scratch, or run with cluster.num_workers={commit.world_size}"
        )


def fetch_whole(point: StartingPoint, local: Path) -> None:
    """Copy the whole state, and rank 0's records of metrics and spikes, to `local`."""
    assert point.store is not None
    assert point.commit is not None
    stored = StoredFile(**json.loads(point.store.read(f"{point.folder}/{FOLDER}/{COMMIT}")))
    fetch_file(point, stored, local / WHOLE, below=f"{point.folder}/{FOLDER}")
    for file in point.commit.files:
        if file.name in (SPOOL, SPIKES, RECENT):
            fetch_file(point, file, local / file.name, below=point.folder)


def convert(zero_files: Path, target: Path) -> None:
    """Write whole tensors to `target`, from all ranks' files of a ZeRO 1, 2 or 3 checkpoint."""
    from deepspeed.checkpoint import ds_to_universal
    from safetensors.torch import save_file

    universal = zero_files.parent / "universal"
    arguments = argparse.Namespace(
        input_folder=str(zero_files),
        output_folder=str(universal),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # ZeRO 1 and 2 leave out a version number
    )
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        ds_to_universal.main(arguments)
    model = _read(min(zero_files.glob("*model_states.pt")))
    steps = _steps(universal, model["param_shapes"])
    tensors = {f"{BUFFER}/{name}": model["module"][name].clone() for name in model["buffer_names"]}
    for name, step in steps.items():
        tensors[f"{STEP}/{name}"] = step
        for key in (WEIGHT, *MOMENTS):
            found = _read(universal / "zero" / name / f"{key}.pt")
            tensors[f"{key}/{name}"] = found["param"] if isinstance(found, Mapping) else found
    shutil.rmtree(universal)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target)


def _steps(universal: Path, groups: list[Mapping[str, object]]) -> dict[str, Tensor]:
    """AdamW's step count of every parameter; DeepSpeed leaves it out of ZeRO 3's fragments."""
    common = _read(universal / "zero" / "optimizer_state.pt")
    steps = {}
    for index, names in enumerate(groups):
        for name in names:
            own = universal / "zero" / name / f"{STEP}.pt"
            found = _read(own) if own.exists() else common["optimizer_state_dict"]["state"][index][STEP]
            steps[name] = torch.as_tensor(found, dtype=torch.float32).clone()
    return steps


def _read(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=False)  # DeepSpeed's classes; the hash was checked
