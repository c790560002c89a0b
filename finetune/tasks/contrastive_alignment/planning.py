"""What a configuration of an alignment would do, and everything wrong with it, without doing it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from brain_models.errors import UserError
from cluster.errors import StorageError
from data_sharding.read.pairs import Pairs
from data_sharding.read.shard_set import open_set
from data_sharding.schema import MANIFEST
from data_sharding.splits import SPLITS
from finetune.backbone import GOLDEN, local_bundles
from finetune.config import DiagnoseConfig, FinetuneConfig
from finetune.errors import FinetuneError
from finetune.tasks import parse_task
from finetune.tasks.contrastive_alignment import diagnosis
from finetune.tasks.contrastive_alignment.config import FUNCTION, SCRATCH, Config
from finetune.tasks.contrastive_alignment.losses import temperature_problems
from finetune.tasks.contrastive_alignment.retrieval import METRICS, chance
from finetune.tasks.contrastive_alignment.sides import open_backbones, open_pairs
from finetune.tasks.contrastive_alignment.study import AlignmentStudy
from training.checkpoint import file_sha256
from training.statistics import Metric
from training.unfreezing import unfreezing_problems


def metrics(config: FinetuneConfig) -> Sequence[Metric]:
    """The numbers of a model, the most important first."""
    return METRICS


def open_study(config: FinetuneConfig) -> AlignmentStudy:
    """The study; an error when sets, splits and encoders do not fit."""
    task = parse_task(config.task, Config)
    pairs = open_pairs(config, task)
    if problems := split_problems(pairs) + order_problems(config, task, pairs):
        raise FinetuneError("; ".join(problems))
    return AlignmentStudy(config, task, pairs, open_backbones(config, task))


def diagnose(config: DiagnoseConfig) -> str:
    """Whether the pipeline can learn one batch by heart, and what a run's curves say."""
    return diagnosis.diagnose(config.diagnose, open_study(config))


def validate(config: FinetuneConfig) -> list[str]:
    """All problems of the task's numbers, of the two sets together, and of the encoders for them."""
    try:
        task = parse_task(config.task, Config)
    except FinetuneError as error:
        return [str(error)]
    problems = number_problems(config, task) + side_problems(config, task)
    problems += temperature_problems(task.loss, "task.loss")
    for side, unfreezing in (("structure", task.structure.unfreezing), ("function", task.function.unfreezing)):
        problems += unfreezing_problems(unfreezing, f"task.{side}.unfreezing", config.train.evaluation)
    if problems:  # towers cannot be made of wrong numbers
        return problems
    try:
        open_study(config).make_task()
    except (UserError, StorageError) as error:
        problems.append(str(error))
    return problems


