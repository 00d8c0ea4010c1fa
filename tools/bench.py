"""Benchmark of a training step and of a generated token, beside plain training.

    python -m tools.bench                     # a small model on one CPU thread
    python -m tools.bench --kind=generate     # a generated token; for 7B see docs/SCALING.md

  quiet        a step of train.py, which samples and learns in one pass without --recompute
  plain_path   a step that first samples and then reads, as thoughts.py does by itself
  sampling     the sampling of the thoughts alone
  plain        a step of next-token prediction on as many tokens
  generate, decode   one more token for each text, with a thought and without

Variants run in turn in fresh processes; the shortest time counts. Memory includes Python and torch
(0.25 GB). FLOPs are those of matrix products, not of fused attention; `share` is of a large one.
"""
import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

import config
from attention import GrowingContext, aten
from inference import Generator
from model import Mistral, ModelConfig
from thoughts import PlainObjective, QuietSTaR, ThoughtConfig, every_position
from tools.one_pass import use_one_pass

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = dict(dim=256, n_layers=4, n_heads=8, n_kv_heads=2, ffn_dim=704, vocab_size=8192,
             thought_len=9)
VARIANTS = ("quiet", "plain_path", "sampling", "plain", "decode", "generate")
TABLES = {                            # variants and their options
    "train": VARIANTS[:4],
    "generate": ["decode --seq_len=64", "generate --seq_len=64", "decode", "generate"]}


@dataclass(frozen=True)
class BenchConfig:
    kind: Literal["train", "generate"] = "train"            # table to print
    dtype: Literal["float32", "bfloat16"] = "float32"       # type of the weights
    seq_len: int = 256                # tokens of a text, or of the context when generating
    batch_size: int = 1               # texts in a step
    recompute: int = 0                # activation checkpointing of every n-th block; 0 none, 1 all
    rounds: int = 3                   # fresh processes for each variant
    variant: Literal["", *VARIANTS] = ""  # measure only this variant, in this process; print JSON


def shortest(run, times: int) -> float:
    """Return seconds of the shortest run but the first; on a CPU, of the one thread."""
    clock = time.perf_counter if DEVICE == "cuda" else time.process_time
    seconds = []
    for _ in range(times + 1):
        started = clock()
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - started)
    return min(seconds[1:])


def random_quiet(m: ModelConfig, c: ThoughtConfig):
    """Make a QuietSTaR with random weights, also in the mixing head, so that thoughts matter."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    with torch.device(DEVICE):
        quiet = QuietSTaR(Mistral(m).init_weights(generator), c)
        quiet.init_thoughts(quiet.model.embed.weight[0].detach(), generator)
    torch.nn.init.normal_(quiet.mixing_head[4].weight, std=0.02, generator=generator)
    return quiet


def variant_run(cfg: BenchConfig, quiet: QuietSTaR):
    """Return a function that runs the variant once: a step, or one more token for each text."""
    c, L, B = quiet.config, cfg.seq_len, cfg.batch_size
    uniform_BNPT = torch.rand(B, c.n_thoughts, L - 1, c.thought_len, device=DEVICE)
    objective, randoms = quiet, {"uniform_BNPT": uniform_BNPT}
    if cfg.variant == "plain":
        objective, randoms = PlainObjective(quiet.model), {}
        B *= 1 + c.n_thoughts * (c.thought_len + c.n_true + 1)
    ids_BL = torch.randint(quiet.model.config.vocab_size, (B, L), device=DEVICE)
    valid_BL = ids_BL >= 0            # no padding
    if cfg.variant in ("generate", "decode"):
        return Generator(quiet, ids_BL, valid_BL.sum(1), 64, think=cfg.variant == "generate").step

    @torch.no_grad()
    def sample():
        context = GrowingContext(L, every_position(ids_BL), True)
        quiet.model(ids_BL, context)
        quiet.sample_thoughts(context, uniform_BNPT, c.n_thoughts)

    def step():
        objective(ids_BL, valid_BL, **randoms).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if cfg.variant == "sampling":
        return sample
    if cfg.variant == "quiet" and not cfg.recompute:
        use_one_pass(quiet)
    optimizer = torch.optim.AdamW(quiet.parameters(), lr=1e-6, fused=True)
    return step


def measure(cfg: BenchConfig, m, c):
    """Measure one variant in this process: seconds, bytes, FLOPs, and FLOPs/s of a product."""
    quiet = random_quiet(m, c).to(getattr(torch, cfg.dtype))
    quiet.model.recompute = cfg.recompute
    run = variant_run(cfg, quiet)
    seconds = shortest(run, 3)
    peak, n = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 2048    # Linux: KiB
    if DEVICE == "cuda":
        peak, n = torch.cuda.max_memory_allocated(), 8192
    a_nn = torch.randn(n, n, device=DEVICE, dtype=quiet.end_thought.dtype)
    rate = 2 * n ** 3 / shortest(lambda: a_nn @ a_nn, 5)
    # a CPU's fused attention is not counted by torch, and a GPU's as a full square: count neither
    fused = (aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_cudnn_attention,
             aten._scaled_dot_product_flash_attention_backward,
             aten._scaled_dot_product_cudnn_attention_backward)
    none = dict.fromkeys(fused, lambda *_, **__: 0)
    quiet.start_thought.requires_grad_(False)         # no product; the counter's hooks refuse it
    with FlopCounterMode(display=False, custom_mapping=none) as counter:
        run()
    return dict(seconds=seconds, peak=peak, flops=counter.get_total_flops(), rate=rate)


def collect(cfg: BenchConfig):
    """Measure each variant of the table in turn, and keep its fastest round."""
    found = {}
    for name in TABLES[cfg.kind] * cfg.rounds:
        command = [sys.executable, "-m", "tools.bench", *sys.argv[1:], *f"--variant={name}".split()]
        try:
            run = json.loads(subprocess.check_output(command, cwd=Path(__file__).parents[1]))
        except subprocess.CalledProcessError as error:
            sys.exit(error.returncode)            # it has said why
        found[name] = min(found.get(name, run), run, key=lambda run: run["seconds"])
    return found


def main():
    cfg, m, c = config.parse(BenchConfig, ModelConfig, ThoughtConfig, defaults=SMALL)
    torch.set_num_threads(1)
    if cfg.variant:
        return print(json.dumps(measure(cfg, m, c)))
    print(cfg, m, c, "\n\n| variant | s | times | peak GB | TFLOP | share |\n" + 6 * "|---" + "|")
    found = collect(cfg)
    first = found[TABLES[cfg.kind][0]]["seconds"]
    for name, run in found.items():
        s, flops = run["seconds"], run["flops"]
        print(f"| {name} | {s:.3g} | {s / first:.2f} | {run['peak'] / 1e9:.2f} | "
              f"{flops / 1e12:.3g} | {flops / s / run['rate']:.0%} |")


if __name__ == "__main__":
    config.run(main)
