"""What a training step holds and sends on several GPUs, from shapes: nothing is allocated.

    python bench.py --plan                                      # Mistral-7B, 1 to 64 GPUs
    python bench.py --plan --batch_size=4 --thought_len=24 --gpus=8 --dim=... --n_layers=...

The model is built on the meta device and goes through parallel.spread, by a process group that only
pretends, to see what each rank keeps. One block runs forward and backward on meta tensors to see
what it saves and needs. The rest is added up from shapes, at three moments of a step: the losses'
end, the last block's backward (the first to run), the first block's (when all gradients are there).

tests/test_parallel.py holds it to what two processes really allocate. On a GPU, not measured yet,
the allocator's fragments, the CUDA context and NCCL come on top; fused kernels keep a little less.
Left out on purpose: the plain objective, times of computation (bench.py measures them).

Read next: README.md
"""
import weakref
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import config
import distributed as parallel
from config import UserError
from attention import PackedContext
from lm_head import ROWS
from model import Block, Mistral, ModelConfig, rope
from thoughts import QuietSTaR, ThoughtConfig


@dataclass(frozen=True)
class PlanConfig:
    plan: bool = True                 # this table
    gpus: tuple[int, ...] = (1, 2, 4, 8, 16, 64)
    batch_size: int = 1                    # texts per GPU and micro-batch
    grad_accum: int = 1               # micro-batches per step
    seq_len: int = 256                 # tokens per text
    dtype: str = "bfloat16"           # of the matrix products: float32 | bfloat16
    recompute: int = 1                # activation checkpointing of every n-th block; 0 none, 1 all
    nvlink: float = 450.0             # GB/s that a GPU receives within its node (H100, H200)
    network: float = 50.0             # GB/s that a GPU receives from other nodes (400 Gb/s each)

    def __post_init__(self):
        config.check_at_least(self, batch_size=1, grad_accum=1, seq_len=2, recompute=0)
        if min(self.gpus) < 1:
            raise UserError(f"--gpus={min(self.gpus)} is below 1")

    @property
    def width(self) -> int:           # bytes of a number in a matrix product
        return 4 if self.dtype == "float32" else 2


