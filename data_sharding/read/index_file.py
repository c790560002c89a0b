"""The index of a set, read as far as it is needed: a rank holds a row a scan and two numbers a chunk of the whole set.

Checksums of frames, most of an index, are read group by group when windows of theirs are drawn.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections import OrderedDict

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.storage.stores import LocalStore, Store
from data_sharding import schema
from data_sharding.read.file_cache import CachedFile, FileCache

ROWS_AT_A_TIME = 1 << 18
KEPT_GROUPS = 128  # 2 MB each as they are written; a shuffle block's shards lie in as many groups at most

COPIES = "indexes"  # of a user, below a node's scratch
MAX_COPIES_BYTES = 1 << 36  # some twenty sets of a million runs


class IndexFile:
    """An opened index.parquet on local disk."""

    def __init__(self, opened: pa.NativeFile) -> None:
        texts = {name for name, kind in schema.INDEX_COLUMNS.items() if kind == "string"}
        repeated = sorted(
            texts - {"member", "key", "frame_crc32"}
        )  # the same in many rows: read as numbers of few texts
        self._file = pq.ParquetFile(opened, read_dictionary=repeated)
        sizes = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        self._first_rows = np.cumsum([0, *sizes])
        self._groups: OrderedDict[int, pa.Table] = OrderedDict()

    def rows(self, kind: str, columns: list[str]) -> pd.DataFrame:
        """The rows of one kind of member, in the order of the tars; `row` is their row in the index."""
        tables, start = [], 0
        for batch in self._file.iter_batches(ROWS_AT_A_TIME, columns=[*columns, "kind"]):
            is_kind = pc.equal(batch["kind"], kind)
            numbers = start + np.flatnonzero(is_kind.to_numpy(zero_copy_only=False))
            chosen = batch.filter(is_kind).select(columns)
            texts = [
                column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
                for column in chosen.columns
            ]
            tables.append(pa.table([*texts, pa.array(numbers)], names=[*columns, "row"]))
            start += len(batch)
        table = pa.concat_tables(tables) if tables else self._file.schema_arrow.empty_table().select(columns)
        return table.to_pandas(types_mapper={pa.string(): pd.StringDtype()}.get)

    def member(self, row: int) -> tuple[str, str]:
        """The name of the member in this row, and the checksums of its frames as 8 hexadecimal digits each."""
        group = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        if group not in self._groups:
            self._groups[group] = self._file.read_row_group(group, columns=["member", "frame_crc32"])
            if len(self._groups) > KEPT_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(group)
        table, row_of_group = self._groups[group], row - int(self._first_rows[group])
        return table["member"][row_of_group].as_py(), table["frame_crc32"][row_of_group].as_py()


def opened_index(store: Store, *, sha256: str, scratch: str | None) -> pa.NativeFile:
    """The index as an open local file. One that is far away is fetched once by all processes that share `scratch`, or
    without it by each for itself."""
    if isinstance(store, LocalStore):
        return pa.OSFile(store.join(schema.INDEX))
    with contextlib.ExitStack() as stack:
        folder = f"{scratch}/{COPIES}-{os.getuid()}" if scratch else stack.enter_context(tempfile.TemporaryDirectory())
        index = CachedFile(schema.INDEX, store.size(schema.INDEX), sha256)
        cache = FileCache(folder, MAX_COPIES_BYTES)
        return cache.open(store, index, lambda path: pa.OSFile(str(path)))  # readable also when its name is gone
