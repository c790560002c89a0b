"""The shard sets of a run, one or several with a weight each: opened, cut into tokens, and read by every rank."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from brain_models.atlas import Atlas, no_atlas
from brain_models.encoder import TokenKind
from brain_models.space import BrainSpace
from data_sharding.read.joint import JointSource, named
from data_sharding.read.reader import BatchSource, ShardSet, WindowBatch, Windows, open_set
from pretrain.errors import PretrainError
from pretrain.masked.config import PretrainConfig
from pretrain.masked.masked_set import Geometry, SetSpec
from pretrain.masked.masked_volumes import MaskedVolumes
from training.collectives import Process, this_process


@dataclass(frozen=True, eq=False)
class OpenedSet:
    """A set of the run with everything but its voxels."""

    name: str
    kind: TokenKind
    weight: float
    location: str
    shard_set: ShardSet
    geometry: Geometry

    @property
    def spec(self) -> SetSpec:
        return SetSpec(self.kind, self.geometry, self.weight)

    @property
    def alignment(self) -> str:
        """How its scans came into the space, as tables of regions say it."""
        alignment = str(self.shard_set.manifest.preprocessing["alignment"])
        return f"{alignment} (preview: regions are off by millimetres)" if alignment == "affine" else alignment

    @property
    def training_subjects(self) -> set[str]:
        return set(self.shard_set.runs(self.kind, ["train"])["subject"])


def open_sets(config: PretrainConfig, *, scratch: str | None = None) -> dict[str, OpenedSet]:
    """Every set of the run, opened; PretrainError where one lacks the atlas. Ranks give their node's `scratch`."""
    found = {}
    for name, each in config.named_sets.items():
        shard_set = open_set(each.shards, scratch=scratch, split=config.data.split)
        if config.atlas is not None and config.atlas not in shard_set.atlases:
            raise PretrainError(
                f"atlas={config.atlas}: {each.shards} holds {sorted(shard_set.atlases) or 'no atlas'}; choose one of "
                "them, write the set with another atlas, or give atlas=null"
            )
        space = shard_set.space
        atlas = pseudo_atlas(space) if config.atlas is None else shard_set.atlases[config.atlas]
        geometry = Geometry.of(space, atlas, config.window_of(name))
        found[name] = OpenedSet(name, each.kind, each.weight, each.shards, shard_set, geometry)
    return found


def pseudo_atlas(space: BrainSpace) -> Atlas:
    """An atlas for a space that has none: compact regions of about the same size, named by number."""
    labels = no_atlas(space).complete_labels(space)
    names = {int(label): f"pseudo {label}" for label in np.unique(labels)}
    return Atlas("pseudo", labels.astype(np.int32), names, {})


def build_task(config: PretrainConfig, sets: Mapping[str, OpenedSet]) -> MaskedVolumes:
    """A fresh task, the same on every rank."""
    torch.manual_seed(config.train.seed)
    return MaskedVolumes(
        config.model,
        {name: each.spec for name, each in sets.items()},
        masking=config.masking,
        loss=config.loss,
        batch_size=config.data.batch_size,
        weight_decay=config.weight_decay,
    )


def open_source(config: PretrainConfig, sets: Mapping[str, OpenedSet], process: Process) -> BatchSource | JointSource:
    """What a rank trains and evaluates on."""
    sources = {
        name: BatchSource(windows_of(each), config.data, rank=process.rank, world_size=process.world_size)
        for name, each in sets.items()
    }
    if len(sources) == 1:
        return next(iter(sources.values()))
    return JointSource(sources, {name: each.weight for name, each in sets.items()}, seed=config.data.seed)


def training_subset(config: PretrainConfig, opened: OpenedSet) -> Iterator[WindowBatch]:
    """This rank's share of the training samples that statistics and baselines are fitted on, the same every time.

    Dealt out, so that the last subjects, on which the ridge's penalty is chosen, are spread over the ranks.
    """
    here = this_process()
    source = BatchSource(windows_of(opened), config.data, rank=here.rank, world_size=here.world_size)
    for batch in source.evaluation("train", limit=config.baselines.fit_samples, is_dealt_out=True):
        yield named(batch, opened.name)
    source.close()


def windows_of(opened: OpenedSet) -> Windows:
    """What a sample of a set is."""
    return Windows(opened.shard_set, kind=opened.kind, window_frames=opened.geometry.window.window_frames)
