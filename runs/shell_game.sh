#!/bin/sh
# What is it that helps? Three seeds of every control, side by side with one thread each; a table
# and a figure. 45 minutes on two busy cores. A stage whose output exists is skipped; a job
# that fails stops the script, $$.
set -e
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
mkdir -p out/shell_game/json

# Data (6 seconds)
[ -f data/shell_game/without_reasoning/meta.json ] || \
  python -m tasks.shell_game --out=data/shell_game

# Base (4 minutes)
for seed in 0 1 2; do
  [ -d out/shell_game/base-$seed/step-001200 ] || python train.py --objective=plain --seed=$seed \
    --data=data/shell_game/with_reasoning --out=out/shell_game/base-$seed \
    --dim=128 --n_layers=2 --n_heads=4 --n_kv_heads=2 --ffn_dim=352 --max_seq_len=512 \
    --steps=1200 --batch_size=32 --seq_len=64 --crops=stream --lr=2e-3 --min_lr=1e-4 --warmup=50 \
    --weight_decay=0 --eval_task=shell_game --eval_every=300 --eval_texts=500 --save_every=300 || kill $$ &
done; wait

# Control: plain training goes on (20 seconds)
for seed in 0 1 2; do
  [ -d out/shell_game/plain-$seed/step-000200 ] || python train.py --objective=plain --seed=$seed \
    --init_from=out/shell_game/base-$seed --data=data/shell_game/without_reasoning \
    --out=out/shell_game/plain-$seed --steps=200 --batch_size=56 --seq_len=12 --crops=document \
    --lr=3e-4 --min_lr=1.5e-5 --warmup=20 --weight_decay=0 --eval_task=shell_game \
    --eval_every=25 --eval_texts=500 --save_every=50 || kill $$ &
done; wait

# Quiet-STaR, six tokens a thought and four thoughts (4 minutes)
for seed in 0 1 2; do
  [ -d out/shell_game/thinking-$seed/step-000200 ] || python train.py --seed=$seed \
    --init_from=out/shell_game/base-$seed --data=data/shell_game/without_reasoning \
    --out=out/shell_game/thinking-$seed --steps=200 --batch_size=56 --seq_len=12 --crops=document \
    --lr=3e-4 --min_lr=1.5e-5 --warmup=20 --weight_decay=0 --eval_task=shell_game \
    --eval_every=25 --eval_texts=500 --save_every=50 \
    --thought_len=6 --n_true=1 --n_thoughts=4 --policy_weight=10 --policy_temperature=1 \
    --marker_lr=1 --mixing_lr=5 || kill $$ &
done; wait

# Control: filler tokens, trained alike (4 minutes)
for seed in 0 1 2; do
  [ -d out/shell_game/filler-$seed/step-000200 ] || python train.py --seed=$seed --filler \
    --init_from=out/shell_game/base-$seed --data=data/shell_game/without_reasoning \
    --out=out/shell_game/filler-$seed --steps=200 --batch_size=56 --seq_len=12 --crops=document \
    --lr=3e-4 --min_lr=1.5e-5 --warmup=20 --weight_decay=0 --eval_task=shell_game \
    --eval_every=25 --eval_texts=500 --save_every=50 \
    --thought_len=6 --n_true=1 --n_thoughts=1 --policy_weight=10 --policy_temperature=1 \
    --marker_lr=1 --mixing_lr=5 || kill $$ &
done; wait

# Control: without REINFORCE (4 minutes)
for seed in 0 1 2; do
  [ -d out/shell_game/no-reinforce-$seed/step-000200 ] || python train.py --seed=$seed \
    --init_from=out/shell_game/base-$seed --data=data/shell_game/without_reasoning \
    --out=out/shell_game/no-reinforce-$seed --steps=200 --batch_size=56 --seq_len=12 \
    --crops=document --lr=3e-4 --min_lr=1.5e-5 --warmup=20 --weight_decay=0 \
    --eval_task=shell_game --eval_every=25 --eval_texts=500 --save_every=50 \
    --thought_len=6 --n_true=1 --n_thoughts=4 --policy_weight=0 --policy_temperature=1 \
    --marker_lr=1 --mixing_lr=5 || kill $$ &
done; wait

