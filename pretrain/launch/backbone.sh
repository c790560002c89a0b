#!/usr/bin/env bash
# From shards to a registered backbone, of 4D fMRI (KIND=bold) or of T1 images (KIND=t1).
#
#   SHARDS=out/demo/shards bash pretrain/launch/backbone.sh experiment=demo_bold
#
# On a cluster every place is one that all nodes reach, and SUBMIT=1 sends the command as a Ray job:
#
#   SUBMIT=1 KIND=t1 SHARDS=s3://brains/adhd200 OUT=s3://runs/t1 TRACKING=http://mlflow:5000 \
#       bash pretrain/launch/backbone.sh model=base engine=zero2 cluster=ray cluster.num_workers=16
#
# Arguments are overrides of python -m pretrain (--validate and --plan too). The same command resumes where it stopped.
# shellcheck disable=SC2086  # LAUNCH is several words
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

SHARDS=${SHARDS:?a shard set, e.g. SHARDS=out/demo/shards}
KIND=${KIND:-bold}
OUT=${OUT:-out/backbone-$KIND}                   # checkpoints, metrics.json and the bundle
TRACKING=${TRACKING:-sqlite:///out/mlflow.db}    # runs and registry
NAME=${NAME:-callosum-$KIND}                     # registered as models:/$NAME@candidate
LAUNCH=${LAUNCH:-${SUBMIT:+bash cluster/submit.sh}}  # a Ray job that is checked, followed, and taken up again
LAUNCH=${LAUNCH:-python -m}                      # this machine, or the Ray at RAY_ADDRESS; echo: only show commands

$LAUNCH pretrain kind="$KIND" shards="$SHARDS" run.name="$NAME" run.folder="$OUT" register.names."$KIND"="$NAME" \
    tracking="$TRACKING" "$@"
