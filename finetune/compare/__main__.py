r"""Compare how well several encoders answer a question.

It ends with verdicts, a table and a figure.

Example (frozen probe and full fine-tuning of each, three seeds, on the same splits):

  python -m finetune.compare encoders=[models:/bold-random@candidate,models:/bold-region@candidate] \
      shards=out/shards task=adhd_classification run.folder=out/runs/compare

With one encoder a pretraining seed:  encoders='{random:[models:/r0@x,models:/r1@x],region:[models:/g0@x,models:/g1@x]}'

Required: encoders=<list, or lists by arm>  shards=<shard set>  run.folder=<where the cells and the result live>
Also:     encoder=<arm the others are compared with>  seeds=[0,1,2]  metric=<one of the task's>  bootstrap.*
          and everything of python -m finetune: task, engine, cluster, experiment, train.*, data.*

Every cell (encoder, mode, seed) chooses on validation and is scored on the test split once. Intervals are over seeds
and subjects (finetune/compare/paired.py says how), corrected for the number of pairs.
Run the same command again to resume. Results: <run.folder>/comparison.md, .csv, .png and cells.csv, and an MLflow run.
"""

from configs.entry import Command, main


def command() -> Command:
    from finetune.compare.planning import needs, plan, run, validate
    from finetune.config import CompareConfig

    return Command(CompareConfig, run, plan, validate, needs)


if __name__ == "__main__":
    main("finetune.compare", __doc__, command)
