"""The training loop: everything that happens in a step, in order. Knows no task, no data format and no engine."""

from __future__ import annotations

import contextlib
import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from cluster.storage import Store, store_for
from training import identity, registry
from training.checkpoint import (
    SCHEMA,
    SPOOL,
    Checkpoints,
    Commit,
    StartingPoint,
    check_fits,
    commit_hash,
    starting_point,
)
from training.collectives import barrier, from_main, gather, place, total
from training.config import TrainConfig
from training.elastic import fetch_state
from training.engine import Engine, make_engine
from training.errors import TrainingError
from training.evaluation import Evaluation, evaluate
from training.progress import Progress
from training.task import Batch, Source, State, Task
from training.tracking import RunLabel, Sender, Spool, Tracker

MAX_NAMED_SCANS = 20


@dataclass
class Services:
    """What the loop gets from the part that calls it."""

    identity: Mapping[str, object]  # the whole configuration, as plain mappings
    export: Callable[[Task], None] | None  # called on rank 0 at the end, with whole parameters
    tags: Mapping[str, str] = field(default_factory=dict)  # of the MLflow run


@dataclass
class FitResult:
    steps: int
    start: str  # own, named, registered, scratch
    metrics: dict[str, float]  # of the final splits, keyed <split>/<metric>
    evaluations: dict[str, Evaluation]
    checkpoint: str
    checkpoint_hash: str
    config_hash: str
    fingerprint: str
    mlflow_run_id: str | None
    is_main: bool
    seconds: float


@dataclass
class Run:
    """Everything `fit` holds while it runs."""

    task: Task
    source: Source
    config: TrainConfig
    services: Services
    store: Store
    start: StartingPoint
    engine: Engine
    tracker: Tracker
    checkpoints: Checkpoints


def fit(task: Task, source: Source, config: TrainConfig, services: Services) -> FitResult:
    """What training to `config.steps` updates led to. Goes on from the run folder's latest commit if there is one."""
    started = time.monotonic()
    with open_run(task, source, config, services) as run:
        engine, tracker = run.engine, run.tracker
        progress = Progress(config.steps, start=run.start.step, is_shown=place().is_main)
        state = run.start.commit.data_state if run.start.commit else source.initial_state()
        if run.start.step == 0:
            evaluate_now(run, 0, progress)  # what the weights a run starts from are worth
        for step, (micro_batches, state) in zip(  # noqa: B020 - the state to go on from moves with the step
            range(run.start.step, config.steps), source.steps(state), strict=False
        ):
            learning_rate = engine.begin(step)
            torch.manual_seed(seed_of(config.seed, step, place().rank))  # a resumed step draws what it would have drawn
            losses: list[dict[str, Tensor]] = []
            for batch in micro_batches:
                losses.append(engine.losses(batch.to(engine.device)))
                engine.backward(losses[-1]["loss"])
            gradient_norm = engine.step()
            if not math.isfinite(gradient_norm):  # then the engine has not updated anything, on any rank
                raise not_finite(step, losses, micro_batches)

            done = step + 1
            is_last = done == config.steps
            if done % config.tracking.every_steps == 0 or is_last:
                values = {f"train/{name}": value for name, value in over_ranks(losses, engine).items()}
                values |= {"train/learning_rate": learning_rate, "train/gradient_norm": gradient_norm}
                values |= {"train/steps_per_second": progress.steps_per_second(done)}
                tracker.record(done, values)
                progress.show(done, values)
            metrics: dict[str, float] = {}
            if done % config.evaluation.every_steps == 0 or is_last:
                metrics = evaluate_now(run, done, progress)
            # After evaluating, so that a commit knows its score and nothing tracked is lost when resuming from it.
            if done % config.checkpoint.every_steps == 0 or is_last:
                save_checkpoint(run, done, state, metrics)
        result = finish(run, started)
    result.mlflow_run_id = run.tracker.run_id  # known for sure once the tracker is closed
    return result


@contextlib.contextmanager
def open_run(task: Task, source: Source, config: TrainConfig, services: Services) -> Iterator[Run]:
    """Claim the folder, decide how to start, load it, and close everything however the block ends."""
    store = store_for(config.run.folder)
    identity.claim(store, services.identity)
    barrier()
    run_key = identity.run_key(store, services.identity)
    start = starting_point(store, config.start)
    check_fits(start, engine=engine_name(config), fingerprint=source.fingerprint)
    scratch = Path(config.run.scratch) / f"{config.run.name}-{run_key[:8]}"
    fetched = scratch / f"fetched-{place().rank:05d}"
    if start.commit is not None:
        fetch_state(start, fetched)
    elif start.registered is not None:
        task.load_registered(
            registry.pull(start.registered, scratch / f"registered-{place().rank}", uri=config.tracking.uri)
        )
    engine = make_engine(task, config, num_micro_batches=source.num_micro_batches)
    if start.commit is not None:
        engine.load(fetched)
    attempt = str(from_main(uuid.uuid4().hex[:8]))
    checkpoints = Checkpoints(store, scratch / "saved", config.checkpoint, attempt=attempt)
    if start.kind == "own":
        checkpoints.latest = start.folder
    tracker = open_tracker(config, services, run_key, start, fetched if start.kind == "own" else None)
    is_finished = False
    try:
        yield Run(task, source, config, services, store, start, engine, tracker, checkpoints)
        is_finished = True
    except TrainingError:
        checkpoints.wait()  # every rank stops here: what was saved before is still worth committing
        raise
    finally:
        tracker.close(is_finished=is_finished)
        source.close()
    engine.close()


