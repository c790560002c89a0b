"""Pretrain an encoder on unlabelled brain scans.

Regions are hidden, their voxels predicted, and the encoder is registered.

Example (two workers on this machine, on a shard set written by `python -m data_sharding`):

  python -m pretrain kind=bold shards=out/shards run.folder=out/runs/bold model=tiny engine=zero2 cluster=local

Required: kind=bold|t1  shards=<shard set>  run.folder=<folder of the run>
Joint:    "sets={rest: {kind: bold, shards: <set>, weight: 0.7}, anat: {kind: t1, shards: <set>, weight: 0.3}}"
          instead of kind and shards: one encoder for sets of any kind, resolution and repetition time
Groups:   model=tiny|small|base|large  masking=region|random|tube|future  engine=plain|zero0..zero3
          cluster=inline|local|ray  experiment=quick_bold|demo_bold|demo_t1

Often changed:
  train.steps=20000                    optimizer steps
  train.optimizer.learning_rate=0.0005 its peak; train.schedule.* is its course
  data.batch_size=64                   windows per step, over all ranks
  data.micro_batch_size=8              windows per forward pass of one rank: lower it when memory is short
  data.num_workers=1                   loader processes per rank
  windows.bold.window_frames=20        frames of one sample
  masking.hidden_share=0.5             share of the brain that is hidden
  cluster.num_workers=2                ranks; with cluster.use_gpu=true a GPU each
  train.checkpoint.every_steps=1000    the most that a failure can cost
  tracking=sqlite:///out/mlflow.db

Run the same command again to resume. Results: <run.folder>/metrics.json (r2 of hidden voxels about the training mean,
beside the mean, neighbour, drift and ridge baselines) and <run.folder>/bundle.
"""

from configs.entry import Command, main


def command() -> Command:
    from cluster.ray.launch import run_on_workers
    from pretrain.masked.config import PretrainConfig
    from pretrain.masked.planning import following, needs, plan
    from pretrain.masked.study import train
    from pretrain.masked.validation import validate
    from training.study import summary

    def run(config: PretrainConfig) -> None:
        numbers = run_on_workers(train, config, cluster=config.cluster, name=config.run.name)
        print(summary(numbers, folder=config.run.folder, following=following(config, numbers)))

    return Command(PretrainConfig, run, plan, validate, needs)


if __name__ == "__main__":
    main("pretrain", __doc__, command)
