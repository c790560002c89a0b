"""What a configuration would do, and everything wrong with it, without doing it."""

import dataclasses
import math

from torch import nn

from cluster.config import validate_cluster
from cluster.errors import StorageError
from data_sharding.addresses import run_table
from data_sharding.errors import ShardError
from data_sharding.reader import ShardSet, open_set
from pretrain.config import PretrainConfig
from pretrain.errors import PretrainError
from pretrain.masked_volumes import Geometry, MaskedVolumes
from pretrain.masking import masking_problems
from pretrain.train import build_task, geometry_of
from training.config import validate_train

BYTES_PER_VALUE = {"bold": 1, "t1": 2}  # int8 and float16 in the shards
OPTIMISER_BYTES = 8  # AdamW's two moments in float32, a parameter
SHARED_FROM_STAGE = {"optimiser": 1, "gradients": 2, "weights": 3}  # what each ZeRO stage divides over the ranks


def validate(config: PretrainConfig) -> list[str]:
    """All problems of a configuration, those that need the shard set included."""
    problems = (
        validate_cluster(config.cluster, "cluster")
        + validate_train(config.train, "train", num_workers=config.cluster.num_workers)
        + window_problems(config)
        + number_problems(config)
    )
    if any(problem.startswith("windows") for problem in problems):
        return problems
    try:
        shard_set = open_set(config.shards)
        geometry = geometry_of(config, shard_set)
        shares, allowed = geometry.membership(config.masking)
    except (ShardError, StorageError, PretrainError) as error:
        return [*problems, str(error)]
    problems += masking_problems(config.masking, shares, allowed=allowed, num_tubelets=geometry.num_tubelets)
    return problems + set_problems(config, shard_set)


def window_problems(config: PretrainConfig) -> list[str]:
    """Problems of the window of this kind."""
    if config.kind not in config.windows:
        return [f"windows: no entry for kind={config.kind}; it has {sorted(config.windows)}"]
    window, key = config.window, f"windows.{config.kind}"
    problems = [
        f"{key}.{name}: {value}; must be above 0" for name, value in dataclasses.asdict(window).items() if value < 1
    ]
    if not problems and window.window_frames % window.tubelet_frames:
        problems.append(
            f"{key}.window_frames: {window.window_frames} is no multiple of tubelet_frames {window.tubelet_frames}"
        )
    if config.kind == "t1" and window.window_frames != 1:
        problems.append(f"{key}.window_frames: {window.window_frames}, but a T1 is one frame; set it to 1")
    return problems


def number_problems(config: PretrainConfig) -> list[str]:
    """Problems of single numbers and of sizes that must fit one another."""
    data, sizes, baselines = config.data, config.model, config.baselines
    positive = {
        "data.batch_size": data.batch_size,
        "data.micro_batch_size": data.micro_batch_size,
        "data.shuffle_shards": data.shuffle_shards,
        "model.encoder.depth": sizes.encoder.depth,
        "model.decoder.depth": sizes.decoder.depth,
        "baselines.num_neighbours": baselines.num_neighbours,
        "baselines.fit_samples": baselines.fit_samples,
        "deviation_floor": config.deviation_floor,
    }
    problems = [f"{key}: {value}; must be above 0" for key, value in positive.items() if value <= 0]
    if data.batch_size < config.cluster.num_workers:
        problems.append(
            f"data.batch_size: {data.batch_size} for {config.cluster.num_workers} workers; give each one or more"
        )
    for part, width in (("encoder", sizes.encoder.width), ("decoder", sizes.decoder.width)):
        if width % sizes.encoder.num_heads:
            problems.append(
                f"model.{part}.width: {width} is no multiple of model.encoder.num_heads {sizes.encoder.num_heads}"
            )
    if not baselines.ridge_penalties or min(baselines.ridge_penalties) <= 0:
        problems.append(f"baselines.ridge_penalties: {baselines.ridge_penalties}; give at least one, all above 0")
    if not 0 < baselines.choice_share < 1:
        problems.append(f"baselines.choice_share: {baselines.choice_share}; give a share between 0 and 1")
    if config.register is not None and config.kind not in config.register.names:
        problems.append(f"register.names: no name for kind={config.kind}; add register.names.{config.kind}=<name>")
    if config.weight_decay < 0:
        problems.append(f"weight_decay: {config.weight_decay}; must not be negative")
    return problems


