r"""Run one command for every combination of values, a grid of runs.

Example (three ways of masking with three seeds each, nine runs):

  python -m training.grid pretrain kind=bold shards=out/shards masking=random,tube,region train.seed=0,1,2 \
      'data.seed=${train.seed}' 'run.name=${masking.kind}-${train.seed}' 'run.folder=out/masks/${run.name}'

Required: the command (pretrain, finetune) and its arguments, run.folder among them: values with commas between them
          are combined, ${key} is the value of another key, and every run needs a folder of its own

With cluster=local|ray runs of one worker are tasks of Ray, as many at once as it has room for; other runs wait for one
another. A run that fails stops no other. Run the same command again to resume: what is finished is not run again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.config import Needs
from cluster.ray.launch import folder_of_workers, ray_session
from cluster.storage.stores import store_for
from configs.entry import Command, combinations, command_named, load, main
from configs.words import counted
from training.errors import StoppedError, TrainingError
from training.identity import METRICS, RECORD, check_claim, config_hash

FAILURE = "failure.txt"
POSITIONAL = ("part", "overrides...")


@dataclass(frozen=True)
class GridConfig:
    """A command and its arguments, with the values to combine."""

    part: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class GridRun:
    """One run of a grid: a command and its whole configuration, with `cluster` in it."""

    part: str
    config: Any

    @functools.cached_property
    def needs(self) -> Needs:
        if (needs := command_named(self.part).needs) is None:
            raise TrainingError(f"python -m {self.part} has no results of its own; run it without a grid")
        return needs(self.config)

    @property
    def folder(self) -> str:
        return self.needs.results


def is_finished(one: GridRun) -> bool:
    """True when the folder holds this configuration's results. TrainingError when it belongs to another configuration,
    or when an input has been written anew since."""
    store = store_for(one.folder)
    if store.exists(RECORD):
        check_claim(store, one.config)
    lineage = json.loads(store.read(METRICS))["lineage"] if store.exists(METRICS) else {"config hash": "none yet"}
    if lineage["config hash"] != config_hash(one.config):
        return False
    now = one.needs.contents()
    if changed := [name for name, value in now.items() if lineage.get(name, value) != value]:
        raise TrainingError(
            f"{store.location}: was made before {' or '.join(one.needs.inputs)} was written anew ("
            + ", ".join(f"{name} {lineage[name][:12]}, now {now[name][:12]}" for name in changed)
            + "); runs of both would be compared: choose another run.folder, or delete this one"
        )
    return True


def run_all(runs: Sequence[GridRun]) -> None:
    """Run those that are not finished: all at once where each is one worker of a Ray, else one after another.

    A run that fails stops no other: TrainingError names all that failed. One that was asked to stop stops the grid.
    """
    unfinished = [one for one in runs if not is_finished(one)]
    print(f"{counted(len(runs), 'run')}, {len(runs) - len(unfinished)} finished", flush=True)
    if not unfinished:
        return
    cluster, failed = unfinished[0].config.cluster, []
    run_them = together if cluster.kind != "inline" and cluster.num_workers == 1 else in_turn
    with ray_session(cluster):
        for number, (one, failure) in enumerate(run_them(unfinished), start=1):
            print(f"run {number}/{len(unfinished)}  {one.folder}  {'FAILED' if failure else 'finished'}", flush=True)
            store = store_for(one.folder)
            if failure:
                store.put(FAILURE, failure.encode())
                failed.append(f"{store.join(FAILURE)}: {failure.strip().splitlines()[-1]}")
            else:
                store.delete(FAILURE)  # of an earlier attempt
    if failed:
        raise TrainingError(
            f"{len(failed)} of {len(runs)} runs failed, the others are finished; run the same command again:\n"
            + "\n".join(f"  - {line}" for line in failed)
        )


def in_turn(runs: Sequence[GridRun]) -> Iterator[tuple[GridRun, str]]:
    """Each run after it has ended, and why it failed: run in this process, on the workers that it asks for."""
    for one in runs:
        yield one, failure_of(one.part, one.config)


def together(runs: Sequence[GridRun]) -> Iterator[tuple[GridRun, str]]:
    """Each run as it ends, and why it failed: each is a Ray task, which is started again when its node is lost."""
    import ray

    task: Any = ray.remote(failure_in_task)
    pending = {}
    for one in runs:
        cluster = one.config.cluster
        resources = {"num_cpus": cluster.cpus_per_worker, "num_gpus": int(cluster.use_gpu)}
        alone = dataclasses.replace(one.config, cluster=dataclasses.replace(cluster, kind="inline"))
        options = task.options(**resources, max_retries=cluster.max_failures)
        pending[options.remote(one.part, alone, folder_of_workers(cluster))] = one
    while pending:
        (ended, *_), _ = ray.wait(list(pending))
        one = pending.pop(ended)
        try:
            yield one, ray.get(ended)
        except ray.exceptions.RayError as error:  # its process is gone, or it was asked to stop
            yield one, str(error)


def failure_in_task(part: str, config: Any, folder: str | None) -> str:
    """Why a run failed, after all that it printed; empty when it did not."""
    if folder is not None:
        os.chdir(folder)
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        failure = failure_of(part, config)
    return failure and output.getvalue() + failure


def failure_of(part: str, config: Any) -> str:
    """The traceback of a run that failed; empty when it did not."""
    try:
        command_named(part).run(config)
    except StoppedError:
        raise
    except Exception:  # noqa: BLE001 - whatever it is, the other runs are worth having, and it is told at the end
        return traceback.format_exc()
    return ""


@functools.lru_cache(maxsize=1)
def runs_of(config: GridConfig) -> list[GridRun]:
    """A run for every combination of values; ConfigError for the first that its command refuses."""
    return [GridRun(config.part, load(config.part, each)[1]) for each in combinations(list(config.overrides))]


def validate(config: GridConfig) -> list[str]:
    folders = [one.folder for one in runs_of(config)]
    if twice := sorted({folder for folder in folders if folders.count(folder) > 1}):
        return [f"run.folder: several runs have {', '.join(twice)}; give each its own: '<folder>/${{train.seed}}'"]
    return []


def plan(config: GridConfig) -> str:
    """How many runs there are and how many are finished, and what one of them does."""
    runs = runs_of(config)
    lines = [f"runs   {len(runs)}, {sum(map(is_finished, runs))} finished", f"each, as {runs[-1].folder}:"]
    return "\n".join([*lines, command_named(config.part).plan(runs[-1].config)])


def needs(config: GridConfig) -> Needs:
    """What one run needs, with the inputs of all."""
    runs = runs_of(config)
    return dataclasses.replace(runs[0].needs, inputs={k: v for one in runs for k, v in one.needs.inputs.items()})


def command() -> Command:
    return Command(GridConfig, lambda config: run_all(runs_of(config)), plan, validate, needs)


if __name__ == "__main__":
    main("training.grid", __doc__, command, positional=POSITIONAL)
