"""Weights and moments in fewer bytes: what is rounded away comes back in the mean."""
import json

import pytest
import torch

import train
from test_distributed import launch, ranks
from test_train import assert_same_weights, rows, tensors, toy
from tools.compact_adamw import (CompactAdamW, empty_moments, read_moment, round_into,
                                 write_moment)

BF16 = "--weights=bf16", "--dtype=bfloat16"


def optimizer_of(p, moments="fp32", lr=1e-6, **group):
    return CompactAdamW([dict(params=[p], **group)], lr, (0.9, 0.999), seed=0, moments=moments)


@pytest.mark.parametrize("sign", [1, -1])
def test_rounding_at_random_is_right_in_the_mean(sign):
    """10,000 draws each, of updates from a thousandth of the distance of two bf16 numbers on."""
    share_R = torch.logspace(-3, 0, 16)[:, None]                   # 0.001 to 1 of that distance
    exact = sign * (1 + share_R / 128).expand(-1, 10_000).contiguous()
    rounded = torch.empty_like(exact, dtype=torch.bfloat16)
    round_into(rounded, exact, torch.Generator().manual_seed(0))
    rounded = rounded.double()
    assert {*rounded.abs().flatten().tolist()} == {1.0, 1 + 1 / 128}
    error_R = (rounded - exact.double()).mean(dim=1).abs()
    assert (error_R <= 3 * rounded.std(dim=1) / 100 + 1e-9).all()


def test_small_updates_of_bf16_weights_are_realised_and_nearest_loses_them():
    """A constant gradient moves each weight by lr a step."""
    start = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    moved = {}
    for name in ("at_random", "nearest"):
        p = torch.nn.Parameter(start.bfloat16())
        adamw = optimizer_of(p)
        if name == "nearest":
            adamw = torch.optim.AdamW([p], 1e-6, weight_decay=0)
        for _ in range(200):
            p.grad = torch.full_like(p, 1e-3)
            adamw.step()
        moved[name] = float((start.bfloat16().double() - p.detach().double()).mean()) / (200 * 1e-6)
    assert moved["at_random"] == pytest.approx(1, abs=0.03)
    assert moved["nearest"] < 0.05


def test_in_fp32_it_is_torchs_adamw():
    start = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    options = dict(lr=1e-2, weight_decay=0.1)
    for adamw, p in ((optimizer_of(ours, **options), ours),
                     (torch.optim.AdamW([theirs], betas=(0.9, 0.999), **options), theirs)):
        generator = torch.Generator().manual_seed(1)
        for _ in range(20):
            p.grad = torch.randn(p.shape, generator=generator)
            adamw.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype, error", [(torch.bfloat16, 0.008), (torch.uint8, 0.02)])
@pytest.mark.parametrize("width", [512, 24])
def test_stored_moments_are_near_what_was_stored(dtype, error, width):
    moment = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    for name, exact in (("exp_avg", moment), ("exp_avg_sq", moment.square())):
        state = empty_moments(moment, dtype)
        write_moment(state, name, exact, torch.Generator().manual_seed(0))
        found = read_moment(state, name)
        assert (found - exact).norm() <= error * exact.norm()


@pytest.mark.parametrize("moments", ["fp32", "bf16", "8bit"])
def test_a_second_moment_decays_when_the_gradients_stop(moments):
    """By 0.1 % a step, which is less than half the distance of two bf16 numbers."""
    p = torch.nn.Parameter(torch.zeros(64, 64))
    adamw = optimizer_of(p, moments, lr=0.0)
    p.grad = torch.ones_like(p)
    adamw.step()
    before = read_moment(adamw.state[p], "exp_avg_sq").mean()
    p.grad.zero_()
    for _ in range(500):
        adamw.step()
    after = read_moment(adamw.state[p], "exp_avg_sq").mean()
    assert float(after / before) == pytest.approx(0.999 ** 500, rel=0.02)


