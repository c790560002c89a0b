#!/usr/bin/env bash
# The whole chain on a laptop, on phantom scans, over the public commands: nothing here that a user could not type.
#   make demo                        installs first
#   OUT=elsewhere examples/demo.sh   with the virtual environment active
# Running it again resumes where it stopped; remove $OUT to start afresh.
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-out/demo}
RUNS=sqlite:///$OUT/mlflow.db
mkdir -p "$OUT"

stage() { # stage <name> <command...>: run a command and note how long it took
    local name=$1 start=$SECONDS
    shift
    printf '\n=== %s\n$ %s\n' "$name" "$*"
    "$@"
    echo "$name $((SECONDS - start))" >>"$OUT/seconds.txt"
}

# 1. Phantom scans: a BIDS derivatives folder of NIfTI files, three sites, an ADHD effect in limbic and cerebellar coupling.
stage phantom python -m data_sharding.phantom out="$OUT/bids"

# 2. Scans -> shards: WebDataset tars, an index and a manifest; 104 subjects are kept for the test. Then every byte again.
stage shards python -m data_sharding source.root="$OUT/bids" out="$OUT/shards" space=mni6 dataset=phantom
stage verify python -m data_sharding.verify "$OUT/shards"

# 3. Shards -> two registered backbones: DeepSpeed ZeRO 2 on two workers, half the brain hidden region by region.
for kind in bold t1; do
    stage "pretrain_$kind" python -m pretrain experiment=demo_$kind shards="$OUT/shards" \
        run.folder="$OUT/pretrain-$kind" run.scratch="$OUT/scratch" tracking="$RUNS"
done

# 4. Backbone -> registered classifier and report: the head first, then the encoder from its top block down.
stage finetune python -m finetune experiment=demo_adhd task=adhd_classification shards="$OUT/shards" \
    encoder=models:/callosum-bold@candidate run.folder="$OUT/adhd" run.scratch="$OUT/scratch" tracking="$RUNS"

# 5. The registered classifier, loaded back, on the NIfTI files of eight test subjects.
SUBJECTS=$(python -c "
import pandas
subjects = pandas.read_parquet('$OUT/shards/subjects.parquet')
held_out = subjects['subject_id'][subjects['split'] == 'test'][:8]
print(','.join(f'$OUT/bids/sub-{subject}' for subject in held_out))")
stage predict python -m finetune.predict registered_model=models:/callosum-adhd@candidate tracking="$RUNS" \
    scans="[$SUBJECTS]" out="$OUT/predictions.csv"

python examples/demo_summary.py "$OUT"
