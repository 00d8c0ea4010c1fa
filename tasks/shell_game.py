"""The shell game: text whose answers need reasoning that the text leaves out.

    ball c : ab cd ce ad now a .                    five cups, a ball, 3 to 6 swaps: where is it?
    ball c : ab cd ce ad now — c d d a a — a .      the same with its reasoning

Two layers cannot compose the swaps in one pass, but can follow the ball one swap at a time. 30 % of
the lines of `with_reasoning` do so, and none of `without_reasoning`, where nothing can be imitated.
`python -m tasks.shell_game` writes both; --hints adds `with_hints`, where half of that reasoning
follows the answer: `now a — c d d a a — a .`, to train a base alone. Left out on purpose: levels of
difficulty.
"""
import json
import random
from dataclasses import dataclass

import torch

import config
from data import prepare
from tokenizer import load_tokenizer

CUPS = "abcde"
SWAPS = "ab ac ad ae bc bd be cd ce de".split()
WORDS = ["ball", ":", "now", "—", ".", *CUPS, *SWAPS]
# Folder, share of lines with reasoning, share of these with a hint, and seed of each corpus. The
# seeds keep the old names of the corpora, because the published numbers depend on their text.
CORPORA = (("with_reasoning", 0.3, 0.0, "shell game, aloud, seed {}"),
           ("without_reasoning", 0.0, 0.0, "shell game, silent, seed {}"))
HINTS = ("with_hints", 0.3, 0.5, "shell game, hints, seed {}")


def follow(cup: str, swaps: list[str]):
    """Return the ball's cup after each swap: follow("c", ["ab", "cd", "de"]) is ["c", "d", "e"]."""
    seen = []
    for swap in swaps:
        if cup in swap:
            cup = swap.replace(cup, "")
        seen.append(cup)
    return seen


def game_lines(n_lines: int, share_with_reasoning: float, share_of_hints: float, seed: str):
    """Yield lines without their full stop, which is the vocabulary's eos."""
    rng = random.Random(seed)
    for _ in range(n_lines):
        start = rng.choice(CUPS)
        swaps = rng.choices(SWAPS, k=rng.randint(3, 6))
        seen, reasoning = follow(start, swaps), []
        if rng.random() < share_with_reasoning:    # the last cup is repeated: a thought is longer
            reasoning = ["—", *seen, *rng.randint(0, 3) * seen[-1:], "—"]
            if share_of_hints and rng.random() < share_of_hints:
                reasoning = [seen[-1], *reasoning]
        yield " ".join(["ball", start, ":", *swaps, "now", *reasoning, seen[-1]])


def write_corpora(out: str, n_lines: int, seed: int, corpora=CORPORA):
    """Write `out`/words.json and, in a folder each, the token files of the corpora."""
    words = dict(words=WORDS, bos=None, eos=".")
    config.write_text(f"{out}/words.json", json.dumps(words, ensure_ascii=False))
    tokenizer = load_tokenizer(f"{out}/words.json")
    for name, share, share_of_hints, source in corpora:
        folder = f"{out}/{name}"
        source = source.format(seed)
        lines = game_lines(n_lines, share, share_of_hints, source)
        meta = prepare(lines, tokenizer, folder, val_share=0.1, sources=[source],
                       split_key=lambda line: line.partition(" now")[0])
        print(f"{folder}: {meta['n_docs']} lines, {meta['n_tokens']} tokens")


def candidates(tokenizer) -> list[int]:
    """Return the ids of the five cups: every answer is one of them."""
    return tokenizer.encode(" ".join(CUPS))


def answer_positions(ids_BL, tokenizer):
    """Mark each `now` before a hidden answer, if its line's `ball` is in view: [B, L] bool."""
    if tokenizer.vocab_size != len(WORDS):
        raise config.UserError(f"{tokenizer.path} is not that of the shell game: leave the task "
                               "out, or use the data of tasks.shell_game")
    ball, now = tokenizer.encode("ball now")
    cup_ids = torch.tensor(candidates(tokenizer), device=ids_BL.device)
    cup_is_next_BL = torch.isin(ids_BL, cup_ids).roll(-1, dims=1)
    cup_is_next_BL[:, -1] = False
    ball_in_view_BL = (ids_BL == ball).cumsum(dim=1) > 0
    return (ids_BL == now) & cup_is_next_BL & ball_in_view_BL


def reasoning_is_right(line_ids, thought_ids, tokenizer) -> bool:
    """Check a thought about a line: each swap's cup, then the last repeated, nothing else."""
    _, start, _, *swaps = tokenizer.decode(line_ids).partition(" now")[0].split()
    seen, thought = follow(start, swaps), tokenizer.decode(thought_ids).split()
    return thought == seen + seen[-1:] * (len(thought) - len(seen))


@dataclass(frozen=True)
class ShellGameConfig:
    out: str = "data/shell_game"      # folder to write: the words and both corpora
    lines: int = 200_000              # lines in each corpus, a tenth of them held out
    seed: int = 0                     # seed of the puzzles
    hints: bool = False               # write a third corpus, for STaR's rationalisation


def main():
    (cfg,) = config.parse(ShellGameConfig)
    config.check_ranges(cfg, lines=1)
    corpora = CORPORA
    if cfg.hints:
        corpora += (HINTS,)
    write_corpora(cfg.out, cfg.lines, cfg.seed, corpora)


if __name__ == "__main__":
    config.run(main)
