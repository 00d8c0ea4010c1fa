"""Where thinking pays: thresholds, probes and the curve, against slow and obvious versions."""
import json
from copy import deepcopy

import numpy as np
import pytest
import torch

import data
import eval as evaluation
from tools import gate
import sample
import tokenizer as tokenizers
import weights
from inference import Gate, read_gate
from toys import tiny_quiet
from tools.trace import given


@pytest.fixture(scope="module")
def checkpoint(game, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gated")
    weights.save(tiny_quiet(model=dict(vocab_size=20)), folder, tokenizer=tokenizers.load(game))
    return folder


def planted(n: int = 4000, seed: int = 0) -> gate.Positions:
    """Gain is a linear function of the state, where entropy is low; where it is high there is none:
    nobody could know those tokens."""
    random = np.random.default_rng(seed)
    state = random.normal(size=(n, 8)).astype(np.float32)
    unknowable = random.random(n) < 0.5
    state[:, 0] = unknowable
    state[:, 1] = np.where(random.random(n) < 0.1, 1, 0) * ~unknowable
    base, gain = random.random(n) + 2, 0.8 * state[:, 1]
    entropy = np.where(unknowable, 2.0, 0.5) + 0.1 * base
    return gate.Positions(torch.from_numpy(state), entropy, base, base - gain,
                          np.repeat(np.arange(n // 10), 10))


def test_a_probe_finds_the_gain_that_entropy_does_not():
    fitted, tuned, seen = (planted(seed=seed) for seed in (1, 2, 3))
    probe = gate.fit_probe(fitted)
    assert np.abs(probe.score(seen.base_RD, None).numpy()
                  - (seen.nll_base_R - seen.nll_mixed_R)).max() < 0.02
    by_probe = gate.curve(probe.score(seen.base_RD, None).numpy(), seen,
                          probe.score(tuned.base_RD, None).numpy())
    by_entropy = gate.curve(seen.entropy_R, seen, tuned.entropy_R)
    at = gate.SHARES.index(0.1)
    assert by_probe[at]["kept"] > 0.9 and by_entropy[at]["kept"] == 0
    assert by_probe[-1]["kept"] > 0.99 and by_probe[-1]["share"] > 0.99


@pytest.mark.parametrize("share", [1e-9, 0.2, 0.5, 1.0])
def test_a_threshold_opens_the_gate_at_its_share_of_the_positions(share):
    score_R = np.random.default_rng(0).permutation(1000) / 1000
    opened = int((score_R >= gate.threshold(score_R, share)).sum())
    assert opened == max(1, round(share * 1000))


def test_the_curve_is_what_thinking_at_those_positions_alone_would_bring():
    seen = planted(seed=4)
    for point in gate.curve(seen.entropy_R, seen, seen.entropy_R):
        gains = [base - mixed if entropy >= point["threshold"] else 0.0 for entropy, base, mixed in
                 zip(seen.entropy_R, seen.nll_base_R, seen.nll_mixed_R)]
        assert point["gain"] == pytest.approx(sum(gains) / len(gains))
        assert point["interval"][0] <= point["gain"] <= point["interval"][1]


def test_what_is_observed_is_what_evaluation_scores(checkpoint, game):
    tokenizer, held_out = tokenizers.load(game), data.TokenFile(game / "silent", "val")
    quiet = weights.load_objective(str(checkpoint), "cpu", tokenizer)
    seen = gate.observe(quiet, held_out, slice(2, 9), 64, batch=3)
    ids_BL, valid_BL = (t[2:9] for t in evaluation.held_out_texts(held_out, 9, 64))
    where_BL = valid_BL.roll(-1, dims=1)
    where_BL[:, -1] = False
    scores = evaluation.score(quiet, ids_BL, where_BL)
    assert seen.text_R.tolist() == scores.text.tolist()
    for ours, theirs in ((seen.nll_base_R, scores.nll_base), (seen.nll_mixed_R, scores.nll_mixed)):
        assert ours == pytest.approx(theirs, abs=1e-4)
    logits_RV = quiet.model.head(seen.base_RD)
    entropy_R = torch.distributions.Categorical(logits=logits_RV).entropy()
    assert seen.entropy_R == pytest.approx(entropy_R.detach().numpy(), abs=1e-4)


def test_the_written_gate_opens_at_its_share_when_text_is_read(call, checkpoint, game, tmp_path):
    out, held_out = tmp_path / "gate.json", data.TokenFile(game / "silent", "val")
    status, text, stderr = call(gate, f"--checkpoint={checkpoint}", f"--data={game}/silent",
                                "--texts=60", "--share=0.3", f"--out={out}")
    assert (status, stderr) == (0, "") and text.count("gate by") == 2
    tokenizer = tokenizers.load(game)
    quiet = weights.load_objective(str(checkpoint), "cpu", tokenizer)
    written = read_gate(str(out), quiet)
    read_gate(str(out), deepcopy(quiet).bfloat16())                      # as it is held on a GPU
    with pytest.raises(ValueError, match="gate.json is of another checkpoint"):
        read_gate(str(out), tiny_quiet(seed=1))
    read = [token for i in range(30)
            for token in given(quiet, tokenizer, held_out.document(i).tolist(), gate=written)[1:]]
    assert np.mean([token.thinks for token in read]) == pytest.approx(0.3, abs=0.01)
    argv = (f"--checkpoint={checkpoint}", "--prompt=ball c : ab cd", "--temperature=1", "--json",
            "--max_new_tokens=20", "--think=gate")
    assert call(sample, *argv, f"--gate={out}")[0] == 0
    for limit, thinks in ((-torch.inf, {True}), (torch.inf, {False})):
        out.write_text(json.dumps(json.loads(out.read_text()) | {"threshold": limit}))
        tokens = call(sample, *argv, f"--gate={out}")[1].splitlines()
        assert {json.loads(token)["thinks"] for token in tokens} == thinks


def test_a_gate_of_a_probe_scores_the_state_alone():
    base_RD, probe_D = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.ones(4)
    opened = Gate(0.5, probe_D, 0.25).opens(base_RD, None)
    assert opened.tolist() == [float(state_D.sum()) + 0.25 >= 0.5 for state_D in base_RD]


def test_a_mistake_is_one_line(call, checkpoint, game, tmp_path):
    weights.save(tiny_quiet(model=dict(vocab_size=20)).model, tmp_path / "base",
                 tokenizer=tokenizers.load(game))
    given, text = f"--checkpoint={checkpoint}", f"--data={game}/silent"
    for argv, words in (([given], "are needed"), ([given, text, "--share=0"], "not above 0"),
                        ([given, text, "--texts=1"], "is below 2"),
                        ([f"--checkpoint={tmp_path}/base", text], "has no thoughts to gate")):
        status, _, stderr = call(gate, *argv)
        assert status == 2 and words in stderr and stderr.count("\n") == 1
