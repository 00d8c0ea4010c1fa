"""A checkpoint in the shape of Mistral-7B, of random weights: does a machine of 24 GB sample it?"""
import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from formats.huggingface import file_name, to_config
from model import Mistral, ModelConfig
from thoughts import QuietSTaR, ThoughtConfig

GB = 10 ** 9


def available_memory() -> int:
    """Bytes that a process could have, those of the page cache included; 0 if unknown."""
    try:
        (line,) = re.findall(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return 0
    return int(line) * 1024


def write_random_checkpoint(folder, shape: ModelConfig, thoughts: ThoughtConfig):
    """In four files, as published; each tensor is a cut from the same random numbers."""
    with torch.device("meta"):
        quiet = QuietSTaR(Mistral(shape), thoughts)
    numbers = torch.randn(shape.dim * shape.vocab_size, dtype=torch.bfloat16) * 0.02
    parameters, file_of = list(quiet.named_parameters()), {}
    for i in range(4):
        part = {}
        for name, p in parameters[i::4]:
            values = torch.ones(p.shape) if "norm" in name else numbers[:p.numel()].view(p.shape)
            part[file_name(name, "ours")] = values.bfloat16().clone()
        file = f"model-{i + 1:05d}-of-00004.safetensors"
        save_file(part, folder / file)
        file_of |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))
    (folder / "config.json").write_text(json.dumps(to_config(shape, thoughts, torch.bfloat16)))
    words = dict(words=[f"w{i}" for i in range(shape.vocab_size)], bos=None, eos=None)
    (folder / "words.json").write_text(json.dumps(words))


@pytest.mark.slow
def test_a_checkpoint_of_7b_is_sampled_from_in_bf16_within_17_gb(tmp_path):
    if shutil.disk_usage(tmp_path).free < 40 * GB or available_memory() < 17 * GB:
        pytest.skip("needs 40 GB of disk and 17 GB of memory")
    shape, thoughts = ModelConfig(), ThoughtConfig(thought_len=4)
    write_random_checkpoint(tmp_path, shape, thoughts)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    try:
        done = subprocess.run(
            [sys.executable, "sample.py", f"--checkpoint={tmp_path}", "--prompt=w1 w2 w3",
             "--max_new_tokens=1", "--show-thoughts", "--dtype=bfloat16", "--device=cpu"],
            capture_output=True, text=True)
    finally:
        for path in tmp_path.glob("*.safetensors"):
            path.unlink()
    assert done.returncode == 0, done.stderr
    (shown,) = [line for line in done.stdout.splitlines() if "+" in line or "-" in line][-1:]
    assert len(shown.split()) == 3 + thoughts.thought_len
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"peak {peak / GB:.1f} GB")
    assert before * 1024 < peak < 17 * GB