# Control: untrained thoughts, which is the base with fresh markers and mixing head (seconds)
for seed in 0 1 2; do
  [ -d out/shell_game/thinking-untrained-$seed/step-000000 ] || python train.py --seed=$seed \
    --init_from=out/shell_game/base-$seed --data=data/shell_game/without_reasoning \
    --out=out/shell_game/thinking-untrained-$seed --steps=0 --batch_size=56 --seq_len=12 \
    --crops=document --eval_task=shell_game --eval_texts=500 \
    --thought_len=6 --n_true=1 --n_thoughts=4 --policy_weight=10 --policy_temperature=1 \
    --marker_lr=1 --mixing_lr=5 || kill $$ &
done; wait

# Thoughts of other lengths (2 to 6 minutes each)
for T in 0 1 2 4 8; do
  for seed in 0 1 2; do
    [ -d out/shell_game/thinking-T$T-$seed/step-000200 ] || python train.py --seed=$seed \
      --init_from=out/shell_game/base-$seed --data=data/shell_game/without_reasoning \
      --out=out/shell_game/thinking-T$T-$seed --steps=200 --batch_size=56 --seq_len=12 \
      --crops=document --lr=3e-4 --min_lr=1.5e-5 --warmup=20 --weight_decay=0 \
      --eval_task=shell_game --eval_every=25 --eval_texts=500 --save_every=50 \
      --thought_len=$T --n_true=1 --n_thoughts=4 --policy_weight=10 --policy_temperature=1 \
      --marker_lr=1 --mixing_lr=5 || kill $$ &
  done; wait
done

# Other numbers of thoughts (2 to 6 minutes each)
for N in 1 2; do
  for seed in 0 1 2; do
    [ -d out/shell_game/thinking-N$N-$seed/step-000200 ] || python train.py --seed=$seed \
      --init_from=out/shell_game/base-$seed --data=data/shell_game/without_reasoning \
      --out=out/shell_game/thinking-N$N-$seed --steps=200 --batch_size=56 --seq_len=12 \
      --crops=document --lr=3e-4 --min_lr=1.5e-5 --warmup=20 --weight_decay=0 \
      --eval_task=shell_game --eval_every=25 --eval_texts=500 --save_every=50 \
      --thought_len=6 --n_true=1 --n_thoughts=$N --policy_weight=10 --policy_temperature=1 \
      --marker_lr=1 --mixing_lr=5 || kill $$ &
  done; wait
done

# Score 2,000 held-out lines with each model (5 seconds a model)
for name in base plain filler no-reinforce thinking thinking-T0 thinking-T1 thinking-T2 \
    thinking-T4 thinking-T8 thinking-N1 thinking-N2 thinking-untrained; do
  for seed in 0 1 2; do
    [ -f out/shell_game/json/$seed-$name.json ] || python eval.py --task=shell_game --texts=2000 \
      --checkpoint=out/shell_game/$name-$seed --data=data/shell_game/without_reasoning \
      --out=out/shell_game/json/$seed-$name.json > /dev/null || kill $$ &
  done; wait
done

# Control: the thoughts of other lines (5 seconds a model)
for seed in 0 1 2; do
  [ -f out/shell_game/json/$seed-thinking-shuffled.json ] || python eval.py --task=shell_game \
    --texts=2000 --thoughts=shuffled --checkpoint=out/shell_game/thinking-$seed \
    --data=data/shell_game/without_reasoning \
    --out=out/shell_game/json/$seed-thinking-shuffled.json > /dev/null || kill $$ &
done; wait

# Models trained with six tokens a thought, given another number of them (5 seconds each)
for T in 0 1 2 3 4 5 7 8; do
  for seed in 0 1 2; do
    [ -f out/shell_game/json/$seed-given-T$T.json ] || python eval.py --task=shell_game \
      --texts=2000 --thought_len=$T --checkpoint=out/shell_game/thinking-$seed \
      --data=data/shell_game/without_reasoning \
      --out=out/shell_game/json/$seed-given-T$T.json > /dev/null || kill $$ &
  done; wait
done

# The table of docs/RESULTS.md and the top picture of the README (seconds)
python -m tools.figures --kind=table --input="$(ls out/shell_game/json/*.json | paste -sd,)"
python -m tools.figures --kind=learning --out=out/shell_game/learning.png \
  --input="$(ls out/shell_game/thinking-?/log.jsonl | paste -sd,)" \
  --plain="$(ls out/shell_game/plain-?/log.jsonl | paste -sd,)"
