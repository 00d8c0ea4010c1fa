"""Structured attention against one dense mask; values to 1e-5, gradients to 1e-4."""
import os
import subprocess
import sys

import pytest
import torch

from attention import (GrowingContext, TwoPartAttention, attend_branch, may_attend,
                       thought_attention)
from thoughts import every_position
from toys import dense_read, texts, tiny_quiet, uniforms


def gradients(quiet, hidden):
    quiet.zero_grad()
    base_BLD, branch_BNPMD = hidden
    (base_BLD.sin().sum() + (branch_BNPMD * 1.7).cos().sum()).backward()
    return {name: p.grad.clone() for name, p in quiet.named_parameters() if p.grad is not None}


def assert_same_pass(quiet, ids_BL, position_BP, every):
    N, T = quiet.config.n_thoughts, quiet.config.thought_len
    thought_BNPT = texts(ids_BL.shape[0] * N * position_BP.shape[1], T, seed=7).view(
        len(ids_BL), N, position_BP.shape[1], T)
    ours = quiet.read(ids_BL, position_BP, thought_BNPT, every, n_after=quiet.config.n_true - 1)
    oracle = dense_read(quiet, ids_BL, position_BP, thought_BNPT)
    for a, b in zip(ours, oracle):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    ours, oracle = gradients(quiet, ours), gradients(quiet, oracle)
    assert ours.keys() == oracle.keys()
    for name in ours:
        size = max(1.0, float(oracle[name].norm()))      # a window of 1 leaves q no gradient at all
        assert (ours[name] - oracle[name]).norm() <= 1e-4 * size, name


@pytest.mark.parametrize("every", [True, False], ids=["two parts", "reference"])
@pytest.mark.parametrize("n_thoughts", [1, 2, 3])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_structured_attention_equals_the_dense_mask(every, n_thoughts, n_kv_heads):
    quiet = tiny_quiet(model=dict(n_kv_heads=n_kv_heads), n_thoughts=n_thoughts)
    ids_BL = texts(2, 9)
    assert_same_pass(quiet, ids_BL, every_position(ids_BL), every)


@pytest.mark.parametrize("window", [1, 2, 3, 5, 8, 14, 15, 16])
@pytest.mark.parametrize("n_true", [1, 3])
def test_structured_attention_equals_the_dense_mask_in_a_window(window, n_true):
    """L + M is 9 + 6 at n_true 2, so that windows bind, just bind, and just do not."""
    quiet = tiny_quiet(model=dict(windows=(window, 0)), n_true=n_true)
    ids_BL = texts(2, 9)
    assert_same_pass(quiet, ids_BL, every_position(ids_BL), every=True)


@pytest.mark.parametrize("every", [True, False], ids=["two parts", "reference"])
def test_in_bfloat16_structured_attention_loses_no_more_than_the_dense_mask_does(every):
    ids_BL, found = texts(2, 24), {}
    position_BP = every_position(ids_BL)
    thought_BNPT = texts(2 * 3 * 23, 3, seed=7).view(2, 3, 23, 3)
    for name, dtype in (("exact", torch.float64), ("ours", torch.bfloat16),
                        ("dense", torch.bfloat16)):
        quiet = tiny_quiet(n_thoughts=3).to(dtype)
        hidden = (quiet.read(ids_BL, position_BP, thought_BNPT, every, n_after=quiet.config.n_true - 1) if name == "ours"
                  else dense_read(quiet, ids_BL, position_BP, thought_BNPT))
        found[name] = dict(gradients(quiet, hidden), base=hidden[0], branch=hidden[1])
    for key, exact in found["exact"].items():
        ours, dense = ((found[name][key] - exact).norm() / exact.norm()
                       for name in ("ours", "dense"))
        assert ours <= 1.25 * dense + 1e-3, f"{key}: {ours:.2e} against {dense:.2e}"


def test_some_positions_may_think_and_others_not():
    position_BP = torch.tensor([[0, 3, 4], [2, 5, 7]])
    assert_same_pass(tiny_quiet(), texts(2, 9), position_BP, every=False)


def test_rows_of_two_part_attention_equal_the_reference_when_only_the_last_tokens_are_new():
    generator = torch.Generator().manual_seed(0)
    B, N, P, M, H, K, E, L = 2, 3, 5, 4, 4, 2, 8, 7
    k, v = (torch.randn(B, N, P, M, K, E, generator=generator) for _ in range(2))
    text_k, text_v = (torch.randn(B, L, K, E, generator=generator) for _ in range(2))
    position_BP = torch.arange(P).expand(B, P)
    for m in (1, 2, M):
        q = torch.randn(B, N, P, m, H, E, generator=generator)
        torch.testing.assert_close(TwoPartAttention.apply(q, text_k[:, :P], text_v[:, :P], k, v),
                                   thought_attention(q, k, v, text_k, text_v, position_BP, None))


