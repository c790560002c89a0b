"""The embedding before training, on the samples that evaluations look at: what a collapse is measured against."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from data_sharding.read.reader import BatchSource
from pretrain.masked.config import PretrainConfig
from pretrain.masked.masked_volumes import MaskedVolumes
from pretrain.masked.sets import OpenedSet, reader_config
from pretrain.report.collapse import Sentinels, embedding_metrics, sampled
from training.collectives import gather, this_process
from training.engine.base import own_device


def open_sentinels(task: MaskedVolumes, config: PretrainConfig, sets: Mapping[str, OpenedSet]) -> Sentinels:
    """Sentinels that know the embedding of the task's present weights, by set.

    Every rank encodes its share of the evaluation subset, and all get the same: the weights are the seeded ones, also
    where the run is a resumed one or starts from registered weights afterwards.
    """
    evaluation, untrained = config.train.evaluation, {}
    device, here = own_device(), this_process()
    task.to(device).eval()
    for name, opened in sets.items():
        reader = reader_config(config, name)
        source = BatchSource(opened.shard_set, reader, rank=here.rank, world_size=here.world_size)
        rows = []
        with torch.no_grad():
            for batch in source.evaluation(evaluation.split, limit=evaluation.subset):
                batch.set_name = name
                moved = batch.to(device)
                found = sampled(task.encode_visible(moved), config.report.sentinels.tokens_per_sample)
                rows.append({key: values[moved.weight > 0].cpu() for key, values in found.items()})
        source.close()
        every = [row for share in cast("list[list[dict[str, Tensor]]]", gather(rows)) for row in share]
        untrained[name] = embedding_metrics({key: torch.cat([row[key] for row in every]) for key in every[0]})
    task.to("cpu").train()
    return Sentinels(config.report.sentinels, untrained)
