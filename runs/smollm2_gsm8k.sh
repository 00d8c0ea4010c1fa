#!/bin/sh
# Does thinking help a real model on text as it is? SmolLM2-135M and GSM8K: first question -> number,
# the solutions removed, after a stage in which the equations are asides in 30 % of the lines; then
# the solutions as they stand. Put the data set's own gsm8k_train.jsonl and gsm8k_test.jsonl (MIT
# licence) into this repository's folder. Not yet run to its end: 40 minutes on two cores and 6 GB of
# memory are estimates. A stage whose output exists is skipped, and one that was stopped goes on.
set -e
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
[ -n "$DTYPE" ] || DTYPE="$(grep -qsm1 -e avx512_bf16 -e amx_bf16 /proc/cpuinfo && echo bfloat16 \
  || echo float32)"
from() { [ -f "$1/latest" ] && echo resume || echo "$2"; }      # a run that was stopped goes on
out=out/smollm2_gsm8k
mkdir -p $out/json data/smollm2_gsm8k

# Data: Q: ... A:— 48/2=24 48+24=72— 72, the same without asides, and the solutions (10 seconds)
[ -f data/smollm2_gsm8k/solutions/meta.json ] || python - <<'END'
import json, random, re
rng = random.Random("asides")
files = {name: open(f"data/smollm2_gsm8k/{name}.jsonl", "w")
         for name in ("asides", "numbers", "solutions")}
for line in open("gsm8k_train.jsonl"):
    row = json.loads(line)
    solution, _, number = row["answer"].rpartition("####")
    equations = " ".join(re.findall(r"<<(.*?)>>", solution))
    aside = f"— {equations}—" if equations and rng.random() < 0.3 else ""
    plain = re.sub(r"<<.*?>>", "", solution)
    texts = dict(asides=f"Q: {row['question']}\nA:{aside}{number}\n",
                 numbers=f"Q: {row['question']}\nA:{number}\n",
                 solutions=f"Q: {row['question']}\nA: {plain}")
    for name, text in texts.items():
        files[name].write(json.dumps({"text": text}) + "\n")
END
for name in asides numbers solutions; do
  [ -f data/smollm2_gsm8k/$name/meta.json ] || python data.py --tokenizer=out/SmolLM2-135M \
    --input=data/smollm2_gsm8k/$name.jsonl --out=data/smollm2_gsm8k/$name --val_share=0.05
done

# Question -> number: a base with asides, then plain training or Quiet-STaR without them
[ -d $out/base/step-000100 ] || python train.py --objective=plain --dtype=$DTYPE \
  --init_from="$(from $out/base out/SmolLM2-135M)" --out=$out/base \
  --data=data/smollm2_gsm8k/asides --steps=100 --batch_size=8 --seq_len=160 --lr=1e-4 \
  --min_lr=1e-5 --warmup=10 --weight_decay=0 --eval_every=0 --save_every=25
[ -d $out/plain/step-000030 ] || python train.py --objective=plain --dtype=$DTYPE \
  --init_from="$(from $out/plain $out/base)" --out=$out/plain \
  --data=data/smollm2_gsm8k/numbers --steps=30 --batch_size=8 --seq_len=128 --lr=5e-5 \
  --min_lr=5e-6 --warmup=5 --weight_decay=0 --eval_every=0 --save_every=10
[ -d $out/thinking/step-000030 ] || python train.py --dtype=$DTYPE \
  --init_from="$(from $out/thinking $out/base)" --out=$out/thinking --grad_accum=4 \
  --data=data/smollm2_gsm8k/numbers --steps=30 --batch_size=8 --seq_len=128 --lr=5e-5 \
  --min_lr=5e-6 --warmup=5 --weight_decay=0 --positions=uncertain --think_share=0.05 \
  --thought_len=12 --n_true=2 --n_thoughts=4 --policy_weight=10 --policy_temperature=1 \
  --marker_lr=5 --mixing_lr=4 --eval_every=0 --save_every=10

# Solutions as they stand: plain training or Quiet-STaR, from the released weights
[ -d $out/solutions-plain/step-000030 ] || python train.py --objective=plain --dtype=$DTYPE \
  --init_from="$(from $out/solutions-plain out/SmolLM2-135M)" --out=$out/solutions-plain \
  --data=data/smollm2_gsm8k/solutions --steps=30 --batch_size=8 --seq_len=128 --lr=5e-5 \
  --min_lr=5e-6 --warmup=5 --weight_decay=0 --eval_every=0 --save_every=10
[ -d $out/solutions-thinking/step-000030 ] || python train.py --dtype=$DTYPE \
  --init_from="$(from $out/solutions-thinking out/SmolLM2-135M)" --out=$out/solutions-thinking \
  --data=data/smollm2_gsm8k/solutions --steps=30 --batch_size=8 --grad_accum=4 --seq_len=128 \
  --lr=5e-5 --min_lr=5e-6 --warmup=5 --weight_decay=0 --positions=uncertain --think_share=0.05 \
  --thought_len=8 --n_true=4 --n_thoughts=4 --policy_weight=10 --policy_temperature=1 \
  --marker_lr=5 --mixing_lr=4 --eval_every=0 --save_every=10

# 300 test questions, and 60 held-out solutions
for name in base plain thinking; do
  [ -f $out/json/0-$name.json ] || python eval.py --checkpoint=$out/$name --task=gsm8k \
    --file=gsm8k_test.jsonl --limit=300 --out=$out/json/0-$name.json
done
for name in plain thinking; do
  [ -f $out/json/0-solutions-$name.json ] || python eval.py --checkpoint=$out/solutions-$name \
    --data=data/smollm2_gsm8k/solutions --texts=60 --seq_len=160 --batch_size=4 \
    --out=$out/json/0-solutions-$name.json
done
