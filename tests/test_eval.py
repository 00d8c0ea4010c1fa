"""Evaluation: what is scored, against what, and how sure one can be."""
import json

import numpy as np
import pytest
import torch

import eval as evaluation
import shell_game
import tokenizer as tokenizers
import weights
from data import TokenFile
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
    position_BP, real_BP = evaluation.pack_positions(some_positions())
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
    head_VD, choices = torch.eye(4), torch.tensor([1, 2])
    nll, right = evaluation.nll_and_right(torch.tensor([[9.0, 3.0, 1.0, 0.0]]), head_VD,
                                          torch.tensor([1]), choices)
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


def test_intervals_resample_texts_and_hold_the_mean():
    n = 400
    text = np.repeat(np.arange(n // 4), 4)
    value = np.repeat(np.random.default_rng(0).normal(size=n // 4), 4)       # a text's tokens agree
    zeros = np.zeros(n)
    scores = evaluation.Scores(text, value, zeros, zeros, zeros, zeros, zeros)
    low, high = scores.interval("nll_base")
    assert low < value.mean() < high
    expected = 2 * 1.96 * value.std() / np.sqrt(n // 4)                # not / sqrt(n): 4 are as 1
    assert high - low == pytest.approx(expected, rel=0.15)


def test_bins_of_difficulty_run_from_easy_to_hard_and_hold_every_token():
    nll, zeros = np.random.default_rng(0).exponential(size=95), np.zeros(95)
    scores = evaluation.Scores(np.arange(95), nll, nll / 2, zeros, zeros, zeros, zeros)
    rows = evaluation.by_difficulty(scores)
    assert sum(row["tokens"] for row in rows) == 95 and len(rows) == 10
    assert all(a["nll_base"] < b["nll_base"] for a, b in zip(rows, rows[1:]))
    for row in rows:
        low, high = row["interval_gain"]
        assert low <= row["nll_base"] - row["nll_mixed"] <= high


def test_the_command_prints_a_table_and_writes_the_same_numbers(call, game, tmp_path):
    weights.save(tiny_quiet(model=dict(vocab_size=20)), tmp_path / "quiet")
    status, out, _ = call(evaluation, f"--checkpoint={tmp_path}/quiet", f"--data={game}/silent",
                          "--texts=20", f"--out={tmp_path}/scores.json")
    told = json.loads((tmp_path / "scores.json").read_text())
    assert status == 0 and f"{told['nll_mixed']['mean']:+.4f}" in out
    assert told["tokens"] == 20 and 0 <= told["working_is_right"]["mean"] <= 1


def test_a_mistake_is_one_line(call, game, tmp_path):
    for argv, words in (
            ([f"--checkpoint={tmp_path}", f"--data={game}/silent"], "holds no whole checkpoint"),
            (["--data=x"], "--checkpoint=FOLDER and --data=FOLDER are needed"),
            ([f"--checkpoint={tmp_path}", "--data=x", "--thoughts=mine"], "--thoughts=mine")):
        status, _, stderr = call(evaluation, *argv)
        assert status == 2 and words in stderr and stderr.count("\n") == 1
