#!/bin/sh
# What is it that helps? Three seeds of everything, JOBS processes at a time with one thread each:
# the controls, thoughts of every length, and which answers gain; a table and two figures.
# Interrupted, it goes on where it was: what is trained is not trained again, what has its json is
# done. ONLY="base thinking ..." makes those alone.
set -e
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
. runs/shell_game_settings.sh
game=data/shell_game out=out/shell_game seeds="0 1 2"
every="base thinking plain filler thinking-T0 thinking-T1 thinking-T2 thinking-T4 thinking-T8
  no-reinforce thinking-N1 thinking-N2 thinking-untrained thinking-swapped"
ONLY=${ONLY:-$every}
mkdir -p $out/json
each() { xargs -P "${JOBS:-2}" -I{} sh -ec "{}"; }                # a command a line
wanted() { case " $(echo $ONLY) " in *" $1 "*) ;; *) return 1 ;; esac; }

# run NAME FROM OPTIONS: for every seed, a line that trains
run() {
  name=$1 from=$2; shift 2
  wanted $name || return 0
  for seed in $seeds; do
    folder=$out/$name-$seed
    grep -qs ^done: $folder.log || echo "rm -rf $folder;" \
      "python train.py $(echo "$@") --seed=$seed --init_from=$(echo $from | sed s/SEED/$seed/)" \
      "--out=$folder > $folder.log"
  done
}

# score NAME TRAINED OPTIONS: for every seed, a line that evaluates TRAINED on 2,000 held-out lines
score() {
  name=$1 trained=$2; shift 2
  wanted $name || return 0
  for seed in $seeds; do
    json=$out/json/$seed-$name.json
    [ -f $json ] || echo "python eval.py --checkpoint=$out/$trained-$seed --data=$game/silent" \
      "--texts=2000 --out=$json $* > /dev/null"
  done
}

[ -f $game/silent/meta.json ] || python -m tasks.shell_game --out=$game
run base scratch $model $pretrain --data=$game/aloud | each
silent="--data=$game/silent" base=$out/base-SEED
{
  run thinking            $base $silent $quiet
  run plain               $base $silent $plain
  run filler              $base $silent $quiet --filler --n_thoughts=1
  run thinking-T0         $base $silent $quiet --thought_len=0
  run thinking-T1         $base $silent $quiet --thought_len=1
  run thinking-T2         $base $silent $quiet --thought_len=2
  run thinking-T4         $base $silent $quiet --thought_len=4
  run thinking-T8         $base $silent $quiet --thought_len=8
  run no-reinforce        $base $silent $quiet --policy_weight=0
  run thinking-N1         $base $silent $quiet --n_thoughts=1
  run thinking-N2         $base $silent $quiet --n_thoughts=2
  run thinking-untrained  $base $silent $quiet --steps=0
} | each
for name in $every; do
  case $name in
    thinking-swapped) score $name thinking --thoughts=swapped ;;
    thinking)         score $name thinking --thought_len=0,1,2,3,4,5,6,7,8 ;;
    *)                score $name $name ;;
  esac
done | each

for name in $every; do
  for seed in $seeds; do ! [ -f $out/json/$seed-$name.json ] || echo $out/json/$seed-$name.json; done
done | paste -sd, > $out/json/all
python -m tools.figures --kind=table --input="$(cat $out/json/all)"
python -m tools.compare --kind=controls --input="$(cat $out/json/all)" --out=$out/controls.png
python -m tools.compare --kind=difficulty --out=$out/difficulty.png \
  --input="$(for seed in $seeds; do echo $out/json/$seed-thinking.json; done | paste -sd,)"
