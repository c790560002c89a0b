#!/usr/bin/env bash
# The region-aware paper's experiment as one command: does it matter which half of the brain a backbone has to guess?
#
#   SHARDS=out/demo/shards bash pretrain/launch/region_vs_random.sh
#
# 1. pretrains one backbone for every arm and seed: same shards, same steps, same seeds, equally many tokens hidden;
# 2. adapts every backbone to ADHD, as a frozen probe and whole, with every fine-tuning seed, on the same splits;
# 3. prints what may be said of each arm less the first, with intervals over seeds and subjects: often "no difference".
#
# On a cluster every place is one that all nodes reach, and SUBMIT=1 sends each command as a Ray job:
#
#   SUBMIT=1 SHARDS=s3://brains/adhd200 OUT=s3://runs/masks TRACKING=http://mlflow:5000 \
#       PRETRAIN="model=base cluster=ray cluster.num_workers=16" FINETUNE="cluster=ray cluster.num_workers=4" \
#       bash pretrain/launch/region_vs_random.sh
#
# Running it again resumes where it stopped: a finished backbone is not trained again, nor a finished cell scored again.
# So other overrides need another OUT and NAME. Several at once, each with some of ARMS and SEEDS, share the pretraining.
# Windows of one tubelet (windows.bold) make tube and random the same: give them two or more.
# shellcheck disable=SC2086  # PRETRAIN, FINETUNE and LAUNCH are several words each
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

SHARDS=${SHARDS:?a shard set with BOLD runs and a diagnosis, e.g. SHARDS=out/demo/shards}
OUT=${OUT:-out/region_vs_random}                 # backbones, cells and the result
TRACKING=${TRACKING:-sqlite:///out/mlflow.db}    # runs and registry
NAME=${NAME:-masks}                              # backbones are registered as $NAME-<arm>-<seed>
ARMS=${ARMS:-random tube region}                 # configs/masking/; the first is what the others are compared with
SEEDS=${SEEDS:-0 1 2}                            # of pretraining; with fewer than three almost nothing can be shown
FINETUNE_SEEDS=${FINETUNE_SEEDS:-0 1 2}          # averaged for every backbone
HIDDEN=${HIDDEN:-0.5}                            # share of all tokens: random reaches any, region what the atlas covers
PRETRAIN=${PRETRAIN:-}                           # more overrides of python -m pretrain, e.g. experiment=demo_bold
FINETUNE=${FINETUNE:-}                           # and of python -m finetune.compare, e.g. experiment=demo_adhd
LAUNCH=${LAUNCH:-${SUBMIT:+bash cluster/submit.sh}}  # a Ray job that is checked, followed, and taken up again
LAUNCH=${LAUNCH:-python -m}                      # this machine, or the Ray at RAY_ADDRESS; echo: only show commands

# shellcheck disable=SC2016  # ${...} are for the command: it fills them in for every backbone
$LAUNCH training.grid pretrain kind=bold $PRETRAIN shards="$SHARDS" masking="${ARMS// /,}" \
    masking.hidden_share="$HIDDEN" train.seed="${SEEDS// /,}" data.seed='${train.seed}' \
    run.name="$NAME"'-${masking.kind}-${train.seed}' run.folder="$OUT"'/pretrain/${masking.kind}-${train.seed}' \
    register.names.bold='${run.name}' register.alias=candidate tracking="$TRACKING"

ENCODERS=""
for arm in $ARMS; do
    OF_ARM=$(printf ",models:/$NAME-$arm-%s@candidate" $SEEDS)
    ENCODERS+="${ENCODERS:+,}$arm:[${OF_ARM:1}]"
done

$LAUNCH finetune.compare $FINETUNE encoders="{$ENCODERS}" seeds="[${FINETUNE_SEEDS// /,}]" shards="$SHARDS" \
    task=adhd_classification run.name="$NAME" run.folder="$OUT/compare" tracking="$TRACKING"
