"""Where thinking pays: thresholds, probes and the curve, against slow and obvious versions."""
import json
from copy import deepcopy

import numpy as np
import pytest
import torch

import sample
import scoring
import train
from checkpoint import find_checkpoint, load_for_inference, load_model, save_model
from config import UserError
from data import TokenFile
from tokenizer import load_tokenizer
from tools import gate
from tools.gate import Gate, read_gate
from toys import tiny_quiet


@pytest.fixture(scope="module")
def checkpoint(game, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gated")
    save_model(tiny_quiet(model=dict(vocab_size=20)), folder, tokenizer=load_tokenizer(game))
    return folder


def planted(n: int = 4000, seed: int = 0):
    """States, gains, entropies and texts of n tokens. Gain is a linear function of the state where
    entropy is low; where it is high there is none: nobody could know those tokens."""
    random = np.random.default_rng(seed)
    state = random.normal(size=(n, 8)).astype(np.float32)
    unknowable = random.random(n) < 0.5
    state[:, 0] = unknowable
    state[:, 1] = np.where(random.random(n) < 0.1, 1, 0) * ~unknowable
    base, gain = random.random(n) + 2, 0.8 * state[:, 1].astype(float)
    entropy = np.where(unknowable, 2.0, 0.5) + 0.1 * base
    return torch.from_numpy(state), gain, entropy, np.repeat(np.arange(n // 10), 10)


def test_a_probe_finds_the_gain_that_entropy_does_not():
    fitted_RD, fitted_gain_R, _, _ = planted(seed=1)
    tuned_RD, _, tuned_entropy_R, _ = planted(seed=2)
    base_RD, gain_R, entropy_R, text_R = planted(seed=3)
    probe = gate.fit_probe(fitted_RD, fitted_gain_R)
    score_R, tuned_R = (probe.score(x_RD, None).numpy() for x_RD in (base_RD, tuned_RD))
    assert np.abs(score_R - gain_R).max() < 0.02
    by_probe = [*gate.curve(score_R, gain_R, text_R, tuned_R)]
    by_entropy = [*gate.curve(entropy_R, gain_R, text_R, tuned_entropy_R)]
    at = gate.SHARES.tolist().index(0.1)
    assert by_probe[at]["kept"] > 0.9 and by_entropy[at]["kept"] == 0
    assert by_probe[-1]["kept"] > 0.99 and by_probe[-1]["share"] > 0.99


@pytest.mark.parametrize("n", [1, 7, 1000])
def test_a_threshold_opens_the_gate_at_its_share_of_the_positions(n, monkeypatch):
    monkeypatch.setattr(gate, "SHARES", np.array([1e-9, 0.2, 0.5, 1.0]))
    score_R = np.random.default_rng(0).permutation(n) / n
    text_R = np.arange(n)
    for share, point in zip(gate.SHARES, gate.curve(score_R, score_R, text_R, score_R)):
        opened = int((score_R >= point["threshold"]).sum())
        assert opened == round(point["share"] * n) >= 1
        assert abs(opened - share * n) < 1 and (n < 1000 or opened == max(1, round(share * n)))


def test_the_curve_is_what_thinking_at_those_positions_alone_would_bring():
    _, gain_R, entropy_R, text_R = planted(seed=4)
    for point in gate.curve(entropy_R, gain_R, text_R, entropy_R):
        gains = [gain if entropy >= point["threshold"] else 0.0
                 for entropy, gain in zip(entropy_R, gain_R)]
        assert point["mean"] == pytest.approx(sum(gains) / len(gains))
        assert point["low"] <= point["mean"] <= point["high"]


def test_what_is_observed_is_what_evaluation_scores(checkpoint, game):
    data, tokenizer = game / "without_reasoning", load_tokenizer(game)
    quiet = load_for_inference(str(checkpoint), "cpu", tokenizer)
    cfg = gate.GateConfig(str(checkpoint), str(data), texts=9, seq_len=64)
    base_RD, gain_R, entropy_R, text_R = gate.observe(quiet, tokenizer, cfg, "val")
    ids_BL, valid_BL = scoring.held_out_texts(TokenFile(data, "val"), 9, 64)
    where_BL = valid_BL.roll(-1, dims=1)
    where_BL[:, -1] = False
    scores = scoring.score_positions(quiet, ids_BL, where_BL)
    assert text_R.tolist() == where_BL.nonzero()[:, 0].tolist()
    gain = (scores["nll_base"] - scores["nll_mixed"]).numpy()
    assert gain_R == pytest.approx(gain, abs=1e-4)
    # the states are in the order of the scores: they predict the same tokens
    logits_RV = quiet.model.head(base_RD).detach()
    expected_R = torch.distributions.Categorical(logits=logits_RV).entropy()
    assert entropy_R == pytest.approx(expected_R.numpy(), abs=1e-4)
    target_R = torch.cat([ids_L[valid_L][1:] for ids_L, valid_L in zip(ids_BL, valid_BL)])
    nll_R = torch.nn.functional.cross_entropy(logits_RV, target_R, reduction="none")
    assert scores["nll_base"].numpy() == pytest.approx(nll_R.numpy(), abs=1e-4)


def test_the_written_gate_opens_at_its_share_when_text_is_read(call, checkpoint, game, tmp_path):
    out, held_out = tmp_path / "gate.json", TokenFile(game / "without_reasoning", "val")
    folders = f"--checkpoint={checkpoint}", f"--data={game}/without_reasoning"
    status, text, stderr = call(gate, *folders, "--texts=60", "--share=0.3", f"--out={out}")
    assert (status, stderr) == (0, "") and text.count("gate by") == 2
    tokenizer = load_tokenizer(game)
    quiet = load_for_inference(str(checkpoint), "cpu", tokenizer)
    written = read_gate(str(out), quiet)
    read_gate(str(out), deepcopy(quiet).bfloat16())                      # as it is held on a GPU
    with pytest.raises(ValueError, match="gate.json is not a gate of this checkpoint"):
        read_gate(str(out), tiny_quiet(seed=1))
    read = []
    for i in range(30):
        ids = held_out.document(i).tolist()
        read += sample.teacher_forced(quiet, tokenizer, ids, gate=written).tokens
    assert np.mean([token.thinks for token in read]) == pytest.approx(0.3, abs=0.01)
    argv = (f"--checkpoint={checkpoint}", "--prompt=ball c : ab cd", "--temperature=1",
            "--max_new_tokens=20", "--think=gate", f"--gate={out}", "--show-thoughts")
    assert call(sample, *argv)[0] == 0
    for limit, thinks in ((-1e9, {True}), (1e9, {False})):
        out.write_text(json.dumps(json.loads(out.read_text()) | {"threshold": limit}))
        rows = call(sample, *argv)[1].splitlines()[3:]
        assert {len(row.split()) > 1 for row in rows} == thinks


def test_a_gate_of_a_probe_scores_the_state_alone():
    base_RD, probe_D = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.ones(4)
    opened = Gate(0.5, probe_D, 0.25).opens(base_RD, None)
    assert opened.tolist() == [float(state_D.sum()) + 0.25 >= 0.5 for state_D in base_RD]


def test_training_thinks_where_a_gate_says_and_a_resumed_run_keeps_its_gate(
        call, checkpoint, game, tmp_path):
    text, file = f"--data={game}/without_reasoning", tmp_path / "gate.json"
    assert call(gate, f"--checkpoint={checkpoint}", text, "--texts=60", f"--out={file}")[0] == 0
    options = (text, f"--init_from={checkpoint}", "--positions=gate", "--think_share=0.3",
               "--batch_size=4", "--seq_len=12", "--lr=1e-2", "--warmup=1", "--eval_every=0")

    def weights(run, *argv):
        status, _, stderr = call(train, f"--out={tmp_path}/{run}", *argv)
        assert status == 0, stderr
        return load_model(find_checkpoint(tmp_path / run)).state_dict()
    whole = weights("whole", *options, f"--gate={file}", "--steps=4")
    weights("part", *options, f"--gate={file}", "--steps=2")
    gate_of = json.loads(file.read_text())
    file.write_text(json.dumps(gate_of | {"probe": [-x for x in gate_of["probe"]]}))
    resumed = weights("part", "--init_from=resume", "--steps=4")      # with the gate it began with
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    other = weights("other", *options, f"--gate={file}", "--steps=4")
    assert not all(torch.equal(whole[name], other[name]) for name in whole)
    (tmp_path / "short.json").write_text(json.dumps(gate_of | {"probe": gate_of["probe"][1:]}))
    for argv, words in (([], "needs --gate=FILE"), (["--gate=0.5"], "cannot read"),
                        ([f"--gate={tmp_path}/short.json"], "fit one to this model"),
                        ([f"--gate={file}", "--positions=random"], "and others none")):
        status, _, stderr = call(train, f"--out={tmp_path}/new", *options, *argv, "--steps=1")
        assert status == 2 and words in stderr and stderr.count("\n") == 1, stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("value, words", [
    ("nan", "0 nats or more"), ("-5", "0 nats or more"), ("-inf", "0 nats or more"),
    ("x" * 300, "name too long")])
def test_a_threshold_is_0_nats_or_more(value, words):
    with pytest.raises(UserError, match=f"(?i){words}"):
        read_gate(value, None)
    assert read_gate("inf", None).threshold == float("inf") and read_gate("0", None).threshold == 0


def test_a_mistake_is_one_line(call, checkpoint, game, tmp_path):
    save_model(tiny_quiet(model=dict(vocab_size=20)).model, tmp_path / "base",
               tokenizer=load_tokenizer(game))
    given, text = f"--checkpoint={checkpoint}", f"--data={game}/without_reasoning"
    for argv, words in (([given], "are needed"), ([given, text, "--share=0"], "above 0"),
                        ([given, text, "--texts=1"], "is below 2"),
                        ([f"--checkpoint={tmp_path}/base", text], "has no thoughts to gate")):
        status, _, stderr = call(gate, *argv)
        assert status == 2 and words in stderr and stderr.count("\n") == 1
