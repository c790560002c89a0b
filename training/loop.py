"""The training loop: everything that happens in a step, in order. Knows no task, no data format and no engine."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from rich.console import Console
from torch import Tensor

from cluster.hanging import HEARTBEAT
from cluster.stopping import REQUEST, listening
from cluster.storage.stores import Store, store_for
from configs.parse import flatten
from training import identity
from training.checkpoint import (
    SCHEMA,
    SPOOL,
    Checkpoints,
    Commit,
    StartingPoint,
    check_fits,
    chosen_commit,
    commit_hash,
    full_disk_is_an_error,
    starting_point,
)
from training.collectives import barrier, from_main, gather, this_process
from training.config import RunConfig, TrainConfig
from training.database import create_database
from training.engine.base import Engine
from training.engine.elastic import fetch_state
from training.engine.engines import make_engine
from training.engine.optimizer import plateau_rules
from training.errors import StoppedError, TrainingError
from training.evaluation import Evaluation, evaluate
from training.plateau import Watch
from training.registry import models as registry
from training.registry.seen_subjects import copy_seen, keep_seen
from training.step import BatchFeed, not_finite, reduce_over_ranks, scans_of_all_ranks, seed_of
from training.task import Batch, Source, State, Task
from training.watch.meter import Meter, peak_tflops_of
from training.watch.progress import Progress, phase
from training.watch.spikes import FILE as SPIKES
from training.watch.spikes import RECENT, Spikes
from training.watch.system_metrics import Nodes
from training.watch.tracing import Tracing
from training.watch.tracking import FINAL, Ending, RunLabel, Sender, Spool, Tracker, last_step, mlflow_environment


@dataclass
class Services:
    """What the loop gets from the part that calls it."""

    run: RunConfig  # where the run lives
    identity: object  # the whole configuration: a dataclass, or a mapping of dataclasses
    # Called on rank 0 at the end, with whole parameters and the evaluations of the final splits.
    export: Callable[[Task, Mapping[str, Evaluation]], None] | None
    tags: Mapping[str, str] = field(default_factory=dict)  # of the MLflow run
    # Called before the engine exists: (task, whether the run resumes from one of its own commits).
    prepare: Callable[[Task, bool], None] | None = None
    make_task: Callable[[], Task] | None = None  # a fresh task for weights of an earlier commit; train.choose=best
    starts_from: Sequence[Path] = ()  # bundles whose weights the task holds from the start


@dataclass
class FitResult:
    task: Task  # holding the chosen commit's weights
    steps: int
    step: int  # of the chosen commit: what was evaluated and exported
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
    meter: Meter
    spikes: Spikes
    tracing: Tracing
    progress: Progress
    nodes: Nodes
    watch: Watch
    scratch: Path


def fit(task: Task, source: Source, config: TrainConfig, services: Services) -> FitResult:
    """The result of training up to `config.steps` updates; it resumes from the run folder's latest commit, if any."""
    started = time.monotonic()
    with open_run(task, source, config, services, started) as run:
        engine, meter = run.engine, run.meter
        state = run.start.commit.data_state if run.start.commit else source.initial_state()
        if run.start.step == 0:
            evaluate_now(run, 0)  # what the weights a run starts from are worth
        feed = BatchFeed(source.steps(state), engine.device, meter, is_ahead=engine.device.type == "cuda")
        for step in range(run.start.step, config.steps):
            done, is_last = step + 1, step + 1 == config.steps
            HEARTBEAT.beat()
            run.tracing.begin_step(step)
            meter.begin_step()
            batches, state = feed.next_batches()
            learning_rate = engine.begin(step, run.watch.values)
            torch.manual_seed(seed_of(config.seed, step, this_process().rank))  # a resumed step draws the same numbers
            losses: list[dict[str, Tensor]] = []
            for batch in feed.on_device(batches, is_last_step=is_last):
                with meter.forward():
                    losses.append(engine.losses(batch))
                engine.backward(losses[-1]["loss"])
                meter.count(task.cost(batch))
            totals = reduce_over_ranks(losses, is_asked_to_stop=REQUEST.reason is not None, device=engine.device)
            is_tracked = done % config.tracking.every_steps == 0 or is_last
            group_norms = engine.group_norms() if is_tracked and config.tracking.group_norms else {}
            gradient_norm = engine.step()  # once per step, this rank waits here for its device
            if not math.isfinite(gradient_norm):  # then the engine has not updated anything, on any rank
                raise not_finite(step, losses, batches)
            values, is_stopping = totals.read()
            meter.end_step(done, batches)

            flag_spike(run, done, values, batches)
            run.progress.step(done, loss=values["loss"], learning_rate=learning_rate)
            if is_tracked:
                values |= {f"gradient_norm/{name}": norm for name, norm in group_norms.items()}
                track(run, done, values | {"learning_rate": learning_rate, "gradient_norm": gradient_norm})
            metrics: dict[str, float] = {}
            if done % config.evaluation.every_steps == 0 or is_last:
                metrics = evaluate_now(run, done)
            # After evaluating, so that a commit knows its score and nothing tracked is lost when resuming from it.
            if config.checkpoint.is_due(done) or is_last or is_stopping:
                save_checkpoint(run, done, state, metrics)
            if is_stopping and not is_last:
                raise stopped(run, done)
        run.tracing.finish(config.steps)
        result = finish(run, started)
    HEARTBEAT.stop()  # no step is to come, however long reports, baselines and registration take
    result.mlflow_run_id = run.tracker.run_id  # known for sure once the tracker is closed
    return result