class Live(TorchDispatchMode):
    """Bytes of all tensors that operators made and that still live; `most` there ever were."""
    def __init__(self):
        super().__init__()
        self.storages, self.most, self.counts = {}, 0, True

    def watch(self, tensor):
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()   # of a rank's share
        if storage._cdata not in self.storages:
            self.storages[storage._cdata] = weakref.ref(storage)
            weakref.finalize(storage, self.storages.pop, storage._cdata, None)

    def now(self) -> int:
        """Counted anew: fsdp empties and refills its storages."""
        held = [reference() for reference in list(self.storages.values())]
        return sum(storage.nbytes() for storage in held if storage is not None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self.watch(tensor)
        self.most = max(self.most, self.now() if self.counts else 0)
        return out


def shares(m: ModelConfig, c: ThoughtConfig, kind: str, world: int) -> tuple[int, int, int, int]:
    """How many parameters rank 0 keeps, a block's matrices have, all blocks' have, the rest has."""
    with torch.device("meta"):
        quiet = QuietSTaR(Mistral(m), c)
    block = sum(p.numel() for part in (quiet.model.layers[0].attention, quiet.model.layers[0].ffn)
                for p in part.parameters())
    everything = sum(p.numel() for p in quiet.parameters())
    kept = everything
    if kind == "fsdp":
        from torch.testing._internal.distributed.fake_pg import FakeStore      # brings "fake"
        dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
        parallel.spread(quiet, parallel.Place(0, world, torch.device("cpu"), "fsdp"))
        kept = sum(p.to_local().numel() for p in quiet.parameters())
        dist.destroy_process_group()
    return kept, block, block * m.n_layers, everything - block * m.n_layers


def one_block(cfg: PlanConfig, m: ModelConfig, c: ThoughtConfig) -> tuple[int, int]:
    """Bytes that a block saves for its backward, and the most its forward and backward need beside
    its input and its weights."""
    dtype, saved = getattr(torch, cfg.dtype), {}
    P, M = cfg.seq_len - 1, c.thought_len + c.n_true + 1
    with torch.device("meta"):
        block = Block(m, 0).to(dtype)
        position_BP = torch.arange(P).expand(cfg.batch_size, -1)
        context = PackedContext(cfg.seq_len, position_BP, c.n_thoughts, M, True)
        x_BSD = torch.empty(*context.position_BS.shape, m.dim, dtype=dtype, requires_grad=True)
    weights = {p.untyped_storage()._cdata for p in block.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage.nbytes()
        return tensor
    with Live() as live:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out_BSD = block(x_BSD, *rope(context.position_BS, m), context)
        out_BSD.backward(torch.empty_like(out_BSD))
    return sum(saved.values()), live.most


def plan(cfg: PlanConfig, m: ModelConfig, c: ThoughtConfig, kind: str, world: int) -> dict:
    """Bytes on one GPU by what they are for, the `peak` of a step, and bytes it receives a step."""
    kept, block, blocks, rest = shares(m, c, kind, world)
    b, D, V, sharded = cfg.width, m.dim, m.vocab_size, kind == "fsdp"
    L, N, T, A = cfg.seq_len, c.n_thoughts, c.thought_len, c.n_true
    B, P = cfg.batch_size, L - 1
    stream = 4 * B * (L + N * P * (T + A + 1)) * D             # one state of every token, in fp32
    saved, working = one_block(cfg, m, c)
    gathered = b * blocks + 4 * rest if sharded else 0
    casts = 2 * (blocks + rest) if b == 2 and not sharded else 0
    again = cfg.grad_accum > 1                                 # gradients that wait for others:
    kept_always = (4 * (blocks + rest) * again if sharded else 4 * kept * (again or kind == "ddp"))
    mixed = B * N * P * A * D                                  # numbers in the mixed states
    predictions = B * P + B * N * sum(P - a for a in range(A))
    n_again = -(-m.n_layers // cfg.recompute) if cfg.recompute else 0          # blocks run again
    activations = n_again * stream + (m.n_layers - n_again) * saved + stream
    chunk = min(ROWS, predictions) * V * (8 if b == 4 else 10)
    head = 4 * V * D * 2 + b * V * D + chunk + 8 * predictions * D
    kv = 2 * m.n_layers * m.n_kv_heads * m.head_dim * B * (L + N * P * T) * b
    exchange = 4 * block * 2 if sharded else 0                 # being sent, and the one before
    moments = {
        "losses": gathered + casts + activations + 2 * stream + mixed * (20 if b == 4 else 12)
        + head + kept_always,
        "first backward": gathered + (0 if cfg.recompute else casts) + activations + working
        + exchange / 2 + max(kept_always, 4 * (rest - V * D)),              # no embedding's yet
        "last backward": max(kept_always, 4 * kept) + (4 * rest * 2 if sharded else 0) + stream
        + working - b * block + exchange}
    moment = max(moments, key=moments.get)
    share = (world - 1) / world
    sent = {"none": 0, "ddp": 2 * 4 * (blocks + rest) * share,
            "fsdp": (gathered + 4 * (blocks + rest)) * share}[kind]
    return {"weights": 4 * kept, "moments": 8 * kept, "gradients": 4 * kept,
            "gathered or cast": gathered + casts, "activations": activations, "a block": working,
            "head": head, "KV": kv, "peak": 12 * kept + moments[moment],
            "received": sent, "moment": moment}


def main():
    cfg, m, c = config.parse(PlanConfig, ModelConfig, ThoughtConfig)
    print(f"{m.n_layers} layers, D {m.dim}, V {m.vocab_size}; per GPU {cfg.batch_size} texts of "
          f"{cfg.seq_len} tokens, T {c.thought_len}, A {c.n_true}, N {c.n_thoughts}; {cfg.dtype}, "
          f"recompute {cfg.recompute}\n")
    names = ("weights", "moments", "gradients", "gathered or cast", "activations", "a block",
             "head", "KV", "peak", "received")
    print(f"| GPUs | | {' | '.join(names)} | ms, NVLink | ms, network |\n" + "|---" * 14 + "|")
    for world in cfg.gpus:
        for kind in ("none",) if world == 1 else ("ddp", "fsdp"):
            found = plan(cfg, m, c, kind, world)
            times = [found["received"] / rate / 1e6 for rate in (cfg.nvlink, cfg.network)]
            cells = " | ".join(f"{found[name] / 1e9:.1f}" for name in names)
            print(f"| {world} | {kind} | {cells} | {times[0]:.0f} | {times[1]:.0f} |", flush=True)


if __name__ == "__main__":
    config.run(main)