def open_tracker(
    config: TrainConfig, services: Services, run_key: str, start: StartingPoint, fetched: Path | None
) -> Tracker:
    """Rank 0's spool, cut back to what the commit had seen, and its sender; silent trackers elsewhere."""
    if not place().is_main:
        return Tracker(None, None, config.tracking)
    saved = fetched / SPOOL if fetched is not None else None
    spool = Spool(
        Path(config.run.scratch) / f"{config.run.name}-{run_key[:8]}" / SPOOL,
        start=saved.read_bytes() if saved else b"",
    )
    if config.tracking.uri is None:
        return Tracker(spool, None, config.tracking)
    label = RunLabel(config.run.name, run_key, identity.flatten(services.identity), dict(services.tags))
    return Tracker(spool, Sender(config.tracking, spool.path, label), config.tracking)


def evaluate_now(run: Run, done: int, progress: Progress) -> dict[str, float]:
    """The metrics of the evaluation subset after `done` updates, tracked and shown."""
    config = run.config.evaluation
    found = evaluate(run.task, run.source, run.engine, config.split, limit=config.subset)
    prefix = "train_split" if config.split == "train" else config.split  # train/loss is the loss of a step
    metrics = {f"{prefix}/{name}": value for name, value in found.metrics.items()}
    run.tracker.record(done, metrics)
    progress.show(done, metrics)
    return metrics


def save_checkpoint(run: Run, done: int, state: State, metrics: dict[str, float]) -> None:
    """Save locally on every rank; upload and commit in the background."""
    run.checkpoints.wait()
    local = run.checkpoints.local_folder(done)
    run.engine.save(local)
    run.tracker.snapshot(local / SPOOL)
    commit = Commit(
        schema=SCHEMA,
        step=done,
        files=[],
        world_size=place().world_size,
        engine=engine_name(run.config),
        data_state=run.source.merge_states(cast("list[State]", gather(state))),
        fingerprint=run.source.fingerprint,
        config_hash=identity.config_hash(run.services.identity),
        mlflow_run_id=run.tracker.run_id,
        spool_position=run.tracker.position,
        metrics=metrics,
    )
    run.checkpoints.commit_later(local, commit)


def finish(run: Run, started: float) -> FitResult:
    """Evaluate the final splits whole, export, and wait until the last checkpoint is committed."""
    evaluations = {
        split: evaluate(run.task, run.source, run.engine, split, limit=None)
        for split in run.config.evaluation.final_splits
    }
    metrics = {
        f"{split}/{name}": value for split, found in evaluations.items() for name, value in found.metrics.items()
    }
    run.tracker.record(run.config.steps, {f"final/{key}": value for key, value in metrics.items()})
    with run.engine.whole_parameters():
        if run.services.export is not None and place().is_main:
            run.services.export(run.task)
    barrier()
    run.checkpoints.close()
    assert run.checkpoints.latest is not None
    if run.tracker.spool is not None:
        run.store.put(SPOOL, run.tracker.spool.path)
    return FitResult(
        steps=run.config.steps,
        start=run.start.kind,
        metrics=metrics,
        evaluations=evaluations,
        checkpoint=run.store.join(run.checkpoints.latest),
        checkpoint_hash=commit_hash(run.store, run.checkpoints.latest),
        config_hash=identity.config_hash(run.services.identity),
        fingerprint=run.source.fingerprint,
        mlflow_run_id=None,
        is_main=place().is_main,
        seconds=time.monotonic() - started,
    )


def engine_name(config: TrainConfig) -> str:
    """How a commit names the engine that can read it."""
    return "plain" if config.engine.kind == "plain" else f"zero{config.engine.zero_stage}"


def seed_of(seed: int, step: int, rank: int) -> int:
    """A seed for torch's global generator, different for every (seed, step, rank)."""
    return hash((seed, step, rank)) & 0x7FFFFFFFFFFFFFFF  # hashes of ints do not depend on PYTHONHASHSEED


def over_ranks(losses: list[dict[str, Tensor]], engine: Engine) -> dict[str, float]:
    """The step's losses: summed over micro-batches and ranks, because each is in sum form."""
    names = sorted(losses[0])
    sums = torch.stack([torch.stack([part[name].detach().float() for part in losses]).sum() for name in names])
    return dict(zip(names, total(sums.to(engine.device)).tolist(), strict=True))


def not_finite(step: int, losses: list[dict[str, Tensor]], micro_batches: Sequence[Batch]) -> TrainingError:
    """The error every rank raises, naming the scans of the micro-batches whose loss is not finite, on any rank."""
    scans_of = [
        [scan_id for scan_id, weight in zip(batch.scan_ids, batch.weight.tolist(), strict=True) if weight > 0]
        for batch in micro_batches
    ]
    all_mine = [scan_id for scans in scans_of for scan_id in scans]
    mine = [
        scan_id
        for part, scans in zip(losses, scans_of, strict=True)
        if not bool(torch.isfinite(part["loss"]))
        for scan_id in scans
    ]
    everyone = cast("list[tuple[list[str], list[str]]]", gather((mine, all_mine)))
    guilty = sorted({scan_id for scans, _ in everyone for scan_id in scans})
    what = "loss" if guilty else "gradient (every loss is finite)"
    scans = guilty or sorted({scan_id for _, scans in everyone for scan_id in scans})
    named = ", ".join(scans[:MAX_NAMED_SCANS]) + (
        f" and {len(scans) - MAX_NAMED_SCANS} more" if scans[MAX_NAMED_SCANS:] else ""
    )
    return TrainingError(
        f"step {step}: {what} is not finite; nothing was updated. Scans: {named}. Look at them with "
        "'python -m data_sharding.verify <set>', or lower train.optimizer.learning_rate; then run again to go on from "
        "the last commit"
    )
