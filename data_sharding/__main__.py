"""Turn a folder of brain scans into a shard set that training reads.

Find the scans of a data set (BIDS derivatives such as fMRIPrep's, ADHD-200, ...), bring them onto one brain
space, and write them as WebDataset tars with an index and a manifest. Run the same command again to resume.

Example:
  python -m data_sharding source.root=out/phantom out=out/shards space=mni6 atlas=template

Required: source.root=<folder of the scans>  out=<folder of the new set>
Groups:   dataset=bids|adhd200|mica_mics|hcp_motor|algonauts2023 (docs/datasets.md)
          space=mni2|mni3|mni4|mni6|mni12|t1_cube128|fsaverage5|fslr32k|algonauts2023
          registration=none|affine|nonlinear  cluster=local|ray

Often changed:
  source.kinds=[bold,t1]               which scans are taken
  atlas=template                       or aal3, a label NIfTI, a list of them, null
  splits.rule=threshold                how subjects are divided into train, validation and test
  preprocessing.cleaning.*             confounds, filter, censoring of runs
  acceptance.min_frames=16             and the other limits of what is accepted
  storage.bold_type=int8               or float16
  privacy.key_file=<file>              pseudonyms instead of subject ids
  cluster.num_workers=2                processes that pack
"""

from configs.entry import Command, main


def command() -> Command:
    from cluster.config import Needs
    from data_sharding.config import ShardingConfig, validate_config
    from data_sharding.hints import after_set
    from data_sharding.write.build import build
    from data_sharding.write.prepare import describe

    def run(config: ShardingConfig) -> None:
        if following := after_set(build(config), config.out):
            print(following)

    def needs(config: ShardingConfig) -> Needs:
        return Needs(results=config.out, cluster=config.cluster, inputs={config.source.root: None})

    return Command(ShardingConfig, run, describe, validate_config, needs)


if __name__ == "__main__":
    main("data_sharding", __doc__, command)
