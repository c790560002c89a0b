"""All problems of a configuration, those that only the shard sets show included; nothing is changed."""

import dataclasses
import re
from typing import get_args

from brain_models.encoder import TokenKind
from brain_models.errors import SpaceError
from cluster.config import validate_cluster
from cluster.errors import StorageError
from cluster.storage.files import folder_problems
from cluster.storage.stores import store_for
from data_sharding.errors import ShardError
from data_sharding.read.shard_set import split_conflicts
from data_sharding.splits import validate_splits
from pretrain.errors import PretrainError
from pretrain.masked.config import PretrainConfig
from pretrain.masked.masking import masking_problems
from pretrain.masked.sets import OpenedSet, open_sets
from pretrain.report.config import PROBED_SPLITS, report_problems
from training.checkpoint import starting_point
from training.config import validate_train
from training.errors import CheckpointError, RegistryError
from training.registry import models as registry

SET_NAME = re.compile("[a-z][a-z0-9_]*")


def validate(config: PretrainConfig) -> list[str]:
    """All problems of a configuration, those that need the shard set included."""
    problems = (
        validate_cluster(config.cluster, "cluster")
        + folder_problems(config.run.folder, "run.folder")
        + validate_train(config.train, "train", num_workers=config.cluster.num_workers)
        + number_problems(config)
        + validate_splits(config.data.split, "data.split")
    )
    unreadable = naming_problems(config) or [
        problem for name in config.named_sets for problem in window_problems(config, name)
    ]
    if unreadable:
        return problems + unreadable
    problems += registration_problems(config) + start_problems(config)
    try:
        sets = open_sets(config)
        for opened in sets.values():
            shares, columns = opened.geometry.membership(config.masking)
            found = masking_problems(config.masking, shares, columns=columns, num_tubelets=opened.geometry.num_tubelets)
            problems += found if len(sets) == 1 else [f"set {opened.name}: {problem}" for problem in found]
            problems += set_problems(config, opened)
    except (ShardError, StorageError, SpaceError, PretrainError) as error:
        return [*problems, str(error)]
    return problems + split_conflicts({name: each.shard_set.subjects for name, each in sets.items()})


def naming_problems(config: PretrainConfig) -> list[str]:
    """What is wrong with how the sets are given: kind and shards, or sets."""
    if config.sets is None:
        return config.missing(vars(config))
    problems = [
        f"windows.{name}: no set has this name; they are {', '.join(config.sets)}"
        for name in config.windows.keys() - {*get_args(TokenKind), *config.sets}
    ]
    if config.kind is not None or config.shards is not None:
        problems.append("sets: kind or shards are given as well; a joint run names both in each set")
    if not config.sets:
        problems.append("sets: empty; name at least one, e.g. sets={rest: {kind: bold, shards: ..., weight: 1}}")
    for name, each in config.sets.items():
        if not SET_NAME.fullmatch(name) or (name in get_args(TokenKind) and name != each.kind):
            problems.append(f"sets.{name}: use small letters, digits and _, and no other kind's name")
        if each.weight <= 0:
            problems.append(f"sets.{name}.weight: {each.weight}; must be above 0")
    return problems


def window_problems(config: PretrainConfig, name: str) -> list[str]:
    """Problems of the window of a set."""
    kind = config.named_sets[name].kind
    key = name if name in config.windows else kind
    if key not in config.windows:
        return [f"windows: no entry for kind={kind}; it has {sorted(config.windows)}"]
    window, key = config.windows[key], f"windows.{key}"
    problems = [
        f"{key}.{field}: {value}; must be above 0" for field, value in dataclasses.asdict(window).items() if value < 1
    ]
    if not problems and window.window_frames % window.tubelet_frames:
        problems.append(
            f"{key}.window_frames: {window.window_frames} is no multiple of tubelet_frames {window.tubelet_frames}"
        )
    if kind == "t1" and window.window_frames != 1:
        problems.append(f"{key}.window_frames: {window.window_frames}, but a T1 is one frame; set it to 1")
    return problems


def registration_problems(config: PretrainConfig) -> list[str]:
    """A backbone without a name to register it under."""
    if config.register is None or config.label in config.register.names:
        return []
    return [f"register.names: no name for {config.label}; add register.names.{config.label}=<name>"]


def start_problems(config: PretrainConfig) -> list[str]:
    """A checkpoint or registered model to start from that does not exist: the run would claim its folder and fail."""
    try:
        point = starting_point(store_for(config.run.folder), config.train.start)
        if point.registered is not None and config.train.tracking.uri is not None:
            registry.version_tags(point.registered, uri=config.train.tracking.uri)
    except (CheckpointError, RegistryError, StorageError) as error:
        return [str(error)]
    return []


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
    if not 0 < config.loss.smallest_region <= 1:
        problems.append(f"loss.smallest_region: {config.loss.smallest_region}; must lie above 0 and up to 1")
    problems += report_problems(config.report)
    if config.report.contribution.num_samples > 0 and not config.train.evaluation.final_splits:
        problems.append(
            f"report.contribution.num_samples: {config.report.contribution.num_samples} windows of the first final "
            "split, but train.evaluation.final_splits is empty; name a split there, or give 0"
        )
    if config.weight_decay < 0:
        problems.append(f"weight_decay: {config.weight_decay}; must not be negative")
    return problems


def set_problems(config: PretrainConfig, opened: OpenedSet) -> list[str]:
    """Splits without a scan of this kind, and windows longer than every run."""
    problems = []
    evaluation, window_frames = config.train.evaluation, opened.geometry.window.window_frames
    probed = PROBED_SPLITS if config.report.probes.num_samples > 0 else []
    for split in dict.fromkeys(["train", evaluation.split, *evaluation.final_splits, *probed]):
        runs = opened.shard_set.runs(opened.kind, [split])
        if not len(runs):
            problems.append(
                f"shards={opened.location}: no {opened.kind} scan in split '{split}'; choose another kind or "
                "split (train.evaluation; report.probes needs train and validation), or write the set with both"
            )
        elif opened.kind == "bold" and int(runs["num_frames"].max()) < window_frames:
            key = opened.name if opened.name in config.windows else opened.kind
            problems.append(
                f"windows.{key}.window_frames: {window_frames}, but the longest run of split "
                f"'{split}' has {int(runs['num_frames'].max())} frames; shorten the window"
            )
    return problems
