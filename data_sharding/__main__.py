"""Turns a folder of brain scans into a verified shard set that training reads.

Purpose: find the scans of a data set (BIDS derivatives such as fMRIPrep's, ADHD-200, ...), bring them onto one brain
space, and write them as WebDataset tars with an index and a manifest. Run it again after a stop: it goes on.

Example:
  python -m data_sharding source.root=out/phantom out=out/shards space=mni6 atlas=template

Required: source.root=<folder of the scans>  out=<folder of the new set>
Groups:   dataset=bids|adhd200|mica_mics|hcp_motor|algonauts2023 (docs/datasets.md)
          space=mni2|mni3|mni4|mni6|mni12|t1_cube128|fsaverage5|fslr32k|algonauts2023
          registration=none|affine|nonlinear  cluster=local|ray
"""

from __future__ import annotations

from configs.entry import main
from data_sharding.config import ShardingConfig, validate_config
from data_sharding.write.build import build
from data_sharding.write.prepare import describe


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
