#!/bin/sh
# A real language model learns to think, on two CPU cores: `make dates`. The text is ordinary English
# whose last word needs counting days (tasks/dates.py); chance is one weekday in seven. 16 minutes
# where the processor multiplies bf16, and where not 24 (estimated); 5 GB of memory. A stage whose
# output exists is skipped, and one that was stopped goes on.
set -e
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" SEED="${SEED:-0}"
[ -n "$DTYPE" ] || DTYPE="$(grep -qsm1 -e avx512_bf16 -e amx_bf16 /proc/cpuinfo && echo bfloat16 \
  || echo float32)"
from() { [ -f "$1/latest" ] && echo resume || echo "$2"; }      # a run that was stopped goes on
out=out/dates
mkdir -p $out/json

# Data: lines with and without reasoning (2 seconds)
[ -f data/dates/seen_combinations/meta.json ] || python -m tasks.dates

# 1. A base that counts aloud, and forgets the second stay in most of these lines (6 minutes)
[ -d $out/base-$SEED/step-000150 ] || python train.py --objective=plain --seed=$SEED \
  --init_from="$(from $out/base-$SEED out/SmolLM2-135M)" --out=$out/base-$SEED --dtype=$DTYPE \
  --data=data/dates/with_mistakes --steps=150 --batch_size=16 --seq_len=36 --lr=2e-4 \
  --min_lr=2e-5 --warmup=5 --weight_decay=0 --eval_every=0 --save_every=50

# 2. Quiet-STaR on lines without any reasoning: the two positions where the base is least certain
#    think (6 minutes)
[ -d $out/thinking-$SEED/step-000036 ] || python train.py --seed=$SEED \
  --init_from="$(from $out/thinking-$SEED $out/base-$SEED)" --out=$out/thinking-$SEED \
  --dtype=$DTYPE --data=data/dates/without_reasoning --steps=36 --batch_size=16 --grad_accum=2 \
  --seq_len=26 --lr=2e-5 --min_lr=2e-6 --warmup=5 --weight_decay=0 \
  --positions=uncertain --think_share=0.08 --thought_len=9 --n_true=1 --n_thoughts=4 \
  --policy_weight=10 --policy_temperature=1 --marker_lr=12 --mixing_lr=10 \
  --eval_task=dates --eval_every=12 --eval_texts=64 --save_every=12

# 3. A thought, and pages of that sentence and of dates beside ordinary prose (20 seconds)
sentence="Alice came to Oslo on Wednesday, stayed three days there and two days in Cairo, and left on"
python sample.py --checkpoint=$out/thinking-$SEED --prompt="$sentence" --max_new_tokens=1 \
  --show-thoughts
echo "$sentence Monday." > $out/sentence.txt
cat > $out/paragraphs.txt <<'END'
Alice came to Oslo on Wednesday, stayed three days there and two days in Cairo, and left on Monday. Peter came to Madrid on Saturday, stayed two days there and one day in Vienna, and left on Tuesday.

The old clock in the hall had stopped long ago, but nobody wanted to throw it away. Every evening my grandmother wound it up, listened for a moment, and went to bed without a word.
END
for text in sentence paragraphs; do
  python sample.py --checkpoint=$out/thinking-$SEED --text-file=$out/$text.txt \
    --html=$out/$text.html > /dev/null
done

# 500 held-out lines scored without and with thoughts (1 minute)
for name in base thinking; do
  [ -f $out/json/$SEED-$name.json ] || python eval.py --checkpoint=$out/$name-$SEED --texts=500 \
    --data=data/dates/without_reasoning --task=dates --seq_len=26 --batch_size=50 \
    --out=$out/json/$SEED-$name.json > /dev/null
done
python -m tools.figures --kind=table --input=$out/json/$SEED-base.json,$out/json/$SEED-thinking.json
