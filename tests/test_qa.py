"""GSM8K and CommonsenseQA: an answer depends on nothing but model, question and seed, and its score
is that of the official code, quirks and all, with plainer ones beside it."""
import json
import random
import os
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval as evaluation
import questions
from checkpoint import load_model
from config import UserError
from inference import complete
from questions import commonsense_qa, files, gsm8k, write
from scoring import answer_logits
from tasks import bootstrap, qa
from tasks.bootstrap import UNSCALED
from tokenizer import Tokenizer, load_tokenizer

EOS, LENGTH = 2, 256
DIGITS = [28740, 28750, 28770, 28781, 28782, 28784, 28787, 28783, 28774, 28734, 13]
LETTERS = [330, 365, 334, 384, 413, 13]              # of Mistral v0.1; 13 is the newline
TASKS = ("gsm8k", "commonsense_qa")
N_ROWS = 11


@pytest.fixture(scope="module")
def school(tmp_path_factory):
    folder = questions.school(tmp_path_factory.mktemp("school"), N_ROWS)
    without_percent(folder / "gsm8k.jsonl")
    return folder


def without_percent(path):
    """Made answers like "5%" become numbers: others are refused."""
    path.write_text(path.read_text().replace('%"}', '"}'))
    return path


def asked(call, school, out, task, *changes, model="quiet"):
    """The jsonl's rows and the json that one command writes."""
    status, told, stderr = call(
        evaluation, f"--checkpoint={school}/{model}", f"--task={task}",
        f"--file={school}/{task.partition(' ')[0]}.jsonl", f"--out={out}/answers.json", *changes)
    assert status == 0, stderr
    lines = (out / "answers.jsonl").read_text().splitlines()
    whole = [json.loads(line) for line in lines if line.endswith("}}")]
    rows = {row["number"]: row for row in whole}
    assert len(rows) == len(whole)                                        # a line per question
    return rows, json.loads((out / "answers.json").read_text()), told


MODES = {"gsm8k": ("gsm8k",), "commonsense_qa": ("commonsense_qa",),
        "votes": ("gsm8k", "--votes=3", "--max_new_tokens=8"),
        "letters": ("commonsense_qa", "--votes=2", "--max_new_tokens=6")}
every_mode = pytest.mark.parametrize("mode", MODES)


def assert_same(ours, theirs, exactly: bool = False):
    (rows, result, _), (other_rows, other, _) = ours, theirs
    assert rows.keys() == other_rows.keys() and len(rows) == N_ROWS
    for number, row in rows.items():
        for name, value in row.items():
            other_value = other_rows[number][name]
            if name == "scores" and not exactly:
                assert other_value.keys() == value.keys()
                for score, values in value.items():
                    assert other_value[score] == pytest.approx(values, rel=1e-3, abs=1e-5), score
            elif name != "settings" or exactly:
                assert other_value == value, name
    for name, value in result["clusters"].items():
        tolerance = {} if exactly else dict(rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(other["clusters"][name], value, **tolerance)


@every_mode
def test_a_batch_equals_one_by_one(call, school, tmp_path, mode):
    (tmp_path / "one").mkdir(), (tmp_path / "all").mkdir()
    assert_same(asked(call, school, tmp_path / "one", *MODES[mode], "--batch_size=1"),
                asked(call, school, tmp_path / "all", *MODES[mode], "--batch_size=64"))


@every_mode
def test_interrupted_and_resumed_equals_uninterrupted(call, school, tmp_path, mode, monkeypatch):
    (tmp_path / "whole").mkdir(), (tmp_path / "cut").mkdir()
    whole = asked(call, school, tmp_path / "whole", *MODES[mode], "--batch_size=6")
    add, added = bootstrap.ResultsFile.add, []

    def once(self, rows):
        if added:
            raise ValueError("interrupted")
        added.append([row["number"] for row in rows])
        add(self, rows)
    monkeypatch.setattr(bootstrap.ResultsFile, "add", once)
    with pytest.raises(ValueError, match="interrupted"):
        asked(call, school, tmp_path / "cut", *MODES[mode], "--batch_size=6")

    def every_time(self, rows):
        added.append([row["number"] for row in rows])
        add(self, rows)
    monkeypatch.setattr(bootstrap.ResultsFile, "add", every_time)
    with open(tmp_path / "cut" / "answers.jsonl", "a") as file:
        file.write('{"number": 3, "gold": "7", "scores": {}')             # killed in mid-line
    assert_same(whole, asked(call, school, tmp_path / "cut", *MODES[mode], "--batch_size=6"),
                exactly=True)
    assert sorted(sum(added, [])) == sorted(whole[0])                     # nothing is asked again


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["gsm8k", "votes"])
def test_two_ranks_equal_one(call, school, tmp_path, mode):
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    one = asked(call, school, tmp_path / "one", *MODES[mode], "--batch_size=3")
    task, *changes = MODES[mode]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
         "eval.py", f"--checkpoint={school}/quiet", f"--task={task}", "--batch_size=3", *changes,
         f"--file={school}/{task}.jsonl", f"--out={tmp_path}/two/answers.json"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    # This command only reads what the two ranks have answered.
    two = asked(call, school, tmp_path / "two", *MODES[mode], "--batch_size=3")
    assert_same(one, two, exactly=True)
    assert done.stdout.count("wrote ") == 1                                   # rank 0 writes


