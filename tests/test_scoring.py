"""Scoring: which tokens are scored, from which states, and that batches change nothing."""
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import config
from data import TokenFile, uniform_by_text
from model import CausalContext
from config import UserError
from scoring import ReasonsAloud, of_another_text, pack_positions, score_positions, score_targets, score_texts
from tasks import shell_game
from tokenizer import load_tokenizer
from thoughts import every_position
from toys import texts, tiny_mistral, tiny_quiet


def score(model, ids_BL, where_BL, **options):
    found = score_positions(model, ids_BL, where_BL, **options)
    return SimpleNamespace(**{name: value.numpy() for name, value in found.items()})


def some_positions():
    where_BL = torch.zeros(3, 8, dtype=torch.bool)
    where_BL[0, [1, 4]], where_BL[1, [0, 2, 6]], where_BL[2, 3] = True, True, True
    return where_BL


def test_thinking_at_scored_positions_only_equals_thinking_everywhere_there():
    quiet, ids_BL, where_BL = tiny_quiet(n_thoughts=1), texts(3, 8), some_positions()
    scores = score(quiet, ids_BL, where_BL)
    base_BPD, mixed_BNPD, weight_BNP, thought_BNPT = quiet.predict(ids_BL)
    for hidden_BLD, nll, right in ((base_BPD, scores.nll_base, scores.right_base),
                                   (mixed_BNPD[:, 0], scores.nll_mixed, scores.right_mixed)):
        logp_BLV = quiet.model.head(hidden_BLD).log_softmax(-1)
        expected = [-logp_BLV[b, j, ids_BL[b, j + 1]].item()
                    for b, j in where_BL.nonzero().tolist()]
        np.testing.assert_allclose(nll, expected, rtol=1e-4, atol=1e-5)
        best = [logp_BLV[b, j].argmax() == ids_BL[b, j + 1] for b, j in where_BL.nonzero().tolist()]
        assert right.tolist() == best
    np.testing.assert_allclose(scores.mixing_weight, weight_BNP[:, 0][where_BL].detach(),
                               rtol=1e-4, atol=1e-5)
    assert scores.thought.tolist() == thought_BNPT[:, 0][where_BL].tolist()


def test_positions_are_packed_in_order_and_shorter_rows_repeat_a_real_one():
    position_BP, real_BP = pack_positions(some_positions())
    assert position_BP.tolist() == [[1, 4, 1], [0, 2, 6], [3, 3, 3]]
    assert real_BP.sum(1).tolist() == [2, 3, 1]


def test_shuffled_thoughts_are_the_same_thoughts_at_other_positions():
    quiet, ids_BL, where_BL = tiny_quiet(n_thoughts=1), texts(3, 8), some_positions()
    own, shuffled = (score(quiet, ids_BL, where_BL, thoughts=t)
                    for t in ("own", "shuffled"))
    text_R = where_BL.nonzero()[:, 0].tolist()
    for r, thought in enumerate(shuffled.thought.tolist()):
        assert any(thought == own.thought[other].tolist()
                   for other in range(len(text_R)) if text_R[other] != text_R[r])
    assert (own.thought != shuffled.thought).any(-1).sum() >= 4
    np.testing.assert_allclose(own.nll_base, shuffled.nll_base, rtol=1e-5)
    assert not np.allclose(own.nll_mixed, shuffled.nll_mixed)


def test_sampled_thoughts_are_as_frequent_as_they_are_likely():
    quiet, n = tiny_quiet(n_thoughts=1, thought_len=1), 4000
    ids_BL = texts(n, 5)
    where_BL = torch.zeros_like(ids_BL, dtype=torch.bool)
    where_BL[:, 3] = True
    sampled = score(quiet, ids_BL, where_BL, thoughts="sampled")
    embeds_BLD = quiet.model.embed(ids_BL[:, :4])
    start_B1D = quiet.start_thought.expand(n, 1, -1)
    context = CausalContext(every_position(torch.zeros(1, 5), last=True).expand(n, -1))
    hidden_BLD = quiet.model.transform(torch.cat((embeds_BLD, start_B1D), 1), context)
    p_BV = quiet.model.head(hidden_BLD[:, -1]).softmax(-1).detach().numpy()
    counted_V = np.bincount(sampled.thought[:, 0], minlength=p_BV.shape[1])
    sd_V = (p_BV * (1 - p_BV)).sum(0) ** 0.5
    assert (abs(counted_V - p_BV.sum(0)) < 4.5 * sd_V).all()


