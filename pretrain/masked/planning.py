"""What a run would read, compute and hold: samples, steps, bytes, parameters, memory. Starts nothing."""

import math
from collections.abc import Mapping
from typing import Any, get_args

from jaxtyping import Float
from torch import Tensor, nn

from cluster.config import Needs
from configs.words import aligned, next_command, size_of
from data_sharding.read.joint import sets_of_steps
from data_sharding.read.shard_set import copied_index_bytes, open_set
from data_sharding.schema import MANIFEST
from pretrain.baselines.guesses import ridge_bytes
from pretrain.masked.config import PretrainConfig
from pretrain.masked.costs import bytes_kept
from pretrain.masked.masked_set import Geometry, MaskedSet
from pretrain.masked.masked_volumes import MaskedVolumes
from pretrain.masked.masking import Rule, columns_of_groups, reachable
from pretrain.masked.sets import OpenedSet, build_task, open_sets, windows_of
from training.engine.engines import checkpoint_bytes, scratch_bytes

BYTES_PER_VALUE = {"int8": 1, "float16": 2}  # in the shards
STAGES = (0, 1, 2, 3)
WHOLE = "brain"
LABEL = "diagnosis"  # the column that task=adhd_classification predicts
MOST_WINDOWS = 24  # that it asks for, where runs hold them


def plan(config: PretrainConfig) -> str:
    """The lines of the plan: about every set, then about the whole run."""
    sets = open_sets(config)
    task = build_task(config, sets)
    lines: dict[str, str] = {}
    for name, num_steps in steps_by_set(config).items():
        of_set = set_lines(config, sets[name], task.set_named(name), num_steps=num_steps)
        lines |= of_set if len(sets) == 1 else {f"{name}: {key}": text for key, text in of_set.items()}
    lines |= run_lines(config, task, sets)
    return aligned(lines.items())


def needs(config: PretrainConfig) -> Needs:
    """What a run needs of a cluster."""
    shards = [each.shards for each in config.named_sets.values()]

    def scratch() -> int:
        task = build_task(config, open_sets(config))
        run = scratch_bytes(task, config.train.engine, num_ranks=config.cluster.num_workers)
        return run + sum(map(copied_index_bytes, shards))

    def contents() -> dict[str, str]:
        fingerprints = [open_set(location, split=config.data.split).fingerprint for location in shards]
        return {"callosum.set_fingerprint": ", ".join(fingerprints)}

    return Needs(
        results=config.run.folder,
        cluster=config.cluster,
        inputs=dict.fromkeys(shards, MANIFEST),
        scratch=config.run.scratch,
        scratch_bytes=scratch,
        cache=(config.data.cache_folder, config.data.cache_bytes) if config.data.cache_folder else None,
        tracking=config.train.tracking.uri,
        contents=contents,
    )


