"""tasks/shell_game.py: every answer is right, none leaks, only one corpus shows reasoning."""
import functools
import hashlib
import itertools
import re

import pytest
import torch

from data import Batches, TokenFile
from tasks import shell_game
from tokenizer import load_tokenizer

LINE = re.compile(r"ball ([a-e]) : ((?:[a-e]{2} ){3,6})now (?:— ((?:[a-e] )+)— )?([a-e]) \.")
N_LINES = 6000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shell_game")
    shell_game.write_corpora(str(folder), N_LINES, seed=0)
    return folder


@functools.cache
def games(folder, corpus: str, split: str) -> list[tuple]:
    """Start, swaps, reasoning (or None) and answer of each line, read back from the tokens."""
    file, tokenizer = TokenFile(folder / corpus, split), load_tokenizer(folder / corpus)
    lines = [tokenizer.decode(file.document(i)) for i in range(file.n_docs)]
    found = [LINE.fullmatch(line).groups() for line in lines]
    return [(start, tuple(swaps.split()), reasoning and reasoning.split(), answer)
            for start, swaps, reasoning, answer in found]


def every_game(folder):
    corpora = ("with_reasoning", "without_reasoning")
    for corpus, split in itertools.product(corpora, ("train", "val")):
        yield from games(folder, corpus, split)


def play(start, swaps) -> list[str]:
    """The oracle: five cups on a table, moved by hand, looked under after each swap."""
    under = {cup: cup == start for cup in "abcde"}
    seen = []
    for one, other in swaps:
        under[one], under[other] = under[other], under[one]
        seen.append(next(cup for cup in under if under[cup]))
    return seen


def test_every_answer_and_every_reasoning_is_right(folder):
    for start, swaps, reasoning, answer in every_game(folder):
        seen = play(start, swaps)
        assert answer == seen[-1]
        if reasoning:
            assert reasoning[:len(swaps)] == seen
            assert reasoning[len(swaps):] in [[answer] * n for n in range(4)]


def test_half_of_the_reasoning_follows_a_hint_in_the_third_corpus_alone(tmp_path):
    shell_game.write_corpora(str(tmp_path), N_LINES, 0, (shell_game.HINTS,))
    file, tokenizer = TokenFile(tmp_path / "with_hints", "train"), load_tokenizer(tmp_path)
    lines = [tokenizer.decode(file.document(i)) for i in range(file.n_docs)]
    hinted = [re.fullmatch(r"(.* now )([a-e]) (— .*)", line) for line in lines]
    for start, answer, rest in [found.groups() for found in hinted if found]:
        assert LINE.fullmatch(start + rest)[4] == answer
    aloud = [line for line in lines if "—" in line]
    assert sum(map(bool, hinted)) / len(aloud) == pytest.approx(0.5, abs=0.04)
    assert len(aloud) / len(lines) == pytest.approx(0.3, abs=0.03)


def test_games_are_drawn_evenly(folder):
    drawn = list(every_game(folder))
    for k in (3, 4, 5, 6):
        assert abs(sum(len(swaps) == k for _, swaps, _, _ in drawn) / len(drawn) - 1 / 4) < 0.02
    for cup in "abcde":
        assert abs(sum(answer == cup for *_, answer in drawn) / len(drawn) - 1 / 5) < 0.02
    for extra in range(4):
        shown = [len(reasoning) - len(swaps) for _, swaps, reasoning, _ in drawn if reasoning]
        assert abs(shown.count(extra) / len(shown) - 1 / 4) < 0.05
    assert {swap for _, swaps, _, _ in drawn for swap in swaps} == set(shell_game.SWAPS)


def test_held_out_puzzles_are_in_the_training_lines_of_neither_corpus(folder):
    puzzles = {(corpus, split): {game[:2] for game in games(folder, corpus, split)}
               for corpus in ("with_reasoning", "without_reasoning") for split in ("train", "val")}
    trained = puzzles["with_reasoning", "train"] | puzzles["without_reasoning", "train"]
    held_out = puzzles["with_reasoning", "val"] | puzzles["without_reasoning", "val"]
    assert not trained & held_out
    assert 0.08 < len(held_out) / len(trained | held_out) < 0.12


def test_three_lines_in_ten_show_reasoning_in_one_corpus_and_none_in_the_other(folder):
    for corpus, low, high in (("with_reasoning", 0.27, 0.33), ("without_reasoning", 0.0, 0.0)):
        drawn = games(folder, corpus, "train") + games(folder, corpus, "val")
        assert len(drawn) == N_LINES
        assert low <= sum(reasoning is not None for _, _, reasoning, _ in drawn) / N_LINES <= high


