"""Questions and answers: the official metric, quirks and all, and the sane ones beside it."""
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tasks import qa as tasks
import tokenizer as tokenizers
from questions import commonsense_qa, files, gsm8k, write
from tokenizer import Tokenizer

EOS, LENGTH = 2, 256
DIGITS = [28740, 28750, 28770, 28781, 28782, 28784, 28787, 28783, 28774, 28734, 13]
LETTERS = [330, 365, 334, 384, 413, 13]              # of Mistral v0.1; 13 is the newline


@pytest.fixture(scope="module")
def mistral():
    library = pytest.importorskip("mistral_common")
    return tokenizers.load(Path(library.__file__).parent / "data" / "tokenizer.model.v1")


def released_soft_accuracy(padded_ids, logits_LV, tokenizer) -> float:
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


def both(ids, tokenizer, task, logits_LV):
    answer = tasks.locate(ids, tokenizer, tasks.alphabets(tokenizer))
    ours = tasks.worth(answer, logits_LV[answer.start - 1:len(ids) - 1], (1.0,), task)["soft"][0]
    padded = ids + [EOS] * (LENGTH - len(ids))
    return ours, released_soft_accuracy(padded, logits_LV, tokenizer), answer


@pytest.mark.parametrize("task", tasks.TASKS)
def test_the_soft_metric_is_the_released_algorithm_restated(mistral, tmp_path, task):
    n_rows, found = 200, set()
    for path in files(task, tmp_path, n_rows):
        questions = tasks.read(task, str(path))[:n_rows]
        assert len(questions) == n_rows
        for question in questions:
            ids = mistral.encode(f"{question.text}\nA:{question.answer}\n", bos=True)
            ours, official, answer = both(ids, mistral, task, random_logits(question.number))
            assert ours == pytest.approx(official, abs=1e-6), question
            assert 0 < ours < 1
            found |= {question.gold} if task == "commonsense_qa" else set(question.answer)
    assert found >= set("ABCDE") or found >= set(",-.$%0123456789")      # what the rows must cover


def test_the_released_quirks_are_kept(mistral):
    """A comma is free; a negative answer has its newline scored alone, among letters; text without
    a marker is scored throughout, and can be worth 1."""
    known = tasks.alphabets(mistral)
    assert (sorted(known.digits), sorted(known.letters)) == (sorted(DIGITS), sorted(LETTERS))

    def counted(text):
        ids = mistral.encode(text, bos=True)
        ours, official, answer = both(ids, mistral, "gsm8k", random_logits(1))
        assert ours == pytest.approx(official, abs=1e-6)
        return [mistral.decode([ids[t]]) for t in answer.counted], answer.among, ours
    assert counted("Q: 1?\nA: 1,250\n")[:2] == ([*"1250", "\n"], known.digits)
    assert counted("Q: 1?\nA: -10\n")[:2] == (["\n"], known.letters)
    assert counted("Q: 1?\nA: $10\n")[:2] == (["\n"], known.letters)
    assert counted("Q: no marker at all")[::2] == ([], 1.0)
    assert counted("Q: is\nA: 4 or\nA: 52\n")[0] == [*"52", "\n"]        # the last marker


@pytest.mark.parametrize("kind", ["tokenizer.model.v1", "tekken_240911.json",
                                  "mistral_instruct_tokenizer_240323.model.v3"])
def test_any_tokenizer_that_writes_digits_singly_counts_the_same_characters(mistral, kind):
    other = tokenizers.load(Path(mistral.path).parent / kind)
    known = tasks.alphabets(other)
    for answer, expected in ((" 1,250", "1250\n"), (" B", "B\n"), (" -3", "\n")):
        ids = other.encode(f"Q: x?\nA:{answer}\n", bos=True)
        counted = tasks.locate(ids, other, known).counted
        assert "".join(other.decode([ids[t]]).strip(" ") for t in counted) == expected


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
    known = tasks.alphabets(tokenizer)
    assert known.digits is None and len(known.letters) == 6
    ids = tokenizer.encode("Q: x?\nA: 1250\n")
    answer = tasks.locate(ids, tokenizer, known)
    assert answer.counted == [*range(answer.start, len(ids))]
    logits_SV = torch.randn(len(ids) - answer.start, len(tokenizer.pieces))
    worth = tasks.worth(answer, logits_SV, (1.0,), "gsm8k")
    assert worth["soft"][0] == pytest.approx(np.exp(-worth["nll"][0]))


