#!/usr/bin/env bash
# From two shard sets of the same people, T1s and runs, to an aligned T1 embedder with its report.
#
#   SHARDS=out/mica_t1 FUNCTION=out/mica_rest bash finetune/launch/alignment.sh
#
# With pretrained encoders: ENCODER=models:/callosum-t1@candidate, and for the runs
# FUNCTION_ENCODER=models:/callosum-bold@candidate. On a cluster every place is one that all nodes reach, and SUBMIT=1
# sends the command as a Ray job.
#
# Arguments are overrides of python -m finetune (--validate and --plan too). The same command resumes where it stopped.
# shellcheck disable=SC2086  # LAUNCH and NETWORKS are several words
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

SHARDS=${SHARDS:?a shard set with T1 images, e.g. SHARDS=out/mica_t1}
FUNCTION=${FUNCTION:-$SHARDS}                    # runs or region series of the same people
ENCODER=${ENCODER:-scratch}                      # of the T1s
FUNCTION_ENCODER=${FUNCTION_ENCODER:-scratch}    # of the runs
OUT=${OUT:-out/alignment}                        # checkpoints, report.html, metrics.json and the bundle
TRACKING=${TRACKING:-sqlite:///out/mlflow.db}    # runs and registry
NAME=${NAME:-callosum-alignment}                 # registered as models:/$NAME@candidate
LAUNCH=${LAUNCH:-${SUBMIT:+bash cluster/submit.sh}}  # a Ray job that is checked, followed, and taken up again
LAUNCH=${LAUNCH:-python -m}                      # this machine, or the Ray at RAY_ADDRESS; echo: only show commands

NETWORKS=""                                      # a registered encoder brings its own network
[ "$ENCODER" = scratch ] || NETWORKS="task.structure.network=null"
[ "$FUNCTION_ENCODER" = scratch ] || NETWORKS="$NETWORKS task.function.network=null"

$LAUNCH finetune task=contrastive_alignment shards="$SHARDS" encoder="$ENCODER" task.function.shards="$FUNCTION" \
    task.function.encoder="$FUNCTION_ENCODER" $NETWORKS run.name="$NAME" run.folder="$OUT" register.name="$NAME" \
    tracking="$TRACKING" "$@"