def test_several_thoughts_predict_by_the_mean_of_their_probabilities():
    quiet, ids_BL, where_BL = tiny_quiet(n_thoughts=3), texts(3, 8), some_positions()
    scores = score(quiet, ids_BL, where_BL, thoughts="sampled")
    position_BP, real_BP = pack_positions(where_BL)
    uniform_BNPT = uniform_by_text(ids_BL, position_BP, quiet.config)
    _, mixed_BNPD, weight_BNP, _ = quiet.predict(ids_BL, position_BP, uniform_BNPT)
    p_RV = quiet.model.head(mixed_BNPD).softmax(-1).mean(1)[real_BP].detach()
    target_R = ids_BL.roll(-1, 1)[where_BL]
    expected_R = -p_RV.gather(1, target_R[:, None])[:, 0].log()
    np.testing.assert_allclose(scores.nll_mixed, expected_R, rtol=1e-4, atol=1e-5)
    assert scores.right_mixed.tolist() == (p_RV.argmax(-1) == target_R).tolist()
    np.testing.assert_allclose(scores.mixing_weight, weight_BNP.mean(1)[real_BP].detach(), rtol=1e-5)
    # the first of them is the one that is drawn alone
    quiet.config = replace(quiet.config, n_thoughts=1)
    alone = score(quiet, ids_BL, where_BL, thoughts="sampled")
    assert alone.thought.tolist() == scores.thought.tolist()
    assert (alone.nll_mixed != scores.nll_mixed).all()


def test_a_text_has_the_same_sampled_thoughts_in_any_batch():
    quiet, ids_BL, where_BL = tiny_quiet(n_thoughts=1), texts(3, 8), some_positions()
    together = score(quiet, ids_BL, where_BL, thoughts="sampled").thought.tolist()
    alone = [score(quiet, ids_BL[b:b + 1, :n], where_BL[b:b + 1, :n], thoughts="sampled").thought
             for b, n in ((0, 6), (1, 8), (2, 5))]
    assert np.concatenate(alone).tolist() == together


def test_a_model_without_thoughts_is_scored_by_its_base():
    quiet, ids_BL, where_BL = tiny_quiet(), texts(3, 8), some_positions()
    alone = score(quiet.model, ids_BL, where_BL)
    thinking = score(quiet, ids_BL, where_BL)
    np.testing.assert_allclose(alone.nll_base, thinking.nll_base, rtol=1e-5)
    assert np.array_equal(alone.nll_mixed, alone.nll_base) and alone.thought.shape == (6, 0)


def test_a_choice_is_the_best_of_the_choices_and_its_nll_is_among_all_tokens():
    model, choices = tiny_mistral(vocab_size=4, dim=4, head_dim=4), [1, 2]
    model.head.weight.data = torch.eye(4)
    nll, right, *_ = score_targets(model, torch.tensor([[9.0, 3.0, 1.0, 0.0]]),
                                      torch.tensor([1]), torch.tensor(choices))
    assert right.tolist() == [True]
    assert nll[0] == pytest.approx(-torch.tensor([9.0, 3, 1, 0]).log_softmax(0)[1].item())


def test_batches_of_texts_change_nothing(game):
    tokenizer, held_out = load_tokenizer(game), TokenFile(game / "with_reasoning", "val")
    quiet = tiny_quiet(model=dict(vocab_size=tokenizer.vocab_size))
    a, b = (score_texts(quiet, held_out, tokenizer, 30, 40, batch_size=batch)
            for batch in (1, 64))
    assert a["text"].tolist() == b["text"].tolist()
    np.testing.assert_allclose(a["nll_mixed"], b["nll_mixed"], rtol=1e-4)


