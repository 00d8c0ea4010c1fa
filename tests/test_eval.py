"""Evaluation: what is scored, against what, and how sure one can be."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import eval as evaluation
from tasks import bootstrap as evidence
import predict
from tasks import shell_game
import tokenizer as tokenizers
import weights
from data import TokenFile, prepare
from model import NextToken
from toys import texts, tiny_mistral, tiny_quiet


def some_positions():
    where_BL = torch.zeros(3, 8, dtype=torch.bool)
    where_BL[0, [1, 4]], where_BL[1, [0, 2, 6]], where_BL[2, 3] = True, True, True
    return where_BL


def test_thinking_at_scored_positions_only_equals_thinking_everywhere_there():
    quiet, ids_BL, where_BL = tiny_quiet(n_thoughts=1), texts(3, 8), some_positions()
    scores = evaluation.score(quiet, ids_BL, where_BL)
    base_BPD, mixed_BNPD, weight_BNP, thought_BNPT = quiet.predict(ids_BL)
    for hidden_BLD, nll, right in ((base_BPD, scores.nll_base, scores.right_base),
                                   (mixed_BNPD[:, 0], scores.nll_mixed, scores.right_mixed)):
        logp_BLV = quiet.model.head(hidden_BLD).log_softmax(-1)
        expected = [-logp_BLV[b, j, ids_BL[b, j + 1]].item()
                    for b, j in where_BL.nonzero().tolist()]
        np.testing.assert_allclose(nll, expected, rtol=1e-4, atol=1e-5)
        best = [logp_BLV[b, j].argmax() == ids_BL[b, j + 1] for b, j in where_BL.nonzero().tolist()]
        assert right.tolist() == best
    assert scores.text.tolist() == where_BL.nonzero()[:, 0].tolist()
    np.testing.assert_allclose(scores.mixing_weight, weight_BNP[:, 0][where_BL].detach(),
                               rtol=1e-4, atol=1e-5)
    assert scores.thought.tolist() == thought_BNPT[:, 0][where_BL].tolist()


def test_positions_are_packed_in_order_and_shorter_rows_repeat_a_real_one():
    position_BP, real_BP = predict.pack_positions(some_positions())
    assert position_BP.tolist() == [[1, 4, 1], [0, 2, 6], [3, 3, 3]]
    assert real_BP.sum(1).tolist() == [2, 3, 1]


def test_swapped_thoughts_are_the_same_thoughts_at_other_positions():
    quiet, ids_BL, where_BL = tiny_quiet(n_thoughts=1), texts(3, 8), some_positions()
    own, swapped = (evaluation.score(quiet, ids_BL, where_BL, thoughts=t)
                    for t in ("own", "swapped"))
    assert sorted(own.thought.tolist()) == sorted(swapped.thought.tolist())
    assert (own.thought != swapped.thought).any(-1).sum() >= 4
    np.testing.assert_allclose(own.nll_base, swapped.nll_base, rtol=1e-5)
    assert not np.allclose(own.nll_mixed, swapped.nll_mixed)


def test_a_model_without_thoughts_is_scored_by_its_base():
    quiet, ids_BL, where_BL = tiny_quiet(), texts(3, 8), some_positions()
    alone = evaluation.score(NextToken(quiet.model), ids_BL, where_BL)
    thinking = evaluation.score(quiet, ids_BL, where_BL)
    np.testing.assert_allclose(alone.nll_base, thinking.nll_base, rtol=1e-5)
    assert np.array_equal(alone.nll_mixed, alone.nll_base) and alone.thought.shape == (6, 0)


def test_a_choice_is_the_best_of_the_choices_and_its_nll_is_among_all_tokens():
    objective, choices = NextToken(tiny_mistral(vocab_size=4, dim=4, head_dim=4)), [1, 2]
    objective.model.head.weight.data = torch.eye(4)
    nll, right, *_ = evaluation.grade(objective, torch.tensor([[9.0, 3.0, 1.0, 0.0]]),
                                      torch.tensor([1]), torch.tensor(choices))
    assert right.tolist() == [True]
    assert nll[0] == pytest.approx(-torch.tensor([9.0, 3, 1, 0]).log_softmax(0)[1].item())


def test_batches_of_texts_change_nothing(game):
    tokenizer, held_out = tokenizers.load(game), TokenFile(game / "aloud", "val")
    quiet = tiny_quiet(model=dict(vocab_size=tokenizer.vocab_size))
    a, b = (evaluation.score_texts(quiet, held_out, tokenizer, 30, 40, batch=batch)
            for batch in (1, 64))
    assert a.text.tolist() == b.text.tolist()
    np.testing.assert_allclose(a.nll_mixed, b.nll_mixed, rtol=1e-4)


def test_in_the_shell_game_hidden_answers_are_scored_among_the_cups(game):
    tokenizer, held_out = tokenizers.load(game), TokenFile(game / "silent", "val")
    objective = NextToken(tiny_mistral(vocab_size=tokenizer.vocab_size))
    scores = evaluation.score_texts(objective, held_out, tokenizer, 50, 40)
    assert scores.text.tolist() == list(range(50))                     # one answer in each line
    with torch.no_grad():                                # cup c always best of the cups, "." of all
        objective.model.head.weight.zero_()
        objective.model.norm.weight.zero_()
    scores = evaluation.score_texts(objective, held_out, tokenizer, 50, 40)
    assert scores.nll_base == pytest.approx(np.log(tokenizer.vocab_size))
    first = tokenizer.encode(shell_game.CUPS[0])[0]                    # ties go to the first choice
    answers = [held_out.document(i)[-2] for i in range(50)]
    assert scores.right_base.tolist() == [answer == first for answer in answers]


def scores_of(text, nll, **others):
    """Scores without thoughts, but for what is given."""
    zeros = np.zeros(len(nll))
    at = np.tile(nll[:, None], len(evidence.TEMPERATURES))
    values = dict(text=text, nll_base=nll, nll_mixed=nll, right_base=zeros, right_mixed=zeros,
                  entropy_base=zeros, mixing_weight=zeros, nll_at=at,
                  thought=np.zeros((len(nll), 0)))
    return evaluation.Scores(**{**values, **others})


def test_intervals_resample_texts_and_hold_the_mean():
    n = 400
    text = np.repeat(np.arange(n // 4), 4)
    value = np.repeat(np.random.default_rng(0).normal(size=n // 4), 4)       # a text's tokens agree
    found = evidence.summary(scores_of(text, value).units())["nll_base"]
    assert found["mean"] == pytest.approx(value.mean())
    assert found["low"] < value.mean() < found["high"]
    expected = 2 * 1.96 * value.std() / np.sqrt(n // 4)                # not / sqrt(n): 4 are as 1
    assert found["high"] - found["low"] == pytest.approx(expected, rel=0.15)


def test_a_paired_difference_is_surer_than_its_parts():
    rng = np.random.default_rng(0)
    nll = rng.normal(size=300)
    scores = scores_of(np.arange(300), nll, nll_mixed=nll - 0.1 + 0.01 * rng.normal(size=300))
    found = evidence.summary(scores.units())
    low, high = (found["nll_mixed-nll_base"][name] for name in ("low", "high"))
    assert low < -0.1 < high < -0.09
    assert high - low < (found["nll_base"]["high"] - found["nll_base"]["low"]) / 50


@pytest.mark.parametrize("by", evaluation.BINNED.values())
def test_bins_run_from_the_least_to_the_greatest_and_hold_every_token(by):
    rng = np.random.default_rng(0)
    values = {name: rng.exponential(size=95) for name in evaluation.BINNED.values()}
    scores = scores_of(np.arange(95) // 2, values.pop("nll_base"), nll_mixed=rng.normal(size=95),
                       **values)
    rows = evaluation.bins(scores, by)
    assert sum(row["tokens"] for row in rows) == 95 and len(rows) == 10
    assert all(a[by] < b[by] for a, b in zip(rows, rows[1:]))
    for row in rows:
        low, high = row["interval_gain"]
        assert low <= row["nll_base"] - row["nll_mixed"] <= high


def test_the_sharpened_base_has_the_temperature_that_suits_the_other_half_of_the_texts():
    """Logits that are twice too flat: the temperature found is one half, on either half."""
    rng = np.random.default_rng(0)
    logits_RV = torch.tensor(rng.normal(size=(4000, 5)) * 2)
    target_R = torch.multinomial(logits_RV.softmax(-1), 1,
                                 generator=torch.Generator().manual_seed(0))[:, 0]
    objective = NextToken(tiny_mistral(vocab_size=5, dim=8))
    objective.model.head.weight.data = torch.eye(5, 8)
    hidden_RD = torch.nn.functional.pad(logits_RV.float() / 2, (0, 3))
    nll, _, entropy, nll_at = evaluation.grade(objective, hidden_RD, target_R, None,
                                               evidence.TEMPERATURES)
    np.testing.assert_allclose(nll_at[:, evidence.PLAIN], nll, rtol=1e-4, atol=1e-5)
    p_RV = (logits_RV / 2).softmax(-1)
    np.testing.assert_allclose(entropy, -(p_RV * p_RV.log()).sum(-1), rtol=1e-4)
    value, fitted = evidence.temperature_scaled(nll_at, np.arange(4000), least=True)
    assert fitted == [0.5, 0.5] and value.mean() < nll.mean() - 0.05
    spoilt = nll_at.copy()
    spoilt[::2, 0] = -100                                     # what is scored decides nothing
    value, fitted = evidence.temperature_scaled(spoilt, np.arange(4000), least=True)
    assert fitted[0] == 0.5 and np.array_equal(value[::2], nll_at[::2, evidence.PLAIN - 4])


def test_the_command_prints_a_table_and_writes_the_same_numbers(call, game, tmp_path):
    weights.save(tiny_quiet(model=dict(vocab_size=20)), tmp_path / "quiet")
    argv = (f"--checkpoint={tmp_path}/quiet", f"--data={game}/silent", "--texts=20")
    status, out, _ = call(evaluation, *argv, f"--out={tmp_path}/scores.json")
    told = json.loads((tmp_path / "scores.json").read_text())
    assert status == 0 and f"{told['nll_mixed']['mean']:.4f}" in out
    assert told["tokens"] == 20 and 0 <= told["reasoning_is_right"]["mean"] <= 1
    assert len(told["difficulty"]) == len(told["by_entropy"]) == len(told["by_weight"]) == 10
    status, out, _ = call(evaluation, *argv, f"--against={tmp_path}/scores.json", "--thoughts=none",
                          f"--out={tmp_path}/none.json")
    none = json.loads((tmp_path / "none.json").read_text())
    assert none["differences"]["nll_base"]["mean"] == pytest.approx(0, abs=1e-5)
    gain = told["nll_mixed-nll_base"]["mean"]
    assert none["differences"]["nll_mixed"]["mean"] == pytest.approx(-gain, abs=1e-5)
    told["units"]["count"][3] += 1
    (tmp_path / "scores.json").write_text(json.dumps(told))
    status, _, stderr = call(evaluation, *argv, f"--against={tmp_path}/scores.json",
                             f"--out={tmp_path}/again.json")
    assert status == 2 and "counts other tokens of the same texts" in stderr
    assert json.loads((tmp_path / "again.json").read_text())["nll_mixed"] == told["nll_mixed"]


def test_a_sweep_scores_the_same_tokens_after_thoughts_of_each_length(call, game, tmp_path):
    weights.save(tiny_quiet(model=dict(vocab_size=20)), tmp_path / "quiet")
    argv = (f"--checkpoint={tmp_path}/quiet", f"--data={game}/silent", "--texts=10",
            f"--out={tmp_path}/scores.json")
    assert call(evaluation, *argv, "--thought_len=0,3,5")[0] == 0
    told = json.loads((tmp_path / "scores.json").read_text())
    assert [row["thought_len"] for row in told["sweep"]] == [0, 3, 5]
    assert told["sweep"][1]["nll_mixed"] == told["nll_mixed"]               # the trained length
    assert call(evaluation, *argv, "--thought_len=5")[0] == 0
    alone = json.loads((tmp_path / "scores.json").read_text())
    assert alone["nll_mixed"] == told["sweep"][2]["nll_mixed"] != told["sweep"][0]["nll_mixed"]


@pytest.mark.slow
def test_two_ranks_score_the_same_tokens_as_one(call, tmp_path):
    weights.save(tiny_quiet(model=dict(vocab_size=20)), tmp_path / "quiet")
    words = dict(words=["a", "b", "c", "."], bos=None, eos=".")
    (tmp_path / "words.json").write_text(json.dumps(words))
    lines = (" ".join("abc"[i * j % 3] for j in range(2 + i % 9)) for i in range(90))
    prepare(lines, tokenizers.load(tmp_path / "words.json"), tmp_path / "data", 0.9, [])
    argv = (f"--checkpoint={tmp_path}/quiet", f"--data={tmp_path}/data", "--batch_size=4")
    assert call(evaluation, *argv, f"--out={tmp_path}/one.json")[0] == 0
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                           "--standalone", "eval.py", *argv, f"--out={tmp_path}/two.json"],
                          capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one", "two"))
    assert one == two and one["tokens"] > 0


def test_a_mistake_is_one_line(call, game, tmp_path):
    weights.save(tiny_mistral(vocab_size=20), tmp_path / "plain")
    for argv, words in (
            ([f"--checkpoint={tmp_path}", f"--data={game}/silent"], "holds no whole checkpoint"),
            ([f"--checkpoint={tmp_path}", "--data=x", "--texts=0"], "--texts=0 is below 1"),
            ([f"--checkpoint={tmp_path}/gone", f"--data={game}/silent"], "gone is missing"),
            (["--data=x"], "--checkpoint=FOLDER and --data=FOLDER (or"),
            ([f"--checkpoint={tmp_path}", "--data=x", "--thoughts=mine"], "--thoughts=mine"),
            ([f"--checkpoint={tmp_path}/plain", f"--data={game}/silent", "--thought_len=2"],
             "plain does not think")):
        status, _, stderr = call(evaluation, *argv)
        assert status == 2 and words in stderr and stderr.count("\n") == 1


def test_progress_tells_the_time_that_is_left(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(evidence.time, "monotonic", lambda: clock[0])
    progress = evidence.Progress(40, "asking", evaluation.ALONE)
    for clock[0] in (20.0, 31.0, 40.0):
        progress(10)
    assert capsys.readouterr().err == "asking: 50% in 31 s, 31 s left\n"     # on no screen