@contextlib.contextmanager
def open_run(task: Task, source: Source, config: TrainConfig, services: Services, started: float) -> Iterator[Run]:
    """Claim the folder, decide how to start, load it, and close everything however the block ends."""
    store = store_for(services.run.folder)
    run_key = identity.claim(store, services.identity)
    start = starting_point(store, config.start)
    check_fits(start, engine=engine_name(config), fingerprint=source.fingerprint, num_steps=config.steps)
    scratch = Path(services.run.scratch) / f"{services.run.name}-{run_key[:8]}"
    engine = loaded_engine(task, source, config, services, start, scratch, own=store)
    attempt = str(from_main(uuid.uuid4().hex[:8]))
    checkpoints = Checkpoints(store, scratch / "saved", config.checkpoint, attempt=attempt)
    if start.kind == "own":
        checkpoints.latest = start.folder
    peak = peak_tflops_of(engine.device, config.peak_tflops, precision=config.engine.precision)
    repeated_until = max(start.step, last_step(scratch / SPOOL))  # before the spool is cut back to the commit
    meter = Meter(engine.device, peak_tflops=peak, started=started, repeated_until=repeated_until)
    own = fetched_folder(scratch) if start.kind == "own" else None
    spikes_path = scratch / SPIKES if this_process().is_main else None
    spikes = Spikes(config.spikes, spikes_path, start=_content(own, SPIKES), recent=_content(own, RECENT))
    tracker = open_tracker(config, services, run_key, scratch / SPOOL, start=_content(own, SPOOL))
    shutil.rmtree(fetched_folder(scratch), ignore_errors=True)  # as large as a checkpoint, and read by now
    rules = plateau_rules(config.schedule, engine.groups)
    tracing = Tracing(config.profile, store, scratch)
    ending = Ending.FAILED
    progress = Progress(
        config.steps,
        start=start.step,
        every_steps=config.tracking.every_steps,
        is_verbose=services.run.verbose,
        console=Console(quiet=not this_process().is_main),
    )
    try:
        with listening(REQUEST.ask):
            run = Run(
                task=task,
                source=source,
                config=config,
                services=services,
                store=store,
                start=start,
                engine=engine,
                tracker=tracker,
                checkpoints=checkpoints,
                meter=meter,
                spikes=spikes,
                tracing=tracing,
                progress=progress,
                nodes=Nodes(services.run.scratch, engine.device),
                watch=Watch(rules, start=start.commit.watched if start.commit else {}),
                scratch=scratch,
            )
            yield run
        ending = Ending.FINISHED
    except StoppedError:
        ending = Ending.KILLED
        raise
    except TrainingError:
        checkpoints.wait()  # every rank stops here: what was saved before is still worth committing
        raise
    finally:
        progress.close()
        REQUEST.clear()
        tracker.close(ending)
        source.close()
    run.engine.close()


