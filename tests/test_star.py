"""STaR: what a round asks, what it keeps, and that a hint is never learnt from."""
import json
import re
import sys
from pathlib import Path

import pytest

import config
import train
from data import TokenFile
from questions import gsm8k, school, write
from tasks import shell_game, star
from tokenizer import dash_id, load_tokenizer


@pytest.fixture(scope="module")
def base(game, tmp_path_factory) -> Path:
    """A model that reasons between dashes, wrong more often than right."""
    run = tmp_path_factory.mktemp("base") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [
            "train.py", "--objective=plain", f"--data={game}/with_reasoning", f"--out={run}",
            "--dim=64", "--n_layers=1", "--n_heads=2", "--n_kv_heads=1", "--ffn_dim=128",
            "--max_seq_len=128", "--steps=150", "--batch_size=32", "--seq_len=24", "--lr=5e-3",
            "--min_lr=5e-4", "--eval_every=0"])
        config.run(train.main)
    return run


def lines_of(folder: Path) -> list[str]:
    token_file, tokenizer = TokenFile(folder, "train"), load_tokenizer(folder)
    return [tokenizer.decode(token_file.document(i)) for i in range(token_file.n_docs)]


def answers(game: Path, n: int) -> list[str]:
    token_file, tokenizer = TokenFile(game / "without_reasoning", "train"), load_tokenizer(game)
    lines = [tokenizer.decode(token_file.document(i)) for i in range(n)]
    return [line.removesuffix(" .") for line in lines]


def scripted(tokenizer, seen):
    """A model that is right about swaps of `ab` alone, unless it is given a hint."""
    def complete(model, prompts, tokenizer_, max_new_tokens, stop, think):
        for ids in prompts:
            prompt = tokenizer.decode(ids)
            assert prompt.endswith(" —") and not think
            line, hint = prompt.removesuffix(" —").split(" now")
            _, ball, _, *swaps = line.split()
            cups = shell_game.follow(ball, swaps)
            seen.append(hint.strip())
            assert not hint or hint.strip() == cups[-1]
            right = hint or "ab" in swaps
            text = " ".join([*cups, "—", cups[-1] if right else swaps[0]])
            assert not stop(0, text)
            yield f" {text}"
    return complete


@pytest.mark.parametrize("how", [(), ("--rationalise",)])
def test_a_round_keeps_what_was_right_and_never_a_hint(call, game, base, tmp_path, monkeypatch, how):
    hints, n = [], 60
    monkeypatch.setattr(star, "complete", scripted(load_tokenizer(game), hints))
    status, said, _ = call(star, f"--checkpoint={base}", f"--data={game}/without_reasoning",
                           f"--out={tmp_path}/out", f"--questions={n}", "--batch_size=7", *how)
    asked = answers(game, n)
    easy = [line for line in asked if "ab" in line]
    hard = [line for line in asked if "ab" not in line]
    share = f"{len(easy) / n:.3f}"
    assert status == 0 and f"asked {n}, right {share}" in said and 0 < len(easy) < n
    assert hints == [""] * n + (how != ()) * [line[-1] for line in hard]
    expected = []
    for line in easy + (how != ()) * hard:
        question, _, answer = line.partition(" now ")
        _, ball, _, *swaps = question.split()
        reasoning = " ".join(shell_game.follow(ball, swaps))
        expected.append(f"{question} now — {reasoning} — {answer} .")
    assert lines_of(tmp_path / "out") == expected


def test_a_round_depends_on_nothing_but_the_weights(call, game, base, tmp_path):
    options = f"--checkpoint={base}", f"--data={game}/without_reasoning", "--questions=200"
    for name, batch_size in (("one", 200), ("two", 200), ("other", 9)):
        status, said, stderr = call(star, *options, f"--batch_size={batch_size}",
                                    f"--out={tmp_path}/{name}", "--rationalise")
        assert status == 0, stderr
    kept = lines_of(tmp_path / "one")
    n_right = round(200 * float(re.search(r"right (\S+);", said)[1]))
    assert 10 < n_right < 190 and n_right < len(kept)
    asked = dict(line.split(" now ") for line in answers(game, 200))
    for line in kept:                     # each asked, reasoned about, and right
        question, reasoning, answer = re.fullmatch(r"(.*) now — (.*) — (.) \.", line).groups()
        assert answer == asked[question] and reasoning
    for name in ("two", "other"):
        assert (tmp_path / name / "train.bin").read_bytes() == \
               (tmp_path / "one" / "train.bin").read_bytes()


def test_questions_in_gsm8k_form(call, tmp_path, monkeypatch):
    folder = school(tmp_path)
    write(folder / "gsm8k.jsonl", gsm8k(2))
    golds = [json.loads(line)["answer"].rpartition("#### ")[2]
             for line in (folder / "gsm8k.jsonl").read_text().splitlines()]
    tokenizer = load_tokenizer(folder / "plain")
    dash = tokenizer.decode([dash_id(tokenizer)])                # there is no em dash in it

    def complete(model, prompts, *_, **__):
        for ids, gold in zip(prompts, golds):
            assert tokenizer.decode(ids).endswith(f"\nA:{dash}")
            yield f" {gold}*1={gold}{dash} {gold}\nQ: and so on"
    monkeypatch.setattr(star, "complete", complete)
    status, said, stderr = call(
        star, f"--checkpoint={folder}/plain", "--task=gsm8k", f"--file={folder}/gsm8k.jsonl",
        f"--out={tmp_path}/out")
    assert status == 0 and "asked 2, right 1.000" in said, stderr
    kept = lines_of(tmp_path / "out")
    for line, gold in zip(kept, golds, strict=True):
        assert line.startswith("Q: ") and f"\nA:{dash} {gold}*1={gold}{dash} " in line
        assert line.endswith(f"{dash} {gold.replace(',', '')}\n")


def test_a_mistake_is_one_line(call, game, base, tmp_path):
    data, out = f"--data={game}/without_reasoning", f"--out={tmp_path}/out"
    for argv, words in (
            ([data, out], "--checkpoint=FOLDER and --out=FOLDER are needed"),
            ([f"--checkpoint={base}", out, "--task=gsm8k", data], "for gsm8k, --file=FILE"),
            ([f"--checkpoint={base}", out, data, "--questions=0"], "--questions=0 is below 1"),
            ([f"--checkpoint={base}", out, data, "--task=riddles"], "'riddles' is not one of"),
            ([f"--checkpoint={base}", out, data, "--max_new_tokens=1"], "no reasoning to learn from"),
            ([f"--checkpoint={base}", out, f"--data={tmp_path}"], "cannot read")):
        status, _, stderr = call(star, *argv)
        assert status == 2 and words in stderr and stderr.count("\n") == 1, stderr
    assert not (tmp_path / "out").exists()
