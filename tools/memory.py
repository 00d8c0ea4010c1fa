"""Memory of a training step on each GPU, by formulas: `python -m tools.memory --gpus=1,2,4,8`.

fsdp with fp32 weights, gradients and moments, bf16 products, all blocks recomputed; ddp takes what
one GPU takes with --grad_accum=2. Left out on purpose: fragments, the CUDA context, NCCL, time.
"""
from dataclasses import dataclass

import config
from lm_head import CHUNK
from model import ModelConfig
from thoughts import ThoughtConfig


@dataclass(frozen=True)
class MemoryConfig:
    gpus: tuple[int, ...] = (1, 2, 4, 8, 16, 64)  # numbers of GPUs, a row of the table for each
    batch_size: int = 1                           # texts per GPU and micro-batch
    grad_accum: int = 1                           # micro-batches per step
    seq_len: int = 256                            # tokens per text

    def __post_init__(self):
        config.check_ranges(self, batch_size=1, grad_accum=1, seq_len=1)
        if min(self.gpus, default=0) < 1:
            raise config.UserError(f"--gpus={self.gpus}: give numbers above 0, like 1,2,4")


def step_memory(cfg: MemoryConfig, m, c, n_gpus):
    """Return bytes on one GPU by purpose. `m` and `c` are a ModelConfig and a ThoughtConfig."""
    D = m.dim
    kv_width = m.n_kv_heads * m.head_dim
    texts = cfg.batch_size * cfg.seq_len
    thoughts = c.n_thoughts * (texts - cfg.batch_size)
    sampled = texts + thoughts * c.thought_len
    tokens = sampled + thoughts * (c.n_true + 1)
    attention = 2 * D * (m.n_heads * m.head_dim + kv_width)
    block = attention + 3 * D * m.ffn_dim               # parameters of its matrices
    tables = (2 - m.tied) * m.vocab_size * D            # embedding and head
    rest = tables + 3 * D * D                           # and the mixing head
    n_params = m.n_layers * block + rest
    weights = 4 * n_params / n_gpus
    copies = 2 * (n_params + rest)                      # blocks gathered in bf16, the rest in fp32
    activations = 4 * tokens * D * (m.n_layers + 1)     # the input of each block, in fp32
    states = 20 * D + 4 * kv_width + 2 * m.ffn_dim      # about this many numbers per token
    working = 2 * tokens * states + 4 * block           # and the gradient of the block's matrices
    head = 10 * m.vocab_size * (D + CHUNK)              # gradient twice, copy; a chunk of logits
    kv = 4 * m.n_layers * kv_width * sampled            # of the sampling, in bf16
    waiting = 4 * n_params * (cfg.grad_accum > 1)       # whole gradients, for other micro-batches
    early = waiting + copies + activations + max(head, working)
    late = max(waiting, weights) + working
    peak = 3 * weights + max(early, late)
    return {"weights": weights, "gradients": weights, "moments": 2 * weights,
            "copies": copies, "activations": activations, "a block": working,
            "head": head, "KV": kv, "peak": peak}


def main():
    cfg, m, c = config.parse(MemoryConfig, ModelConfig, ThoughtConfig)
    rows = [step_memory(cfg, m, c, n_gpus) for n_gpus in cfg.gpus]
    print("| GPUs |", " | ".join(rows[0]), "|\n|---|---|---|---|---|---|---|---|---|---|")
    for n_gpus, row in zip(cfg.gpus, rows):
        cells = [f"{value / 1e9:.1f} |" for value in row.values()]
        print(f"| {n_gpus} |", *cells)


if __name__ == "__main__":
    config.run(main)
