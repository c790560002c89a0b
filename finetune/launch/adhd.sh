#!/usr/bin/env bash
# From shards and a registered backbone to a registered classifier of ADHD with its report.
#
#   SHARDS=out/demo/shards ENCODER=models:/callosum-bold@candidate bash finetune/launch/adhd.sh experiment=demo_adhd
#
# On a cluster every place is one that all nodes reach, and SUBMIT=1 sends the command as a Ray job:
#
#   SUBMIT=1 SHARDS=s3://brains/adhd200 OUT=s3://runs/adhd TRACKING=http://mlflow:5000 \
#       bash finetune/launch/adhd.sh cluster=ray cluster.num_workers=4 task.atlas=aal3
#
# Arguments are overrides of python -m finetune (--validate and --plan too). The same command resumes where it stopped.
# shellcheck disable=SC2086  # LAUNCH is several words
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

SHARDS=${SHARDS:?a shard set with BOLD runs and a diagnosis, e.g. SHARDS=out/demo/shards}
ENCODER=${ENCODER:-models:/callosum-bold@candidate}
OUT=${OUT:-out/adhd}                             # checkpoints, report.html, metrics.json and the bundle
TRACKING=${TRACKING:-sqlite:///out/mlflow.db}    # runs and registry
NAME=${NAME:-callosum-adhd}                      # registered as models:/$NAME@candidate
LAUNCH=${LAUNCH:-${SUBMIT:+bash cluster/submit.sh}}  # a Ray job that is checked, followed, and taken up again
LAUNCH=${LAUNCH:-python -m}                      # this machine, or the Ray at RAY_ADDRESS; echo: only show commands

$LAUNCH finetune task=adhd_classification shards="$SHARDS" encoder="$ENCODER" run.name="$NAME" run.folder="$OUT" \
    register.name="$NAME" tracking="$TRACKING" "$@"
