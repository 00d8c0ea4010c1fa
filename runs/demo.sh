#!/bin/sh
# Minutes on a laptop: a small Mistral learns to think. `make demo` runs this.
#
# 1. A base is pretrained on lines of the shell game, 30 % of which think aloud.
# 2. Both successors see only lines without any working: one goes on as before, one runs Quiet-STaR.
# 3. The table compares them on held-out lines; nothing but the reward can have taught the difference.
set -e
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"      # on a shared machine two can be slower than one
game=data/shell_game out=out/demo
rm -rf "$out"

. runs/shell_game_settings.sh
python -m tasks.shell_game --out=$game
echo; echo "1/4  pretraining a base that thinks aloud now and then"
python train.py $model $pretrain --data=$game/aloud --out=$out/base
echo; echo "2/4  the same training goes on, on text without working"
python train.py $plain --init_from=$out/base --data=$game/silent --out=$out/plain
echo; echo "3/4  Quiet-STaR on the same text"
python train.py $quiet --init_from=$out/base --data=$game/silent --out=$out/quiet
echo; echo "4/4  what it thinks, and whether that helps"
python sample.py --checkpoint=$out/quiet --show-thoughts --max_new_tokens=1 --prompt="ball c : ab cd ce ad now"
score() { echo "scoring $1"; shift; python eval.py --data=$game/silent --texts=2000 "$@" > /dev/null; }
score "base" --checkpoint=$out/base --out="$out/base.json"
score "plain training goes on" --checkpoint=$out/plain --out="$out/plain training goes on.json"
score "thinking with thoughts swapped" --checkpoint=$out/quiet --thoughts=swapped --out="$out/thinking with thoughts swapped.json"
score "thinking" --checkpoint=$out/quiet --out="$out/thinking.json"
python -m tools.figures --kind=curves --input=$out/quiet/log.jsonl,$out/plain/log.jsonl --out=$out/demo.png
python -m tools.figures --kind=top --input=$out/thinking.json,$out/quiet/log.jsonl --out=$out/top.png
echo
python -m tools.figures --kind=table --input="$out/base.json,$out/plain training goes on.json,$out/thinking with thoughts swapped.json,$out/thinking.json"
