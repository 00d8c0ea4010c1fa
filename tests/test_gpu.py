"""What only a GPU can show. Skipped where there is none; `pytest tests/test_gpu.py` where there is.

The fused kernel there is another one, in bf16 alone; Mistral-7B's head counts are far from a toy's.
"""
import pytest
import torch

import train
from attention import TwoPartAttention, concatenated, thought_attention
from lm_head import logits_of
from test_train import assert_same_weights, rows, toy
from thoughts import every_position
from toys import assert_one_pass_loses_no_more, texts, tiny_quiet, uniforms

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


@pytest.mark.parametrize("B, N, P, passes, H, K, E", [(1, 2, 255, [17], 32, 8, 128),
                                                      (1, 2, 255, [1] * 12 + [5], 32, 8, 128),
                                                      (1, 2, 255, [1] * 5, 32, 8, 128),
                                                      (2, 3, 40, [9], 8, 8, 64)])
def test_folded_attention_loses_no_more_in_bfloat16_than_the_reference(B, N, P, passes, H, K, E):
    """The tokens of the last pass attend; 1,088 query heads for 8 key heads in the first case."""
    generator = torch.Generator("cuda").manual_seed(0)
    own = [(B, N, P, new, K, E) for new in passes for _ in "kv"]
    shapes = (B, N, P, passes[-1], H, E), *[(B, P, K, E)] * 2, *own
    inputs = [torch.randn(shape, device="cuda", generator=generator) for shape in shapes]
    d_out = torch.randn(shapes[0], device="cuda", generator=generator)
    position_BP = torch.arange(P, device="cuda").expand(B, P)

    def reference(q, k_text, v_text, *own):
        return thought_attention(q, *concatenated(own), k_text, v_text, position_BP, None)
    found = []
    for attend, dtype in ((reference, torch.float32), (TwoPartAttention.apply, torch.bfloat16),
                          (reference, torch.bfloat16)):
        leaves = [t.clone().to(dtype).requires_grad_() for t in inputs]
        out = attend(*leaves)
        out.backward(d_out.to(dtype))
        found.append([out.detach()] + [t.grad for t in leaves])
    names = "out", "q", "k_text", "v_text", *["k", "v"] * len(passes)
    for name, exact, folded, plain in zip(names, *found, strict=True):
        ours, theirs = ((t - exact).norm() / exact.norm() for t in (folded, plain))
        assert ours <= 1.25 * theirs + 1e-3, f"{name}: {ours:.2e} against {theirs:.2e}"


def test_a_gpu_finds_the_cpus_loss_and_gradients():
    found, ids_BL, uniform_BNPT = [], texts(2, 24), uniforms(2, 2, 23, 3)
    for device in ("cpu", "cuda"):
        quiet, ids = tiny_quiet().to(device), ids_BL.to(device)
        outcome = quiet(ids, ids >= 0, uniform_BNPT=uniform_BNPT.to(device))
        outcome.loss.backward()
        found.append([outcome.thought_BNPT.cpu(), outcome.loss.detach().cpu()]
                     + [p.grad.cpu() for p in quiet.parameters()])
    for cpu, gpu in zip(*found):
        torch.testing.assert_close(gpu, cpu, rtol=1e-3, atol=1e-4)


def test_in_bfloat16_one_pass_loses_no_more_than_sample_then_read():
    quiet = tiny_quiet(model=dict(dim=64, head_dim=64), n_thoughts=3).cuda()   # the kernel's width
    assert_one_pass_loses_no_more(quiet, texts(2, 24).cuda(), uniforms(2, 3, 23, 3).cuda())


def test_sampling_in_bfloat16_stays_near_float32():
    quiet, ids_BL = tiny_quiet().cuda(), texts(2, 24).cuda()
    thought_BNPT = texts(2 * 2 * 23, 3).view(2, 2, 23, 3).cuda()
    exact = quiet.predict(ids_BL, every_position(ids_BL), thought_BNPT=thought_BNPT)[1]
    with torch.autocast("cuda", torch.bfloat16):
        rounded = quiet.predict(ids_BL, every_position(ids_BL), thought_BNPT=thought_BNPT)[1]
    assert (rounded - exact).norm() / exact.norm() < 0.05



@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_products_give_float32_logits(autocast):
    """Operands are rounded to bf16, their product is not."""
    hidden_RD, head_VD = (torch.randn(n, 256, device="cuda") for n in (40, 500))
    half = hidden_RD.bfloat16(), head_VD.bfloat16()
    exact_RV = half[0].double() @ half[1].double().T
    given = (hidden_RD, head_VD) if autocast else half
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        found_RV = logits_of(*given)
    assert found_RV.dtype == torch.float32 and (found_RV - exact_RV).abs().max() < 1e-3


@pytest.mark.parametrize("head_dim", [4, 12, 264])
def test_heads_that_the_kernel_does_not_take_use_the_reference(head_dim):
    quiet, ids_BL = tiny_quiet(model=dict(head_dim=head_dim)).cuda(), texts(2, 24).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        loss = quiet(ids_BL, ids_BL >= 0, uniform_BNPT=uniforms(2, 2, 23, 3).cuda()).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in quiet.parameters())


@pytest.mark.parametrize("options", [("--moments=bf16",), ("--moments=8bit",), ("--lora=4",)])
def test_bf16_weights_learn_on_a_gpu_and_a_resumed_run_is_the_same(call, game, tmp_path, options):
    base = tmp_path / "base"
    assert call(train, *toy(game, base, "--objective=plain", "--device=cuda"))[0] == 0
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    own = f"--init_from={base}", "--weights=bf16", "--dtype=bfloat16", "--device=cuda", *options
    assert call(train, *toy(game, whole, *own))[0] == 0
    assert call(train, *toy(game, cut, *own, "--steps=3"))[0] == 0
    assert call(train, "--init_from=resume", f"--out={cut}", "--steps=6")[0] == 0
    assert_same_weights(cut, whole)
    assert rows(cut) == rows(whole)
