"""Dates: ordinary English whose last word needs counting days.

    Ann came to Rome on Friday, stayed one day there and two days in Oslo, and left on Monday.
    ... and left on— Saturday then Sunday Monday so Monday Monday Monday Monday— Monday.
    ... and left on— Saturday so Saturday (six times more, nine words in all) Saturday— Saturday.

Three quarters of the lines of `with_mistakes` count aloud, and six tenths of these forget the
second stay, as above; none counts in `without_reasoning`. Their held-out lines have other people,
other cities, and combinations of a weekday and two stays that no training line has; those of
`seen_combinations` have other people and cities alone. `python -m tasks.dates --tokenizer=MODEL`
writes them all. Left out on purpose: months and leap years.
"""
import random
import re
from dataclasses import dataclass
from itertools import product

import torch

import config
from config import UserError
from data import is_held_out, prepare
from tokenizer import load_tokenizer

WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
STAYS = {"one day": 1, "two days": 2, "three days": 3}
COMBINATIONS = [", ".join(chosen) for chosen in product(WEEKDAYS, STAYS, STAYS)]
HELD_OUT = 0.25                       # share of the combinations, roughly: 14 of 63
LONGEST = 9                           # words of the reasoning about the two longest stays
# In training lines, and in held-out lines. Few of each, so that days are the least certain words.
PEOPLE = "Ann Ben Mary Tom".split(), "Alice David Peter Sarah".split()
CITIES = "Rome Paris London Berlin".split(), "Oslo Cairo Madrid Vienna".split()
MISTAKES = 0.6                        # share of the reasoning that forgets the second stay
# Folder, share of lines with reasoning, share of the combinations that is held out.
CORPORA = (("with_mistakes", 0.75, HELD_OUT), ("without_reasoning", 0.0, HELD_OUT),
           ("seen_combinations", 0.0, 1.0))


def combination(line: str) -> str:
    """Return what decides a line's answer: "Friday, one day, two days"."""
    return ", ".join(re.findall("|".join([*WEEKDAYS, *STAYS]), line)[:3])


def reasoning(line: str, forgets: bool = False) -> list[str]:
    """Return the days of the first stay, "then" and those of the second, unless one `forgets` it,
    "so", and the last day again."""
    weekday, first, second = combination(line).split(", ")
    days = (WEEKDAYS * 3)[WEEKDAYS.index(weekday) + 1:]
    here = STAYS[first]
    both = here + STAYS[second]
    counted = days[:here] if forgets else [*days[:here], "then", *days[here:both]]
    repeated = counted[-1:] * (LONGEST - 1 - len(counted))
    return [*counted, "so", *repeated]


def date_lines(n_lines, share_aloud, held_out_share, seed: str):
    """Yield lines; if all are held out, their combinations are those of the training lines."""
    rng = random.Random(seed)
    seen = [chosen for chosen in COMBINATIONS if not is_held_out(chosen, HELD_OUT)]
    for _ in range(n_lines):
        chosen = rng.choice(seen if held_out_share == 1 else COMBINATIONS)
        held_out = is_held_out(chosen, held_out_share)
        weekday, first, second = chosen.split(", ")
        name, (here, there) = rng.choice(PEOPLE[held_out]), rng.sample(CITIES[held_out], k=2)
        line = f"{name} came to {here} on {weekday}, stayed {first} there and {second} in {there}"
        draw = rng.random()
        days = reasoning(line, forgets=draw < share_aloud * MISTAKES)
        counted = f"— {' '.join(days)}—" if draw < share_aloud else ""
        yield f"{line}, and left on{counted} {days[-1]}."


def candidates(tokenizer) -> list[int]:
    """Return the ids of the seven weekdays: every answer is one of them."""
    ids = [tokenizer.encode(f"on {weekday}")[-1] for weekday in WEEKDAYS]
    if tokenizer.decode(ids).split() != WEEKDAYS:
        raise UserError(f"{tokenizer.path} cuts weekdays into pieces: dates need them whole")
    return ids


def answer_positions(ids_BL, tokenizer):
    """Mark the `on` of each `left on` before a hidden answer: [B, L] bool."""
    left, on = tokenizer.encode("and left on")[-2:]
    day_ids = torch.tensor(candidates(tokenizer), device=ids_BL.device)
    where_BL = torch.zeros_like(ids_BL, dtype=torch.bool)
    day_is_next_BL = torch.isin(ids_BL[:, 2:], day_ids)
    where_BL[:, 1:-1] = (ids_BL[:, :-2] == left) & (ids_BL[:, 1:-1] == on) & day_is_next_BL
    return where_BL


def reasoning_is_right(line_ids, thought_ids, tokenizer) -> bool:
    """Check a thought about a line: all days of the stays, the last repeated, nothing else."""
    thought = tokenizer.decode(thought_ids).split()
    right = reasoning(tokenizer.decode(line_ids))
    return bool(thought) and thought == right[:len(thought)]


@dataclass(frozen=True)
class DatesConfig:
    tokenizer: str = "out/SmolLM2-135M"   # that of the model: a file or a folder
    out: str = "data/dates"           # folder to write: three corpora
    lines: int = 20_000               # lines in each corpus
    seed: int = 0                     # seed of the lines


def main():
    (cfg,) = config.parse(DatesConfig)
    config.check_ranges(cfg, lines=1)
    tokenizer = load_tokenizer(cfg.tokenizer)
    for name, *shares in CORPORA:
        source = f"dates, {name}, seed {cfg.seed}"
        lines = date_lines(cfg.lines, *shares, source)
        meta = prepare(lines, tokenizer, f"{cfg.out}/{name}", shares[-1], [source], combination)
        print(f"{cfg.out}/{name}: {meta['n_docs']} lines, {meta['n_tokens']} tokens")


if __name__ == "__main__":
    config.run(main)
