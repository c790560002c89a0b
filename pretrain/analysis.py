"""Analyse a finished pretraining run.

How well each voxel is predicted, what each region contributes to the prediction, and how well site and repetition time
can be read from the embedding.

Example (the command line of the run, with the number of windows to analyse):

  python -m pretrain.analysis kind=bold shards=out/shards run.folder=out/runs/bold model=tiny \\
      report.contribution.num_samples=32 report.probes.num_samples=512

Required: kind, shards and run.folder of the run, and whatever else its command line changed

Runs in this process. Writes files to <run.folder>/report and to the run's artifacts in MLflow, and numbers to `report`
in <run.folder>/metrics.json.
"""

from configs.entry import Command, main


def command() -> Command:
    from pretrain.masked.analysis import analyse_again, plan
    from pretrain.masked.config import PretrainConfig
    from pretrain.masked.planning import needs
    from pretrain.masked.validation import validate

    return Command(PretrainConfig, analyse_again, plan, validate, needs)


if __name__ == "__main__":
    main("pretrain.analysis", __doc__, command)
