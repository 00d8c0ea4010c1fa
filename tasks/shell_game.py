"""The shell game: text whose answers need working that the text leaves out.

    python shell_game.py --out=data/shell_game                  # writes .../aloud and .../silent

    ball c : ab cd ce ad now a .                       five cups, a ball, 3 to 6 swaps: where is it?
    ball c : ab cd ce ad now — c d d a a — a .         the same, thinking aloud

A shallow model cannot compose the swaps in one pass, but it can follow the ball one swap at a time.
In `aloud`, 30 % of the lines do so, in an aside between em dashes: on it a model is pretrained. In
`silent` none does: nothing there can be imitated, so what thinking it brings about is Quiet-STaR's.

Left out on purpose: difficulty settings. This is a proof in minutes on a laptop, not a benchmark.

Read next: parallel.py
"""
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch

import config
from data import prepare
from formats.tensors import published
from tokenizer import load

CUPS = "abcde"
SWAPS = ["".join(pair) for pair in itertools.combinations(CUPS, 2)]     # ab, ac, ... de
WORDS = ["ball", ":", "now", "—", ".", *CUPS, *SWAPS]
HELD_OUT = 0.1                        # of all puzzles; in neither corpus's training lines


def follow(cup: str, swaps: list[str]) -> list[str]:
    """Where the ball is after each swap: follow("c", ["ab", "cd", "de"]) is ["c", "d", "e"]."""
    where = []
    for swap in swaps:
        if cup in swap:
            cup = swap.replace(cup, "")
        where.append(cup)
    return where


def puzzle(line: str) -> str:
    """Start and swaps of a line, without working and answer."""
    return line.partition(" now")[0]


def lines(n_lines: int, aloud_share: float, seed: str) -> Iterator[str]:
    """Lines without their full stop, which is the vocabulary's eos.

    An aside repeats its last cup 0 to 3 times: thoughts of fixed length outlast their working.
    """
    rng = random.Random(seed)
    for _ in range(n_lines):
        start, swaps = rng.choice(CUPS), rng.choices(SWAPS, k=rng.randint(3, 6))
        where, aside = follow(start, swaps), []
        if rng.random() < aloud_share:
            aside = ["—", *where, *where[-1:] * rng.randint(0, 3), "—"]
        yield " ".join(["ball", start, ":", *swaps, "now", *aside, where[-1]])


def write(out: str, n_lines: int, seed: int) -> Iterator[tuple[str, dict]]:
    """Write the vocabulary, `out`/words.json, and both corpora; yields folder and meta of each."""
    with published(f"{out}/words.json") as file:
        file.write(json.dumps(dict(words=WORDS, bos=None, eos="."), ensure_ascii=False).encode())
    tokenizer = load(f"{out}/words.json")
    for name, aloud_share in (("aloud", 0.3), ("silent", 0.0)):
        source = f"shell game, {name}, seed {seed}"
        yield f"{out}/{name}", prepare(lines(n_lines, aloud_share, source), tokenizer,
                                       f"{out}/{name}", HELD_OUT, [source], split_key=puzzle)


def plays(tokenizer) -> bool:
    """Is its vocabulary the shell game's?"""
    size = tokenizer.vocab_size
    return size == len(WORDS) and tokenizer.decode(range(size)) == " ".join(WORDS)


def answer_positions(ids_BL, tokenizer):
    """[B, L] bool: each `now` that the answer itself follows, if its line's `ball` is in view."""
    ball, now, *cups = tokenizer.encode(" ".join(["ball", "now", *CUPS]))
    next_BL = ids_BL.roll(-1, dims=1)
    next_BL[:, -1] = now                                        # nothing follows the last token
    answers_BL = torch.isin(next_BL, torch.tensor(cups, device=ids_BL.device))
    return (ids_BL == now) & answers_BL & ((ids_BL == ball).cumsum(dim=1) > 0)


def reasoning_is_right(line_ids, thought_ids, tokenizer) -> bool:
    """Is the thought the ball's cup after each swap, then its last cup repeated, and nothing else?

    `line_ids` run from `ball` to `now` or beyond; both are iterables of ints.
    """
    _, start, _, *swaps = puzzle(tokenizer.decode(line_ids)).split()
    where, thought = follow(start, swaps), tokenizer.decode(thought_ids).split()
    return thought == where + where[-1:] * (len(thought) - len(where))


@dataclass(frozen=True)
class ShellGameConfig:
    out: str = "data/shell_game"      # folder to write
    lines: int = 200_000              # in each corpus
    seed: int = 0


def main():
    (cfg,) = config.parse(ShellGameConfig)
    for folder, meta in write(cfg.out, cfg.lines, cfg.seed):
        print(f"{folder}: {meta['n_docs']} lines, {meta['n_tokens']} tokens", flush=True)


if __name__ == "__main__":
    config.run(main)
