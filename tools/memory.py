"""Memory of a training step on each GPU, by formulas.

    python -m tools.memory --gpus=1,2,4,8                     fsdp with fp32 weights and moments
    python -m tools.memory --weights=bf16 --moments=8bit      the options are those of train.py
    python -m tools.memory --cards=24,48,80,141               the longest text that fits one card

bf16 products, all blocks recomputed; ddp takes what one GPU takes with --grad_accum=2. Left out on
purpose: fragments, the CUDA context, NCCL, time.
"""
from dataclasses import dataclass, replace
from typing import Literal

import config
from lm_head import CHUNK
from model import ModelConfig
from thoughts import ThoughtConfig

MOMENT_BYTES = {"fp32": 4, "bf16": 2, "8bit": 1 + 4 / 256}
CARD_BYTES = {24: 25.8e9, 48: 48.3e9, 80: 85.5e9, 141: 150.8e9}     # RTX 4090, L40S, H100, H200
USABLE = 0.95                         # of a card; the rest is fragments and the CUDA context
SCHEMES = {                           # --weights, --moments and --lora of train.py
    "fp32 weights and moments": ("fp32", "fp32", 0),
    "bf16 weights, fp32 moments": ("bf16", "fp32", 0),
    "bf16 weights and moments": ("bf16", "bf16", 0),
    "bf16 weights, 8-bit moments": ("bf16", "8bit", 0),
    "bf16 weights, LoRA of rank 16": ("bf16", "fp32", 16)}


@dataclass(frozen=True)
class MemoryConfig:
    gpus: tuple[int, ...] = (1, 2, 4, 8, 16, 64)  # numbers of GPUs, a row of the table for each
    cards: tuple[int, ...] = ()                   # sizes in GB: print what fits one card instead
    weights: Literal["fp32", "bf16"] = "fp32"     # type of the blocks' matrices
    moments: Literal["fp32", "bf16", "8bit"] = "fp32"  # type of AdamW's moments
    lora: int = 0                                 # rank of adapters that learn instead; 0: none
    batch_size: int = 1                           # texts per GPU and micro-batch
    grad_accum: int = 1                           # micro-batches per step
    seq_len: int = 256                            # tokens per text

    def __post_init__(self):
        config.check_ranges(self, batch_size=1, grad_accum=1, seq_len=1, lora=(0, 1024))
        if min(self.gpus, default=0) < 1:
            raise config.UserError(f"--gpus={self.gpus}: give numbers above 0, like 1,2,4")
        unknown = [card for card in self.cards if card not in CARD_BYTES]
        if unknown:
            raise config.UserError(f"--cards={unknown[0]}: known are {[*CARD_BYTES]} GB")


def count_parameters(cfg: MemoryConfig, m: ModelConfig) -> tuple[int, int, int]:
    """Return the parameters of one block's matrices, of embedding and head, and of what is new: the
    mixing head and the adapters."""
    q_width = m.n_heads * m.head_dim
    kv_width = m.n_kv_heads * m.head_dim
    block = 2 * m.dim * (q_width + kv_width) + 3 * m.dim * m.ffn_dim
    tables = (2 - m.tied) * m.vocab_size * m.dim
    # an adapter adds its rank times the width before and after each of seven linears
    widths = 7 * m.dim + 2 * (q_width + kv_width) + 3 * m.ffn_dim
    new = 3 * m.dim * m.dim + m.n_layers * cfg.lora * widths
    return block, tables, new


