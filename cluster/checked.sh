#!/usr/bin/env bash
# One command on a cluster, preceded by the check that the cluster can finish it; the same words for both:
#
#   bash cluster/checked.sh pretrain kind=bold shards=s3://brains/shards run.folder=s3://runs/bold cluster=ray ...
#
# The job of specs/rayjob.yaml, and what specs/slurm.sbatch is given to run.
set -euo pipefail
python="${PYTHON:-python}"
"$python" -m cluster.preflight "$@"
exec "$python" -m "$@"
