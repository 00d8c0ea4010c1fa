#!/bin/sh
# Quiet-STaR on Mistral-7B-v0.1 with the paper's hyper-parameters, on one GPU of 141 GB (H200).
#
# The eight texts of a step are eight micro-batches, which peak at 140e9 bytes of the 150e9 that
# such a GPU has (python -m tools.memory --gpus=1 --grad_accum=8). One of 80 GB cannot hold 7B, as
# fp32 weights, gradients and moments alone are 117e9; it holds models of up to 4e9 parameters, such
# as Qwen/Qwen2.5-3B. Model, data, output and needs are those of mistral7b_8gpu.sh.
# No step of 7B has been timed on a GPU yet.
set -e
cd "$(dirname "$0")/.."

# The model; a download that was interrupted goes on
hf download mistralai/Mistral-7B-v0.1 --local-dir Mistral-7B-v0.1 --exclude "*.bin"

# OpenWebMath, as for the paper's main result: one file holds far more than a run sees
[ -f data/owm/meta.json ] || hf download open-web-math/open-web-math --repo-type dataset \
  --local-dir raw/owm --include "data/train-00000-of-*.parquet"
[ -f data/owm/meta.json ] || python data.py --input="$(ls raw/owm/data/*.parquet)" --field=text \
  --tokenizer=Mistral-7B-v0.1 --out=data/owm --val_share=0.001

# 100 steps of 8 texts of 256 tokens, lr 1e-6 after 20 steps of warm-up, N 2, T 12, A 4 by default
torchrun --standalone --nproc_per_node=1 --max-restarts=3 train.py \
  --init_from=Mistral-7B-v0.1 --data=data/owm --out=out/mistral7b \
  --dtype=bfloat16 --recompute=1 --batch_size=8 --grad_accum=8 --eval_texts=16