def test_answers_thought_of_at_scored_positions_only_are_as_if_every_position_thought(school):
    """And they are what the official metric makes of the whole text's logits."""
    tokenizer = load_tokenizer(school)
    quiet = load_model(school / "quiet")
    asked = qa.read_questions("gsm8k", str(school / "gsm8k.jsonl"))
    rows = qa.direct_answers(quiet, asked, tokenizer, SimpleNamespace(thoughts="own", task="gsm8k"))
    for row, question in zip(rows, asked):
        answer = qa.find_answer(question.with_answer, tokenizer)
        base_BPD, mixed_BNPD, weight_BNP, _ = quiet.predict(torch.tensor([answer.ids]))
        scored = slice(answer.start - 1, len(answer.ids) - 1)
        for hidden_PD, variant in (base_BPD[0], "base"), (mixed_BNPD[0, 0], "mixed"):
            logits_SV = quiet.model.head(hidden_PD[scored]).detach()
            expected = qa.score_answer(answer, logits_SV, (1.0,), "gsm8k", variant)
            assert expected.keys() == {f"nll_{variant}", f"soft_{variant}"}
            for name, value in expected.items():
                found = row["scores"][name][UNSCALED if variant == "base" else 0]
                assert found == pytest.approx(value[0], rel=1e-3)
        mean = float(weight_BNP[0, 0, scored].mean())
        assert row["scores"]["mixing_weight"] == pytest.approx([mean], rel=1e-3)


