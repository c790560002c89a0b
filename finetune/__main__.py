r"""Adapt a pretrained model to a question about people or images.

It ends with an evaluated, registered model and a report.

Example (two workers on this machine, the shards of `python -m data_sharding`, the backbone of `python -m pretrain`):

  python -m finetune task=adhd_classification shards=out/shards encoder=models:/callosum-bold@candidate \
      run.folder=out/runs/adhd

Required: shards=<shard set>  encoder=<models:/name@alias, or a bundle folder>  run.folder=<where the run lives>
Groups:   task=adhd_classification|contrastive_alignment|rdm_prediction  engine=plain|zero0..zero3
          cluster=inline|local|ray  experiment=quick_adhd|demo_adhd|rdm_best|...

Often changed:
  train.steps=60                       optimizer steps
  train.optimizer.learning_rate=0.0002   of the encoder; the head's is task.head_learning_rate_scale times it
  task.label.column=diagnosis          the column of the participants' table that is predicted
  task.num_windows=24                  windows of the backbone per prediction
  task.unfreezing.first_layer_opens_at_step=20  null: the encoder stays frozen
  data.batch_size=16                   runs per step, over all ranks
  data.split.rule=set                  or fold, site, stratified, file: who is trained on and who is tested
  bootstrap.num_resamples=2000         of the intervals
  cluster.num_workers=2                ranks; with cluster.use_gpu=true a GPU each
  tracking=sqlite:///out/mlflow.db

Run the same command again to resume. Results: <run.folder>/report.html, metrics.json (every number with its
interval, beside the baselines), scores.csv and bundle/.
Then ask the model about scans:
  python -m finetune.predict registered_model=models:/finetune-adhd_classification@candidate scans=[...]
"""

from configs.entry import Command, main


def command() -> Command:
    from cluster.ray.launch import run_on_workers
    from finetune.config import FinetuneConfig
    from finetune.planning import following, needs, plan, validate
    from finetune.train import train
    from training.study import summary

    def run(config: FinetuneConfig) -> None:
        numbers = run_on_workers(train, config, cluster=config.cluster, name=config.run.name)
        print(summary(numbers, folder=config.run.folder, following=following(config, numbers)))

    return Command(FinetuneConfig, run, plan, validate, needs)


if __name__ == "__main__":
    main("finetune", __doc__, command)