def test_gradients_of_two_part_attention_equal_finite_differences():
    generator = torch.Generator().manual_seed(0)
    B, N, P, M, H, K, E = 1, 2, 3, 2, 2, 1, 2
    for passes in ([M], [1, 1], [2, 1, 2]):
        own = [(B, N, P, new, K, E) for new in passes for _ in "kv"]
        shapes = [(B, N, P, min(M, sum(passes)), H, E), (B, P, K, E), (B, P, K, E), *own]
        inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
                  for shape in shapes]
        assert torch.autograd.gradcheck(TwoPartAttention.apply, inputs)


@pytest.mark.parametrize("every", [True, False])
def test_autocast_rounds_no_product_inside_the_attention_of_thoughts(every):
    B, N, P, m, K, G, E = 2, 2, 6, 3, 2, 2, 8
    shapes = [(B, N, P, m, K * G, E)] + 2 * [(B, N, P, m, K, E)] + 2 * [(B, P, K, E)]
    outcomes = []
    for autocast in (True, False):
        generator = torch.Generator().manual_seed(0)
        tensors = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
        q, k, v, k_text, v_text = tensors
        position_BP = torch.arange(P).expand(B, P)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = attend_branch(q, [k, v], k_text, v_text, position_BP, None, every)
        out.square().sum().backward()
        outcomes.append([out, *(t.grad for t in tensors)])
    for rounded, exact in zip(*outcomes):
        assert torch.equal(rounded, exact)


def test_the_rule_by_its_words():
    def sees(query, key, same=False, window=None):
        return bool(may_attend(*(tuple(map(torch.tensor, x)) for x in (query, key)),
                               torch.tensor(same), window))
    assert sees((4, 0), (4, 0)) and sees((4, 0), (2, 0)) and not sees((4, 0), (5, 0))     # text
    assert sees((4, 2), (4, 0)) and not sees((4, 2), (5, 0))              # a thought sees its past
    assert sees((4, 2), (4, 1), same=True) and sees((4, 2), (4, 2), same=True)
    assert not sees((4, 2), (4, 3), same=True)                            # not its own future
    assert not sees((4, 2), (4, 1)) and not sees((5, 2), (4, 1))          # nor another thought
    assert not sees((4, 0), (3, 1)) and not sees((4, 0), (4, 1))          # text never sees thoughts
    assert sees((4, 2), (4, 0), window=3) and not sees((4, 2), (3, 0), window=3)   # 6 - 3 = 3 back


def test_no_tensor_grows_with_the_square_of_text_and_thoughts():
    """The largest tensor of a pass grows linearly with the thoughts, where a mask is quadratic."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    self.size = max(self.size, tensor.numel())
            return out

    for every in (True, False):
        sizes = []
        for n_thoughts in (2, 8):
            quiet, ids_BL = tiny_quiet(n_thoughts=n_thoughts), texts(1, 32)
            thought_BNPT = torch.zeros(1, n_thoughts, 31, 3, dtype=torch.long)
            with Largest() as largest, torch.no_grad():
                quiet.read(ids_BL, every_position(ids_BL), thought_BNPT, every, n_after=quiet.config.n_true - 1)
            sizes.append(largest.size)
        assert sizes[1] <= 4.5 * sizes[0]


def test_a_step_of_sampling_computes_only_what_is_new():
    ids_BL, rows = texts(2, 9), []
    for one_pass in (False, True):
        quiet = tiny_quiet(one_pass=one_pass)
        quiet.model.layers[0].register_forward_hook(
            lambda module, args, out: rows.append(out.shape[1]))
        quiet(ids_BL, ids_BL >= 0, uniform_BNPT=uniforms(2, 2, 8, 3))
    sampled = [9, 8] + [2 * 8] * 2           # the text, P start markers, N * P tokens T - 1 times
    assert rows == sampled + [9 + 2 * 8 * 6] + sampled + [2 * 8 * 3]     # once more, or each once


def test_positions_of_sampling_are_those_of_the_packed_pass():
    ids_BL = texts(2, 5)
    context = GrowingContext(5, every_position(ids_BL), True)
    seen = [context.position_BS]
    for new in (1, 2, 1):
        context.begin_pass(new, 1)
        seen.append(context.position_BS)
    assert seen[0][0].tolist() == [0, 1, 2, 3, 4]
    assert seen[1][0].tolist() == [1, 2, 3, 4]                     # start: one past each position
    assert seen[2][0].tolist() == [2, 3, 3, 4, 4, 5, 5, 6]
    assert seen[3][0].tolist() == [4, 5, 6, 7]


@pytest.mark.slow
def test_the_core_holds_on_a_device_without_the_fused_kernel():
    """Such as a Mac's GPU, on which the project was never tried: the same tests, by the reference."""
    core = [f"tests/test_{name}.py" for name in ("golden", "thoughts", "scoring", "eval", "sample")]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "unfused",
                           "-m", "not slow", *core], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": f".:tests:{os.environ.get('PYTHONPATH', '')}"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