def set_problems(config: PretrainConfig, shard_set: ShardSet) -> list[str]:
    """Splits without a scan of this kind, and windows longer than every run."""
    problems = []
    evaluation = config.train.evaluation
    for split in dict.fromkeys(["train", evaluation.split, *evaluation.final_splits]):
        runs = shard_set.runs(config.kind, [split])
        if not len(runs):
            problems.append(
                f"shards={config.shards}: no {config.kind} scan in split '{split}'; choose kind or split anew "
                "(train.evaluation), or write the set with both"
            )
        elif config.kind == "bold" and int(runs["num_frames"].max()) < config.window.window_frames:
            problems.append(
                f"windows.bold.window_frames: {config.window.window_frames}, but the longest run of split "
                f"'{split}' has {int(runs['num_frames'].max())} frames; shorten the window"
            )
    return problems


def plan(config: PretrainConfig) -> str:
    """What would happen: samples, steps, bytes, parameters, tokens and memory, one line each."""
    shard_set = open_set(config.shards)
    geometry = geometry_of(config, shard_set)
    task = build_task(config, geometry)
    samples = samples_per_epoch(shard_set, config)
    drawn = config.train.steps * config.data.batch_size
    values = config.window.window_frames * geometry.space.num_voxels
    bytes_per_sample = values * BYTES_PER_VALUE[config.kind]
    lines = {
        "set": f"{config.shards}, space {geometry.space.name}, {geometry.space.num_voxels:,} voxels",
        "samples an epoch": f"{samples:,} of the train split",
        "steps": f"{config.train.steps:,} of {config.data.batch_size} samples: {drawn / max(samples, 1):.1f} epochs",
        "tokens a sample": f"{task.masker.num_tokens:,}, {task.masker.num_hidden:,} of them hidden "
        f"({geometry.layout.num_patches} patches x {geometry.num_tubelets} tubelets)",
        "bytes read": f"{drawn * bytes_per_sample:,} ({bytes_per_sample:,} a sample)",
        "parameters": f"{count(task.encoder):,} encoder, {count(task.decoder):,} decoder",
        "memory a rank": f"{state_bytes(task, config) / 2**20:,.1f} MiB for weights, gradients and optimiser; "
        f"{ridge_bytes(geometry) / 2**20:,.1f} MiB for the ridge baseline",
        "workers": f"{config.cluster.num_workers} ({config.cluster.kind}), "
        f"{micro_batches(config)} forward passes a step on each",
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())


def samples_per_epoch(shard_set: ShardSet, config: PretrainConfig) -> int:
    """Windows of the train split that may be drawn; one a T1."""
    frames = config.window.window_frames
    return run_table(shard_set, kind=config.kind, split="train", window_frames=frames).num_samples


def micro_batches(config: PretrainConfig) -> int:
    """Forward passes a rank makes in a step."""
    share = math.ceil(config.data.batch_size / config.cluster.num_workers)
    return math.ceil(share / config.data.micro_batch_size)


def state_bytes(task: MaskedVolumes, config: PretrainConfig) -> float:
    """Bytes of weights, gradients and optimiser state on one rank, in float32, as the ZeRO stage divides them."""
    stage = config.train.engine.zero_stage if config.train.engine.kind == "deepspeed" else 0
    parts = {"weights": 4, "gradients": 4, "optimiser": OPTIMISER_BYTES}
    num_parameters = count(task)
    return sum(
        size * num_parameters / (config.cluster.num_workers if stage >= SHARED_FROM_STAGE[part] else 1)
        for part, size in parts.items()
    )


def ridge_bytes(geometry: Geometry) -> int:
    """Bytes of the second moments of patch means with one another (float64) and with voxels (float32), kept twice."""
    patches = geometry.layout.num_patches
    return 2 * (8 * patches * patches + 4 * patches * geometry.space.num_voxels)


def count(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())
