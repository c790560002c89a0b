"""Whole shards through a WebDataset pipeline, for stores without ranged reads. The order of samples stays the same."""

from __future__ import annotations

import io
import tarfile

import numpy as np

from cluster.storage.stores import Store
from data_sharding.errors import ShardError


def read_shard(store: Store, shard: str) -> dict[str, np.ndarray]:
    """Every array of a shard by its member's name, read front to back in one pass."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    source = {"url": store.join(shard), "stream": io.BytesIO(store.read(shard))}
    arrays: dict[str, np.ndarray] = {}
    try:
        for entry in group_by_keys(tar_file_expander([source])):
            for kind in (kind for kind in entry if kind.endswith(".npy")):
                name = f"{entry['__key__']}.{kind}"
                arrays[name] = _array(entry[kind], f"{store.join(shard)} {name}")
    except tarfile.TarError as error:
        raise ShardError(f"{store.join(shard)} is no whole tar ({error}); restore the shard") from error
    return arrays


def _array(data: bytes, label: str) -> np.ndarray:
    try:
        return np.load(io.BytesIO(data), allow_pickle=False)
    except ValueError as error:
        raise ShardError(f"{label} is damaged ({error}); restore the shard") from error
