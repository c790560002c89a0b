"""Responses to images, as a source draws them: images are decoded in the loader processes, splits are by image."""

from __future__ import annotations

import numpy as np

from data_sharding import schema
from data_sharding.read.batch import ResponseBatch, decode
from data_sharding.read.config import DataConfig
from data_sharding.read.fetch import FetchedResponses, ResponseFetcher, ResponseRead, WindowRead
from data_sharding.read.order import RunTable, Samples
from data_sharding.read.shard_set import ShardSet
from data_sharding.read.windows import Windows


class Responses:
    """The images of a set with the response to each."""

    has_substitutes = True

    def __init__(self, shard_set: ShardSet) -> None:
        self.betas = Windows(shard_set, kind="response", window_frames=1)
        self.fingerprint = shard_set.fingerprint
        images = shard_set.index_file.rows(schema.IMAGE, ["scan_id", "offset", "size", "crc32"])
        self._images = images.set_index("scan_id")
        self._stimuli = shard_set.scans("response").set_index("scan_id").stimulus

    def runs(self, split: str) -> RunTable:
        """What the order needs of a split's responses."""
        return self.betas.runs(split)

    def names(self, split: str) -> list[str]:
        """What the quarantine calls each response of a split."""
        return self.betas.names(split)

    def fetcher(self, config: DataConfig) -> ResponseFetcher:
        """A fetcher of these responses."""
        return ResponseFetcher(self.betas.fetch_settings(config))

    def reads(self, split: str, samples: Samples) -> list[ResponseRead]:
        """Where each sample lies."""
        names, betas = self.names(split), self.betas.reads(split, samples)
        return [self._read(names[run], window) for run, window in zip(samples.run, betas, strict=True)]

    def _read(self, scan_id: str, betas: WindowRead) -> ResponseRead:
        row = self._images.loc[scan_id]
        member = f"{schema.stats_key(scan_id)}.{schema.IMAGE}"
        return ResponseRead(betas, member, offset=int(row.offset), size=int(row["size"]), crc32=int(row.crc32))

    def batch(self, split: str, samples: Samples, weight: np.ndarray, fetched: FetchedResponses) -> ResponseBatch:
        """The batch of these samples, read as `fetched`."""
        windows = self.betas.batch(split, samples, weight, fetched)
        betas, is_measured = decode(fetched.stored)
        return ResponseBatch(
            image=fetched.images,
            betas=betas[:, 0],
            is_measured=is_measured,
            weight=windows.weight,
            sample_seed=windows.sample_seed,
            scan_ids=windows.scan_ids,
            subjects=windows.subjects,
            stimuli=self._stimuli.loc[windows.scan_ids].tolist(),
            first_frame=windows.first_frame,
        )
