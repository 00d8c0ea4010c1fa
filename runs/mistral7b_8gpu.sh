#!/bin/sh
# Quiet-STaR on Mistral-7B-v0.1 with the paper's hyper-parameters: one node, eight GPUs of 80 GB.
#
# Needs `pip install huggingface_hub pyarrow`, 15 GB of disk for the model, 87 GB per checkpoint
# (two are kept, a third while it is written), 30 GB of memory a process while it loads, and per GPU
# the memory that `python -m tools.memory` prints. No step of 7B has been timed on a GPU yet. Killed
# processes are restarted, and the same command continues a run that was stopped.
#
# Two GPUs of 80 GB: --nproc_per_node=2 --batch_size=2. Several nodes: prepare model and data on
# one, then run torchrun on each, with a file system that they share and a --batch_size that the
# number of GPUs divides (the export is so that a restart finds nothing of dead processes):
#   export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
#   torchrun --nnodes=2 --rdzv_backend=c10d --rdzv_id=quiet --rdzv_endpoint=FIRST_NODE:29500 ...
set -e
cd "$(dirname "$0")/.."

# The model; a download that was interrupted goes on
hf download mistralai/Mistral-7B-v0.1 --local-dir Mistral-7B-v0.1 --exclude "*.bin"

# OpenWebMath, as for the paper's main result: one file holds far more than a run sees.
# C4 instead: hf download allenai/c4 ... --include "en/c4-train.00000-of-01024.json.gz"
[ -f data/owm/meta.json ] || hf download open-web-math/open-web-math --repo-type dataset \
  --local-dir raw/owm --include "data/train-00000-of-*.parquet"
[ -f data/owm/meta.json ] || python data.py --input="$(ls raw/owm/data/*.parquet)" --field=text \
  --tokenizer=Mistral-7B-v0.1 --out=data/owm --val_share=0.001

# 100 steps of 8 texts of 256 tokens, lr 1e-6 after 20 steps of warm-up, N 2, T 12, A 4 by default
torchrun --standalone --nproc_per_node=8 --max-restarts=3 train.py \
  --init_from=Mistral-7B-v0.1 --data=data/owm --out=out/mistral7b --parallel=fsdp \
  --dtype=bfloat16 --recompute=1 --batch_size=8 --eval_texts=16
