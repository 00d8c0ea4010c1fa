#!/bin/sh
# Quiet-STaR on Mistral-7B-v0.1 with the paper's hyper-parameters on one GPU of 141 GB (H200).
#
#   CORPUS=owm sh runs/mistral7b_1gpu.sh
#
# The eight texts of a step are eight micro-batches; by `python -m tools.bench --plan --gpus=1
# --grad_accum=8` a step peaks at 138e9 bytes of the 150e9 that such a GPU has. One of 80 GB cannot
# hold 7B: fp32 weights, gradients and moments alone are 117e9. It holds models of up to 4e9
# parameters, such as
#   MODEL=Qwen/Qwen2.5-3B sh runs/mistral7b_1gpu.sh
# and two of 80 GB hold 7B (68e9 each):
#   GPUS=2 BATCH=2 sh runs/mistral7b_8gpu.sh
set -e
cd "$(dirname "$0")/.."
GPUS=1 ACCUMULATE="${ACCUMULATE:-8}" exec sh runs/mistral7b_8gpu.sh