def test_a_direct_answer_is_decoded_greedily_with_and_without_thoughts(school):
    tokenizer, quiet = load_tokenizer(school), load_model(school / "quiet")
    ids = tokenizer.encode("Q: 1 + 1?\nA:", bos=True)
    for think in (True, False):
        said = complete(quiet, [ids], tokenizer, 5, lambda row, text: False, think)[0]
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
    tokenizer, quiet = load_tokenizer(school), load_model(school / "quiet")
    prompts = [tokenizer.encode(f"Q: {n} + 1?\nA:", bos=True) for n in range(0, 1000, 200)]
    stops, keys, passes = (9, 2, 9, 5, 3), [(0, row) for row in range(5)], []

    def complete_rows(rows):
        said = dict.fromkeys(rows, 0)

        def stop(i, text):
            said[rows[i]] += 1
            return said[rows[i]] >= stops[rows[i]]
        return complete(quiet, [prompts[row] for row in rows], tokenizer, 20, stop, think, 1.0,
                        [keys[row] for row in rows])
    quiet.model.layers[0].register_forward_hook(lambda module, args, out: passes.append(len(out)))
    a_token = quiet.config.thought_len + 1 if think else 1
    alone, lives = [], []
    for row in range(5):
        alone += complete_rows([row])
        lives.append(len(passes[1:]) // a_token)                 # the filling of the cache aside
        passes.clear()
    assert complete_rows(list(range(5))) == alone
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
        rows, _, _ = asked(call, school, tmp_path / str(i), *MODES["votes"], "--limit=2", change)
        said.append([row["said"] for row in rows.values()])
        assert all(len(set(row["said"])) == 3 for row in rows.values())       # votes differ
    assert said[0] != said[1] and said[0] != said[2] and said[1] != said[2]


def test_a_chain_of_thought_ends_at_a_second_question_or_blank_line_and_then_concludes(
        school, monkeypatch):
    prompts, told = [], iter(["x\nQ: next", " 5, no 6"])

    def scripted(model, ids, tokenizer, max_new_tokens, stop, think, temperature, keys):
        prompts.append(tokenizer.decode(ids[0]))
        text = next(told)
        assert stop(0, text) == ("Q:" in text) and keys == [(4, 9, 0, len(prompts))]
        return [text]
    monkeypatch.setattr(qa, "complete", scripted)
    cfg = SimpleNamespace(votes=1, max_new_tokens=7, seed=4, temperature=0.9, task="gsm8k",
                          thoughts="own")
    row, = qa.cot_votes(None, [qa.Question(9, "Q: why?", " 5", "5")], load_tokenizer(school), cfg)
    assert prompts == ["Q: why?\nA: Let's think step by step.",
                       "Q: why?\nA: Let's think step by step.x\nTherefore, the answer "
                       "(arabic numerals) is"]
    assert row["votes"] == ["5"]
    assert row["scores"] == dict(one_vote=[1.0], majority=[1.0], majority_official=[1.0])


def test_votes_are_counted_with_signs_and_as_official():
    def count(gold, *said):
        _, scores = qa.count_votes("gsm8k", gold, list(said))
        names = ("majority", "majority_official", "one_vote")
        return tuple(value for name in names for value in scores[name])
    assert count("1450", " 1,450.", " $1450", " 7") == (1, 1, pytest.approx(2 / 3))
    assert count("-10", " -10", " -10", " 10") == (1, 1, pytest.approx(2 / 3))
    assert count("10", " -10", " -10", " 10") == (0, 1, pytest.approx(1 / 3))
    assert count("2.5", " 2.5", " 2.5", "") == (1, 1, pytest.approx(2 / 3))
    assert count("3", " 3", " none", " unknown") == (1, 0, pytest.approx(1 / 3))   # None wins there
    assert count("3", " 3", " 4")[0] == 1 and count("3", " 4", " 3")[0] == 0    # a tie: the first
    votes, scores = qa.count_votes("commonsense_qa", "B", [" (B)", " B.", " E"])
    assert votes == ["B", "B", "E"] and scores["majority"] == [1]


def test_the_table_has_the_controls_and_two_models_are_compared_question_by_question(
        call, school, tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    asked(call, school, tmp_path / "a", "gsm8k", model="plain")
    _, result, told = asked(call, school, tmp_path / "b", "gsm8k",
                            f"--against={tmp_path}/a/answers.json")
    plain = json.loads((tmp_path / "a" / "answers.json").read_text())
    for name in ("soft_base", "soft_scaled", "soft_mixed", "nll_mixed-nll_base", "exact_mixed",
                 "soft_mixed-soft_scaled"):
        assert result[name]["low"] <= result[name]["mean"] <= result[name]["high"]
    assert "thinking - scaled" in told and f"{result['soft_mixed']['mean']:.4f}" in told
    ours, theirs = (np.array(r["clusters"]["nll_mixed"]) for r in (result, plain))
    assert result["differences"]["nll_mixed"]["mean"] == pytest.approx((ours - theirs).mean())
    assert plain["clusters"]["soft_mixed"] == plain["clusters"]["soft_base"]     # it cannot think


def test_shuffled_thoughts_change_the_answers_but_not_the_base(call, school, tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    own, _, _ = asked(call, school, tmp_path / "a", "commonsense_qa")
    shuffled, _, _ = asked(call, school, tmp_path / "b", "commonsense_qa", "--thoughts=shuffled")
    for number in own:
        ours, theirs = own[number]["scores"], shuffled[number]["scores"]
        assert ours["nll_base"] == pytest.approx(theirs["nll_base"], rel=1e-4)
    assert any(abs(own[n]["scores"]["nll_mixed"][0] - shuffled[n]["scores"]["nll_mixed"][0]) > 1e-3
               for n in own)


def test_scoring_with_thoughts_costs_at_most_t_plus_3_times_the_base(school):
    from torch.utils.flop_counter import FlopCounterMode
    tokenizer, quiet = load_tokenizer(school), load_model(school / "quiet")
    quiet.requires_grad_(False)                               # or the counter stumbles
    asked = qa.read_questions("gsm8k", str(school / "gsm8k.jsonl"))
    answers = [qa.find_answer(question.with_answer, tokenizer) for question in asked]

    def flops(thoughts):
        with FlopCounterMode(display=False) as counter:
            list(answer_logits(quiet, [(a.ids, a.start) for a in answers], thoughts))
        return counter.get_total_flops()
    assert flops("none") < flops("own") <= (quiet.config.thought_len + 3) * flops("none")


@pytest.mark.parametrize("changes, words", [
    (["--task=gsm8k"], "for gsm8k and commonsense_qa, --file=FILE"),
    (["--task=sums", "--file=x"], "task 'sums' is not one of none, shell_game"),
    (["--task=gsm8k", "--file=nowhere.jsonl"], "nowhere.jsonl"),
    (["--task=gsm8k", "--file=x", "--votes=2", "--thoughts=shuffled"], "new text has no others"),
    (["--task=commonsense_qa", "--file=GSM"], "GSM:1: not a row of commonsense_qa: 'choices'")])
def test_a_mistake_is_one_line(call, school, changes, words):
    gsm = str(school / "gsm8k.jsonl")
    status, _, stderr = call(evaluation, f"--checkpoint={school}/quiet",
                             *[change.replace("GSM", gsm) for change in changes])
    assert status == 2 and words.replace("GSM", gsm) in stderr and stderr.count("\n") == 1


def test_results_of_other_weights_or_settings_are_refused(call, school, tmp_path, monkeypatch):
    asked(call, school, tmp_path, "gsm8k", "--limit=2")
    status, _, stderr = call(evaluation, f"--checkpoint={school}/plain", "--task=gsm8k",
                             "--limit=2", f"--file={school}/gsm8k.jsonl",
                             f"--out={tmp_path}/answers.json")
    assert status == 2 and "was made with {'weights': '" in stderr and stderr.count("\n") == 1
    asked(call, school, tmp_path, "gsm8k", "--limit=2")                       # the same: goes on
    whole = (tmp_path / "answers.jsonl").read_text()
    monkeypatch.setattr(bootstrap.ResultsFile, "add", lambda file, rows: None)  # another rank died
    (tmp_path / "answers.jsonl").write_text(whole[:whole.rstrip("\n").rindex("\n") + 1])
    status, _, stderr = call(evaluation, f"--checkpoint={school}/quiet", "--task=gsm8k",
                             "--limit=2", f"--file={school}/gsm8k.jsonl",
                             f"--out={tmp_path}/answers.json")
    assert status == 2 and "has 1 of 2 questions" in stderr
    row = json.loads(whole.splitlines()[1]) | dict(number=999)                # of no such question
    with open(tmp_path / "answers.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    status, _, stderr = call(evaluation, f"--checkpoint={school}/quiet", "--task=gsm8k",
                             "--limit=2", f"--file={school}/gsm8k.jsonl",
                             f"--out={tmp_path}/answers.json")
    assert status == 2 and "has 1 of 2 questions" in stderr
    monkeypatch.undo()
    _, result, _ = asked(call, school, tmp_path, "gsm8k", "--limit=2")        # a line per question
    assert all(len(values) == 2 for values in result["clusters"].values())
    status, _, stderr = call(evaluation, f"--checkpoint={school}/quiet", "--task=gsm8k",
                             f"--file={school}/gsm8k.jsonl", f"--out={tmp_path}/other.json",
                             f"--against={tmp_path}/answers.json")
    assert status == 2 and "is of other texts or questions than" in stderr


def test_answers_are_kept_for_the_same_files_of_a_model_alone(school, tmp_path):
    """Whatever their dates are: other settings or weights have another fingerprint."""
    for name in ("config.json", "model.safetensors", "model.gguf"):
        content = (school / "quiet" / name.replace("gguf", "safetensors")).read_bytes()
        path = tmp_path / name
        path.write_bytes(content)
        model = path if name.endswith("gguf") else tmp_path
        found = qa.fingerprint(model)
        for other in (content[:9] + b"?" + content[10:], content[:-1] + b"?", content + b"?"):
            path.write_bytes(other)
            assert qa.fingerprint(model) != found
        path.write_bytes(content)
        os.utime(path, (1, 1))
        (tmp_path / "answers.json").write_text(name)                          # eval.py writes it
        assert qa.fingerprint(model) == found


@pytest.fixture(scope="module")
def mistral():
    library = pytest.importorskip("mistral_common")
    return load_tokenizer(Path(library.__file__).parent / "data" / "tokenizer.model.v1")


def official_soft_accuracy(padded_ids, logits_LV, tokenizer) -> float:
    """The official metric of one row, restated: tokens of 256, right-padded with eos; the logits at
    j predict the token at j + 1; ids are Mistral v0.1's."""
    def decode(ids):                                 # their decoding spells the special tokens out
        text = "".join("<s>" if i == 1 else "</s>" if i == EOS else f"\0{i}\0" for i in ids)
        return re.sub("(\0\\d+\0)+", lambda m: tokenizer.decode(
            map(int, m[0].strip("\0").split("\0\0"))), text)
    text = decode(padded_ids)
    numeric = text.split("\nA:")[-1][1].isdigit()
    valid = DIGITS if numeric else LETTERS
    markers = text.count("\nA:")
    for i in range(len(padded_ids) - 1, 0, -1):      # drop tokens until the last marker breaks
        if padded_ids[i - 1] != EOS and decode(padded_ids[:i]).count("\nA:") < markers:
            break
    probability = 1.0
    for j in range(i + numeric, len(padded_ids) - 1):
        token = padded_ids[j + 1]
        if token == EOS:
            break
        if token not in valid:
            continue
        p_V = torch.softmax(logits_LV[j].double(), dim=-1)
        probability *= float(p_V[token] / p_V[valid].sum())
    return probability


def random_logits(row: int, bank=[]):
    """Of 256 positions, the same for the same row."""
    if not bank:
        bank.append(torch.randn(300, 32000, generator=torch.Generator().manual_seed(0)) * 3)
    return bank[0][torch.randperm(300, generator=torch.Generator().manual_seed(row))[:LENGTH]]


def both(text, tokenizer, task, logits_LV):
    answer = qa.find_answer(text, tokenizer)
    logits_SV = logits_LV[answer.start - 1:len(answer.ids) - 1]
    ours = qa.score_answer(answer, logits_SV, (1.0,), task, "base")["soft_base"][0]
    padded = answer.ids + [EOS] * (LENGTH - len(answer.ids))
    return ours, official_soft_accuracy(padded, logits_LV, tokenizer), answer


@pytest.mark.parametrize("task", TASKS)
def test_the_soft_metric_is_the_official_algorithm_restated(mistral, tmp_path, task):
    n_rows, found = 200, set()
    made, *real = files(task, tmp_path, n_rows)
    for path in (without_percent(made), *real):
        rows = qa.read_questions(task, str(path))[:n_rows]
        assert len(rows) == n_rows
        for question in rows:
            logits_LV = random_logits(question.number)
            ours, official, answer = both(question.with_answer, mistral, task, logits_LV)
            assert ours == pytest.approx(official, abs=1e-6), question
            assert 0 < ours < 1
            found |= {question.gold} if task == "commonsense_qa" else set(question.answer)
    assert found >= set("ABCDE") or found >= set(",-.$0123456789")      # what the rows must cover


def test_the_official_quirks_are_kept(mistral):
    """A comma is free; a negative answer has its newline scored alone, among letters."""
    digits, letters = qa.answer_tokens(mistral)
    assert (sorted(digits), sorted(letters)) == (sorted(DIGITS), sorted(LETTERS))

    def scored(text):
        ours, official, answer = both(text, mistral, "gsm8k", random_logits(1))
        assert ours == pytest.approx(official, abs=1e-6)
        tokens = [mistral.decode([answer.ids[answer.start + t]]) for t in answer.scored]
        return tokens, answer.candidates
    assert scored("Q: 1?\nA: 1,250\n") == ([*"1250", "\n"], digits)
    assert scored("Q: 1?\nA: -10\n") == (["\n"], letters)
    assert scored("Q: 1?\nA: $10\n") == (["\n"], letters)
    assert scored("Q: is\nA: 4 or\nA: 52\n")[0] == [*"52", "\n"]        # the last marker


@pytest.mark.parametrize("kind", ["tokenizer.model.v1", "tekken_240911.json",
                                  "mistral_instruct_tokenizer_240323.model.v3"])
def test_any_tokenizer_that_writes_digits_singly_counts_the_same_characters(mistral, kind):
    other = load_tokenizer(Path(mistral.path).parent / kind)
    for said, expected in ((" 1,250", "1250\n"), (" B", "B\n"), (" -3", "\n")):
        answer = qa.find_answer(f"Q: x?\nA:{said}\n", other)
        tokens = [other.decode([answer.ids[answer.start + t]]).strip(" ") for t in answer.scored]
        assert "".join(tokens) == expected


class Merging(Tokenizer):
    """Writes up to three digits as one token, as Llama 3's does."""
    path = "merging"

    def __init__(self):
        self.known = {}
        super().__init__([bytes([i]) for i in range(256)] + [b"%d" % i for i in range(10, 1000)],
                         None, None)

    def _encode(self, text):
        parts = re.findall(r"\d{1,3}| [A-Z]|.|\n", text)
        for part in parts:
            if part.encode() not in self.pieces:
                self.pieces.append(part.encode())
        return [self.pieces.index(part.encode()) for part in parts]


def test_a_tokenizer_that_merges_digits_has_the_whole_answer_scored():
    tokenizer = Merging()
    digits, letters = qa.answer_tokens(tokenizer)
    assert digits is None and len(letters) == 6
    answer = qa.find_answer("Q: x?\nA: 1250\n", tokenizer)
    assert answer.scored == [*range(len(answer.ids) - answer.start)]
    logits_SV = torch.randn(len(answer.ids) - answer.start, len(tokenizer.pieces))
    scores = qa.score_answer(answer, logits_SV, (1.0,), "gsm8k", "base")
    assert scores["soft_base"][0] == pytest.approx(np.exp(-scores["nll_base"][0]))


def test_the_likelihood_is_of_the_whole_answer_and_the_best_letter_of_five_is_chosen(mistral):
    question = qa.Question(1, "Q: where?\n(A) here", " D", "D")
    answer = qa.find_answer(question.with_answer, mistral)
    logits_SV = torch.zeros(2, 32000)
    logits_SV[0, LETTERS[3]], logits_SV[0, 13], logits_SV[0, 5000] = 1.0, 2.0, 9.0
    scores = qa.score_answer(answer, logits_SV, (1.0, 0.5), "commonsense_qa", "base")
    logp_SV = logits_SV.double().log_softmax(-1)
    assert scores["nll_base"][0] == pytest.approx(-float(logp_SV[0, LETTERS[3]] + logp_SV[1, 13]))
    assert scores["right_base"] == [1.0]                  # neither the newline nor 5000 is a letter
    assert scores["nll_base"][1] == pytest.approx(-float(
        (logits_SV * 2).double().log_softmax(-1)[[0, 1], [LETTERS[3], 13]].sum()))


@pytest.mark.parametrize("said, number", [
    (" 1,450", "1450"), ("-10", "-10"), (" $1,000.", "1000"), ("3.50", "3.5"), ("- 7", "-7"),
    ("72.0", "72"), ("seven", "seven"), ("4 or 5", "4 or 5"), ("", ""), (".5", "0.5"),
    (" −10", "-10"), ("+5", "5"), ("007", "7"), ("12 13", "12 13"), ("12,13", "12,13"),
    ("1,234,567.80", "1234567.8"), ("-0", "0"), ("100", "100"), ("٣", "٣"), ("-", "-"),
    ("9" * 5000, "9" * 5000)])
def test_numbers_are_compared_with_their_sign_and_without_commas(said, number):
    assert qa.number_in(said) == number


def test_a_number_written_in_any_usual_way_is_the_same_number():
    rng = random.Random(0)
    for _ in range(500):
        value = Decimal(rng.randint(-10**6, 10**6)).scaleb(-rng.randint(0, 3))
        plain = f"{abs(value):,f}" if rng.random() < 0.5 else f"{abs(value):f}"
        sign = rng.choice(["-", "−", "- "]) if value < 0 else rng.choice(["", "+"])
        written = f" {sign}{rng.choice(['', '$'])}{plain}{rng.choice(['', '.'])}"
        assert Decimal(qa.number_in(written)) == value, written
        assert qa.number_in(written) == qa.number_in(f"{value:f}")
        votes, _ = qa.count_votes("gsm8k", "", [f"It is{written.rstrip('.')} dollars"])
        assert Decimal(votes[0]) == value


@pytest.mark.parametrize("said, vote", [
    (" 1,2345", None), ("1234,567", None), ("1,00", None), ("1.000.000", None), ("0,5", None),
    ("1e3", None), ("1E−3", None), ("1/2", None), ("9" * 5000 + "e3", None), ("5kg", "5"),
    ("$1,450.", "1450"), ("12 13", "12"), (".5", "0.5"), ("+5", "5"), ("007", "7"),
    ("- 3.0", "-3"), ("—10", "10"), ("1/2 or 3", "3"),
    *[(f"is {dash}10.", "-10") for dash in "-\u2212\u2013\uff0d\u2010\u2011\ufe63"]])
def test_a_vote_is_a_whole_number_with_its_sign_or_none(said, vote):
    assert qa.count_votes("gsm8k", "1", [said])[0] == [vote]


@pytest.mark.parametrize("said, gold, right", [(".5", "5", 0), ("−10", "-10", 1), ("+5", "5", 1)])
def test_a_vote_counts_what_was_said(said, gold, right):
    assert qa.count_votes("gsm8k", gold, [said])[1]["majority"] == [right]


def test_both_forms_of_commonsense_qa_give_the_same_questions(tmp_path):
    nested, flat = (qa.read_questions("commonsense_qa", str(write(tmp_path / f"{form}.jsonl",
                                                                  commonsense_qa(7, form))))
                    for form in (False, True))
    assert nested == flat and {question.gold for question in nested} == set("ABCDE")
    assert nested[0].text.startswith("Q: Where") and "\n(E) " in nested[0].text


def test_the_subset_of_128_is_the_official_one(tmp_path):
    library = pytest.importorskip("datasets")
    path = str(without_percent(write(tmp_path / "rows.jsonl", gsm8k(1319))))

    def numbers(limit):
        return [question.number for question in qa.read_questions("gsm8k", path, limit)]
    rows = library.Dataset.from_dict({"number": list(range(1, 1320))}).shuffle(seed=42)["number"]
    assert numbers(128) == sorted(rows[:128])
    assert numbers(0) == numbers(2000) == list(range(1, 1320))


@pytest.mark.parametrize("task, row, words", [
    ("gsm8k", dict(question="q", answer="no marker"), "not a row of gsm8k: no '####' answer"),
    ("gsm8k", dict(question="q", answer="a\n#### "), "not a row of gsm8k: no '####' answer"),
    *[("gsm8k", dict(question="q", answer=f"a\n#### {gold}"), "is not a number: leave the row out")
      for gold in ("50%", "1/2", "abc", ".", "1,00")],
    *[("commonsense_qa", dict(question="s", choices=dict(label=label, text=text), answerKey="A"),
       words) for label, text, words in (
        ([*"ABCDE"], "abcde", "row: choices: text is 'abcde', of another type"),
        ([*"ABCDE"], [*"abcdef"], "6 texts, and answerKey A of choices"),
        ([*"ABCDE"], [*"abcd"], "4 texts"), ([*"ABCDEF"], [*"abcdef"], "6 texts"))],
    *[("commonsense_qa", dict(answerKey="A", question=dict(stem="s", choices=[
        dict(label=label, text=text) for label in "ABCDE"])), "choices, an entry,: text is")
      for text in (None, 5, {}, [])],
    ("gsm8k", dict(text="q"), "not a row of gsm8k: 'answer'"),
    ("gsm8k", dict(question="q", answer=None), "not a row of gsm8k"),
    ("commonsense_qa", dict(question=dict(stem="s", choices=[])), "answerKey None of choices []"),
    ("commonsense_qa", dict(question="s", choices=dict(label=list("ABCDE"), text=list("ABCDE")),
                            answerKey=""),
     "answerKey  of choices ['A', 'B', 'C', 'D', 'E'] (test has no answers, use dev)"),
    ("commonsense_qa", dict(question="s", answerKey="F", choices=dict(label=list("ABCDE"),
                                                                     text=list("ABCDE"))),
     "answerKey F of choices ['A', 'B', 'C', 'D', 'E']")])
def test_a_row_without_its_answer_is_one_line_with_file_and_line(tmp_path, task, row, words):
    good = gsm8k(1) if task == "gsm8k" else commonsense_qa(1)
    path = write(tmp_path / "rows.jsonl", [*good, row])
    with pytest.raises(UserError, match=r"rows\.jsonl:2: .*" + re.escape(words)):
        qa.read_questions(task, str(path))
    (tmp_path / "rows.jsonl").write_text(json.dumps(good[0]) + "\n{")
    with pytest.raises(UserError, match=r"rows\.jsonl:2: damaged"):
        qa.read_questions(task, str(path))
    path.write_text("")
    with pytest.raises(UserError, match="rows.jsonl holds no question"):
        qa.read_questions(task, str(path))
