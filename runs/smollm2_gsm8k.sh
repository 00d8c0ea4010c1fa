#!/bin/sh
# Does thinking help a real model on text as it is? SmolLM2-135M and GSM8K: first question -> number,
# the solutions removed, after a stage in which the equations are asides in 30 % of the lines; then
# the solutions as they stand. Put the data set's own gsm8k_train.jsonl and gsm8k_test.jsonl (MIT
# licence) into this repository's folder. 80 minutes of one thread with bf16 products, timed in parts
# beside other jobs, and 5 GB of memory. A stage whose output exists is skipped, and one that was
# stopped goes on.
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

# Question -> number: a base with asides, then plain training or Quiet-STaR without them. An answer is
# among the less certain half of its text's tokens, so two fifths of them think.
[ -d $out/base/step-000060 ] || python train.py --objective=plain --dtype=$DTYPE \
  --init_from="$(from $out/base out/SmolLM2-135M)" --out=$out/base \
  --data=data/smollm2_gsm8k/asides --steps=60 --batch_size=8 --seq_len=128 --lr=1e-4 \
  --min_lr=1e-5 --warmup=5 --weight_decay=0 --eval_every=0 --save_every=20
[ -d $out/plain/step-000024 ] || python train.py --objective=plain --dtype=$DTYPE \
  --init_from="$(from $out/plain $out/base)" --out=$out/plain \
  --data=data/smollm2_gsm8k/numbers --steps=24 --batch_size=4 --seq_len=96 --lr=2e-5 \
  --min_lr=2e-6 --warmup=5 --weight_decay=0 --eval_every=0 --save_every=8
[ -d $out/thinking/step-000024 ] || python train.py --dtype=$DTYPE \
  --init_from="$(from $out/thinking $out/base)" --out=$out/thinking --grad_accum=4 \
  --data=data/smollm2_gsm8k/numbers --steps=24 --batch_size=4 --seq_len=96 --lr=2e-5 \
  --min_lr=2e-6 --warmup=5 --weight_decay=0 --positions=uncertain --think_share=0.4 \
  --thought_len=12 --n_true=2 --n_thoughts=2 --policy_weight=10 --policy_temperature=1 \
  --marker_lr=12 --mixing_lr=10 --eval_every=0 --save_every=8

# Solutions as they stand: plain training or Quiet-STaR, from the released weights
[ -d $out/solutions-plain/step-000024 ] || python train.py --objective=plain --dtype=$DTYPE \
  --init_from="$(from $out/solutions-plain out/SmolLM2-135M)" --out=$out/solutions-plain \
  --data=data/smollm2_gsm8k/solutions --steps=24 --batch_size=4 --seq_len=128 --lr=2e-5 \
  --min_lr=2e-6 --warmup=5 --weight_decay=0 --eval_every=0 --save_every=8
[ -d $out/solutions-thinking/step-000024 ] || python train.py --dtype=$DTYPE \
  --init_from="$(from $out/solutions-thinking out/SmolLM2-135M)" --out=$out/solutions-thinking \
  --data=data/smollm2_gsm8k/solutions --steps=24 --batch_size=4 --grad_accum=2 --seq_len=128 \
  --lr=2e-5 --min_lr=2e-6 --warmup=5 --weight_decay=0 --positions=uncertain --think_share=0.15 \
  --thought_len=8 --n_true=4 --n_thoughts=2 --policy_weight=10 --policy_temperature=1 \
  --marker_lr=12 --mixing_lr=10 --eval_every=0 --save_every=8

# 300 test questions, and 60 held-out solutions; Quiet-STaR less plain training, in pairs
for name in base plain thinking; do
  [ $name = thinking ] && against="--against=$out/json/0-plain.json" || against=""
  [ -f $out/json/0-$name.json ] || python eval.py --checkpoint=$out/$name --task=gsm8k \
    --file=gsm8k_test.jsonl --limit=300 $against --out=$out/json/0-$name.json
done
for name in plain thinking; do
  [ $name = thinking ] && against="--against=$out/json/0-solutions-plain.json" || against=""
  [ -f $out/json/0-solutions-$name.json ] || python eval.py --checkpoint=$out/solutions-$name \
    --data=data/smollm2_gsm8k/solutions --texts=60 --seq_len=160 --batch_size=4 $against \
    --out=$out/json/0-solutions-$name.json
done