@pytest.mark.parametrize("moments", ["fp32", "bf16", "8bit"])
def test_no_update_is_far_above_the_learning_rate_when_gradients_stop(moments):
    """As those of tokens that are absent do. A second moment that was rounded to 0 beside a large one
    once let a weight move by 60,000 lr."""
    p = torch.nn.Parameter(torch.zeros(256, 256))
    adamw = optimizer_of(p, moments, lr=1.0)
    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    p.grad[:, 0] = 2e-4
    for _ in range(20):
        before = p.detach().clone()
        adamw.step()
        assert (p.detach() - before).abs().max() < 2
        p.grad.zero_()


@pytest.mark.parametrize("moments", ["fp32", "bf16", "8bit"])
def test_a_resumed_run_of_bf16_weights_equals_an_uninterrupted_one_bit_for_bit(
        call, game, tmp_path, moments):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = *BF16, f"--moments={moments}"
    assert call(train, *toy(game, whole, *options))[0] == 0
    assert call(train, *toy(game, cut, *options, "--steps=3"))[0] == 0
    assert call(train, "--init_from=resume", f"--out={cut}", "--steps=6")[0] == 0
    assert_same_weights(cut, whole)
    assert rows(cut) == rows(whole)


def test_the_matrices_of_blocks_are_bf16_and_all_else_fp32(call, game, tmp_path):
    from checkpoint import find_checkpoint, load_model
    assert call(train, *toy(game, tmp_path, *BF16, "--steps=1"))[0] == 0
    model = load_model(find_checkpoint(tmp_path), dtype=None)
    for name, p in model.named_parameters():
        matrix = ".attention." in name or ".ffn." in name
        assert p.dtype == (torch.bfloat16 if matrix else torch.float32), name


def test_bf16_weights_with_fp32_products_are_refused(call, game, tmp_path):
    status, _, stderr = call(train, *toy(game, tmp_path, "--weights=bf16"))
    assert status == 2 and "--dtype=bfloat16" in stderr


@pytest.mark.slow
@pytest.mark.parametrize("moments", ["bf16", "8bit"])
def test_shards_round_as_the_whole_does_bit_for_bit(moments):
    """Given the same gradients; the rows of the toy do not divide into two shards."""
    jobs = launch(ranks(1, "none", moments, function="update"),
                  ranks(2, "ddp", moments, function="update"),
                  ranks(2, "fsdp", moments, function="update"))
    assert all(set(job["status"]) == {0} for job in jobs), jobs
    hashes = {json.loads(job["output"][0])["sha256"] for job in jobs}
    assert len(hashes) == 1


@pytest.mark.slow
def test_every_layout_learns_the_same_but_for_the_rounding_of_bf16(game, tmp_path):
    """A bf16 gradient has 8 bits, so sums in another order differ in the last; then a weight may be
    rounded to its other neighbour, 0.8 % away at most, in each of six steps."""
    options = *BF16, "--moments=8bit", "--lr=2e-4"
    names = dict(one=(1,), accumulated=(1, "--grad_accum=2"), ddp=(2,), fsdp=(2, "--parallel=fsdp"))
    done = launch(*(ranks(world, *toy(game, tmp_path / name, *options, *more))
                    for name, (world, *more) in names.items()))
    assert all(set(job["status"]) == {0} for job in done), done
    one = tensors(tmp_path / "one")
    for name in ("accumulated", "ddp", "fsdp"):
        for key, weight in tensors(tmp_path / name).items():
            difference = (weight - one[key]).abs()
            assert (difference <= 6 * (one[key].abs() / 128 + 2e-4)).all(), (name, key)
            assert difference.norm() <= 0.02 * one[key].norm(), (name, key)
        for ours, theirs in zip(rows(tmp_path / name), rows(tmp_path / "one"), strict=True):
            for column in {"step", "loss", "nll/base", "nll/mixed"} & theirs.keys():
                assert ours[column] == pytest.approx(theirs[column], rel=3e-3)
