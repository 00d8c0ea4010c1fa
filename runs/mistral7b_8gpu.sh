#!/bin/sh
# Quiet-STaR on Mistral-7B-v0.1 with the paper's hyper-parameters: one node of eight GPUs.
#
#   CORPUS=owm sh runs/mistral7b_8gpu.sh         OpenWebMath, as for the paper's main result
#   CORPUS=c4  sh runs/mistral7b_8gpu.sh         C4
#
# Needs `pip install huggingface_hub pyarrow`, 15 GB of disk for the model, 87 GB for each checkpoint
# (two are kept, a third while it is written), 30 GB of memory a process while it loads, and per GPU
# what `python -m tools.bench --plan` says. What dies is restarted, and the same command goes on where it
# was. Several nodes: prepare model and data on one, then on each, with a file system they share,
#   export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1      # a restart finds nothing of what died
#   RUN="--nnodes=2 --rdzv_backend=c10d --rdzv_id=quiet --rdzv_endpoint=FIRST_NODE:29500" \
#     BATCH=16 sh runs/mistral7b_8gpu.sh             # BATCH divides by all GPUs
set -e
cd "$(dirname "$0")/.."
corpus="${CORPUS:-owm}" repository="${MODEL:-mistralai/Mistral-7B-v0.1}"
model=$(basename "$repository")
data=data/$model-$corpus out=out/$model-$corpus

[ -f "$model/.whole" ] || {                 # an interrupted download goes on
  hf download "$repository" --local-dir "$model" --exclude "*.bin"
  touch "$model/.whole"
}
if [ ! -f "$data/meta.json" ]; then         # a few files of the corpus hold far more than a run sees
  if [ "$corpus" = owm ]; then
    hf download open-web-math/open-web-math --repo-type dataset --local-dir raw/owm \
      --include "data/train-00000-of-*.parquet"
    files=$(ls raw/owm/data/*.parquet | paste -sd, -)
  else
    hf download allenai/c4 --repo-type dataset --local-dir raw/c4 \
      --include "en/c4-train.00000-of-01024.json.gz"
    files=$(ls raw/c4/en/*.json.gz | paste -sd, -)
  fi
  python data.py --input="$files" --field=text --tokenizer="$model" --out="$data" --val_share=0.001
fi

# 100 steps of 8 texts of 256 tokens, lr 1e-6 after 20 steps of warm-up, N 2, T 12, A 4: the defaults.
torchrun ${RUN:---standalone} --nproc_per_node="${GPUS:-8}" --max-restarts="${RESTARTS:-3}" train.py \
  --init_from="$model" --data="$data" --out="$out" --parallel=fsdp --dtype=bfloat16 --recompute=1 \
  --batch_size="${BATCH:-8}" --grad_accum="${ACCUMULATE:-1}" --thought_len="${T:-12}" --n_true="${A:-4}" \
  --steps="${STEPS:-100}" --save_every=50 --eval_every=50 --eval_texts="${EVAL_TEXTS:-16}"
