#!/bin/sh
# What is it that helps? Three seeds of everything, JOBS processes at a time with one thread each.
# Interrupted, it goes on where it was: what has its json is done.
set -e
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
. runs/shell_game_settings.sh
game=data/shell_game out=out/shell_game seeds="0 1 2"
mkdir -p $out/json
each() { xargs -P "${JOBS:-2}" -I{} sh -ec "{}"; }                # a command a line

# run NAME FROM OPTIONS: for every seed, a line that trains and then evaluates on held-out lines
run() {
  name=$1 from=$2; shift 2
  for seed in $seeds; do
    folder=$out/$name-$seed json=$out/json/$seed-$name.json
    [ -f $json ] || echo "rm -rf $folder;" \
      "python train.py $(echo "$@") --seed=$seed --init_from=$(echo $from | sed s/SEED/$seed/)" \
      "--out=$folder > $folder.log;" \
      "python eval.py --checkpoint=$folder --data=$game/silent --texts=2000 --out=$json > /dev/null"
  done
}

[ -f $game/silent/meta.json ] || python shell_game.py --out=$game
run base scratch $model $pretrain --data=$game/aloud | each
silent="--data=$game/silent" base=$out/base-SEED
{
  run thinking            $base $silent $quiet
  run no-reinforce        $base $silent $quiet --policy_weight=0
  run thinking-T8         $base $silent $quiet --thought_len=8
  run thinking-T4         $base $silent $quiet --thought_len=4
  run thinking-T2         $base $silent $quiet --thought_len=2
  run thinking-T1         $base $silent $quiet --thought_len=1
  run thinking-T0         $base $silent $quiet --thought_len=0
  run thinking-N2         $base $silent $quiet --n_thoughts=2
  run thinking-N1         $base $silent $quiet --n_thoughts=1
  run filler              $base $silent $quiet --filler --n_thoughts=1
  run plain               $base $silent $plain
  run thinking-untrained  $base $silent $quiet --steps=0
} | each
for seed in $seeds; do
  json=$out/json/$seed-thinking-swapped.json
  [ -f $json ] || echo "python eval.py --checkpoint=$out/thinking-$seed --data=$game/silent --texts=2000" \
    "--thoughts=swapped --out=$json > /dev/null"
done | each

for name in base plain thinking-swapped thinking no-reinforce filler thinking-untrained \
            thinking-T0 thinking-T1 thinking-T2 thinking-T4 thinking-T8 thinking-N1 thinking-N2; do
  for seed in $seeds; do echo "$out/json/$seed-$name.json"; done
done | paste -sd, | xargs -I{} python figures.py --kind=table --input={}
