#!/bin/sh
# What is it that helps SmolLM2-135M with dates? Three seeds of every control but one, and a table.
# Not yet run to its end: two hours and a half on two cores, estimated from its steps. A stage whose
# output exists is skipped, and one that was stopped goes on. Memory: 6 GB.
set -e
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
[ -n "$DTYPE" ] || DTYPE="$(grep -qsm1 -e avx512_bf16 -e amx_bf16 /proc/cpuinfo && echo bfloat16 \
  || echo float32)"
from() { [ -f "$1/latest" ] && echo resume || echo "$2"; }      # a run that was stopped goes on
out=out/dates

# Base and Quiet-STaR (12 minutes a seed, like all times an estimate)
for seed in 0 1 2; do
  SEED=$seed DTYPE=$DTYPE sh runs/smollm2_dates.sh
done

# Controls: plain training goes on (2 minutes a seed); without REINFORCE (10 minutes a seed)
for seed in 0 1 2; do
  [ -d $out/plain-$seed/step-000036 ] || python train.py --objective=plain --seed=$seed \
    --init_from="$(from $out/plain-$seed $out/base-$seed)" --out=$out/plain-$seed --dtype=$DTYPE \
    --data=data/dates/without_reasoning --steps=36 --batch_size=16 --seq_len=26 --lr=2e-5 \
    --min_lr=2e-6 --warmup=5 --weight_decay=0 --eval_task=dates --eval_every=12 --eval_texts=64 \
    --save_every=12
done
for seed in 0 1 2; do
  [ -d $out/no-reinforce-$seed/step-000036 ] || python train.py --seed=$seed --policy_weight=0 \
    --init_from="$(from $out/no-reinforce-$seed $out/base-$seed)" --out=$out/no-reinforce-$seed \
    --dtype=$DTYPE --data=data/dates/without_reasoning --steps=36 --batch_size=16 --grad_accum=2 \
    --seq_len=26 --lr=2e-5 --min_lr=2e-6 --warmup=5 --weight_decay=0 \
    --positions=uncertain --think_share=0.08 --thought_len=9 --n_true=1 --n_thoughts=4 \
    --policy_temperature=1 --marker_lr=12 --mixing_lr=10 \
    --eval_task=dates --eval_every=12 --eval_texts=64 --save_every=12
done

# Control: filler tokens, seed 0 (4 minutes)
[ -d $out/filler-0/step-000036 ] || python train.py --seed=0 --filler --policy_weight=0 \
  --init_from="$(from $out/filler-0 $out/base-0)" --out=$out/filler-0 \
  --dtype=$DTYPE --data=data/dates/without_reasoning --steps=36 --batch_size=16 --grad_accum=2 \
  --seq_len=26 --lr=2e-5 --min_lr=2e-6 --warmup=5 --weight_decay=0 \
  --positions=uncertain --think_share=0.08 --thought_len=9 --n_true=1 --n_thoughts=1 \
  --policy_temperature=1 --marker_lr=12 --mixing_lr=10 \
  --eval_task=dates --eval_every=12 --eval_texts=64 --save_every=12

# Score 500 held-out lines with each model, and three of them on seen combinations; the thoughts of
# other lines; the bases that reason aloud, the ceiling (half a minute each)
score() {                             # name of the result, run, corpus, other options
  [ -f $out/json/$1.json ] || python eval.py --checkpoint=$out/$2 --data=data/dates/$3 --texts=500 \
    --task=dates --seq_len=26 --batch_size=50 --out=$out/json/$1.json $4 $5 > /dev/null
}
for seed in 0 1 2; do
  for name in base plain no-reinforce thinking; do
    score $seed-$name $name-$seed without_reasoning
  done
  for name in plain thinking; do
    score $seed-$name-seen $name-$seed seen_combinations
  done
  score $seed-shuffled thinking-$seed without_reasoning --thoughts=shuffled
  score $seed-base-aloud base-$seed without_reasoning --thoughts=aloud --thought_len=9
  score $seed-base-aloud-seen base-$seed seen_combinations --thoughts=aloud --thought_len=9
done
score 0-filler filler-0 without_reasoning
python -m tools.figures --kind=table --input="$(ls $out/json/*.json | paste -sd,)"
python -m tools.figures --kind=learning --out=$out/learning.png --chance=0.143 \
  --input="$(ls $out/thinking-?/log.jsonl | paste -sd,)" \
  --plain="$(ls $out/plain-?/log.jsonl | paste -sd,)"
