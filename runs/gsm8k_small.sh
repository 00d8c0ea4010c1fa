#!/bin/sh
# Real text on a laptop: GSM8K, a tokenizer trained on it, a small base, Quiet-STaR on top.
# GSM_FILE=gsm8k_train.jsonl sh runs/gsm8k_small.sh      (the data set's own file, MIT licence)
# GSM_TEST=gsm8k_test.jsonl as well: ask the test questions of all three.
set -e
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
data=data/gsm8k out=out/gsm8k
train() {                                             # goes on where it was, if it was stopped
  folder=$1; shift
  if [ -f "$folder/latest" ]; then python train.py --init_from=resume --out="$folder"
  else python train.py "$@" --out="$folder"; fi
}
[ -f $data/tokenizer.model ] || python tokenizer.py --input="$GSM_FILE" --field=question,answer \
  --vocab_size=1024 --out=$data/tokenizer.model
[ -f $data/meta.json ] || python data.py --input="$GSM_FILE" --field=question,answer \
  --tokenizer=$data/tokenizer.model --out=$data --val_share=0.05
train $out/base --objective=plain --data=$data --dim=256 --n_layers=4 --n_heads=8 --n_kv_heads=2 \
  --ffn_dim=704 --max_seq_len=1024 --steps=1000 --batch_size=16 --seq_len=128 --crops=stream --lr=1e-3 \
  --min_lr=1e-4 --warmup=100 --weight_decay=0.1 --eval_every=250 --eval_texts=100 --save_every=250
tune="--data=$data --init_from=$out/base --steps=200 --batch_size=8 --seq_len=64 --crops=stream
  --lr=1e-4 --min_lr=1e-5 --warmup=20 --weight_decay=0 --eval_every=50 --eval_texts=40 --save_every=50"
train $out/plain --objective=plain $tune
train $out/quiet $tune --thought_len=6 --n_true=4 --n_thoughts=2 --policy_weight=1 \
  --policy_temperature=1 --marker_lr=1 --mixing_lr=5
for name in base plain quiet; do
  echo; echo "$name"
  python eval.py --checkpoint=$out/$name --data=$data --texts=150 --seq_len=128 --out=$out/$name.json
done
for name in ${GSM_TEST:+base plain quiet}; do
  echo; echo "$name, asked"
  python eval.py --checkpoint=$out/$name --task=gsm8k --file="$GSM_TEST" --out=$out/$name-asked.json
done
python -m tools.compare --kind=difficulty --input=$out/quiet.json --out=$out/difficulty.png
