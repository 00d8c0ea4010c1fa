"""tools/bench.py and tools/memory.py: counts that do not vary; and the naive scheme is ours."""
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from checkpoint import save_model
from flops import step_flops
from inference import Generator
from model import Mistral, ModelConfig
from naive import naive_objective, naive_step
from thoughts import QuietSTaR, ThoughtConfig
from tokenizer import load_tokenizer
from tools import bench, memory
from tools.one_pass import use_one_pass
from toys import texts, tiny_quiet, uniforms


# ----------------------------------------------------------------------------- the naive scheme

@pytest.mark.parametrize("n_thoughts", [1, 2, 3])
@pytest.mark.parametrize("forced, one_pass", [(True, False), (False, False), (False, True)])
def test_the_naive_scheme_has_our_loss_and_gradients(n_thoughts, forced, one_pass):
    assert_naive_is_ours(tiny_quiet(n_thoughts=n_thoughts, one_pass=one_pass), forced)


@pytest.mark.parametrize("window", [3, 9])
@pytest.mark.parametrize("one_pass", [True, False])
def test_the_naive_scheme_has_our_loss_and_gradients_in_a_window(window, one_pass):
    model = dict(windows=(window, 0))
    assert_naive_is_ours(tiny_quiet(model=model, marker_ids=(5, 6), one_pass=one_pass), False)


