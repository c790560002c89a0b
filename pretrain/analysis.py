"""Look at a finished pretraining run: maps of how well each voxel is guessed, what each region contributes, and how
much of site and repetition time is in the embedding.

Example (the same command line as the run's, with how many windows to spend):

  python -m pretrain.analysis kind=bold shards=out/shards run.folder=out/runs/bold model=tiny \\
      report.contribution.num_samples=32 report.probes.num_samples=512

Runs in this process. Files go to <run.folder>/report and to the run's artifacts in MLflow, numbers to `report` in
<run.folder>/metrics.json.
"""

from configs.entry import main
from pretrain.masked.config import PretrainConfig
from pretrain.masked.validation import validate
from pretrain.report.runs import analyse_again, plan

if __name__ == "__main__":
    main(
        part="pretrain", schema=PretrainConfig, help_text=__doc__ or "", run=analyse_again, validate=validate, plan=plan
    )
