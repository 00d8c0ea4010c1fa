"""tasks/dates.py: every answer is right, nothing held out is in a training line."""
import datetime
import functools
import json
import re
from collections import Counter

import pytest
import torch

import eval as evaluate
from checkpoint import save_model
from config import UserError
from data import TokenFile, train_tokenizer
from scoring import held_out_texts
from tasks import dates
from tokenizer import load_tokenizer
from toys import tiny_mistral

LINE = re.compile(r"(\w+) came to (\w+) on (\w+), stayed (\w+) days? there and (\w+) days? in (\w+), "
                  r"and left on(?:— ([\w ]+)—)? (\w+)\.")
NUMBERS = {"one": 1, "two": 2, "three": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The three corpora, with a tokenizer of this text."""
    folder = tmp_path_factory.mktemp("dates")
    lines = list(dates.date_lines(500, 0.5, dates.HELD_OUT, "tokenizer"))
    (folder / "tokenizer.model").write_bytes(train_tokenizer(lines, 400))
    tokenizer = load_tokenizer(folder)
    for name, *shares in dates.CORPORA:
        dates.prepare(dates.date_lines(3000, *shares, name), tokenizer, folder / name, shares[-1],
                      [name], dates.combination)
    return folder


@functools.cache
def lines(folder, corpus, split):
    if (corpus, split) == ("seen_combinations", "train"):
        return []
    file, tokenizer = TokenFile(folder / corpus, split), load_tokenizer(folder / corpus)
    return [LINE.fullmatch(tokenizer.decode(file.document(i))).groups() for i in range(file.n_docs)]


EVERY = [(corpus, split) for corpus, *_ in dates.CORPORA for split in ("train", "val")]


@pytest.mark.parametrize("corpus, split", EVERY)
def test_every_answer_and_every_reasoning_is_that_of_the_calendar(folder, corpus, split):
    for *_, weekday, first, second, _, reasoning, answer in lines(folder, corpus, split):
        monday = datetime.date(2024, 1, 1)
        arrival = monday + datetime.timedelta(dates.WEEKDAYS.index(weekday))
        n_days = NUMBERS[first] + NUMBERS[second]
        days = [(arrival + datetime.timedelta(n)).strftime("%A") for n in range(1, n_days + 1)]
        counted = [*days[:NUMBERS[first]], "then", *days[NUMBERS[first]:], "so"]
        if reasoning and "then" not in reasoning:            # the second stay is forgotten
            days = days[:NUMBERS[first]]
            counted = [*days, "so"]
        assert answer == days[-1]
        if reasoning:
            assert reasoning.split() == counted + days[-1:] * (9 - len(counted))


def test_nothing_that_is_held_out_is_in_a_training_line(folder):
    train = [line for every in EVERY[:4:2] for line in lines(folder, *every)]
    val = [line for every in EVERY[1:4:2] for line in lines(folder, *every)]
    seen = lines(folder, "seen_combinations", "val")

    def people(found):
        return {name for name, *_ in found}

    def cities(found):
        return {city for line in found for city in (line[1], line[5])}

    def combinations(found):
        return {line[2:5] for line in found}
    for held_out in (val, seen):
        assert not people(train) & people(held_out) and not cities(train) & cities(held_out)
    assert not combinations(train) & combinations(val) and len(combinations(val)) >= 12
    assert combinations(train) == combinations(seen)
    assert len(combinations(train) | combinations(val)) == 7 * 3 * 3


def test_one_corpus_reasons_in_three_quarters_of_its_lines_and_forgets_in_most_of_these(folder):
    for corpus, split in EVERY[:-2]:
        aloud = [line for line in lines(folder, corpus, split) if line[6] is not None]
        forgetful = [line for line in aloud if "then" not in line[6]]
        if corpus == "with_mistakes":
            assert 0.7 < len(aloud) / len(lines(folder, corpus, split)) < 0.8
            assert 0.55 < len(forgetful) / len(aloud) < 0.65
        else:
            assert not aloud


def test_days_and_combinations_are_drawn_evenly(folder):
    counts = Counter(line[2:5] for line in lines(folder, "without_reasoning", "train"))
    mean = counts.total() / len(counts)
    assert max(abs(count - mean) for count in counts.values()) < 5 * mean ** 0.5


def test_the_answer_is_where_it_is_hidden(folder):
    tokenizer = load_tokenizer(folder / "with_mistakes")
    file = TokenFile(folder / "with_mistakes", "train")
    ids_BL, _ = held_out_texts(file, 50, 64)
    where_BL = dates.answer_positions(ids_BL, tokenizer)
    for ids, where, line in zip(ids_BL, where_BL, lines(folder, "with_mistakes", "train")):
        hidden = line[6] is None
        assert where.sum() == hidden
        if hidden:
            at = int(where.nonzero())
            assert tokenizer.decode(ids[:at + 1]).endswith("left on")
            assert tokenizer.decode([*ids[:at + 2]]).endswith(f"on {line[7]}")
            assert int(ids[at + 1]) == dates.candidates(tokenizer)[dates.WEEKDAYS.index(line[7])]
    assert not dates.answer_positions(ids_BL[:, :2], tokenizer).any()


def test_a_right_thought_counts_every_day(folder):
    tokenizer = load_tokenizer(folder / "with_mistakes")
    line = tokenizer.encode("Ann came to Rome on Friday, stayed one day there and two days in Oslo, "
                            "and left on Monday.")
    for thought, right in (("Saturday then Sunday Monday so Monday", True), ("Saturday then", True),
                           ("Saturday Sunday Monday", False), ("Saturday then Monday", False),
                           ("Saturday so Saturday", False), ("", False)):
        ids = tokenizer.encode("on " + thought)[1:]
        assert dates.reasoning_is_right(torch.tensor(line), ids, tokenizer) == right


def test_weekdays_in_pieces_are_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train_tokenizer(["a b c on"] * 9, 266))
    with pytest.raises(UserError, match="cuts weekdays into pieces"):
        dates.answer_positions(torch.zeros(1, 9).long(), load_tokenizer(tmp_path))


def test_the_command_line_writes_the_corpora_and_eval_scores_their_answers(folder, tmp_path, call):
    tokenizer = load_tokenizer(folder / "with_mistakes")
    status, out, _ = call(dates, f"--tokenizer={folder}", f"--out={tmp_path}", "--lines=200")
    assert status == 0 and len(out.splitlines()) == len(list(tmp_path.glob("*/meta.json"))) == 3
    save_model(tiny_mistral(vocab_size=tokenizer.vocab_size), tmp_path / "m", tokenizer=tokenizer)
    options = f"--checkpoint={tmp_path / 'm'}", f"--data={tmp_path / 'without_reasoning'}"
    status, out, _ = call(evaluate, *options, "--task=dates", "--aloud", "--thought_len=2")
    assert status == 0 and "reasoning_is_right" in out
    status, _, error = call(evaluate, *options, "--task=dates", "--aloud")
    assert status == 2 and "--thought_len" in error
    found = []
    for how in ("own", "sampled"):
        assert call(evaluate, *options, "--task=dates", "--aloud", "--thought_len=2",
                    f"--thoughts={how}", f"--out={tmp_path}/answers.json")[0] == 0
        found.append(json.loads((tmp_path / "answers.json").read_text())["clusters"]["nll_mixed"])
    assert found[0] != found[1]
    status, _, error = call(dates, f"--tokenizer={folder}", f"--out={tmp_path}", "--lines=0")
    assert status == 2 and "--lines=0 is below 1" in error
