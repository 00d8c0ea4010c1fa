#!/bin/sh
# STaR on the shell game, beside Quiet-STaR: eight rounds from the bases of runs/shell_game.sh (run
# that first), without and with rationalisation, three seeds; then the same from bases whose text
# has hints: half of its reasoning follows the answer. Forty minutes with one thread. A round whose
# output exists is skipped.
set -e
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" QUESTIONS="${QUESTIONS:-2000}"
data=data/shell_game/without_reasoning

# A round asks the model of the round before, and fine-tunes the base: 40 steps, then 1.2 times as
# many
rounds() {
  out=out/star/$QUESTIONS-$1-$2 seed=$2 base=$3; shift 3
  from=$base steps=40
  for round in 1 2 3 4 5 6 7 8; do
    [ -f $out/text-$round/meta.json ] || python -m tasks.star --checkpoint=$from --data=$data \
      --questions=$QUESTIONS --out=$out/text-$round "$@"
    [ -d $out/round-$round/step-$(printf %06d $steps) ] || python train.py --objective=plain \
      --seed=$seed --init_from=$base --out=$out/round-$round --data=$out/text-$round \
      --steps=$steps --batch_size=56 --seq_len=24 --lr=3e-4 --min_lr=1.5e-5 --warmup=10 \
      --weight_decay=0 --eval_every=0 --save_every=1000 > /dev/null
    from=$out/round-$round
    steps=$((steps * 6 / 5))
  done
  # how many of 2,000 held-out lines it answers right, reasoning aloud
  python -m tasks.star --checkpoint=$from --data=$data --split=val --out=$out/held-out
}
for seed in 0 1 2; do
  rounds star $seed out/shell_game/base-$seed
  rounds rationalised $seed out/shell_game/base-$seed --rationalise
done

# Bases as in runs/shell_game.sh, but for their text
[ -f data/hints/with_hints/meta.json ] || python -m tasks.shell_game --hints --out=data/hints
for seed in 0 1 2; do
  [ -d out/star/base-$seed/step-001200 ] || python train.py --objective=plain --seed=$seed \
    --data=data/hints/with_hints --out=out/star/base-$seed \
    --dim=128 --n_layers=2 --n_heads=4 --n_kv_heads=2 --ffn_dim=352 --max_seq_len=512 \
    --steps=1200 --batch_size=32 --seq_len=64 --crops=stream --lr=2e-3 --min_lr=1e-4 --warmup=50 \
    --weight_decay=0 --eval_every=0 --save_every=300 > /dev/null
  python -m tasks.star --checkpoint=out/star/base-$seed --data=$data --split=val --rationalise \
    --out=out/star/base-$seed-held-out
  rounds hints-star $seed out/star/base-$seed
  rounds hints-rationalised $seed out/star/base-$seed --rationalise
done
