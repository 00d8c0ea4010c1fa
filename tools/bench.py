"""What it costs: a training step and a generated token, beside plain training and the naive way.

    python bench.py                               # the README's tables, on one thread
    python bench.py --shape=7b                    # Mistral-7B's numbers, random weights, one GPU
    python bench.py --plan                        # what it takes on several GPUs: plan.py

Each variant runs in fresh processes, all in turn, `rounds` times. Its time is the shortest seen,
its peak memory the process's high-water mark with Python and torch (0.25 GB) in it, on a GPU the
allocator's. `share` is FLOPs, counted from shapes, per second over the rate of a large matrix
product in the same run. The naive way is tests/naive.py.
Left out on purpose: profiling (torch.profiler does it), several GPUs.

Read next: plan.py
"""
import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import config
from config import UserError
from model import Mistral, ModelConfig, NextToken
from inference import Generator
from thoughts import QuietSTaR, ThoughtConfig, every_position

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from naive import naive_objective, naive_step  # noqa: E402

SHAPES = {                            # what differs from Mistral-7B and the paper
    "cpu": dict(dim=256, n_layers=4, n_heads=8, n_kv_heads=2, ffn_dim=704, vocab_size=8192,
                thought_len=9),
    "7b": dict(dtype="bfloat16", recompute=1)}


@dataclass(frozen=True)
class BenchConfig:
    kind: str = "all"                 # train | growth | generate | all
    shape: str = "cpu"                # cpu | 7b: defaults of the model's and the thoughts' options
    device: str = "auto"              # auto | cpu | cuda
    dtype: str = "float32"            # of the weights: float32 | bfloat16
    seq_len: int = 256                 # tokens of a text, or of the context when generating
    batch_size: int = 1                    # texts
    recompute: int = 0                # activation checkpointing of every n-th block; 0 none, 1 all
    compile: bool = False             # of the blocks in training, of whole passes in generation
    rounds: int = 3                   # fresh processes per variant
    variant: str = ""                 # measure only this, in this process, and print it as JSON

    def __post_init__(self):
        for name, known in (("kind", ("train", "growth", "generate", "all")), ("shape", SHAPES),
                            ("dtype", ("float32", "bfloat16"))):
            if getattr(self, name) not in known:
                raise UserError(f"--{name}={getattr(self, name)} is none of {', '.join(known)}")


def forward_flops(m: ModelConfig, tokens: float, pairs: float, predictions: float) -> float:
    """Of the blocks for `tokens`, attention between `pairs` of query and key, and the head."""
    heads = m.head_dim * (m.n_heads + m.n_kv_heads)
    layer = m.dim * (2 * heads + 3 * m.ffn_dim) * tokens + 2 * m.head_dim * m.n_heads * pairs
    return 2.0 * (m.n_layers * layer + m.dim * m.vocab_size * predictions)


def step_flops(m: ModelConfig, c: ThoughtConfig, B: int, L: int, two_phase: bool = False):
    """A training step's, its sampling's, and `plain` training's on as many tokens. Masked pairs do
    not count, nor recomputation; half of the thoughts have an advantage, and only they see the
    head. `once`: each token forward and backward once, start markers for each thought."""
    P, T, M, branch = L - 1, c.thought_len, c.thought_len + c.n_true + 1, B * c.n_thoughts
    causal, texts = L * (L + 1) / 2, B + branch * M

    def pairs(n):                     # n tokens behind each position, with the text and each other
        return B * causal + branch * (n * P * (P + 1) / 2 + P * n * (n + 1) / 2)
    scored = B * P + branch * sum(L - 1 - a for a in range(c.n_true))
    policy = branch * max(0, P - c.n_true) * T * (0.5 if c.n_thoughts > 1 else 0)
    mixing = 2.0 * m.dim * (3 * m.dim + 1) * branch * P * c.n_true
    forward = forward_flops(m, B * L + branch * P * M, pairs(M), scored + policy) + mixing
    once = 3 * forward + 2.0 * m.dim * m.vocab_size * branch * P * T
    alike = (branch - B) * P * (T > 0)                # start markers that another stands for
    saved = forward_flops(m, alike, alike * ((P + 1) / 2 + 1), 0)
    sampling = forward_flops(m, B * L + branch * P * T, pairs(T), branch * P * T) - saved
    return {"sampling": sampling, "once": once, "naive": once,
            "quiet": sampling + 3 * forward if two_phase else once - 3 * saved,
            "plain": 3 * forward_flops(m, texts * L, texts * causal, texts * P)}