def following(config: PretrainConfig, numbers: Mapping[str, Any]) -> str | None:
    """The command to type after a finished run: fine-tuning on its first BOLD set with diagnoses, by as many windows as
    its runs hold; otherwise a list of what is registered."""
    registered, uri = numbers["registered"], config.train.tracking.uri
    folder = config.run.folder.rstrip("/")
    for name, each in config.named_sets.items():
        shard_set = open_set(each.shards, split=config.data.split)
        if each.kind == "bold" and LABEL in shard_set.subjects:
            shortest = int(shard_set.runs("bold", ["train"])["num_frames"].min())
            num_windows = min(shortest // config.window_of(name).window_frames, MOST_WINDOWS)
            return next_command(
                "finetune",
                "task=adhd_classification",
                f"task.num_windows={num_windows}",
                f"shards={each.shards}",
                f"encoder=models:/{registered[0]}" if registered else f"encoder={folder}/bundle",
                f"run.folder={folder}-adhd",
                f"tracking={uri or 'null'}",
            )
    return None if uri is None else next_command("training.runs", uri)


def set_lines(config: PretrainConfig, opened: OpenedSet, masked_set: MaskedSet, *, num_steps: int) -> dict[str, str]:
    """The plan's lines about one set, of which `num_steps` steps are drawn."""
    geometry = opened.geometry
    samples = samples_per_epoch(opened)
    drawn = num_steps * config.data.batch_size
    sample_bytes = bytes_of_sample(opened)
    num_shards = opened.shard_set.runs(opened.kind, ["train"])["shard"].nunique()
    lines = {
        "set": f"{opened.location}, space {geometry.space.name}, {geometry.space.num_voxels:,} voxels",
        "samples per epoch": f"{samples:,} of the train split",
        "bytes per epoch": size_of(samples * sample_bytes),
        "samples drawn": f"{drawn:,} in {num_steps:,} steps: {drawn / max(samples, 1):.1f} epochs",
        "bytes read": f"{size_of(drawn * sample_bytes)} ({size_of(sample_bytes)} per sample)",
        "shards per worker": f"all {num_shards:,}, {min(config.data.shuffle_shards, num_shards):,} at a time",
        "tokens per sample": f"{masked_set.masker.num_tokens:,}, {masked_set.masker.num_hidden:,} of them hidden "
        f"({geometry.layout.num_patches} patches x {geometry.num_tubelets} tubelets)",
        "ridge baseline": ridge_line(config, geometry),
    }
    shares, _ = geometry.membership(config.masking)
    for rule, reach in reach_of_groups(shares, geometry).items():
        lines[f"{rule} reaches"] = ", ".join(f"{group} {share:.3f}" for group, share in reach.items())
    return lines


def run_lines(config: PretrainConfig, task: MaskedVolumes, sets: Mapping[str, OpenedSet]) -> dict[str, str]:
    """The plan's lines about the whole run; memory is that of a rank's device."""
    num_ranks, engine = config.cluster.num_workers, config.train.engine
    states = {stage: state_bytes(count(task), stage=stage, num_ranks=num_ranks) for stage in STAGES}
    kept = {way: activation_bytes(config, task, sets, recomputes=way) for way in (False, True)}
    this = engine.zero_stage if engine.kind == "deepspeed" else 0
    whole = plain_bytes(count(task)) if engine.kind == "plain" else states[this]
    return {
        "steps": f"{config.train.steps:,} of {config.data.batch_size} samples",
        "parameters": f"{count(task.encoder):,} encoder, {count(task.decoder):,} decoder",
        "weights and optimiser": ", ".join(f"ZeRO {stage} {size_of(size)}" for stage, size in states.items()),
        "activations": f"{size_of(kept[False])}, {size_of(kept[True])} when recomputed "
        f"({config.data.micro_batch_size} samples, {engine.precision})",
        "memory per rank": f"{size_of(whole + kept[engine.activation_checkpointing])} as configured, without "
        "the buffers of libraries",
        "a checkpoint": f"{size_of(checkpoint_bytes(task, engine, num_ranks=num_ranks))}, the last "
        f"{config.train.checkpoint.keep_last} kept",
        "workers": f"{num_ranks} ({config.cluster.kind}), {micro_batches(config)} forward passes per step on each",
    }


def steps_by_set(config: PretrainConfig) -> dict[str, int]:
    """How many of the run's steps each set gets."""
    weights = {name: each.weight for name, each in config.named_sets.items()}
    drawn = sets_of_steps(weights, seed=config.data.seed, first_step=0, num_steps=config.train.steps)
    return {name: drawn.count(name) for name in weights}


def samples_per_epoch(opened: OpenedSet) -> int:
    """Windows of the train split that may be drawn; one per T1."""
    return windows_of(opened).runs("train").num_samples


def bytes_of_sample(opened: OpenedSet) -> int:
    """Bytes of a sample's window in its shard."""
    values = opened.geometry.window.window_frames * opened.geometry.space.num_voxels
    return values * BYTES_PER_VALUE[opened.shard_set.frame_type(opened.kind)]


def micro_batches(config: PretrainConfig) -> int:
    """Forward passes a rank makes in a step."""
    share = math.ceil(config.data.batch_size / config.cluster.num_workers)
    return math.ceil(share / config.data.micro_batch_size)


def plain_bytes(num_parameters: int) -> float:
    """Bytes of float32 weights, gradients and AdamW's two moments in one process."""
    return 16.0 * num_parameters


def state_bytes(num_parameters: int, *, stage: int, num_ranks: int) -> float:
    """Bytes of weights, gradients and optimiser on one rank under DeepSpeed, in float32.

    From stage 1 on DeepSpeed keeps the weights of a rank's share twice: as the model sees them and as AdamW's own.
    """
    weights = 4 / (num_ranks if stage == 3 else 1)
    gradients = 4 / (num_ranks if stage >= 2 else 1)
    optimiser = 12 / num_ranks if stage else 8
    return (weights + gradients + optimiser) * num_parameters


def activation_bytes(
    config: PretrainConfig, task: MaskedVolumes, sets: Mapping[str, OpenedSet], *, recomputes: bool
) -> int:
    """Bytes that a forward pass keeps, on the set where it keeps most."""
    precision = config.train.engine.precision
    shapes = [task.pass_shape(task.set_named(name), rows=config.data.micro_batch_size) for name in sets]
    return max(bytes_kept(config.model, shape, precision=precision, recomputes=recomputes) for shape in shapes)


def ridge_line(config: PretrainConfig, geometry: Geometry) -> str:
    """The memory of the ridge baseline, or why it is left out."""
    needed = ridge_bytes(geometry.layout.num_patches, geometry.space.num_voxels)
    if needed > config.baselines.ridge_max_gib * 2**30:
        return f"left out: {size_of(needed)}, more than baselines.ridge_max_gib={config.baselines.ridge_max_gib}"
    return f"{size_of(needed)} on every rank while it is fitted"


def count(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def reach_of_groups(shares: Float[Tensor, "patch region"], geometry: Geometry) -> dict[Rule, dict[str, float]]:
    """The share of all patches that region masking can hide, by rule and group; 'brain': without naming a group.

    `shares` are the geometry's own membership, pseudo-regions of unlabelled tissue included.
    """
    region_ids = geometry.atlas.membership(geometry.layout, geometry.space).region_ids.tolist()
    groups = geometry.atlas.groups
    columns = {name: columns_of_groups([name], "groups", atlas_groups=groups, region_ids=region_ids) for name in groups}
    return {
        rule: {
            name: float(reachable(shares, rule, allowed).float().mean())
            for name, allowed in {WHOLE: None, **columns}.items()
        }
        for rule in get_args(Rule)
    }
