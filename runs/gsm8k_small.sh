#!/bin/sh
# Real text on a laptop: GSM8K, a tokenizer trained on it, a small base, Quiet-STaR on top. Put the
# data set's own gsm8k_train.jsonl and gsm8k_test.jsonl (MIT licence) into this repository's folder.
# A stage whose output exists is skipped; one that was stopped goes on with --init_from=resume. Times
# are estimates from a few steps on one thread of an AMD EPYC.
set -e
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Data: a tokenizer of 1,024 tokens, and 5 % of the problems held out (seconds)
[ -f data/gsm8k/tokenizer.model ] || python data.py --input=gsm8k_train.jsonl \
  --field=question,answer --vocab_size=1024 --train_tokenizer=data/gsm8k/tokenizer.model
[ -f data/gsm8k/meta.json ] || python data.py --input=gsm8k_train.jsonl --field=question,answer \
  --tokenizer=data/gsm8k/tokenizer.model --val_share=0.05 --out=data/gsm8k

# Base (about 8 minutes)
[ -d out/gsm8k/base/step-001000 ] || python train.py --objective=plain --data=data/gsm8k \
  --out=out/gsm8k/base --dim=256 --n_layers=4 --n_heads=8 --n_kv_heads=2 --ffn_dim=704 \
  --max_seq_len=1024 --steps=1000 --batch_size=16 --seq_len=128 --crops=stream --lr=1e-3 \
  --min_lr=1e-4 --warmup=100 --weight_decay=0.1 --eval_every=250 --eval_texts=100 --save_every=250

# Control: plain training goes on (half a minute)
[ -d out/gsm8k/plain/step-000200 ] || python train.py --objective=plain --data=data/gsm8k \
  --init_from=out/gsm8k/base --out=out/gsm8k/plain --steps=200 --batch_size=8 --seq_len=64 \
  --crops=stream --lr=1e-4 --min_lr=1e-5 --warmup=20 --weight_decay=0 --eval_every=50 \
  --eval_texts=40 --save_every=50

# Quiet-STaR (about 10 minutes)
[ -d out/gsm8k/quiet/step-000200 ] || python train.py --data=data/gsm8k \
  --init_from=out/gsm8k/base --out=out/gsm8k/quiet --steps=200 --batch_size=8 --seq_len=64 \
  --crops=stream --lr=1e-4 --min_lr=1e-5 --warmup=20 --weight_decay=0 --eval_every=50 \
  --eval_texts=40 --save_every=50 --thought_len=6 --n_true=4 --n_thoughts=2 --policy_weight=1 \
  --policy_temperature=1 --marker_lr=1 --mixing_lr=5

# Held-out text, then the test questions if they are there (minutes)
for name in base plain quiet; do
  python eval.py --checkpoint=out/gsm8k/$name --data=data/gsm8k --texts=150 --seq_len=128 \
    --out=out/gsm8k/$name.json
  [ ! -f gsm8k_test.jsonl ] || python eval.py --checkpoint=out/gsm8k/$name --task=gsm8k \
    --file=gsm8k_test.jsonl --out=out/gsm8k/$name-asked.json
done
