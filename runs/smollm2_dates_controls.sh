#!/bin/sh
# What is it that helps SmolLM2-135M with dates? Three seeds of every control but one, and a table.
# TIME. A stage whose output exists is skipped, and one that was stopped goes on. Memory: 6 GB.
set -e
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
[ -n "$DTYPE" ] || DTYPE="$(grep -qsm1 -e avx512_bf16 -e amx_bf16 /proc/cpuinfo && echo bfloat16 \
  || echo float32)"
from() { [ -f "$1/latest" ] && echo resume || echo "$2"; }      # a run that was stopped goes on
out=out/dates

# Base and Quiet-STaR (12 minutes a seed)
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

# Score 500 held-out lines with each model, of held-out and of seen combinations (half a minute each)
for seed in 0 1 2; do
  for name in base plain filler no-reinforce thinking; do
    [ -d $out/$name-$seed ] || continue
    [ -f $out/json/$seed-$name.json ] || python eval.py --checkpoint=$out/$name-$seed --texts=500 \
      --data=data/dates/without_reasoning --task=dates --seq_len=26 --batch_size=50 \
      --out=$out/json/$seed-$name.json > /dev/null
    [ -f $out/json/$seed-$name-seen.json ] || python eval.py --checkpoint=$out/$name-$seed \
      --data=data/dates/seen_combinations --texts=500 --task=dates --seq_len=26 --batch_size=50 \
      --out=$out/json/$seed-$name-seen.json > /dev/null
  done

  # Controls: the thoughts of other lines, and the base that reasons aloud, the ceiling
  [ -f $out/json/$seed-shuffled.json ] || python eval.py --checkpoint=$out/thinking-$seed \
    --data=data/dates/without_reasoning --texts=500 --task=dates --seq_len=26 --batch_size=50 \
    --thoughts=shuffled --out=$out/json/$seed-shuffled.json > /dev/null
  [ -f $out/json/$seed-base-aloud.json ] || python eval.py --checkpoint=$out/base-$seed \
    --data=data/dates/without_reasoning --texts=500 --task=dates --seq_len=26 --batch_size=50 \
    --thoughts=aloud --thought_len=9 --out=$out/json/$seed-base-aloud.json > /dev/null
  [ -f $out/json/$seed-base-aloud-seen.json ] || python eval.py --checkpoint=$out/base-$seed \
    --data=data/dates/seen_combinations --texts=500 --task=dates --seq_len=26 --batch_size=50 \
    --thoughts=aloud --thought_len=9 --out=$out/json/$seed-base-aloud-seen.json > /dev/null
done
python -m tools.figures --kind=table --input="$(ls $out/json/*.json | paste -sd,)"
python -m tools.figures --kind=learning --out=$out/learning.png --chance=0.143 \
  --input="$(ls $out/thinking-?/log.jsonl | paste -sd,)" \
  --plain="$(ls $out/plain-?/log.jsonl | paste -sd,)"
