#!/bin/sh
# A small Mistral learns to think, in 6 minutes on two cores, without a GPU. `make demo` runs this.
# The times are those of one thread of an AMD EPYC beside another job. Chance is one cup in five.
set -e
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"      # on a shared machine two can be slower than one
rm -rf out/demo

# Data: the shell game, with and without reasoning in its lines (6 seconds)
python -m tasks.shell_game --out=data/shell_game

# 1. Pretrain a base on text of which 30 % of the lines show their reasoning (2 minutes)
python train.py --objective=plain --data=data/shell_game/with_reasoning --out=out/demo/base \
  --dim=128 --n_layers=2 --n_heads=4 --n_kv_heads=2 --ffn_dim=352 --max_seq_len=512 \
  --steps=1200 --batch_size=32 --seq_len=64 --crops=stream --lr=2e-3 --min_lr=1e-4 --warmup=50 \
  --weight_decay=0 --eval_task=shell_game --eval_every=300 --eval_texts=500 --save_every=300

# 2. Control: the same training goes on, on text without reasoning (15 seconds)
python train.py --objective=plain --init_from=out/demo/base \
  --data=data/shell_game/without_reasoning --out=out/demo/plain \
  --steps=200 --batch_size=56 --seq_len=12 --crops=document --lr=3e-4 --min_lr=1.5e-5 --warmup=20 \
  --weight_decay=0 --eval_task=shell_game --eval_every=25 --eval_texts=500 --save_every=50

# 3. Quiet-STaR on the same text: only the reward can teach it to think (3 minutes)
python train.py --init_from=out/demo/base \
  --data=data/shell_game/without_reasoning --out=out/demo/quiet \
  --steps=200 --batch_size=56 --seq_len=12 --crops=document --lr=3e-4 --min_lr=1.5e-5 --warmup=20 \
  --weight_decay=0 --eval_task=shell_game --eval_every=25 --eval_texts=500 --save_every=50 \
  --thought_len=6 --n_true=1 --n_thoughts=4 --policy_weight=10 --policy_temperature=1 \
  --marker_lr=1 --mixing_lr=5

# 4. A thought, and 2,000 held-out lines scored without and with thoughts (1 minute)
python sample.py --checkpoint=out/demo/quiet --show-thoughts --max_new_tokens=1 \
  --prompt="ball c : ab cd ce ad now"
python eval.py --checkpoint=out/demo/base --task=shell_game --texts=2000 \
  --data=data/shell_game/without_reasoning --out=out/demo/base.json > /dev/null
python eval.py --checkpoint=out/demo/plain --task=shell_game --texts=2000 \
  --data=data/shell_game/without_reasoning --out=out/demo/plain.json > /dev/null
python eval.py --checkpoint=out/demo/quiet --task=shell_game --texts=2000 --thoughts=shuffled \
  --data=data/shell_game/without_reasoning --out=out/demo/thinking-shuffled.json > /dev/null
python eval.py --checkpoint=out/demo/quiet --task=shell_game --texts=2000 \
  --data=data/shell_game/without_reasoning --out=out/demo/thinking.json > /dev/null
python -m tools.figures --kind=learning --input=out/demo/quiet/log.jsonl \
  --plain=out/demo/plain/log.jsonl --out=out/demo/learning.png
python -m tools.figures --kind=table --input=out/demo/base.json,out/demo/plain.json,\
out/demo/thinking-shuffled.json,out/demo/thinking.json
