"""The schema of `train:`: everything a run's numbers depend on, apart from task and data. Values live in configs/."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from configs.parse import FREE
from training.database import database_problems


@dataclass
class RunConfig:
    """Where a run lives. The same command with the same folder resumes from the folder's latest commit."""

    name: str
    folder: str  # a folder or s3://bucket/prefix; holds run.json, checkpoints/ and metrics.jsonl
    scratch: str  # local disk of a node, for checkpoints on their way up or down
    verbose: bool  # every tracked number on the terminal too
    command: str | None  # the command line, which the front end fills in; null: called by Python


@dataclass
class StartConfig:
    """How a run starts when its folder holds no commit; both null: from scratch."""

    checkpoint: str | None  # location of a committed step, e.g. out/runs/a/checkpoints/step-00000100-3f2a
    registered: str | None  # a registered model, 'name@alias' or 'models:/name/3'


@dataclass
class OptimizerConfig:
    kind: Literal["adamw", "adam"]  # adam: weight decay is part of the gradient
    learning_rate: float
    betas: tuple[float, float]
    epsilon: float
    clip_norm: float  # of the gradient of all parameters together


@dataclass
class PlateauConfig:
    """A metric has stopped improving when `patience` evaluations in a row bring no new best."""

    metric: str  # of train.evaluation.split, e.g. validation/loss
    best_is: Literal["lowest", "highest"]
    patience: int
    min_change: float  # a new best is better than the one before by more than this


@dataclass
class DecayConfig(PlateauConfig):
    factor: float  # the learning rate is multiplied by this at every plateau


@dataclass
class ScheduleConfig:
    """Linear warm-up, then half a cosine to the last step, a constant, or lower at every plateau of a metric."""

    kind: Literal["cosine", "constant", "plateau"]
    warmup_steps: int
    final_share: float  # of the peak learning rate: cosine at the last step, plateau at the lowest
    plateau: DecayConfig | None  # for kind plateau


@dataclass
class EngineConfig:
    kind: Literal["plain", "deepspeed"]
    zero_stage: Literal[0, 1, 2, 3]
    precision: Literal["fp32", "bf16"]  # bf16: autocast, weights and optimiser stay fp32
    compile: bool  # torch.compile of the task's forward pass
    activation_checkpointing: bool = field(metadata=FREE)  # less memory, a third more computation, the same losses


