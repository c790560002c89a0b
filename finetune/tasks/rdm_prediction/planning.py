"""What a configuration of RDM prediction would do, and everything wrong with it, without doing it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from brain_models.errors import UserError
from configs.words import counted
from data_sharding.read.shard_set import open_set
from data_sharding.schema import MANIFEST
from data_sharding.splits import SPLITS
from finetune.config import FinetuneConfig
from finetune.errors import FinetuneError
from finetune.tasks import parse_task
from finetune.tasks.rdm_prediction.encoders import CNN, PIXELS, VGG, open_encoder
from finetune.tasks.rdm_prediction.metrics import METRICS
from finetune.tasks.rdm_prediction.pairs import make_pairs, num_pairs
from finetune.tasks.rdm_prediction.stimuli import open_stimuli, split_warnings, with_fewer_training_images
from finetune.tasks.rdm_prediction.study import Config, RdmStudy
from training.statistics import Metric
from training.unfreezing import unfreezing_problems


def metrics(config: FinetuneConfig) -> Sequence[Metric]:
    """The numbers of a model, the most important first."""
    return METRICS


def open_study(config: FinetuneConfig) -> RdmStudy:
    """The study; FinetuneError when set, region, splits and encoder do not fit."""
    task = parse_task(config.task, Config)
    stimuli = open_stimuli(config.shards, config.data, region=task.region)
    if problems := split_warnings(stimuli)[0]:
        raise FinetuneError("; ".join(problems))
    stimuli = with_fewer_training_images(stimuli, task.num_training_images, seed=config.data.seed)
    pairs = make_pairs(stimuli, task.measure, task.split_by, seed=config.data.seed)
    return RdmStudy(config, task, pairs, open_encoder(config.encoder, task.image, seed=config.train.seed))


def validate(config: FinetuneConfig) -> list[str]:
    """All problems of the task's numbers, of the set's parts, and of the encoder."""
    try:
        task = parse_task(config.task, Config)
    except FinetuneError as error:
        return [str(error)]
    problems = number_problems(task) + combination_problems(config, task)
    problems += unfreezing_problems(task.unfreezing, "task.unfreezing", config.train.evaluation)
    try:
        stimuli = open_stimuli(config.shards, config.data, region=task.region)
        problems += split_warnings(stimuli)[0]
        if task.loss.kind == "contrastive" and stimuli.patterns is None:
            problems.append("task.loss.kind: contrastive aligns images with responses, this set has an RDM alone")
    except UserError as error:
        problems.append(str(error))
    try:
        open_encoder(config.encoder, task.image, seed=config.train.seed)
    except FinetuneError as error:
        problems.append(str(error))
    return problems


def number_problems(task: Config) -> list[str]:
    """Problems of single numbers."""
    positive = {
        "task.head.width": task.head.width,
        "task.image.max_features": task.image.max_features,
        "task.image.size": task.image.size,
        "task.baseline_pixels": task.baseline_pixels,
        "task.num_permutations": task.num_permutations,
        "task.loss.temperature": task.loss.temperature,
    }
    problems = [f"{key}: {value}; must be above 0" for key, value in positive.items() if value <= 0]
    if task.num_training_images is not None and task.num_training_images < 5:
        problems.append(f"task.num_training_images: {task.num_training_images}; give at least 5, or null for all")
    if not 0 <= task.head.num_hidden <= 3:
        problems.append(f"task.head.num_hidden: {task.head.num_hidden}; must lie in 0..3")
    if not 0 <= task.loss.alpha <= 1:
        problems.append(f"task.loss.alpha: {task.loss.alpha}; must lie in 0..1")
    if not task.baselines.penalties or min(task.baselines.penalties) <= 0:
        problems.append(f"task.baselines.penalties: {task.baselines.penalties}; give at least one, all above 0")
    return problems


def combination_problems(config: FinetuneConfig, task: Config) -> list[str]:
    """Values that do not go together."""
    problems = []
    if task.split_by == "leaky_pairs" and config.register is not None:
        problems.append(
            "task.split_by: leaky_pairs tests pairs whose images were trained on; it is a demonstration and its model "
            "is not registered: set register=null, or task.split_by=images"
        )
    if config.encoder == CNN and task.unfreezing.first_layer_opens_at_step != 0:
        problems.append("encoder: cnn has no weights yet; set task.unfreezing.first_layer_opens_at_step=0")
    if config.train.engine.zero_stage == 3 and config.train.engine.kind == "deepspeed":
        problems.append("engine: zero3 divides the head, which is small and is asked about all pairs; use engine=zero2")
    if task.head.output == "sigmoid" and task.measure == "euclidean":
        problems.append("task.head.output: sigmoid lies in 0..2, the range of 1 - Pearson; use linear for euclidean")
    share = -(-config.data.batch_size // config.cluster.num_workers)
    if config.data.micro_batch_size < share:
        problems.append(
            f"data.micro_batch_size: {config.data.micro_batch_size}; a step is all pairs of its images, so give each "
            f"worker one batch: at least {share}"
        )
    return problems


def plan(config: FinetuneConfig) -> dict[str, str]:
    """What would happen: images, pairs, features, steps."""
    study = open_study(config)
    task, stimuli = study.make_task(), study.pairs.stimuli
    images = {split: len(study.pairs.images(split)) for split in SPLITS}
    pairs = {split: num_pairs(len(stimuli.rows(split))) for split in SPLITS}
    size = sum(parameter.numel() for parameter in task.parameters())
    return {
        "set": f"{config.shards}, {counted(len(stimuli.names), 'image')}, region {stimuli.region}"
        + ("" if stimuli.patterns is None else f" ({stimuli.patterns.shape[1]:,} vertices)"),
        "images": ", ".join(f"{split} {number:,}" for split, number in images.items()),
        "pairs": ", ".join(f"{split} {number:,}" for split, number in pairs.items()),
        "encoder": f"{config.encoder}, {len(task.head.mean):,} features"
        + (", trained too" if study.opens else ", each image encoded once"),
        "parameters": f"{size:,}",
        "steps": f"{config.train.steps:,} of {config.data.batch_size} images, "
        f"{num_pairs(config.data.batch_size):,} pairs each",
    }


def inputs(config: FinetuneConfig) -> dict[str, str | None]:
    """What a run reads: locations, each with an object that it holds."""
    encoder = config.encoder.removeprefix(VGG)
    is_folder = (Path(encoder) / "config.json").exists()
    is_local = encoder not in (CNN, PIXELS) and is_folder
    is_set = not (Path(config.shards) / "images").is_dir()
    return {config.shards: MANIFEST if is_set else None} | ({encoder: "config.json"} if is_local else {})


def contents(config: FinetuneConfig) -> Mapping[str, str]:
    """Hashes of what a run reads now, by their names in its lineage."""
    if (Path(config.shards) / "images").is_dir():
        task = parse_task(config.task, Config)
        fingerprint = open_stimuli(config.shards, config.data, region=task.region).fingerprint
    else:
        fingerprint = open_set(config.shards, split=config.data.split).fingerprint
    return {"callosum.set_fingerprint": fingerprint}
