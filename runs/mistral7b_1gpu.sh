#!/bin/sh
# Quiet-STaR on Mistral-7B-v0.1 with the paper's hyper-parameters, on one GPU, as its memory allows:
#
#   141 GB (H200)      fp32 weights and moments, 140e9 bytes at the peak
#   80 GB (H100)       bf16 weights that are rounded at random, bf16 moments, 68e9
#   48 GB (L40S)       adapters of rank 16 over frozen bf16 weights, 25e9
#   24 GB (RTX 4090)   the same with texts of 128 tokens, 21e9
#
# The bytes are those of `python -m tools.memory --grad_accum=8` with --weights, --moments and
# --lora. The eight texts of a step are eight micro-batches. Adapters learn at ten times the
# learning rate, markers and mixing head at their own. Model, data, output and needs are those of
# mistral7b_8gpu.sh. No step of 7B has been timed on a GPU yet.
set -e
cd "$(dirname "$0")/.."

MIB=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -n 1)
if [ "${MIB:-0}" -ge 140000 ]; then
  HOW=""
elif [ "${MIB:-0}" -ge 79000 ]; then
  HOW="--weights=bf16 --moments=bf16"
elif [ "${MIB:-0}" -ge 44000 ]; then
  HOW="--weights=bf16 --lora=16 --lr=1e-5 --marker_lr=10 --mixing_lr=0.1"
elif [ "${MIB:-0}" -ge 22000 ]; then
  HOW="--weights=bf16 --lora=16 --lr=1e-5 --marker_lr=10 --mixing_lr=0.1 --seq_len=128"
else
  echo "error: nvidia-smi reports ${MIB:-no} MiB; 7B needs a GPU of 24 GB or more" >&2
  exit 1
fi
echo "a GPU of $MIB MiB: ${HOW:-fp32 weights and moments}"

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
  --dtype=bfloat16 --recompute=1 --batch_size=8 --grad_accum=8 --eval_texts=16 $HOW
