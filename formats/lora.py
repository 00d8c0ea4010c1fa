"""LoRA: thin matrices that learn beside the frozen linears of the blocks (arXiv 2106.09685).

    python train.py --lora=16 --init_from=Mistral-7B-v0.1 ...     saves adapters, not the model
    python checkpoint.py --convert=out/run --out=merged           adds them to the weights, in fp32

    y = W x + (ALPHA / rank) B A x        A and B are fp32; B is zero at first, so nothing changes

An adapter is always on: the base prediction, and a model that does not think, are those of the
weights as trained. The untouched model is the base itself. A checkpoint holds A and B under PEFT's
names, markers and mixing head beside them, and in adapter_config.json its base's path and hash.
"""
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from config import UserError, read_json
from model import Mistral

ALPHA = 32
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Adapter:
    """The rank of A and B, and their base: a checkpoint's path, and the hash of its files."""
    rank: int
    base: str
    base_sha256: str


class LoRALinear(nn.Linear):
    """A linear with A, [rank, in], and B, [out, rank], beside its weight."""
    def forward(self, x):
        scale = ALPHA / len(self.lora_A)
        low = F.linear(x, self.lora_A) * scale
        return super().forward(x) + F.linear(low, self.lora_B)


def linears_of(model: Mistral):
    """Yield every linear of the blocks."""
    for block in model.layers:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                yield module


def add_adapter(model: Mistral, adapter: Adapter, generator=None) -> None:
    """Freeze the model in place, and put an A and a B beside each linear of its blocks."""
    model.requires_grad_(False)
    model.adapter = adapter
    for linear in linears_of(model):
        linear.__class__ = LoRALinear     # its weight stays the same object under the same name
        bound = 1 / math.sqrt(linear.in_features)
        A = torch.empty(adapter.rank, linear.in_features)
        A.uniform_(-bound, bound, generator=generator)
        B = torch.zeros(linear.out_features, adapter.rank)
        device = linear.weight.device
        linear.lora_A = nn.Parameter(A.to(device))
        linear.lora_B = nn.Parameter(B.to(device))


@torch.no_grad()
def merge_adapter(model: Mistral) -> None:
    """Add the adapters to the weights in place; the model is then an ordinary one."""
    for linear in linears_of(model):
        scale = ALPHA / len(linear.lora_A)
        product = linear.lora_B.float() @ linear.lora_A.float()
        merged = linear.weight.float() + scale * product
        linear.weight.copy_(merged)
        del linear.lora_A, linear.lora_B
        linear.__class__ = nn.Linear
    model.adapter = None
    model.requires_grad_(True)


def adapter_config(adapter: Adapter) -> dict:
    """Return the adapter_config.json of PEFT; the hash is ours."""
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": adapter.rank, "lora_alpha": ALPHA,
            "target_modules": TARGETS, "base_model_name_or_path": adapter.base,
            "base_sha256": adapter.base_sha256}


def read_adapter(path: Path) -> Adapter:
    """Read an adapter_config.json. Raises UserError."""
    given = read_json(path, {"r": int, "lora_alpha": int, "base_model_name_or_path": str,
                             "base_sha256": str})
    if given["lora_alpha"] != ALPHA or not 1 <= given["r"] <= 1024:
        raise UserError(f"{path}: r = {given['r']} with lora_alpha = {given['lora_alpha']} is not "
                        f"supported: only adapters of this program are, with lora_alpha = {ALPHA}")
    return Adapter(given["r"], given["base_model_name_or_path"], given["base_sha256"])