def assert_naive_is_ours(quiet, forced: bool):
    ids_BL, L, shape = texts(2, 9), 9, (2, quiet.config.n_thoughts, 8, 3)
    valid_BL = torch.arange(L) < torch.tensor([[L], [L - 3]])                # right padding
    draws = (dict(thought_BNPT=texts(2, shape[1] * 8 * 3, seed=4).view(shape)) if forced
             else dict(uniform_BNPT=uniforms(*shape)))
    found = []
    for objective in (lambda: quiet(ids_BL, valid_BL, **draws).loss,
                      lambda: naive_objective(quiet, ids_BL, valid_BL, **draws)):
        quiet.zero_grad()
        loss = objective()
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in quiet.named_parameters()}))
    (loss, gradients), (naive_loss, naive_gradients) = found
    torch.testing.assert_close(loss, naive_loss, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        error = (gradient - naive_gradients[name]).norm() / gradient.norm()
        assert error < 1e-4, f"{name}: relative error {error:.1e}"


def test_rethinking_everything_generates_our_text_token_for_token():
    quiet, ids_BL = tiny_quiet(), texts(1, 6)
    ours, naive = Generator(quiet, ids_BL, torch.tensor([6]), 8, temperature=0), ids_BL[0]
    for _ in range(8):
        naive = torch.cat((naive, torch.tensor([naive_step(quiet, naive)])))
        assert int(ours.step().token_B[0]) == naive[-1]


# ----------------------------------------------------------------------- counts that do not vary

@pytest.mark.parametrize("variant", ["quiet", "plain_path"])
@pytest.mark.parametrize("n_thoughts", [1, 2, 4])
def test_counted_flops_are_those_of_the_formula(n_thoughts, variant):
    """The framework counts products of weights, and thoughts' own attention as a full square; it
    does not see into the fused kernel on a CPU. So the formula is compared without attention, and
    the own part by its square."""
    m = ModelConfig(vocab_size=600, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=96)
    c, L = ThoughtConfig(thought_len=5, n_thoughts=n_thoughts, n_true=3), 48
    quiet = bench.random_quiet(m, c)
    quiet.start_thought.requires_grad_(False)          # no product; the counter's hooks refuse it
    if variant == "quiet":
        use_one_pass(quiet)
    ids_BL, T, M, thinkers = texts(2, L, 600), 5, 9, 2 * n_thoughts * (L - 1)
    with FlopCounterMode(display=False) as counter:
        quiet(ids_BL, ids_BL >= 0, uniform_BNPT=uniforms(2, n_thoughts, L - 1, T)).loss.backward()
    counts = counter.get_flop_counts()["Global"].items()
    counted = Counter({str(op).split(".")[-1]: n for op, n in counts})
    formula = step_flops(m, c, 2, L)[variant]
    in_kernel = 4 * 2 * 64                             # FLOPs of a query and a key, all layers
    pairs = {n: 2 * L * (L + 1) / 2 + thinkers * (n * L / 2 + n * (n + 1) / 2) for n in (T, M)}
    alike = thinkers * (1 - 1 / n_thoughts)            # start markers that another stands for
    if variant == "plain_path":
        expected = formula - in_kernel * (pairs[T] - alike * (L / 2 + 1) + 3 * pairs[M])
        own = thinkers * (T * (T + 1) / 2 + 3 * M ** 2) - alike
    else:
        expected = formula - in_kernel * 3 * (pairs[M] - alike * (L / 2 + 1))
        own = 3 * (thinkers * (T * (T + 1) / 2 + (M - T) * M) - alike)
    assert counted["mm"] + counted["addmm"] == pytest.approx(expected, rel=0.02)
    assert counted["bmm"] == pytest.approx(in_kernel * own, rel=0.02)


def test_at_7b_the_formula_gives_the_papers_necessary_arithmetic():
    """384 TFLOP per text of 256 tokens: each token forward and backward once, T 12, A 4, N 2."""
    flops = step_flops(ModelConfig(), ThoughtConfig(), 1, 256)
    assert flops["once"] == pytest.approx(384e12, rel=0.01)


def saved_mib(quiet, ids_BL, **draws) -> float:
    """Distinct storages that one forward keeps for its backward, parameters excluded."""
    parameters = {p.untyped_storage().data_ptr() for p in quiet.parameters()}
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        valid_BL = torch.ones_like(ids_BL, dtype=torch.bool)
        outcome = quiet(ids_BL, valid_BL, **draws)
    assert outcome.loss.requires_grad
    return sum(sizes.values()) / 2 ** 20


@pytest.mark.slow
@pytest.mark.parametrize("length, vocab_size, plain, recomputed", [(256, 1000, 400, 45),
                                                                   (128, 32000, 240, 70)])
def test_a_step_saves_little_for_backward(length, vocab_size, plain, recomputed):
    model = Mistral(ModelConfig(vocab_size, 128, 4, 8, 2, ffn_dim=352))
    quiet = QuietSTaR(model, ThoughtConfig(thought_len=12, n_thoughts=2, n_true=4))
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    quiet.init_thoughts(torch.zeros(128), generator)
    torch.nn.init.normal_(quiet.mixing_head[4].weight, generator=generator)   # so half the thoughts
    ids_BL = texts(1, length, vocab_size)                                       # have an advantage
    uniform_BNPT = uniforms(1, 2, length - 1, 12)
    thought_BNPT = texts(2 * (length - 1), 12, vocab_size).view(1, 2, -1, 12)
    use_one_pass(quiet)
    for draws in dict(uniform_BNPT=uniform_BNPT), dict(thought_BNPT=thought_BNPT):
        assert saved_mib(quiet, ids_BL, **draws) <= plain
    model.recompute = 1
    quiet.__class__ = QuietSTaR
    assert saved_mib(quiet, ids_BL, uniform_BNPT=uniform_BNPT) <= recomputed


# ----------------------------------------------------------------------------------------- memory

PLANNED = {1: (29.2, 14.6, 4.8, 2.9, 1.7, 0.8, 119.3), 2: (14.6, 15.2, 4.8, 2.9, 1.7, 0.8, 68.3),
           4: (7.3, 15.2, 4.8, 2.9, 1.7, 0.8, 46.5), 8: (3.6, 15.2, 4.8, 2.9, 1.7, 0.8, 35.5),
           16: (1.8, 15.2, 4.8, 2.9, 1.7, 0.8, 30.0), 64: (0.5, 15.2, 4.8, 2.9, 1.7, 0.8, 25.9)}


@pytest.mark.parametrize("n_gpus", PLANNED)
def test_memory_formulas_are_near_what_was_counted_on_the_meta_device(n_gpus):
    """GB that an operator-by-operator count of the 7B step found, commit 0058d91."""
    found = memory.step_memory(memory.MemoryConfig(), ModelConfig(), ThoughtConfig(), n_gpus)
    names = "weights", "copies", "activations", "a block", "head", "KV", "peak"
    for name, planned in zip(names, PLANNED[n_gpus]):
        assert found[name] / 1e9 == pytest.approx(planned, rel=0.1, abs=0.05), name
    assert found["gradients"] == found["weights"] == found["moments"] / 2


def test_memory_of_several_micro_batches_and_of_ddp_is_near_what_was_counted():
    cfg = memory.MemoryConfig(grad_accum=8)
    found = memory.step_memory(cfg, ModelConfig(), ThoughtConfig(), 1)
    assert found["peak"] / 1e9 == pytest.approx(138.2, rel=0.1)


def test_the_memory_table_has_a_row_for_each_number_of_gpus(call):
    status, out, _ = call(memory, "--gpus=1,8")
    rows = [line.split(" | ")[0] for line in out.splitlines()]
    assert status == 0 and rows[0] == "| GPUs" and rows[2:] == ["| 1", "| 8"]


def test_the_table_of_cards_says_what_fits(call):
    status, out, _ = call(memory, "--cards=24,80", "--grad_accum=8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()]
    assert status == 0 and rows[0] == ["", "states, GB", "24 GB", "80 GB"]
    assert [row[0] for row in rows[2:]] == [*memory.SCHEMES]
    fits = {row[0]: row[2:] for row in rows[2:]}
    assert fits["fp32 weights and moments"] == ["-", "-"]
    name = "bf16 weights, LoRA of rank 16"
    c, scheme = ThoughtConfig(), memory.MemoryConfig(grad_accum=8, weights="bf16", lora=16)
    for length, card in zip(map(int, fits[name]), (24, 80)):
        peaks = [memory.step_memory(replace(scheme, seq_len=n), ModelConfig(), c, 1)["peak"]
                 for n in (length, length + 16)]
        assert peaks[0] <= memory.USABLE * memory.CARD_BYTES[card] < peaks[1]
    assert call(memory, "--cards=25")[0] == 2


PEAK = """
import os, re, sys
sys.path.insert(0, ".")
import checkpoint, config, train

def report(*_, **__):
    (kilobytes,) = re.findall(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())
    print(int(kilobytes) * 1024, flush=True)
    os._exit(0)

checkpoint.save_run = report
config.run(train.main)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads its peak from /proc")
def test_small_runs_hold_what_the_formulas_say(game, tmp_path):
    """Beyond a tiny run, which holds Python and torch; with an allocator that keeps nothing."""
    shape = dict(vocab_size=1000, dim=1024, n_layers=4, n_heads=8, n_kv_heads=2, ffn_dim=3584)
    model = Mistral(ModelConfig(**shape)).init_weights(torch.Generator().manual_seed(0))
    save_model(model, tmp_path / "base", torch.bfloat16, tokenizer=load_tokenizer(game))
    del model
    own = [f"--{name}={value}" for name, value in shape.items()]
    runs = {"tiny": ["--dim=64", "--n_layers=1", "--n_heads=4", "--n_kv_heads=2", "--ffn_dim=128"],
            "8bit": ["--weights=bf16", "--moments=8bit", *own],
            "lora": ["--weights=bf16", "--lora=16", f"--init_from={tmp_path / 'base'}"]}
    peak = {}
    for name, words in runs.items():
        done = subprocess.run(
            [sys.executable, "-c", PEAK, f"--data={game}/without_reasoning",
             f"--out={tmp_path / name}", "--steps=2", "--batch_size=1", "--seq_len=32",
             "--crops=stream", "--recompute=1", "--dtype=bfloat16", "--eval_every=0", *words],
            capture_output=True, text=True, env={
                **os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000",
                "MALLOC_TRIM_THRESHOLD_": "1000000"})
        assert done.returncode == 0, done.stderr
        peak[name] = int(done.stdout.splitlines()[-1])
    schemes = {"8bit": dict(moments="8bit"), "lora": dict(lora=16)}
    for name, scheme in schemes.items():
        cfg = memory.MemoryConfig(weights="bf16", seq_len=32, **scheme)
        found = memory.step_memory(cfg, ModelConfig(**shape), ThoughtConfig(), 1)["peak"]
        assert peak[name] - peak["tiny"] == pytest.approx(found, rel=0.15), name


# ------------------------------------------------------------------------------------ the script

SMALL = ["--dim=16", "--n_layers=1", "--n_heads=2", "--n_kv_heads=1", "--ffn_dim=16",
         "--vocab_size=50",
         "--seq_len=12", "--thought_len=2", "--n_true=2", "--rounds=1"]


@pytest.mark.parametrize("variant", ["quiet", "plain_path", "sampling", "plain", "generate",
                                     "decode"])
def test_every_variant_is_measured(call, variant, monkeypatch):
    monkeypatch.setattr(bench, "shortest", lambda run, times: (run(), 1.0)[1])
    status, out, _ = call(bench, *SMALL, f"--variant={variant}")
    found = json.loads(out)
    assert status == 0 and found["peak"] > 0 and found["rate"] > 0
    assert found["flops"] > 0


@pytest.mark.parametrize("kind", ["train", "generate"])
def test_tables_have_all_their_rows(call, kind, monkeypatch):
    run = dict.fromkeys(("seconds", "peak", "flops", "rate"), 2.0)
    monkeypatch.setattr(bench, "collect", lambda cfg: dict.fromkeys(bench.TABLES[cfg.kind], run))
    status, out, _ = call(bench, *SMALL, f"--kind={kind}")
    assert status == 0 and all(f"\n| {name} |" in out for name in bench.TABLES[kind])


def test_the_fastest_round_of_each_variant_counts(monkeypatch):
    seconds = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(bench, "TABLES", {"train": ["quiet"]})
    monkeypatch.setattr(bench.subprocess, "check_output",
                        lambda command, cwd: json.dumps({"seconds": next(seconds)}))
    assert bench.collect(bench.BenchConfig(rounds=3)) == {"quiet": {"seconds": 1.0}}


def test_a_wrong_kind_is_one_line(call):
    status, _, err = call(bench, "--kind=speed")
    assert status == 2 and err.startswith("error: --kind: 'speed' is not one of train, generate")


@pytest.mark.parametrize("mistake", ["--gpus=0", "--gpus=", "--seq_len=0", "--batch_size=0"])
def test_memory_of_nothing_is_one_line(call, mistake):
    status, _, stderr = call(memory, mistake)
    assert status == 2 and stderr.startswith("error: --") and stderr.count("\n") == 1
