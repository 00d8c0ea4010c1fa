#!/bin/sh
# What teaches a thought best? Other estimators on the shell game, on the bases and beside the
# models of runs/shell_game.sh (run that first): three seeds side by side with a thread each, a
# table. An hour and a half on two cores, by its steps. A stage whose output exists is skipped; a
# job that fails stops the script, $$.
set -e
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
out=out/estimators data=data/shell_game/without_reasoning
mkdir -p $out/json

# name, seed, checkpoint to start from, steps, other options
train() {
  run=$out/$1-$2 seed=$2 from=$3 steps=$4; shift 4
  [ -d $run/step-$(printf %06d $steps) ] || python train.py --seed=$seed --init_from=$from \
    --out=$run --data=$data --steps=$steps --batch_size=56 --lr=3e-4 \
    --weight_decay=0 --eval_task=shell_game --eval_every=25 --eval_texts=500 --save_every=200 \
    --thought_len=6 --policy_weight=10 --policy_temperature=1 --marker_lr=1 \
    --mixing_lr=5 --n_true=1 --seq_len=12 "$@"
}
# result, model, seed, other options
score() {
  json=$out/json/$3-$1.json model=$2-$3; shift 3
  [ -f $json ] || python eval.py --task=shell_game --texts=2000 --checkpoint=$model --data=$data \
    --out=$json "$@" > /dev/null
}

one_seed() {
  base=out/shell_game/base-$1

  # Signed leave-one-out advantage
  for N in 2 4 8; do
    train loo-N$N $1 $base 200 --n_thoughts=$N --advantage=leave_one_out --min_lr=1.5e-5
    score loo-N$N $out/loo-N$N $1
  done

  # Some of the eleven positions think, with as many thoughts in all: at random, or least certain
  for positions in random uncertain; do
    for share_N in "0.1 22" "0.25 15" "0.5 7"; do
      set -- $1 $share_N
      train $positions-$2 $1 $base 200 --n_thoughts=$3 --positions=$positions --think_share=$2 \
        --min_lr=1.5e-5
      score $positions-$2 $out/$positions-$2 $1
    done
  done

  # or where a probe expects the greatest gain, after 50 steps of all positions; with fewer thoughts
  train all-first $1 $base 50 --n_thoughts=4
  [ -f $out/gate-$1.json ] || python -m tools.gate --checkpoint=$out/all-first-$1 --data=$data \
    --out=$out/gate-$1.json
  for share_N in "0.1 22" "0.1 4" "0.25 15"; do
    set -- $1 $share_N
    train gate-$2-N$3 $1 $out/all-first-$1 150 --n_thoughts=$3 --positions=gate --think_share=$2 \
      --gate=$out/gate-$1.json --warmup=1 --min_lr=1.5e-5
    score gate-$2-N$3 $out/gate-$2-N$3 $1
  done

  # A thought is rewarded for four true tokens, alike or those further ahead less
  for discount in 1 0.7; do
    train A4-discount-$discount $1 $base 200 --n_thoughts=4 --n_true=4 --discount=$discount \
      --seq_len=15 --min_lr=1.5e-5
    score A4-discount-$discount $out/A4-discount-$discount $1
  done

  # The mean of the predictions after k sampled thoughts, of the model that learnt as in the paper
  for k in 1 4 16; do
    score mean-of-$k out/shell_game/thinking $1 --thoughts=sampled --n_thoughts=$k
  done
}
for seed in 0 1 2; do one_seed $seed || kill $$ & done; wait
python -m tools.figures --kind=table --input="$(ls $out/json/*.json | paste -sd,)"
