#!/bin/sh
# Thoughts from long to short (the schedule of Fast Quiet-STaR, arXiv 2505.17746) and from short to
# long, each stage from the checkpoint before, on the bases of runs/shell_game.sh (run that first).
# 200 steps in all, as many as its thoughts of fixed length. Three seeds side by side; 12 minutes on two
# cores. A stage whose output exists is skipped; a job that fails stops the script, $$.
set -e
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
out=out/curriculum data=data/shell_game/without_reasoning
mkdir -p $out/json

# name, seed, and of each stage the length of its thoughts and its steps
stages() {
  name=$1 seed=$2 from=out/shell_game/base-$2; shift 2
  for stage in "$@"; do
    T=${stage%:*} steps=${stage#*:} run=$out/$name-T${stage%:*}-$seed
    [ -d $run/step-0000$steps ] || python train.py --seed=$seed --init_from=$from --out=$run \
      --data=$data --steps=$steps --batch_size=56 --seq_len=12 --lr=3e-4 --min_lr=1.5e-5 \
      --warmup=20 --weight_decay=0 --eval_task=shell_game --eval_every=25 --eval_texts=500 \
      --save_every=100 --thought_len=$T --n_true=1 --n_thoughts=4 --policy_weight=10 \
      --policy_temperature=1 --marker_lr=1 --mixing_lr=5
    from=$run
  done
  [ -f $out/json/$seed-$name.json ] || python eval.py --task=shell_game --texts=2000 --data=$data \
    --checkpoint=$from --out=$out/json/$seed-$name.json > /dev/null
}
for seed in 0 1 2; do (stages long-to-short $seed 8:67 6:67 4:66) || kill $$ & done; wait
for seed in 0 1 2; do (stages short-to-long $seed 2:67 4:67 6:66) || kill $$ & done; wait
python -m tools.figures --kind=table --input="$(ls $out/json/*.json | paste -sd,)"
