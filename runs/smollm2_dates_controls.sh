#!/bin/sh
# What is it that helps SmolLM2-135M with dates? Three seeds of every control but one, two of them
# side by side with a thread each; a table and a figure. 100 minutes on two cores with bf16 products,
# 10 GB of memory. A stage whose output exists is skipped, and one that was stopped goes on.
set -e
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
[ -n "$DTYPE" ] || DTYPE="$(grep -qsm1 -e avx512_bf16 -e amx_bf16 /proc/cpuinfo && echo bfloat16 \
  || echo float32)"
export DTYPE
out=out/dates

# 36 more steps on lines without reasoning: base, run, seed, other options
go_on() {
  base=$out/$1-$3 run=$out/$2-$3 seed=$3; shift 3
  from=$([ -f $run/latest ] && echo resume || echo $base)       # a run that was stopped goes on
  [ -d $run/step-000036 ] || python train.py --seed=$seed --init_from=$from --out=$run \
    --dtype=$DTYPE --data=data/dates/without_reasoning --steps=36 --batch_size=16 --seq_len=26 \
    --lr=2e-5 --min_lr=2e-6 --warmup=5 --weight_decay=0 \
    --eval_task=dates --eval_every=12 --eval_texts=64 --save_every=12 "$@"
}
go_on_thinking() {
  go_on "$@" --grad_accum=2 --positions=uncertain --think_share=0.08 --thought_len=9 --n_true=1 \
    --policy_temperature=1 --marker_lr=12 --mixing_lr=10
}

# 500 held-out lines: result, run, seed, corpus, other options
score() {
  json=$out/json/$3-$1.json run=$out/$2-$3 data=data/dates/$4; shift 4
  [ -f $json ] || python eval.py --checkpoint=$run --data=$data --texts=500 --task=dates \
    --seq_len=26 --batch_size=50 --out=$json "$@" > /dev/null
}

one_seed() {
  # Base and Quiet-STaR
  SEED=$1 sh runs/smollm2_dates.sh

  # Controls: plain training goes on; without REINFORCE
  go_on base plain $1 --objective=plain
  go_on_thinking base no-reinforce $1 --n_thoughts=4 --policy_weight=0

  # Scores with greedy thoughts, and with sampled ones; with the thoughts of other lines
  for name in base plain no-reinforce thinking; do
    score $name $name $1 without_reasoning
  done
  for name in no-reinforce thinking; do
    score $name-sampled $name $1 without_reasoning --thoughts=sampled
  done
  score shuffled thinking $1 without_reasoning --thoughts=shuffled

  # The base that counts aloud; combinations of the training lines
  for how in own sampled; do
    score base-aloud-$how base $1 without_reasoning --aloud --thought_len=9 --thoughts=$how
  done
  score plain-seen plain $1 seen_combinations
  score thinking-seen thinking $1 seen_combinations
}

[ -f data/dates/seen_combinations/meta.json ] || python -m tasks.dates
one_seed 0 & first=$!
one_seed 1
wait $first
one_seed 2

# Control: filler tokens, seed 0
go_on_thinking base filler 0 --filler --n_thoughts=1 --policy_weight=0
score filler filler 0 without_reasoning

python -m tools.figures --kind=table --input="$(ls $out/json/*.json | paste -sd,)"
python -m tools.figures --kind=learning --out=$out/learning.png --chance=0.143 \
  --input="$(ls $out/thinking-?/log.jsonl | paste -sd,)" \
  --plain="$(ls $out/plain-?/log.jsonl | paste -sd,)"
