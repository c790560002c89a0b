"""MICA-MICs: T1w and rest runs of its BIDS tree, one T1w per session; source.kinds=[bold,parcels] adds region series.

T1w suit the space t1_cube128 as they are; rest needs derivatives in the space's template, or registration.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from brain_models.space import BrainSpace
from data_sharding.scans import Scan, SourceContents
from data_sharding.schema import Refusal
from data_sharding.sources import SourceConfig, bids, parse_options

RAW_FOLDER = "rawdata"
TASKS = ["rest"]


@dataclass
class Options:
    """The options of this data set only."""

    sessions: list[str] | None  # labels without ses-; null uses all


def find(config: SourceConfig, space: BrainSpace, *, accepts_raw: bool) -> SourceContents:
    """Rest runs and one T1w per session: the one without a run entity, or else of the first run; others are refused."""
    options = parse_options(config, Options)
    root = Path(config.root)
    top = root / RAW_FOLDER if (root / RAW_FOLDER).is_dir() else root
    rest_only = replace(config, tasks=config.tasks or TASKS)
    tree_options = bids.Options(echo=None, sessions=options.sessions)
    contents = bids.find_in_tree(top, rest_only, tree_options, space=space, accepts_raw=accepts_raw)
    by_session: dict[tuple[str, str], list[Scan]] = defaultdict(list)
    for scan in contents.scans:
        if scan.kind == "t1":
            by_session[scan.subject, scan.session].append(scan)
    for scans in by_session.values():
        scans.sort(key=lambda scan: (scan.run, scan.scan_id))
        for scan in scans[1:]:
            reason = (
                f"{scan.path}: the T1w used of this session is {Path(scans[0].path).name}; remove it to use this one"
            )
            contents.refused.append(Refusal(scan.scan_id, scan.path, reason))
            contents.scans.remove(scan)
    return contents