def step_memory(cfg: MemoryConfig, m: ModelConfig, c: ThoughtConfig, n_gpus: int) -> dict:
    """Return bytes on one GPU by purpose."""
    D = m.dim
    kv_width = m.n_kv_heads * m.head_dim
    texts = cfg.batch_size * cfg.seq_len
    thoughts = c.n_thoughts * (texts - cfg.batch_size)
    sampled = texts + thoughts * c.thought_len
    tokens = sampled + thoughts * (c.n_true + 1)
    # weights, and gradients and moments of what learns
    block, tables, new = count_parameters(cfg, m)
    n_blocks = m.n_layers * block
    block_bytes = 2 if cfg.weights == "bf16" else 4
    weights = (block_bytes * n_blocks + 4 * (tables + new)) / n_gpus
    gradients = weights
    learning = n_blocks + tables + new
    if cfg.lora:
        learning = new
        gradients = 4 * new / n_gpus
    moments = 2 * MOMENT_BYTES[cfg.moments] * learning / n_gpus
    # copies: bf16 ones of fp32 blocks, or gathered blocks in bf16, and the rest
    copies = 4 * (tables + new)
    if cfg.weights == "fp32" or n_gpus > 1:
        copies += 2 * n_blocks
    activations = 4 * tokens * D * (m.n_layers + 1)     # the input of each block, in fp32
    states = 20 * D + 4 * kv_width + 2 * m.ffn_dim      # about this many numbers per token
    working = 2 * tokens * states
    head = 10 * m.vocab_size * CHUNK                    # a chunk of logits
    head += 2 * m.vocab_size * D                        # a copy of the head
    if not cfg.lora:
        working += block_bytes * block                  # the gradient of the block's matrices
        head += 8 * m.vocab_size * D                    # the gradient of the head, twice
    kv = 4 * m.n_layers * kv_width * sampled            # of the sampling, in bf16
    # gradients are whole while they wait for other micro-batches
    waiting = gradients * n_gpus * (cfg.grad_accum > 1)
    early = waiting + copies + activations + max(head, working)
    late = max(waiting, gradients) + working
    # tools/compact_adamw.py updates a matrix at a time, in fp32
    largest = max(m.dim * m.ffn_dim, m.vocab_size * m.dim)
    if cfg.lora:
        largest = 2 * m.dim * m.dim
    update = gradients
    if (cfg.weights, cfg.moments) != ("fp32", "fp32"):
        update += 32 * largest / n_gpus
    peak = weights + moments + max(early, late, update)
    return {"weights": weights, "gradients": gradients, "moments": moments,
            "copies": copies, "activations": activations, "a block": working,
            "head": head, "KV": kv, "peak": peak}


def longest_text(cfg: MemoryConfig, m: ModelConfig, c: ThoughtConfig, n_bytes: float) -> int:
    """Return the longest text in tokens, a multiple of 16, whose step takes at most `n_bytes`.
    Beyond a window attention would take the reference, whose scores are large."""
    length, branch = 0, c.thought_len + c.n_true + 1
    limit = m.window(0) or m.max_seq_len
    while length + 16 + branch <= limit:
        longer = replace(cfg, seq_len=length + 16)
        if step_memory(longer, m, c, 1)["peak"] > n_bytes:
            break
        length += 16
    return length


def table_of_cards(cfg: MemoryConfig, m: ModelConfig, c: ThoughtConfig):
    """Yield the rows: each scheme's states, and what fits the cards."""
    yield "| | states, GB |" + "".join(f" {card} GB |" for card in cfg.cards)
    yield "|---|---|" + "---|" * len(cfg.cards)
    for name, (weights, moments, lora) in SCHEMES.items():
        own = replace(cfg, weights=weights, moments=moments, lora=lora)
        found = step_memory(own, m, c, 1)
        states = found["weights"] + found["gradients"] + found["moments"]
        row = f"| {name} | {states / 1e9:.1f} |"
        for card in cfg.cards:
            length = longest_text(own, m, c, USABLE * CARD_BYTES[card])
            row += f" {length or '-'} |"
        yield row


def main():
    cfg, m, c = config.parse(MemoryConfig, ModelConfig, ThoughtConfig)
    if cfg.cards:
        print("\n".join(table_of_cards(cfg, m, c)))
        return
    rows = [step_memory(cfg, m, c, n_gpus) for n_gpus in cfg.gpus]
    print("| GPUs |", " | ".join(rows[0]), "|\n|---|---|---|---|---|---|---|---|---|---|")
    for n_gpus, row in zip(cfg.gpus, rows):
        cells = [f"{value / 1e9:.1f} |" for value in row.values()]
        print(f"| {n_gpus} |", *cells)


if __name__ == "__main__":
    config.run(main)