@dataclass
class CheckpointConfig:
    every_steps: int  # at most so many steps are ever repeated (2 or more)
    keep_last: int
    keep_every_steps: int | None  # also keep every commit whose step is a multiple of this
    best_metric: str | None  # also keep the commit with the best value of this metric, e.g. validation/loss
    best_is: Literal["lowest", "highest"]

    def is_due(self, done: int) -> bool:
        """True twice per interval: a save's upload is waited for by the next save only, so the newest commit may be of
        the save before the last."""
        return done % self.every_steps in (0, self.every_steps // 2)


@dataclass
class EvaluationConfig:
    every_steps: int
    split: str
    subset: int  # samples of the split seen while training: a fixed hashed subset
    final_splits: list[str]  # seen whole, once, at the end

    @property
    def metric_prefix(self) -> str:
        """What the names of metrics evaluated while training begin with; train/loss is the loss of a step."""
        return "train_split" if self.split == "train" else self.split


@dataclass
class TrackingConfig:
    every_steps: int
    uri: str | None  # MLflow tracking server or sqlite:///file.db; null: only the local metrics.jsonl
    experiment: str
    group_norms: bool  # also the norm of each parameter group's gradient; then ranks exchange every gradient once more
    timeout_s: float  # of one request to the server
    drain_s: float  # how long the end of a run waits for the server to take what is left


@dataclass
class SpikeConfig:
    """A loss is flagged when it lies this many robust deviations above the median of the steps before."""

    window_steps: int
    threshold: float


@dataclass
class ProfileConfig:
    """A torch profiler trace of rank 0."""

    start_step: int  # counted from where this attempt starts
    num_steps: int  # 0: no trace


@dataclass
class TrainConfig:
    steps: int
    seed: int
    choose: Literal["best", "last"]  # which commit is evaluated and registered: by checkpoint.best_metric, or the last
    start: StartConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    engine: EngineConfig
    checkpoint: CheckpointConfig = field(metadata=FREE)  # but what chooses the commit: training.identity
    evaluation: EvaluationConfig
    tracking: TrackingConfig = field(metadata=FREE)
    spikes: SpikeConfig = field(metadata=FREE)
    profile: ProfileConfig = field(metadata=FREE)
    peak_tflops: dict[str, float] = field(metadata=FREE)  # dense bf16 peak of a device, by how its name begins


def validate_train(config: TrainConfig, key: str, *, num_workers: int) -> list[str]:
    """All problems of a `train:` configuration; `key` is its full name in the composed configuration."""
    problems = []
    positive = {
        "steps": config.steps,
        "optimizer.learning_rate": config.optimizer.learning_rate,
        "optimizer.epsilon": config.optimizer.epsilon,
        "optimizer.clip_norm": config.optimizer.clip_norm,
        "checkpoint.keep_last": config.checkpoint.keep_last,
        "evaluation.every_steps": config.evaluation.every_steps,
        "evaluation.subset": config.evaluation.subset,
        "tracking.every_steps": config.tracking.every_steps,
        "tracking.timeout_s": config.tracking.timeout_s,
        "spikes.window_steps": config.spikes.window_steps,
        "spikes.threshold": config.spikes.threshold,
    }
    problems += [f"{key}.{name}: {value}; must be above 0" for name, value in positive.items() if value <= 0]
    if config.checkpoint.every_steps < 2:  # a save waits for the upload of the one before: two steps may be repeated
        problems.append(f"{key}.checkpoint.every_steps: {config.checkpoint.every_steps}; must be 2 or more")
    if not 0 <= config.schedule.warmup_steps <= config.steps:
        problems.append(f"{key}.schedule.warmup_steps: {config.schedule.warmup_steps}; must lie in 0..{key}.steps")
    if not 0 <= config.schedule.final_share <= 1:
        problems.append(f"{key}.schedule.final_share: {config.schedule.final_share}; must lie in 0..1")
    problems += schedule_problems(config, key)
    if config.engine.kind == "plain" and num_workers > 1:
        problems.append(f"{key}.engine.kind: plain runs in one process, {num_workers} workers asked; use engine=zero2")
    if config.engine.compile and config.engine.zero_stage == 3:
        problems.append(f"{key}.engine.compile: true with zero_stage=3, which gathers parameters by hooks; use zero2")
    if config.profile.start_step < 0 or config.profile.num_steps < 0:
        problems.append(f"{key}.profile: start_step and num_steps must be 0 or more")
    if config.tracking.uri is not None and "://" not in config.tracking.uri:
        problems.append(f"tracking: {config.tracking.uri}; give sqlite:///<file>, http://<server>, or null")
    elif config.tracking.uri is not None:
        problems += database_problems(config.tracking.uri)
    # Anywhere in it: a password may hold a slash. A file's name may hold an @.
    if config.tracking.uri and "@" in config.tracking.uri and not config.tracking.uri.startswith("sqlite:"):
        problems.append(
            "tracking: names a user or a password, and is stored with the run; leave them out and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    if config.start.checkpoint and config.start.registered:
        problems.append(f"{key}.start: give checkpoint or registered, not both")
    return problems


def schedule_problems(config: TrainConfig, key: str) -> list[str]:
    """What is wrong with the schedule's plateau."""
    plateau = config.schedule.plateau
    if (config.schedule.kind == "plateau") != (plateau is not None):
        given = "is null" if plateau is None else "is given"
        return [
            f"{key}.schedule.plateau: {given} with kind {config.schedule.kind}; kind plateau needs it, no other does"
        ]
    if plateau is None:
        return []
    problems = plateau_problems(plateau, f"{key}.schedule.plateau", config.evaluation)
    if not 0 < plateau.factor < 1:
        problems.append(f"{key}.schedule.plateau.factor: {plateau.factor}; must lie between 0 and 1")
    return problems


def plateau_problems(plateau: PlateauConfig, key: str, evaluation: EvaluationConfig) -> list[str]:
    """What is wrong with a plateau to wait for; `key` is its full name in the composed configuration."""
    problems = []
    if plateau.patience < 1:
        problems.append(f"{key}.patience: {plateau.patience}; must be 1 or more")
    if plateau.min_change < 0:
        problems.append(f"{key}.min_change: {plateau.min_change}; must be 0 or more")
    if not plateau.metric.startswith(f"{evaluation.metric_prefix}/"):
        problems.append(
            f"{key}.metric: {plateau.metric}; evaluated while training are metrics of {evaluation.metric_prefix}/..."
        )
    return problems