def shortest(run, times: int) -> float:
    """Seconds of the shortest of some runs; the first, which warms up, does not count. On a CPU
    those of the one thread, whatever else the machine is doing."""
    on_gpu, seconds = torch.cuda.is_available(), []
    clock = time.perf_counter if on_gpu else time.process_time
    for _ in range(times + 1):
        started = clock()
        run()
        torch.cuda.synchronize() if on_gpu else None
        seconds.append(clock() - started)
    return min(seconds[1:])


def peak(device: str) -> int:
    """Bytes: the most that was ever held."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else resource.getrusage(
        resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def build(cfg: BenchConfig, m: ModelConfig, c: ThoughtConfig, device: str) -> QuietSTaR:
    """Random weights; the mixing head is not fresh, else no thought would have an advantage."""
    generator = torch.Generator(device).manual_seed(0)
    with torch.device(device):
        quiet = QuietSTaR(Mistral(m).init_weights(generator), c)
        quiet.init_thoughts(quiet.model.embed.weight[0].detach().clone(), generator)
        torch.nn.init.normal_(quiet.mixing_head[4].weight, std=0.02, generator=generator)
    quiet.model.recompute = cfg.recompute
    return quiet.to(getattr(torch, cfg.dtype))


def runner(cfg: BenchConfig, quiet: QuietSTaR, device: str):
    """What one run of a variant does, as a function: a training step, or a token for each text."""
    c, name, plain = quiet.config, cfg.variant, NextToken(quiet.model)
    texts = cfg.batch_size * (1 + c.n_thoughts * (c.thought_len + c.n_true + 1) * (name == "plain"))
    ids_BL = torch.randint(quiet.model.config.vocab_size, (texts, cfg.seq_len), device=device)
    valid_BL = torch.ones_like(ids_BL, dtype=torch.bool)
    uniform_BNPT = torch.rand(cfg.batch_size, c.n_thoughts, cfg.seq_len - 1, c.thought_len, device=device)
    if name in ("generate", "decode"):
        return Generator(quiet, ids_BL, valid_BL.sum(1), 64, 0, think=name == "generate",
                         compiled=cfg.compile).step
    if name == "rethink":
        return lambda: naive_step(quiet, ids_BL[0])
    if name == "sampling":
        return lambda: quiet.think(ids_BL, every_position(ids_BL), uniform_BNPT, True)
    if cfg.compile:
        quiet.model.compile_blocks()
    losses = {"quiet": lambda: quiet(ids_BL, valid_BL, uniform_BNPT=uniform_BNPT).loss,
              "plain": lambda: plain(ids_BL, valid_BL).loss,
              "naive": lambda: naive_objective(quiet, ids_BL, valid_BL, uniform_BNPT=uniform_BNPT)}
    optimizer = torch.optim.AdamW(quiet.parameters(), lr=1e-6, fused=True)

    def step():
        losses[name]().backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def measure(cfg: BenchConfig, m: ModelConfig, c: ThoughtConfig, device: str) -> dict[str, float]:
    before, quiet = peak(device), build(cfg, m, c, device)
    found = dict(seconds=shortest(runner(cfg, quiet, device), 3), peak=peak(device),
                 weights=sum(p.numel() * p.element_size() for p in quiet.parameters()))
    flops = step_flops(m, c, cfg.batch_size, cfg.seq_len, two_phase=cfg.recompute > 0)
    n, size = (8192, 2 ** 32) if device == "cuda" else (2048, 2 ** 27)
    a_nn = torch.randn(n, n, device=device).to(quiet.end_thought.dtype)
    block, copy = torch.empty(2, size, dtype=torch.uint8, device=device)
    return found | dict(flops=flops.get(cfg.variant, 0), once=flops["once"],
                        activations=found["peak"] - before - 4 * found["weights"],     # two moments
                        matmul=2 * n ** 3 / shortest(lambda: a_nn @ a_nn, 5),
                        bandwidth=2 * size / shortest(lambda: copy.copy_(block), 5))


def collect(cfg: BenchConfig, variants: dict[str, str]) -> dict[str, dict[str, float]]:
    """Each variant (name: options) in fresh processes, in turn; the best time, the worst peak."""
    found = {name: [] for name in variants}
    for name, options in list(variants.items()) * cfg.rounds:
        done = subprocess.run([sys.executable, "-m", "tools.bench", *sys.argv[1:], *options.split()],
                              capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"'{name}' ended with {done.returncode}: {done.stderr.strip()[-300:]}")
        found[name].append(json.loads(done.stdout))
    return {name: {key: (min if key == "seconds" else max)(r[key] for r in runs) for key in runs[0]}
            for name, runs in found.items()}


def train_table(cfg: BenchConfig, c: ThoughtConfig):
    grown = [f"quiet --{name}={n}" for name, n in (
        ("length", 2 * cfg.seq_len), ("thought_len", 2 * c.thought_len), ("n_true", 2 * c.n_true),
        ("n_thoughts", 2 * c.n_thoughts), ("vocab_size", 32000))]
    variants = ["quiet", "sampling", "plain", "naive"][:3 + (cfg.shape == "cpu")]  # 7B: > 100 GB
    variants = variants[:1 if cfg.kind == "growth" else 4] + grown * (cfg.kind != "train")
    found = collect(cfg, {name: f"--variant={name}" for name in variants})
    s, GB, rate, once = map(found["quiet"].get, ("seconds", "peak", "matmul", "once"))
    print("\n| training step | s | times | peak GB | times | activations | TFLOP | share |\n"
          + "|---" * 8 + "|")
    for name, f in found.items():
        print(f"| {name} | {f['seconds']:.3g} | {f['seconds'] / s:.2f} | {f['peak'] / 1e9:.2f} | "
              f"{f['peak'] / GB:.2f} | {f['activations'] / 1e9:.2f} | {f['flops'] / 1e12:.3g} | "
              f"{f['flops'] / f['seconds'] / f['matmul']:.0%} |")
    if cfg.kind != "growth":
        times = s / (found["plain"]["seconds"] + found["sampling"]["seconds"])
        speed = cfg.batch_size * cfg.seq_len / s
        print(f"\n{times:.2f} times plain + sampling; {speed:.0f} text tokens/s; "
              f"each token counted once, {once / s / rate:.0%} of {rate / 1e12:.3g} TFLOP/s")


def generate_table(cfg: BenchConfig, c: ThoughtConfig):
    print("\n| context | streams | ms a token | without thoughts | ratio / (T + 3) | tokens/s | "
          "of the bandwidth floor | the naive way, ms |\n" + "|---" * 8 + "|")
    small, T = cfg.shape == "cpu", c.thought_len
    for length, batch in ((64, 1), (256, 1)) if small else ((256, 1), (256, 64)):
        found = collect(cfg, {name: f"--variant={name} --seq_len={length} --batch_size={batch}"
                              for name in ("generate", "decode", "rethink")[:2 + small]})
        ms, plain, *naive = (1e3 * f["seconds"] for f in found.values())
        floor = 1e3 * (T + 1) * found["generate"]["weights"] / found["generate"]["bandwidth"]
        print(f"| {length} | {batch} | {ms:.1f} | {plain:.2f} | {ms / plain / (T + 3):.2f} | "
              f"{1e3 * batch / ms:.1f} | {floor / ms:.0%} | {sum(naive):.0f} |", flush=True)


def main():
    if "--plan" in config.options_on_command_line():
        from tools import memory as plan
        return plan.main()
    kinds = BenchConfig, ModelConfig, ThoughtConfig
    cfg, m, c = config.parse(*kinds, defaults=SHAPES[config.parse(*kinds)[0].shape])
    device = "cuda" if torch.cuda.is_available() and cfg.device != "cpu" else "cpu"
    if cfg.device not in ("auto", device):
        raise UserError(f"--device={cfg.device}: torch sees none here; leave it out for {device}")
    torch.set_num_threads(1)
    if cfg.variant:
        return print(json.dumps(measure(cfg, m, c, device)))
    print(f"{torch.cuda.get_device_name() if device == 'cuda' else 'one CPU thread'}, {cfg.dtype}, "
          f"recompute {cfg.recompute}, {m.n_layers} layers, D {m.dim}, V {m.vocab_size}, "
          f"B {cfg.batch_size}, L {cfg.seq_len}, T {c.thought_len}, A {c.n_true}, N {c.n_thoughts}")
    if cfg.kind != "generate":
        train_table(cfg, c)
    if cfg.kind in ("generate", "all"):
        generate_table(cfg, c)


if __name__ == "__main__":
    config.run(main)
