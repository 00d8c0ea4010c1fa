#!/bin/sh
# What is it that helps SmolLM2-135M with dates? Three seeds of every control, and a table. Three
# hours on two cores, estimated from its steps: it was not yet run to its end. A stage whose output
# exists is skipped, and one that was stopped goes on. Memory: 6 GB.
set -e
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
[ -n "$DTYPE" ] || DTYPE="$(grep -qsm1 -e avx512_bf16 -e amx_bf16 /proc/cpuinfo && echo bfloat16 \
  || echo float32)"
from() { [ -f "$1/latest" ] && echo resume || echo "$2"; }      # a run that was stopped goes on
out=out/dates

# Base and Quiet-STaR (16 minutes a seed)
for seed in 0 1 2; do
  SEED=$seed DTYPE=$DTYPE sh runs/smollm2_dates.sh
done

# Control: plain training goes on (2 minutes a seed)
for seed in 0 1 2; do
  [ -d $out/plain-$seed/step-000045 ] || python train.py --objective=plain --seed=$seed \
    --init_from="$(from $out/plain-$seed $out/base-$seed)" --out=$out/plain-$seed --dtype=$DTYPE \
    --data=data/dates/without_reasoning --steps=45 --batch_size=16 --seq_len=26 --lr=5e-5 \
    --min_lr=5e-6 --warmup=5 --weight_decay=0 --eval_task=dates --eval_every=15 --eval_texts=64 \
    --save_every=15
done

# Controls: without REINFORCE, then filler tokens (11 minutes a seed, and 4)
for seed in 0 1 2; do
  [ -d $out/no-reinforce-$seed/step-000045 ] || python train.py --seed=$seed \
    --init_from="$(from $out/no-reinforce-$seed $out/base-$seed)" --out=$out/no-reinforce-$seed \
    --dtype=$DTYPE --data=data/dates/without_reasoning --steps=45 --batch_size=16 --grad_accum=4 \
    --seq_len=26 --lr=5e-5 --min_lr=5e-6 --warmup=5 --weight_decay=0 \
    --positions=uncertain --think_share=0.12 --thought_len=8 --n_true=1 --n_thoughts=4 \
    --policy_weight=0 --policy_temperature=1 --marker_lr=5 --mixing_lr=4 \
    --eval_task=dates --eval_every=15 --eval_texts=64 --save_every=15
done
for seed in 0 1 2; do
  [ -d $out/filler-$seed/step-000045 ] || python train.py --seed=$seed --filler \
    --init_from="$(from $out/filler-$seed $out/base-$seed)" --out=$out/filler-$seed \
    --dtype=$DTYPE --data=data/dates/without_reasoning --steps=45 --batch_size=16 \
    --seq_len=26 --lr=5e-5 --min_lr=5e-6 --warmup=5 --weight_decay=0 \
    --positions=uncertain --think_share=0.12 --thought_len=8 --n_true=1 --n_thoughts=1 \
    --policy_weight=0 --policy_temperature=1 --marker_lr=5 --mixing_lr=4 \
    --eval_task=dates --eval_every=15 --eval_texts=64 --save_every=15
done

# What REINFORCE is worth where there is more to learn: a base of fewer steps, which reasons right
# about half of the time, then Quiet-STaR and the same without REINFORCE (25 minutes a seed)
for seed in 0 1 2; do
  [ -d $out/half-base-$seed/step-000072 ] || python train.py --objective=plain --seed=$seed \
    --init_from="$(from $out/half-base-$seed out/SmolLM2-135M)" --out=$out/half-base-$seed \
    --dtype=$DTYPE --data=data/dates/with_reasoning --steps=72 --batch_size=16 --seq_len=36 \
    --lr=2e-4 --min_lr=2e-5 --warmup=5 --weight_decay=0 --eval_every=0 --save_every=24
  for run in half-thinking:10 half-no-reinforce:0; do
    name="${run%:*}-$seed"
    [ -d $out/$name/step-000045 ] || python train.py --seed=$seed --policy_weight=${run#*:} \
      --init_from="$(from $out/$name $out/half-base-$seed)" --out=$out/$name --dtype=$DTYPE \
      --data=data/dates/without_reasoning --steps=45 --batch_size=16 --grad_accum=4 --seq_len=26 \
      --lr=5e-5 --min_lr=5e-6 --warmup=5 --weight_decay=0 --positions=uncertain \
      --think_share=0.12 --thought_len=8 --n_true=1 --n_thoughts=4 --policy_temperature=1 \
      --marker_lr=5 --mixing_lr=4 --eval_task=dates --eval_every=15 --eval_texts=64 --save_every=15
  done
done

# Score 500 held-out lines with each model, of held-out and of seen combinations (half a minute each)
for seed in 0 1 2; do
  for name in base plain filler no-reinforce thinking half-base half-no-reinforce half-thinking; do
    [ -f $out/json/$seed-$name.json ] || python eval.py --checkpoint=$out/$name-$seed --texts=500 \
      --data=data/dates/without_reasoning --task=dates --seq_len=26 --batch_size=50 \
      --out=$out/json/$seed-$name.json > /dev/null
  done
  for name in base plain no-reinforce thinking; do
    [ -f $out/json/$seed-$name-seen.json ] || python eval.py --checkpoint=$out/$name-$seed \
      --data=data/dates/seen_combinations --texts=500 --task=dates --seq_len=26 --batch_size=50 \
      --out=$out/json/$seed-$name-seen.json > /dev/null
  done

  # Controls: the thoughts of other lines, and the base that reasons aloud, the ceiling
  [ -f $out/json/$seed-thinking-shuffled.json ] || python eval.py --checkpoint=$out/thinking-$seed \
    --data=data/dates/without_reasoning --texts=500 --task=dates --seq_len=26 --batch_size=50 \
    --thoughts=shuffled --out=$out/json/$seed-thinking-shuffled.json > /dev/null
  for name in base half-base; do
    [ -f $out/json/$seed-$name-aloud.json ] || python eval.py --checkpoint=$out/$name-$seed \
      --data=data/dates/without_reasoning --texts=500 --task=dates --seq_len=26 --batch_size=50 \
      --thoughts=aloud --thought_len=8 --out=$out/json/$seed-$name-aloud.json > /dev/null
  done
done
python -m tools.figures --kind=table --input="$(ls $out/json/*.json | paste -sd,)"
python -m tools.figures --kind=learning --out=$out/learning.png --chance=0.143 \
  --input="$(ls $out/thinking-?/log.jsonl | paste -sd,)" \
  --plain="$(ls $out/plain-?/log.jsonl | paste -sd,)"
