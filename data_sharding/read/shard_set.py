"""An opened shard set: its manifest and tables. Needs no NIfTI library, and reads no voxel."""

from __future__ import annotations

import io
import itertools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar

import pandas as pd

from brain_models.atlas import Atlas
from brain_models.recipe import BoldPreprocessing, CleaningConfig
from brain_models.space import BrainSpace
from cluster.errors import StorageError, StoreUnavailableError
from cluster.storage.stores import Store, store_for
from data_sharding import schema
from data_sharding.errors import ShardError
from data_sharding.read.file_cache import CachedFile
from data_sharding.read.index_file import IndexFile, opened_index
from data_sharding.splits import ReadingSplit, SplitConfig, assign_splits

Kind = Literal["bold", "t1", "parcels", "response"]
Loaded = TypeVar("Loaded")

MAX_NAMED_SUBJECTS = 5
MAX_NAMED_SITES = 12
RUN_COLUMNS = [
    "scan_id",
    "subject",
    "session",
    "task",
    "run",
    "site",
    "split",
    "num_frames",
    "repetition_time_s",
    "censored",
    "shard",
]


def copied_index_bytes(location: str) -> int:
    """Bytes of the index that every node copies of a set that is far away; 0 for a folder."""
    return store_for(location).size(schema.INDEX) if "://" in location else 0


def open_set(location: str, *, scratch: str | None = None, split: ReadingSplit | None = None) -> ShardSet:
    """The complete set at a location; ShardError when there is none, or one of another schema.

    Below `scratch`, a folder of this node, its processes share one copy of the index of a set that is far away. `split`
    replaces the splits that the set was written with.
    """
    store = store_for(location)
    try:
        manifest = schema.Manifest.from_json(store.read(schema.MANIFEST), location)
    except StoreUnavailableError:
        raise
    except StorageError as error:
        hint = "its writing was not finished; run the same 'python -m data_sharding' again"
        if not store.list(schema.PLAN):
            hint = f"write one with 'python -m data_sharding source.root=<scans> out={location}'"
        raise ShardError(f"{location} holds no shard set (no {schema.MANIFEST}): {hint}") from error
    return ShardSet(store, manifest, scratch=scratch, split=split)