def test_the_corpora_are_a_function_of_the_seed(folder, tmp_path):
    for seed in (0, 1):
        shell_game.write_corpora(str(tmp_path), N_LINES, seed)
        for name in ("with_reasoning/train.bin", "without_reasoning/train.bin"):
            same = (tmp_path / name).read_bytes() == (folder / name).read_bytes()
            assert same is (seed == 0)


def test_the_corpora_are_those_of_the_published_numbers(tmp_path):
    """Renaming the corpora once could have changed the seeds, and with them every table."""
    shell_game.write_corpora(str(tmp_path), 3000, seed=0)
    found = {name: hashlib.sha256((tmp_path / name / "train.bin").read_bytes()).hexdigest()[:16]
             for name in ("with_reasoning", "without_reasoning")}
    assert found == dict(with_reasoning="4afcce95c018db85", without_reasoning="b68f78503e71e51e")


def test_no_lines_are_refused_before_anything_is_written(tmp_path, call):
    status, _, error = call(shell_game, f"--out={tmp_path}", "--lines=0")
    assert status == 2 and "--lines=0 is below 1" in error and not list(tmp_path.iterdir())


def test_the_candidates_are_the_five_cups(folder):
    tokenizer = load_tokenizer(folder)
    assert [tokenizer.decode([i]) for i in shell_game.candidates(tokenizer)] == list("abcde")


def test_answer_positions_are_where_the_next_token_is_a_hidden_answer(folder):
    tokenizer = load_tokenizer(folder / "without_reasoning")
    crops = Batches(TokenFile(folder / "without_reasoning", "val"), 16, "document")
    ids_BL, valid_BL = crops.batch(0, range(64))
    asks_BL = shell_game.answer_positions(ids_BL, tokenizer)
    assert asks_BL.sum(1).tolist() == [1] * 64 and not (asks_BL & ~valid_BL).any()
    for ids, j in zip(ids_BL, asks_BL.int().argmax(1)):
        before, answer = tokenizer.decode(ids[:j + 1]), tokenizer.decode([ids[j + 1]])
        _, start, _, *swaps, now = before.split()
        assert now == "now" and answer == play(start, swaps)[-1]


@pytest.mark.parametrize("text, expected", [
    ("ball c : ab cd ce now e .", [6]),
    ("ball c : ab cd ce now e . ball a : ab bc ac now a .", [6, 15]),
    ("ball c : ab cd ce now — c d d — d .", []),                # shown: nothing is hidden
    ("ab cd ce now e . ball a : ab bc ac now a .", [12]),       # the first start is out of view
    ("now ball c : ab cd ce now", []),                          # the answer is out of view
    ("e . ball c : ab cd ce now", []),
    ("now", []),
])
def test_answer_positions_need_the_whole_puzzle_and_a_hidden_answer(folder, text, expected):
    tokenizer = load_tokenizer(folder)
    asks_BL = shell_game.answer_positions(torch.tensor([tokenizer.encode(text)]), tokenizer)
    assert asks_BL[0].nonzero()[:, 0].tolist() == expected


@pytest.mark.parametrize("thought, right", [
    ("c d d a", True), ("c d d a a", True), ("c d d a a a a a", True),
    ("c d d", False), ("", False), ("c d d b", False), ("c d a a", False), ("c d d a b", False),
    ("c d d a . a", False), ("— c d d a", False), ("c d d a a — a", False),
])
def test_reasoning_is_right_only_if_all_of_it_is(folder, thought, right):
    tokenizer = load_tokenizer(folder)
    line, thought = tokenizer.encode("ball c : ab cd ce ad now a ."), tokenizer.encode(thought)
    for ids in (line, torch.tensor(line[:-2])):                 # with or without its answer
        assert shell_game.reasoning_is_right(ids, torch.tensor(thought), tokenizer) is right
    assert not shell_game.reasoning_is_right(line, thought + [len(shell_game.WORDS)], tokenizer)


def test_the_reasoning_shown_is_the_reasoning_asked_for(folder):
    tokenizer = load_tokenizer(folder)
    for start, swaps, reasoning, _ in games(folder, "with_reasoning", "val"):
        if reasoning:
            line = tokenizer.encode(" ".join(["ball", start, ":", *swaps, "now"]))
            thought = tokenizer.encode(" ".join(reasoning))
            assert shell_game.reasoning_is_right(line, thought, tokenizer)
