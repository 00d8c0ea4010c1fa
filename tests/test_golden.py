"""The official implementation's own numbers, through the public forward, with its thoughts forced.

Each folder holds a tiny random checkpoint in the official layout, and what the official code made
of it: losses, rewards, log-probabilities and the gradient of every parameter, in fp32. They were
made by running that code. GOLDEN_DIR=folder runs another folder of such cases.
"""
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import thoughts
from checkpoint import load_model, save_model
from formats.huggingface import file_name
from lm_head import chunked_cross_entropy
from thoughts import ThoughtConfig, every_position
from tools.one_pass import use_one_pass

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))
CASES = sorted(path.parent for path in GOLDEN.glob("*/case.json"))
assert CASES, f"no golden cases in {GOLDEN}"


@pytest.fixture(params=CASES, ids=lambda path: path.name)
def case(request):
    return request.param


def read(case: Path):
    told = json.loads((case / "case.json").read_text())
    arrays = {name: torch.from_numpy(array) for name, array in np.load(case / "case.npz").items()}
    config = ThoughtConfig(told["thought_len"], told["n_thoughts"], told["n_true"],
                           told["policy_weight"], told["reinforce_temperature"],
                           told["base_loss_weight"],
                           marker_ids=(told["start_thought_id"], told["end_thought_id"]))
    quiet = load_model(case, thought_config=config)
    return quiet, arrays, arrays["ids"].long(), arrays["valid"].bool()


PATHS = ["plain path, two parts", "plain path, reference", "one pass, two parts",
         "one pass, reference"]


def forward(quiet, arrays, ids_BL, valid_BL, path: str, monkeypatch):
    thought_BNPT = arrays["thoughts"].long()[:, :, :-1]          # the last position has no target
    position_BP = None if "two parts" in path else every_position(ids_BL)
    if "plain" in path:
        return quiet(ids_BL, valid_BL, position_BP, thought_BNPT=thought_BNPT)
    use_one_pass(quiet)
    tokens = iter(thought_BNPT.flatten(0, 2).unbind(-1))         # as if they had been sampled
    monkeypatch.setattr(thoughts, "sample_tokens",
                        lambda hidden_RD, *_: (next(tokens), hidden_RD.new_zeros(len(hidden_RD))))
    outcome = quiet(ids_BL, valid_BL, position_BP)
    assert torch.equal(outcome.thought_BNPT, thought_BNPT)
    return outcome


def close(ours, official, tolerance: float = 1e-5):
    assert ours.shape == official.shape
    torch.testing.assert_close(ours, official.to(ours.dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("path", PATHS)
def test_every_value_equals_the_official_one(case, path, monkeypatch):
    quiet, arrays, ids_BL, valid_BL = read(case)
    out = forward(quiet, arrays, ids_BL, valid_BL, path, monkeypatch)
    A, L = quiet.config.n_true, ids_BL.shape[1]
    close(out.loss.detach(), arrays["loss"])
    close(out.policy_loss, arrays["policy_loss"])
    close(out.base_nll_BL, arrays["base_nll"])
    for a in range(A):
        close(out.mixed_nll_BNPA[:, :, :L - 1 - a, a], arrays[f"mixed_nll_{a}"])
    close(out.reward_BNP[:, :, :L - 1 - A], arrays["reward"])
    close(out.advantage_BNP[:, :, :L - 1 - A], arrays["advantage"])


def test_log_probabilities_of_the_thoughts_equal_the_official_ones(case):
    quiet, arrays, ids_BL, valid_BL = read(case)
    cfg, position_BP = quiet.config, every_position(ids_BL)
    thought_BNPT = arrays["thoughts"].long()[:, :, :-1]
    _, branch_BNPMD = quiet.read(ids_BL, position_BP, thought_BNPT, True, n_after=0)
    before_RD = branch_BNPMD[..., :cfg.thought_len, :].flatten(0, 3)
    target_R = thought_BNPT.flatten()
    _, nll_R = chunked_cross_entropy(before_RD, quiet.model.head.weight, target_R,
                                     torch.ones(len(target_R)), cfg.policy_temperature,
                                     cfg.marker_ids)
    logp_BNPT = -nll_R.view(thought_BNPT.shape)
    close(logp_BNPT[:, :, :ids_BL.shape[1] - 1 - cfg.n_true], arrays["thought_logp_T3"])


@pytest.mark.parametrize("path", PATHS)
def test_every_gradient_equals_the_official_one(case, path, monkeypatch):
    quiet, arrays, ids_BL, valid_BL = read(case)
    forward(quiet, arrays, ids_BL, valid_BL, path, monkeypatch).loss.backward()
    ours = {file_name(name, "official"): p.grad for name, p in quiet.named_parameters()}
    official = load_file(case / "grads.safetensors")
    assert set(ours) == set(official)
    for name, gradient in official.items():
        if name.endswith("_embedding"):                   # stored / 100: its gradient is 100 times
            gradient, mine = gradient[0], 100 * ours[name]
        else:
            mine = ours[name]
        assert mine.shape == gradient.shape
        error = (mine - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error < 1e-4, f"{name}: relative error {error:.1e}"


def test_evaluation_equals_the_official_one(case):
    """Where there is text; at padding, the official code attends to other nonsense than ours."""
    quiet, arrays, ids_BL, valid_BL = read(case)
    quiet.config = replace(quiet.config, n_thoughts=1, n_true=1)
    thought_BNPT = arrays["eval_thoughts"].long()[:, None]
    _, mixed_BNPD, _, _ = quiet.predict(ids_BL, thought_BNPT=thought_BNPT)
    logits_BLV = quiet.model.head(mixed_BNPD[:, 0]).detach()
    close(logits_BLV[valid_BL], arrays["eval_logits"][valid_BL])


def test_saved_and_loaded_again_it_is_bit_identical(case, tmp_path):
    quiet, *_ = read(case)
    save_model(quiet, tmp_path)
    again = load_model(tmp_path)
    assert again.config.marker_ids == quiet.config.marker_ids
    saved, loaded = quiet.state_dict(), again.state_dict()
    for (name, a), (_, b) in zip(saved.items(), loaded.items(), strict=True):
        assert torch.equal(a, b), name