def loaded_engine(
    task: Task,
    source: Source,
    config: TrainConfig,
    services: Services,
    start: StartingPoint,
    scratch: Path,
    *,
    own: Store,
) -> Engine:
    """The engine, holding what the run starts from."""
    fetched = fetched_folder(scratch)
    if services.prepare is not None:
        services.prepare(task, start.kind == "own")
    if start.commit is not None:
        fetch_state(start, fetched)
        if start.kind == "named" and this_process().is_main:
            copy_seen(store_for(run_folder_of(start)), own)
    elif start.registered is not None:
        bundle = registry.pull(start.registered, scratch / f"registered-{this_process().rank}", uri=config.tracking.uri)
        task.load_registered(bundle)
        if this_process().is_main:
            keep_seen([bundle], own)
        shutil.rmtree(scratch / f"registered-{this_process().rank}", ignore_errors=True)
    elif services.starts_from and this_process().is_main:
        keep_seen(services.starts_from, own)
    phase("building the engine")
    engine = make_engine(task, config, num_micro_batches=source.num_micro_batches)
    if start.commit is not None:
        engine.load(fetched)
    return engine


def run_folder_of(start: StartingPoint) -> str:
    """The folder of the run that wrote the commit a run starts from."""
    assert start.store is not None
    return start.store.join(start.folder).rsplit("/", 2)[0]


def fetched_folder(scratch: Path) -> Path:
    """Where this rank keeps what it fetched of a commit."""
    return scratch / f"fetched-{this_process().rank:05d}"


def _content(folder: Path | None, name: str) -> bytes:
    """The bytes of a file that a commit may hold."""
    return (folder / name).read_bytes() if folder is not None and (folder / name).exists() else b""


def open_tracker(config: TrainConfig, services: Services, run_key: str, spool_path: Path, *, start: bytes) -> Tracker:
    """Rank 0's spool, cut back to what the commit had seen, and its sender; silent trackers elsewhere."""
    if not this_process().is_main:
        return Tracker(None, None, config.tracking)
    spool = Spool(spool_path, start=start)
    if config.tracking.uri is None:
        return Tracker(spool, None, config.tracking)
    mlflow_environment(config.tracking.timeout_s)
    create_database(config.tracking.uri)
    tags = {**services.tags, **registry.origin_tags(services.run.command)}
    label = RunLabel(services.run.name, run_key, flatten(services.identity), tags)
    return Tracker(spool, Sender(config.tracking, spool.path, label), config.tracking)


def track(run: Run, done: int, values: dict[str, float]) -> None:
    """Record and show the last step's losses, and where the time of the interval went."""
    values = {f"train/{name}": value for name, value in (values | run.meter.report()).items()}
    values |= run.nodes.report()
    run.tracker.record(done, values)
    run.progress.interval(done, values)


def flag_spike(run: Run, done: int, losses: dict[str, float], batches: Sequence[Batch]) -> None:
    """Record, show and keep the scans of a step whose loss is far above those before; every rank sees the same loss."""
    deviations = run.spikes.deviations(losses)
    if deviations is None:
        return
    loss, scan_ids = losses["loss"], scans_of_all_ranks(batches)
    run.spikes.keep(done, loss=loss, deviations=deviations, scan_ids=scan_ids)
    values = {"train/loss_spike": loss, "train/loss_spike_deviations": deviations}
    run.tracker.record(done, values)
    run.progress.say(
        f"step {done}: the loss {loss:.4g} lies {deviations:.1f} robust deviations above the steps before; {SPIKES} of "
        "the run folder names its scans"
    )


def evaluate_now(run: Run, done: int) -> dict[str, float]:
    """The metrics of the evaluation subset after `done` updates, tracked and shown."""
    config = run.config.evaluation
    run.progress.evaluating(config.split)
    found = evaluate(run.task, run.source, run.engine, config.split, limit=config.subset)
    metrics = {f"{config.metric_prefix}/{name}": value for name, value in found.metrics.items()}
    run.watch.add(done, metrics)
    run.tracker.record(done, metrics)
    run.progress.evaluated(metrics)
    return metrics


