"""Turns a folder of brain scans into a verified shard set that training reads.

Purpose: find BOLD runs and T1w images in a BIDS derivatives folder (such as fMRIPrep's), bring them onto one brain
space, and write them as WebDataset tars with an index and a manifest. Run it again after a stop: it goes on.

Example:
  python -m data_sharding source.root=out/phantom out=out/shards space=mni6 atlas=template

Required: source.root=<BIDS derivatives folder>  out=<folder of the new set>
"""

from __future__ import annotations

from configs.entry import main
from data_sharding.build import build
from data_sharding.config import ShardingConfig, validate_config
from data_sharding.prepare import describe


def run() -> None:
    """Runs the command line."""
    main(
        part="data_sharding",
        schema=ShardingConfig,
        help_text=__doc__ or "",
        run=build,
        validate=validate_config,
        plan=describe,
    )


if __name__ == "__main__":
    run()