def number_problems(config: FinetuneConfig, task: Config) -> list[str]:
    """Problems of single numbers, and a batch that has nothing to tell apart."""
    positive = {
        "task.structure.patch_voxels": task.structure.patch_voxels,
        "task.function.num_frames": task.function.num_frames,
        "task.projection.hidden": task.projection.hidden,
        "task.projection.embedding": task.projection.embedding,
        "task.rows_per_chunk": task.rows_per_chunk,
        "task.num_permutations": task.num_permutations,
    }
    problems = [f"{key}: {value}; must be above 0" for key, value in positive.items() if value <= 0]
    augmentation = task.function.augmentation
    if augmentation is not None and not 0 < augmentation.shortest_share <= 1:
        problems.append(
            f"task.function.augmentation.shortest_share: {augmentation.shortest_share}; must lie above 0, at most 1"
        )
    if not 0 <= task.projection.dropout < 1:
        problems.append(f"task.projection.dropout: {task.projection.dropout}; must be at least 0 and below 1")
    if config.data.batch_size < 2:
        problems.append(
            f"data.batch_size: {config.data.batch_size}; a subject is told from the others of its step, so give at "
            "least 2, better 32"
        )
    share = -(-config.data.batch_size // config.cluster.num_workers)
    if config.data.micro_batch_size != share:
        problems.append(
            f"data.micro_batch_size: {config.data.micro_batch_size}; every worker embeds its share of a step in one "
            f"batch, a few rows at a time (task.rows_per_chunk): set it to {share}"
        )
    return problems


def side_problems(config: FinetuneConfig, task: Config) -> list[str]:
    """Sides with a registered encoder and a network of their own, or with neither."""
    problems = []
    for key, encoder, network, of in (
        ("encoder", config.encoder, task.structure.network, "task.structure.network"),
        ("task.function.encoder", task.function.encoder, task.function.network, "task.function.network"),
    ):
        if encoder == SCRATCH and network is None:
            problems.append(f"{of}: null with {key}={SCRATCH}; say what the network is made of")
        if encoder != SCRATCH and network is not None:
            problems.append(
                f"{of}: given with {key}={encoder}, which brings its own; set it to null, or {key}={SCRATCH}"
            )
    if task.function.network is None and task.function.augmentation is not None:
        problems.append("task.function.augmentation: is of region series, this side reads voxels; set it to null")
    if task.function.encoder == SCRATCH and task.function.num_channels is not None:
        problems.append("task.function.num_channels: is of a registered encoder; set it to null")
    width = getattr(task.structure.network, "width", 8)
    if task.structure.network is not None and width % 8:
        problems.append(f"task.structure.network.width: {width}; give a multiple of 8")
    return problems


def split_problems(pairs: Pairs) -> list[str]:
    """Splits in which nobody could be confused with anybody."""
    return [
        f"split {split!r} has one subject with both sides; retrieval needs two: choose other splits (data.split)"
        for split in SPLITS
        if len(pairs.names(split)) < 2
    ]


def order_problems(config: FinetuneConfig, task: Config, pairs: Pairs) -> list[str]:
    """A step of one subject, which has nothing to be told from."""
    num_trained = len(pairs.names("train"))
    if task.order == "endless" or num_trained % config.data.batch_size != 1:
        return []
    return [
        f"data.batch_size: {config.data.batch_size} cuts {num_trained} training subjects so that an epoch's last step "
        "holds one; choose another batch size, or task.order=endless"
    ]


def plan(config: FinetuneConfig) -> dict[str, str]:
    """What would happen: subjects, those left out, chance, steps and parameters."""
    study = open_study(config)
    task = study.make_task()
    num_tested = len(study.pairs.names("test"))
    sizes = {side: sum(parameter.numel() for parameter in tower.parameters()) for side, tower in task.towers.items()}
    drawn = config.train.steps * config.data.batch_size
    return {
        "sets": f"{config.shards} (T1), {study.config.function.shards} ({study.pairs.sides[FUNCTION].kind})",
        **{split: study.pairs.summary(split) for split in SPLITS},
        "chance": f"R@1 {chance('recall_1', num_tested):.3f}, median rank {chance('median_rank', num_tested):g} among "
        f"{num_tested} test subjects",
        "steps": f"{config.train.steps:,} of {config.data.batch_size} subjects: "
        f"{drawn / len(study.pairs.names('train')):.1f} epochs",
        "parameters": ", ".join(f"{side} {size:,}" for side, size in sizes.items()),
    }


def inputs(config: FinetuneConfig) -> dict[str, str | None]:
    """What a run reads: locations, each with an object that it holds."""
    task = parse_task(config.task, Config)
    sets: dict[str, str | None] = {config.shards: MANIFEST, task.function.shards: MANIFEST}
    return sets | local_bundles([config.encoder, task.function.encoder])


def contents(config: FinetuneConfig) -> Mapping[str, str]:
    """Hashes of what a run reads now, by their names in its lineage."""
    task = parse_task(config.task, Config)
    found = {
        "callosum.set_fingerprint": open_set(config.shards, split=config.data.split).fingerprint,
        "callosum.function_set_fingerprint": open_set(task.function.shards, split=config.data.split).fingerprint,
    }
    for name, encoder in (("structure", config.encoder), ("function", task.function.encoder)):
        if (golden := Path(encoder) / GOLDEN).exists():  # a registered version cannot change, a folder can
            found[f"callosum.{name}_output"] = file_sha256(golden)
    return found