def save_checkpoint(run: Run, done: int, state: State, metrics: dict[str, float]) -> None:
    """Save locally on every rank; upload and commit in the background."""
    with run.meter.saving():
        run.checkpoints.wait()
        local = run.checkpoints.local_folder(done)
        with full_disk_is_an_error(local):
            run.engine.save(local)
            run.tracker.snapshot(local / SPOOL)
            run.spikes.snapshot(local)
        commit = Commit(
            schema=SCHEMA,
            step=done,
            files=[],
            world_size=this_process().world_size,
            engine=engine_name(run.config),
            data_state=run.source.merge_states(cast("list[State]", gather(state))),
            fingerprint=run.source.fingerprint,
            config_hash=identity.config_hash(run.services.identity),
            mlflow_run_id=run.tracker.run_id,
            metrics=metrics,
            watched=run.watch.so_far(),
        )
        run.checkpoints.commit_later(local, commit)


def stopped(run: Run, done: int) -> StoppedError:
    """The error every rank raises once the checkpoint it has just saved is committed."""
    run.checkpoints.wait()
    reasons = {
        rank: reason for rank, reason in enumerate(gather(REQUEST.reason)) if reason is not None
    }  # and nobody leaves before rank 0 has committed
    asked = ", ".join(f"{reason} (rank {rank})" for rank, reason in reasons.items())
    assert run.checkpoints.latest is not None
    return StoppedError(
        f"step {done} of {run.config.steps}: stopped as asked by {asked}; saved as "
        f"{run.store.join(run.checkpoints.latest)}; run the same command again to resume"
    )


def finish(run: Run, started: float) -> FitResult:
    """Evaluate the final splits whole with the chosen commit's weights, and export them."""
    run.checkpoints.wait()
    found = chosen_commit(run.store, run.config) if this_process().is_main else None
    folder, commit = cast("tuple[str, Commit]", from_main(found))
    if folder != run.checkpoints.latest:
        load_earlier(run, folder, commit)
    evaluations = {}
    for split in run.config.evaluation.final_splits:
        run.progress.evaluating(f"all of {split}")
        evaluations[split] = evaluate(run.task, run.source, run.engine, split, limit=None)
        run.progress.evaluated({f"{split}/{name}": value for name, value in evaluations[split].metrics.items()})
    metrics = {
        f"{split}/{name}": value for split, found in evaluations.items() for name, value in found.metrics.items()
    }
    run.tracker.record(run.config.steps, final_metrics(metrics))
    with run.engine.whole_parameters():
        if run.services.export is not None and this_process().is_main:
            run.services.export(run.task, evaluations)
    barrier()
    run.checkpoints.close()
    if run.tracker.spool is not None and run.spikes.path is not None:
        run.store.put(SPOOL, run.tracker.spool.path)
        run.store.put(SPIKES, run.spikes.path)
    return FitResult(
        task=run.task,
        steps=run.config.steps,
        step=commit.step,
        start=run.start.kind,
        metrics=metrics,
        evaluations=evaluations,
        checkpoint=run.store.join(folder),
        checkpoint_hash=commit_hash(run.store, folder),
        config_hash=identity.config_hash(run.services.identity),
        fingerprint=run.source.fingerprint,
        mlflow_run_id=None,
        is_main=this_process().is_main,
        seconds=time.monotonic() - started,
    )


def final_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """The final splits' metrics as they are tracked, each beside its curve; those of groups are in metrics.json."""
    return {f"{key}{FINAL}": value for key, value in metrics.items() if key.count("/") == 1}


def engine_name(config: TrainConfig) -> str:
    """How a commit names the engine that can read it."""
    return "plain" if config.engine.kind == "plain" else f"zero{config.engine.zero_stage}"


def load_earlier(run: Run, folder: str, commit: Commit) -> None:
    """Replace task and engine by fresh ones that hold the weights of an earlier commit of this run.

    Fresh ones, because a ZeRO 3 engine that has saved cannot load.
    """
    assert run.services.make_task is not None, "train.choose=best needs Services.make_task"
    fetch_state(StartingPoint("named", run.store, folder, commit, None), fetched_folder(run.scratch))
    run.engine.close()
    run.task = run.services.make_task()
    run.engine = make_engine(run.task, run.config, num_micro_batches=run.source.num_micro_batches)
    run.engine.load(fetched_folder(run.scratch))
    shutil.rmtree(fetched_folder(run.scratch))