def test_in_the_shell_game_hidden_answers_are_scored_among_the_cups(game):
    tokenizer, held_out = load_tokenizer(game), TokenFile(game / "without_reasoning", "val")
    model = tiny_mistral(vocab_size=tokenizer.vocab_size)
    scores = score_texts(model, held_out, tokenizer, 50, 40, task=shell_game)
    assert scores["text"].tolist() == list(range(50))                     # one answer in each line
    with torch.no_grad():                                # cup c always best of the cups, "." of all
        model.head.weight.zero_()
        model.norm.weight.zero_()
    scores = score_texts(model, held_out, tokenizer, 50, 40, task=shell_game)
    assert scores["nll_base"] == pytest.approx(np.log(tokenizer.vocab_size))
    first = tokenizer.encode(shell_game.CUPS[0])[0]                    # ties go to the first choice
    answers = [held_out.document(i)[-2] for i in range(50)]
    assert scores["right_base"].tolist() == [answer == first for answer in answers]


def test_progress_tells_the_time_that_is_left(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(config.time, "monotonic", lambda: clock[0])
    progress = config.Progress(40, "asking")
    for clock[0] in (20.0, 31.0, 40.0):
        progress(10)
    assert capsys.readouterr().err == "asking: 50% in 31 s, 31 s left\n"     # on no screen


def test_a_single_thought_has_none_to_be_shuffled_with():
    where_BL = torch.zeros(1, 9, dtype=torch.bool)
    where_BL[0, 4] = True
    with pytest.raises(config.UserError, match="batch_size"):
        score_positions(tiny_quiet(), texts(1, 9), where_BL, thoughts="shuffled")


def test_other_text_is_not_taken_for_the_shell_game():
    other = SimpleNamespace(vocab_size=600, path="tokenizer.model")
    with pytest.raises(config.UserError, match="leave the task out"):
        shell_game.answer_positions(texts(1, 9), other)


@pytest.mark.parametrize("text", [[0, 1], [0, 0, 1], [3] * 9 + [5], [0, 1, 2, 2, 2, 2, 4, 1, 0, 0]])
def test_a_shuffled_thought_is_always_of_another_text(text):
    chosen = of_another_text(torch.tensor(text))
    assert all(text[other] != text[r] for r, other in enumerate(chosen))
    if len(set(text)) == len(text):
        assert sorted(chosen) == list(range(len(text)))


def test_one_text_has_no_thoughts_of_another_to_take():
    with pytest.raises(UserError, match="raise --batch_size"):
        of_another_text(torch.tensor([4, 4, 4]))


def test_reasoning_aloud_is_text_between_two_dashes_and_then_the_answer():
    base, ids_BL, where_BL, dash = tiny_mistral(), texts(3, 8), some_positions(), 4
    scores = score(ReasonsAloud(base, 3, dash), ids_BL, where_BL)
    for r, (b, j) in enumerate(where_BL.nonzero().tolist()):
        text = [*ids_BL[b, :j + 1].tolist(), dash]
        for _ in range(3):
            text.append(int(next_logits(base, text).argmax()))
        assert scores.thought[r].tolist() == text[-3:]
        logp_V = next_logits(base, [*text, dash]).log_softmax(-1)
        assert scores.nll_mixed[r] == pytest.approx(-float(logp_V[ids_BL[b, j + 1]]), abs=1e-4)
    assert (scores.mixing_weight == 1).all()


@torch.no_grad()
def next_logits(base, ids):
    ids_BL = torch.tensor([ids])
    return base.head(base(ids_BL, CausalContext(torch.arange(len(ids))[None])))[0, -1]


@pytest.mark.parametrize("thoughts, longest", [("own", 11), ("shuffled", 11), ("none", 16)])
def test_no_text_is_scored_beyond_the_context(thoughts, longest):
    quiet = tiny_quiet(model=dict(max_seq_len=16), n_thoughts=1)      # 5 tokens beside the text
    for n_tokens in (longest, longest + 1):
        where_BL = torch.ones(2, n_tokens, dtype=torch.bool)
        where_BL[:, -1] = False
        if n_tokens == longest:
            score(quiet, texts(2, n_tokens), where_BL, thoughts=thoughts)
        else:
            with pytest.raises(UserError, match="exceed the context of 16"):
                score(quiet, texts(2, n_tokens), where_BL, thoughts=thoughts)
