"""Asking: what a model answers depends on nothing but the model, the question and the seed."""
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tasks import ask
import eval as evaluation
from tasks import bootstrap as evidence
import predict
import questions
from tasks import qa as tasks
import tokenizer as tokenizers
import weights
from tasks.bootstrap import PLAIN

N_ROWS = 11


@pytest.fixture(scope="module")
def school(tmp_path_factory):
    return questions.school(tmp_path_factory.mktemp("school"), N_ROWS)


def asked(call, school, out, task, *changes, model="quiet"):
    """The jsonl's rows and the json that one command writes."""
    status, told, stderr = call(
        evaluation, f"--checkpoint={school}/{model}", f"--task={task}",
        f"--file={school}/{task.partition(' ')[0]}.jsonl", f"--out={out}/answers.json", *changes)
    assert status == 0, stderr
    lines = (out / "answers.jsonl").read_text().splitlines()[1:]
    rows = {row["number"]: row for row in map(json.loads, lines)}
    return rows, json.loads((out / "answers.json").read_text()), told


WAYS = {"gsm8k": ("gsm8k",), "commonsense_qa": ("commonsense_qa",),
        "votes": ("gsm8k", "--votes=3", "--max_new_tokens=8"),
        "letters": ("commonsense_qa", "--votes=2", "--max_new_tokens=6")}
every_way = pytest.mark.parametrize("way", WAYS)


