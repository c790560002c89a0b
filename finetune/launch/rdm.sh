#!/usr/bin/env bash
# From images and the responses to them to a registered model of their dissimilarities with its report.
#
#   SHARDS=out/algonauts/subj01 ENCODER=openai/clip-vit-base-patch32 REGION=V1 bash finetune/launch/rdm.sh
#
# On a cluster every place is one that all nodes reach, and SUBMIT=1 sends the command as a Ray job:
#
#   SUBMIT=1 SHARDS=s3://brains/algonauts/subj01 OUT=s3://runs/rdm TRACKING=http://mlflow:5000 \
#       bash finetune/launch/rdm.sh cluster=ray cluster.num_workers=4
#
# Arguments are overrides of python -m finetune (--validate and --plan too). The same command resumes where it stopped.
# shellcheck disable=SC2086  # LAUNCH is several words
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

SHARDS=${SHARDS:?a shard set of responses to images, e.g. SHARDS=out/algonauts/subj01}
ENCODER=${ENCODER:-openai/clip-vit-base-patch32} # or a local folder, vgg16:<file.safetensors>, cnn, pixels
REGION=${REGION:-all}                            # or V1, prf-visualrois, streams, ...
OUT=${OUT:-out/rdm}                              # checkpoints, report.html, metrics.json and the bundle
TRACKING=${TRACKING:-sqlite:///out/mlflow.db}    # runs and registry
NAME=${NAME:-callosum-rdm}                       # registered as models:/$NAME@candidate
LAUNCH=${LAUNCH:-${SUBMIT:+bash cluster/submit.sh}}  # a Ray job that is checked, followed, and taken up again
LAUNCH=${LAUNCH:-python -m}                      # this machine, or the Ray at RAY_ADDRESS; echo: only show commands

$LAUNCH finetune task=rdm_prediction shards="$SHARDS" encoder="$ENCODER" task.region="$REGION" run.name="$NAME" \
    run.folder="$OUT" register.name="$NAME" tracking="$TRACKING" "$@"
