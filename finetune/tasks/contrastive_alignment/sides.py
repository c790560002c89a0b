"""Both sides of an alignment as a configuration names them: their sets, paired by subject, and their towers."""

from __future__ import annotations

import dataclasses

from brain_models.bundle import Bundle
from brain_models.inputs import StemSpec
from brain_models.patches import PatchLayout
from brain_models.scan_networks import RunTokenNetwork, T1TokenNetwork
from brain_models.towers import Tower, series_network, t1_network
from data_sharding.errors import ShardError
from data_sharding.read.pairs import Pairs
from data_sharding.read.reader import ShardSet, Windows, open_set
from data_sharding.read.shard_set import Kind
from finetune.backbone import Backbone, fetch_backbone
from finetune.config import FinetuneConfig
from finetune.errors import FinetuneError
from finetune.tasks.contrastive_alignment.config import FUNCTION, SCRATCH, STRUCTURE, Config


def open_pairs(config: FinetuneConfig, task: Config) -> Pairs:
    """The subjects that have a T1 and a run; ShardError where the two sets do not go together."""
    structure = open_set(config.shards, scratch=config.run.scratch, split=config.data.split)
    function = structure
    if task.function.shards != config.shards:
        function = open_set(task.function.shards, scratch=config.run.scratch, split=config.data.split)
    kind: Kind = "bold" if task.function.network is None else "parcels"
    for shard_set, needed in ((structure, "t1"), (function, kind)):
        if shard_set.scans(needed).empty:
            raise ShardError(
                f"{shard_set.location} holds no {needed} scan; write it with source.kinds=[{needed}], or name another "
                f"set in {'shards' if needed == 't1' else 'task.function.shards'}"
            )
    return Pairs(
        {
            STRUCTURE: Windows(structure, kind="t1", window_frames=1),
            FUNCTION: Windows(
                function, kind=kind, window_frames=task.function.num_frames, pads_short_runs=kind == "parcels"
            ),
        },
        shuffled=FUNCTION if task.pairing == "shuffled" else None,
    )


def set_of(pairs: Pairs, side: str) -> ShardSet:
    """The shard set of a side."""
    return pairs.sides[side].shard_set


def open_backbones(config: FinetuneConfig, task: Config) -> dict[str, Backbone]:
    """The registered encoder of each side that has one."""
    run = dataclasses.replace(config.run, name=f"{config.run.name}-function")
    of_side = {
        STRUCTURE: config,
        FUNCTION: dataclasses.replace(config, encoder=task.function.encoder, run=run),
    }
    return {side: fetch_backbone(named) for side, named in of_side.items() if named.encoder != SCRATCH}


def structure_stem(task: Config, shard_set: ShardSet) -> StemSpec:
    """How a fresh network reads the T1s of a set."""
    return StemSpec(
        space=shard_set.space,
        layout=PatchLayout.from_grid(shard_set.space, task.structure.patch_voxels),
        tubelet_frames=1,
        window_frames=1,
        needs_brain_mask=shard_set.needs_brain_mask("t1"),
    )


def loaded(backbone: Backbone, kind: str, shard_set: ShardSet, key: str) -> Bundle:
    """The bundle of a backbone with this kind's stem alone; FinetuneError where it does not read the set."""
    bundle = backbone.bundle_in(kind, shard_set.space)
    if kind not in bundle.stems:
        raise FinetuneError(
            f"{key}: knows {', '.join(sorted(bundle.stems))}, this side needs {kind}; give a backbone pretrained with "
            f"kind={kind}, or {SCRATCH}"
        )
    theirs, ours = bundle.stems[kind].space, shard_set.space
    if theirs.fingerprint != ours.fingerprint:
        raise FinetuneError(
            f"{key}: was trained on space {theirs.name} ({theirs.num_voxels} voxels), {shard_set.location} is in "
            f"{ours.name} ({ours.num_voxels} voxels); shard the scans in the backbone's space, or pretrain on this one"
        )
    for name in [name for name in bundle.encoder.stems if name != kind]:  # what no step uses would have no gradient
        del bundle.encoder.stems[name]
    return bundle


def structure_tower(task: Config, pairs: Pairs, backbone: Backbone | None) -> tuple[Tower, StemSpec]:
    """The tower of the T1s, and how it reads them."""
    shard_set = set_of(pairs, STRUCTURE)
    if backbone is None:
        assert task.structure.network is not None
        stem = structure_stem(task, shard_set)
        return Tower(t1_network(task.structure.network, stem), task.projection), stem
    bundle = loaded(backbone, "t1", shard_set, "encoder")
    return Tower(T1TokenNetwork(bundle.encoder), task.projection), bundle.stems["t1"]


def function_tower(task: Config, pairs: Pairs, backbone: Backbone | None) -> Tower:
    """The tower of the runs."""
    windows = pairs.sides[FUNCTION]
    if backbone is None:
        assert task.function.network is not None
        num_regions = windows.shard_set.frame_width("parcels")
        return Tower(series_network(task.function.network, num_regions), task.projection)
    bundle = loaded(backbone, "bold", windows.shard_set, "task.function.encoder")
    network = RunTokenNetwork(bundle.encoder, bundle.stems["bold"], task.function.num_channels)
    return Tower(network, task.projection)