class ShardSet:
    """Manifest, space, subjects and index of one set; tables are read when first asked for."""

    def __init__(
        self, store: Store, manifest: schema.Manifest, *, scratch: str | None = None, split: ReadingSplit | None = None
    ) -> None:
        self.store = store
        self.scratch = scratch
        self.manifest = manifest
        self.location = store.location
        self._split = None if split is None or split.rule == "set" else split
        self._scans: dict[str, pd.DataFrame] = {}

    @cached_property
    def space(self) -> BrainSpace:
        space = self._loaded(schema.SPACE, BrainSpace.load)
        if space.fingerprint != self.manifest.space["fingerprint"]:
            raise ShardError(f"{self.location}/{schema.SPACE} is not the space of the manifest; write the set again")
        return space

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the space, the shards and every subject's (or stimulus') split: other splits, another order."""
        if self._split is None:
            return self.manifest.fingerprint
        return schema.set_fingerprint(self.manifest.space["fingerprint"], self.manifest.shards, self.split_of_unit)

    @cached_property
    def split_of_unit(self) -> dict[str, str]:
        """The split of every subject; of every stimulus in a set of responses."""
        if self._split is None:
            return self._units["split"].to_dict()
        family_column = self._split.family_column or self.manifest.splits["family_column"]
        sites_of = {str(unit): set(sites) for unit, sites in self.quality.groupby("subject").site}
        return assign_splits(self._units, replace(self._split, family_column=family_column), sites_of=sites_of)

    @property
    def split_rule(self) -> SplitConfig:
        """The rule that divided the subjects: this reader's, else the one the set was written with."""
        return self._split or SplitConfig(**self.manifest.splits)

    @cached_property
    def subjects(self) -> pd.DataFrame:
        """participants.tsv's columns and `split`, indexed by subject_id."""
        if not self._holds_responses:
            return self._units.assign(split=pd.Series(self.split_of_unit, dtype="str"))
        return self._table(schema.SUBJECTS).set_index("subject_id")

    @cached_property
    def stimuli(self) -> pd.DataFrame | None:
        """The images of a set of responses with their `split`, indexed by stimulus_id; None for sets of scans."""
        if not self._holds_responses:
            return None
        return self._units.assign(split=pd.Series(self.split_of_unit, dtype="str"))

    @cached_property
    def _units(self) -> pd.DataFrame:
        """What splits divide, as the set was written: stimuli of a set of responses, else subjects."""
        if self._holds_responses:
            return self._table(schema.STIMULI).set_index("stimulus_id")
        return self._table(schema.SUBJECTS).set_index("subject_id")

    @property
    def _holds_responses(self) -> bool:
        return schema.STIMULI in self.manifest.tables

    @cached_property
    def index(self) -> pd.DataFrame:
        """One row a tar member; columns as in schema.INDEX_COLUMNS. Whole: a large one takes gigabytes."""
        return self._table(schema.INDEX)

    @cached_property
    def atlases(self) -> dict[str, Atlas]:
        return {name: self._loaded(f"{schema.ATLASES}{name}.npz", Atlas.load) for name in self.manifest.atlases}

    def runs(self, kind: str, splits: list[str]) -> pd.DataFrame:
        """One row a scan of this kind in these splits, sorted by scan_id."""
        if kind not in schema.KIND_OF_SCAN:
            raise ShardError(f"{kind!r} is no kind of scan; use one of {', '.join(schema.KIND_OF_SCAN)}")
        rows = self.scans(kind)
        return rows[rows.split.isin(splits)][RUN_COLUMNS].reset_index(drop=True)

    def scans(self, kind: str) -> pd.DataFrame:
        """One row a scan of this kind, of all splits, sorted by scan_id, with its `row` in the index."""
        if kind not in self._scans:
            unit = "stimulus" if kind == "response" else "subject"
            rows = self.index_file.rows(schema.KIND_OF_SCAN[kind], list(dict.fromkeys([*RUN_COLUMNS, unit])))
            if self._split is not None:
                rows["split"] = rows[unit].map(self.split_of_unit).astype("string")
            self._scans[kind] = rows.sort_values("scan_id", ignore_index=True)
        return self._scans[kind]

    @cached_property
    def index_file(self) -> IndexFile:
        """The index for those who need little of it."""
        sha256 = self.manifest.tables[schema.INDEX]
        return IndexFile(opened_index(self.store, sha256=sha256, scratch=self.scratch))

    @cached_property
    def quality(self) -> pd.DataFrame:
        """One row a scan: frames, motion, DVARS, signal to noise, coverage, what was clipped and censored, and the
        split that the set was written with."""
        return self._table(schema.QUALITY)

    @cached_property
    def region_coverage(self) -> pd.DataFrame:
        """The measured share of every region, [scan, <atlas>/<label>], indexed by scan_id."""
        return self._table(schema.REGION_COVERAGE).set_index("scan_id")

    @property
    def max_censored_fraction(self) -> float:
        """Windows with more censored frames than this share are not drawn."""
        return float(self.manifest.preprocessing["max_censored_fraction"])

    @cached_property
    def cached_shards(self) -> dict[str, CachedFile]:
        """What a node's cache needs to know of every shard, by name."""
        return {shard.name: CachedFile(shard.name, shard.bytes, shard.sha256) for shard in self.manifest.shards}

    def frame_type(self, kind: str) -> Literal["int8", "float16"]:
        """How a frame of this kind is stored."""
        return self.manifest.preprocessing["storage"]["bold_type"] if kind == "bold" else "float16"

    def frame_width(self, kind: str) -> int:
        """Values of a frame of this kind: the space's voxels, or the regions of a series."""
        if kind != "parcels":
            return self.space.num_voxels
        series = self.index_file.rows(schema.PARCELS, ["size", "num_frames"])
        if series.empty:
            raise ShardError(f"{self.location} holds no region series; write a set with source.kinds=[parcels]")
        return int((series["size"][0] - schema.NPY_HEADER_BYTES) // (2 * series.num_frames[0]))  # float16

    def bold_preprocessing(self) -> BoldPreprocessing:
        """What a served model must do to a run so that it looks like those of this set."""
        recorded = self.manifest.preprocessing
        return BoldPreprocessing(
            cleaning=CleaningConfig(**recorded["cleaning"]),
            stored_as=self.frame_type("bold"),
            unknown_orientation=recorded["acceptance"]["unknown_orientation"],
            needs_confounds=bool(recorded["cleaning"]["confounds"]) or recorded["frames_dropped"] > 0,
        )

    @property
    def is_phantom(self) -> bool:
        """True when a program made the scans, as the set's name or notes say."""
        return any("phantom" in text.lower() for text in [self.manifest.name, *self.manifest.notes])

    def facts(self, kind: Kind) -> dict[str, str]:
        """What a reader must know of the scans of this kind, text by name."""
        runs, recorded = self.scans(kind), self.manifest.preprocessing
        sites = sorted({str(site) for site in runs.site if isinstance(site, str) and site})
        seconds = sorted({f"{each:g} s" for each in runs.repetition_time_s if each > 0})
        done = {name: value for name, value in recorded["cleaning"].items() if value} if kind == "bold" else {}
        return {
            "scans": f"{len(runs)} {kind}",
            "subjects": ", ".join(f"{split} {each.subject.nunique()}" for split, each in runs.groupby("split")),
            "sites": f"{len(sites)}: {', '.join(sites[:MAX_NAMED_SITES])}" if sites else "not stated",
            "repetition time": ", ".join(seconds) or "none",
            "space": f"{self.manifest.space['name']}, {self.manifest.space['num_voxels']} locations",
            "alignment": str(recorded["alignment"]),
            "preprocessing": ", ".join(f"{name}: {value}" for name, value in done.items()) or "none beyond resampling",
        }

    def needs_brain_mask(self, kind: str) -> bool:
        """True when scans of this kind were packed inside brain masks, so that a served scan needs one too."""
        return self.manifest.preprocessing["scans_with_brain_mask"][kind] > 0

    def _table(self, name: str) -> pd.DataFrame:
        return pd.read_parquet(io.BytesIO(self.store.read(name)))

    def _loaded(self, name: str, load: Callable[[Path], Loaded]) -> Loaded:
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / Path(name).name
            self.store.get_file(name, local)
            return load(local)


def split_conflicts(subjects: Mapping[str, pd.DataFrame]) -> list[str]:
    """What is wrong with the splits of sets used together: subjects that one set trains on and another holds out.

    `subjects` are the sets' subject tables, with a column split. Equal names are taken for one person: two people taken
    for one cost a message, one person taken for two would leak.
    """
    problems = []
    for (one, first), (other, second) in itertools.combinations(subjects.items(), 2):
        both = first["split"].to_frame("one").join(second["split"].rename("other"), how="inner")
        moved = both[both.one != both.other]
        if len(moved):
            named = ", ".join(
                f"{subject} ({row.one} in {one}, {row.other} in {other})"
                for subject, row in moved.head(MAX_NAMED_SUBJECTS).iterrows()
            )
            more = f" and {len(moved) - MAX_NAMED_SUBJECTS} more" if len(moved) > MAX_NAMED_SUBJECTS else ""
            problems.append(
                f"sets {one} and {other} split {len(moved)} of {len(both)} shared subjects differently: {named}{more}; "
                "choose one rule for both (data.split.rule=threshold or file), or write one of them again with the "
                "other's splits"
            )
    return problems