def assert_same(ours, theirs, exactly: bool = False):
    (rows, result, _), (other_rows, other, _) = ours, theirs
    assert rows.keys() == other_rows.keys() and len(rows) == N_ROWS
    for number, row in rows.items():
        for name, value in row.items():
            close = value if exactly or not isinstance(value, (float, list)) or name in (
                "said", "votes") else pytest.approx(value, rel=1e-3, abs=1e-5)
            assert other_rows[number][name] == close, name
    for name, value in result["units"].items():
        tolerance = {} if exactly else dict(rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(other["units"][name], value, **tolerance)


@every_way
def test_a_batch_equals_one_by_one(call, school, tmp_path, way):
    (tmp_path / "one").mkdir(), (tmp_path / "all").mkdir()
    assert_same(asked(call, school, tmp_path / "one", *WAYS[way], "--batch_size=1"),
                asked(call, school, tmp_path / "all", *WAYS[way], "--batch_size=64"))


@every_way
def test_interrupted_and_resumed_equals_uninterrupted(call, school, tmp_path, way, monkeypatch):
    (tmp_path / "whole").mkdir(), (tmp_path / "cut").mkdir()
    whole = asked(call, school, tmp_path / "whole", *WAYS[way], "--batch_size=6")
    add, added = ask.ResultsFile.add, []

    def once(self, rows):
        if added:
            raise ValueError("interrupted")
        added.append([row["number"] for row in rows])
        add(self, rows)
    monkeypatch.setattr(ask.ResultsFile, "add", once)
    with pytest.raises(AssertionError, match="interrupted"):
        asked(call, school, tmp_path / "cut", *WAYS[way], "--batch_size=6")
    monkeypatch.setattr(ask.ResultsFile, "add", lambda self, rows: add(self, rows) or added.append(
        [row["number"] for row in rows]))
    with open(tmp_path / "cut" / "answers.jsonl", "a") as file:
        file.write('{"number": 3, "gold": "7", "nll_base": {}')           # killed in mid-line
    assert_same(whole, asked(call, school, tmp_path / "cut", *WAYS[way], "--batch_size=6"), exactly=True)
    assert sorted(sum(added, [])) == sorted(whole[0])                     # nothing is asked again


@pytest.mark.slow
@pytest.mark.parametrize("way", ["gsm8k", "votes"])
def test_two_ranks_equal_one(call, school, tmp_path, way):
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    one = asked(call, school, tmp_path / "one", *WAYS[way], "--batch_size=3")
    task, *changes = WAYS[way]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
         "eval.py", f"--checkpoint={school}/quiet", f"--task={task}", "--batch_size=3", *changes,
         f"--file={school}/{task}.jsonl", f"--out={tmp_path}/two/answers.json"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    two = asked(call, school, tmp_path / "two", *WAYS[way], "--batch_size=3")      # reads what they did
    assert_same(one, two, exactly=True)
    assert done.stdout.count("wrote ") == 1                                   # rank 0 writes


def test_answers_thought_of_at_scored_positions_only_are_as_if_every_position_thought(school):
    """And they are what the official metric makes of the whole text's logits."""
    tokenizer = tokenizers.load(school)
    quiet = weights.load(school / "quiet")
    asked = tasks.read("gsm8k", str(school / "gsm8k.jsonl"))
    known = tasks.alphabets(tokenizer)
    answers = [tasks.locate(tokenizer.encode(f"{q.text}\nA:{q.answer}\n", bos=True), tokenizer,
                            known) for q in asked]
    rows = ask.direct(quiet, asked, answers, tokenizer,
                      SimpleNamespace(thoughts="own", task="gsm8k"))
    for row, answer in zip(rows, answers):
        base_BPD, mixed_BNPD, weight_BNP, _ = quiet.predict(torch.tensor([answer.ids]))
        scored = slice(answer.start - 1, len(answer.ids) - 1)
        for hidden_PD, variant in (base_BPD[0], "base"), (mixed_BNPD[0, 0], "mixed"):
            hidden_SD = hidden_PD[scored]
            expected = tasks.worth(answer, quiet.model.head(hidden_SD).detach(), (1.0,), "gsm8k")
            for name in ("nll", "soft"):
                found = row[f"{name}_{variant}"]
                found = found[PLAIN] if variant == "base" else found
                assert found == pytest.approx(expected[name][0], rel=1e-3)
        mean = float(weight_BNP[0, 0, scored].mean())
        assert row["mixing_weight"] == pytest.approx(mean, rel=1e-3)


def test_a_direct_answer_is_decoded_greedily_with_and_without_thoughts(school):
    tokenizer, quiet = tokenizers.load(school), weights.load(school / "quiet")
    ids = tokenizer.encode("Q: 1 + 1?\nA:", bos=True)
    for think in (True, False):
        said = predict.complete(quiet, [ids], tokenizer, 5, lambda row, text: False, think)[0]
        longer = list(ids)
        for _ in range(5):
            base_BPD, mixed_BNPD, _, _ = quiet.predict(torch.tensor([longer]))
            state_D = mixed_BNPD[0, 0, -1] if think else base_BPD[0, -1]
            longer.append(int(quiet.model.head(state_D).argmax()))
            if longer[-1] in (tokenizer.eos, tokenizer.bos):
                longer.pop()
                break
        assert tokenizer.decode(longer) == tokenizer.decode(ids) + said


@pytest.mark.parametrize("think", [True, False])
def test_texts_that_have_ended_cost_nothing_and_leave_the_others_alone(school, think):
    tokenizer, quiet = tokenizers.load(school), weights.load(school / "quiet")
    prompts = [tokenizer.encode(f"Q: {n} + 1?\nA:", bos=True) for n in range(0, 1000, 200)]
    stops, keys, passes = (9, 2, 9, 5, 3), [(0, row) for row in range(5)], []

    def complete(rows):
        said = dict.fromkeys(rows, 0)

        def stop(i, text):
            said[rows[i]] += 1
            return said[rows[i]] >= stops[rows[i]]
        return predict.complete(quiet, [prompts[row] for row in rows], tokenizer, 20, stop, think,
                                1.0, [keys[row] for row in rows])
    quiet.model.layers[0].register_forward_hook(lambda module, args, out: passes.append(len(out)))
    a_token = quiet.config.thought_len + 1 if think else 1
    alone, lives = [], []
    for row in range(5):
        alone += complete([row])
        lives.append(len(passes[1:]) // a_token)                 # the filling of the cache aside
        passes.clear()
    assert complete(list(range(5))) == alone
    rows, expected = 5, []
    for step in range(max(lives)):
        expected += [rows] * a_token
        left = sum(life > step + 1 for life in lives)
        rows = left if 2 * left <= rows else rows
    assert passes[1:] == expected and expected[0] > expected[-1]


def test_another_seed_says_something_else_and_no_thoughts_something_else_again(
        call, school, tmp_path):
    said = []
    for i, change in enumerate(("--seed=0", "--seed=1", "--thoughts=none")):
        (tmp_path / str(i)).mkdir()
        rows, _, _ = asked(call, school, tmp_path / str(i), *WAYS["votes"], "--limit=2", change)
        said.append([row["said"] for row in rows.values()])
        assert all(len(set(row["said"])) == 3 for row in rows.values())       # votes differ
    assert said[0] != said[1] and said[0] != said[2] and said[1] != said[2]


def test_a_chain_of_thought_ends_at_a_second_question_or_blank_line_and_then_concludes(
        school, monkeypatch):
    prompts, told = [], iter(["x\nQ: next", " 5, no 6"])

    def scripted(objective, ids, tokenizer, max_new, stop, think, temperature, keys):
        prompts.append(tokenizer.decode(ids[0]))
        text = next(told)
        assert stop(0, text) == ("Q:" in text) and keys == [(4, 9, 0, len(prompts))]
        return [text]
    monkeypatch.setattr(ask, "complete", scripted)
    cfg = SimpleNamespace(votes=1, max_new_tokens=7, seed=4, temperature=0.9, task="gsm8k", thoughts="own")
    row, = ask.reason(None, [tasks.Question(9, "Q: why?", " 5", "5")], tokenizers.load(school), cfg)
    assert prompts == ["Q: why?\nA: Let's think step by step.",
                       "Q: why?\nA: Let's think step by step.x\nTherefore, the answer "
                       "(arabic numerals) is"]
    assert (row["votes"], row["majority"], row["majority_official"]) == (["5"], 1.0, 1.0)


def test_votes_are_counted_with_signs_and_as_released():
    def count(gold, *said):
        found = ask.count("gsm8k", gold, list(said))
        return found["majority"], found["majority_official"], found["one_vote"]
    assert count("1450", " 1,450.", " $1450", " 7") == (1, 1, pytest.approx(2 / 3))
    assert count("-10", " -10", " -10", " 10") == (1, 1, pytest.approx(2 / 3))
    assert count("10", " -10", " -10", " 10") == (0, 1, pytest.approx(1 / 3))
    assert count("2.5", " 2.5", " 2.5", "") == (1, 1, pytest.approx(2 / 3))
    assert count("3", " 3", " none", " unknown") == (1, 0, pytest.approx(1 / 3))   # None wins there
    assert count("3", " 3", " 4")[0] == 1 and count("3", " 4", " 3")[0] == 0    # a tie: the first
    assert ask.count("commonsense_qa", "B", [" (B)", " B.", " E"])["majority"] == 1


def test_the_table_tells_the_controls_and_two_models_are_compared_question_by_question(
        call, school, tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    asked(call, school, tmp_path / "a", "gsm8k", model="plain")
    _, result, told = asked(call, school, tmp_path / "b", "gsm8k",
                            f"--against={tmp_path}/a/answers.json")
    plain = json.loads((tmp_path / "a" / "answers.json").read_text())
    for name in ("soft_base", "soft_sharp", "soft_mixed", "nll_mixed-nll_base", "exact_mixed",
                 "soft_mixed-soft_sharp"):
        assert result[name]["low"] <= result[name]["mean"] <= result[name]["high"]
    assert "thinking - temperature_scaled" in told and f"{result['soft_mixed']['mean']:.4f}" in told
    ours, theirs = (np.array(r["units"]["nll_mixed"]) for r in (result, plain))
    assert result["differences"]["nll_mixed"]["mean"] == pytest.approx((ours - theirs).mean())
    assert plain["units"]["soft_mixed"] == plain["units"]["soft_base"]     # it cannot think


def test_shuffled_thoughts_change_the_answers_but_not_the_base(call, school, tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    own, _, _ = asked(call, school, tmp_path / "a", "commonsense_qa")
    swapped, _, _ = asked(call, school, tmp_path / "b", "commonsense_qa", "--thoughts=swapped")
    for number in own:
        assert own[number]["nll_base"] == pytest.approx(swapped[number]["nll_base"], rel=1e-4)
    assert any(abs(own[n]["nll_mixed"] - swapped[n]["nll_mixed"]) > 1e-3 for n in own)


def test_scoring_with_thoughts_costs_at_most_t_plus_3_times_the_base(school):
    from torch.utils.flop_counter import FlopCounterMode
    tokenizer, quiet = tokenizers.load(school), weights.load(school / "quiet")
    quiet.requires_grad_(False)                               # or the counter stumbles
    known = tasks.alphabets(tokenizer)
    answers = [tasks.locate(tokenizer.encode(f"{q.text}\nA:{q.answer}\n", bos=True), tokenizer,
                            known) for q in tasks.read("gsm8k", str(school / "gsm8k.jsonl"))]

    def flops(thoughts):
        with FlopCounterMode(display=False) as counter:
            list(predict.predictions(quiet, [(a.ids, a.start) for a in answers], thoughts))
        return counter.get_total_flops()
    assert flops("none") < flops("own") <= (quiet.config.thought_len + 3) * flops("none")


@pytest.mark.parametrize("changes, words", [
    (["--task=gsm8k"], "its questions are in --file=FILE"),
    (["--task=sums", "--file=x"], "--task=sums"),
    (["--task=gsm8k", "--file=nowhere.jsonl"], "nowhere.jsonl"),
    (["--task=gsm8k", "--file=x", "--votes=2", "--thoughts=swapped"], "being written has none"),
    (["--task=gsm8k", "--file=x", "--thought_len=1,2"], "a task takes one length"),
    (["--task=commonsense_qa", "--file=GSM"], "GSM:1: not a row of commonsense_qa")])
def test_a_mistake_is_one_line(call, school, changes, words):
    gsm = str(school / "gsm8k.jsonl")
    status, _, stderr = call(evaluation, f"--checkpoint={school}/quiet",
                             *[change.replace("GSM", gsm) for change in changes])
    assert status == 2 and words.replace("GSM", gsm) in stderr and stderr.count("\n") == 1


def test_what_other_weights_or_settings_said_is_not_gone_on_with(call, school, tmp_path,
                                                                 monkeypatch):
    asked(call, school, tmp_path, "gsm8k", "--limit=2")
    status, _, stderr = call(evaluation, f"--checkpoint={school}/plain", "--task=gsm8k",
                             "--limit=2", f"--file={school}/gsm8k.jsonl",
                             f"--out={tmp_path}/answers.json")
    assert status == 2 and "was made with another weights" in stderr and stderr.count("\n") == 1
    asked(call, school, tmp_path, "gsm8k", "--limit=2")                       # the same: goes on
    whole = (tmp_path / "answers.jsonl").read_text()
    monkeypatch.setattr(evidence.ResultsFile, "add", lambda ledger, rows: None)    # another rank died
    (tmp_path / "answers.jsonl").write_text(whole[:whole.rstrip("\n").rindex("\n") + 1])
    status, _, stderr = call(evaluation, f"--checkpoint={school}/quiet", "--task=gsm8k",
                             "--limit=2", f"--file={school}/gsm8k.jsonl",
                             f"--out={tmp_path}/answers.json")
    assert status == 2 and "has 1 of 2 questions" in stderr
    monkeypatch.undo()
    asked(call, school, tmp_path, "gsm8k", "--limit=2")
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 3     # a line per question
    status, _, stderr = call(evaluation, f"--checkpoint={school}/quiet", "--task=gsm8k",
                             f"--file={school}/gsm8k.jsonl", f"--out={tmp_path}/other.json",
                             f"--against={tmp_path}/answers.json")
    assert status == 2 and "only the same texts or questions can be compared" in stderr