def test_the_likelihood_is_of_the_whole_answer_and_the_best_letter_of_five_is_chosen(mistral):
    question = tasks.Question(1, "Q: where?\n(A) here", " D", "D")
    ids = mistral.encode(f"{question.text}\nA:{question.answer}\n", bos=True)
    answer = tasks.locate(ids, mistral, tasks.alphabets(mistral))
    logits_SV = torch.zeros(2, 32000)
    logits_SV[0, LETTERS[3]], logits_SV[0, 13], logits_SV[0, 5000] = 1.0, 2.0, 9.0
    worth = tasks.worth(answer, logits_SV, (1.0, 0.5), "commonsense_qa")
    logp_SV = logits_SV.double().log_softmax(-1)
    assert worth["nll"][0] == pytest.approx(-float(logp_SV[0, LETTERS[3]] + logp_SV[1, 13]))
    assert worth["right"] == [1.0]                       # neither the newline nor 5000 is a letter
    assert worth["nll"][1] == pytest.approx(-float(
        (logits_SV * 2).double().log_softmax(-1)[[0, 1], [LETTERS[3], 13]].sum()))


@pytest.mark.parametrize("said, number", [
    (" 1,450", "1450"), ("-10", "-10"), (" $1,000.", "1000"), ("3.50", "3.5"), ("- 7", "-7"),
    ("72.0", "72"), ("seven", "seven"), ("4 or 5", "4 or 5"), ("", ""), (".5", ".5")])
def test_numbers_are_compared_with_their_sign_and_without_commas(said, number):
    assert tasks.number_in(said) == number


def test_both_forms_of_commonsense_qa_give_the_same_questions(tmp_path):
    nested, flat = (tasks.read("commonsense_qa", str(write(tmp_path / f"{form}.jsonl",
                                                           commonsense_qa(7, form))))
                    for form in (False, True))
    assert nested == flat and {question.gold for question in nested} == set("ABCDE")
    assert nested[0].text.startswith("Q: Where") and "\n(E) " in nested[0].text


def test_the_subset_of_128_is_the_released_one():
    library = pytest.importorskip("datasets")
    rows = library.Dataset.from_dict({"i": list(range(1319))}).shuffle(seed=42)["i"][:128]
    assert tasks.subset(1319, 128) == sorted(rows)
    assert tasks.subset(5, 0) == [0, 1, 2, 3, 4] and len(tasks.subset(5, 9)) == 5


@pytest.mark.parametrize("task, row, words", [
    ("gsm8k", dict(question="q", answer="no marker"), "rows.jsonl:2: no '####' answer"),
    ("gsm8k", dict(question="q", answer="a\n#### "), "rows.jsonl:2: no '####' answer"),
    ("gsm8k", dict(text="q"), "rows.jsonl:2: not a row of gsm8k"),
    ("commonsense_qa", dict(question=dict(stem="s", choices=[])), "rows.jsonl:2: no answerKey"),
    ("commonsense_qa", dict(question="s", choices=dict(label=[], text=[]), answerKey=""),
     "rows.jsonl:2: no answerKey: the test split has no answers, use the dev split"),
    ("commonsense_qa", dict(question="s", answerKey="F", choices=dict(label=list("ABCDE"),
                                                                     text=list("ABCDE"))),
     "rows.jsonl:2: answerKey F of choices ABCDE")])
def test_a_row_without_its_answer_is_one_line_with_file_and_line(tmp_path, task, row, words):
    good = gsm8k(1) if task == "gsm8k" else commonsense_qa(1)
    path = write(tmp_path / "rows.jsonl", [*good, row])
    with pytest.raises(ValueError, match=re.escape(words)):
        tasks.read(task, str(path))
    (tmp_path / "rows.jsonl").write_text(json.dumps(good[0]) + "\n{")
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: not UTF-8 text, JSON lines"):
        tasks.read(task, str(path))
