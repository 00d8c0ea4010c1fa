"""How sure one can be: intervals, paired differences, a control, and rows that outlive a crash.

What is drawn anew by the bootstrap is a *unit*: a text or a question, never a token, because the
tokens of one text are not independent. A measure is a sum for each unit beside a count of what was
added up, so its mean is a ratio, and two measures of the same units are compared pair by pair: what
makes one question harder than another is in neither the difference nor its interval.

Left out on purpose: tests of significance. An interval of a paired difference says more.

Read next: tasks.py
"""
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

import distributed as parallel
import weights
from config import UserError
from formats.tensors import read_json

N_BOOTSTRAP = 1000
TEMPERATURES = 2.0 ** (np.arange(-12, 9) / 4)      # 1/8 to 4, and 1 among them
PLAIN = int(np.argmin(abs(TEMPERATURES - 1)))
VARIANTS = {"base": "not thinking", "sharp": "not thinking, temperature_scaled", "mixed": "thinking"}


def interval(total_U, count_U=None) -> dict[str, float]:
    """The mean of what was added up, and its 95 % bootstrap interval over the units."""
    total_U = np.asarray(total_U, float)
    count_U = np.ones(len(total_U)) if count_U is None else np.asarray(count_U, float)
    equal = np.full(len(total_U), 1 / len(total_U))
    draws = np.random.default_rng(0).multinomial(len(total_U), equal, size=N_BOOTSTRAP)
    low, high = np.percentile(draws @ total_U / (draws @ count_U), (2.5, 97.5))
    return dict(mean=float(total_U.sum() / count_U.sum()), low=float(low), high=float(high))


def temperature_scaled(value_RK, unit_R, least: bool):
    """What the base alone reaches by a temperature: the control for a gain by sharpening.

    `value_RK` at each of TEMPERATURES. The temperature of every second unit is the one at which the
    mean of the *other* units is least (a loss) or greatest: fitted on held-out text, and nothing
    held out is lost. Returns value_R and the two temperatures.
    """
    value_R, fitted = value_RK[:, PLAIN].copy(), []
    for half in (0, 1):
        here_R = unit_R % 2 == half
        others_RK = value_RK[~here_R]
        best = PLAIN                                    # a single text has no others to learn from
        if len(others_RK):
            best = int((np.argmin if least else np.argmax)(others_RK.mean(0)))
        value_R[here_R] = value_RK[here_R, best]
        fitted.append(float(TEMPERATURES[best]))
    return value_R, fitted


def summary(units: dict[str, np.ndarray]) -> dict[str, dict]:
    """The mean of every measure but `count`, which says how much was added up in each unit.

    Where MEASURE_mixed stands beside MEASURE_base or _sharp, also what thinking changed, in pairs:
    in `nll_mixed-nll_base` less is better, in the others more.
    """
    count_U = units["count"]
    result = {name: interval(units[name], count_U) for name in units if name != "count"}
    for name in [name for name in units if name.endswith("_mixed")]:
        for other in (name.replace("_mixed", "_base"), name.replace("_mixed", "_sharp")):
            if other in units:
                result[f"{name}-{other}"] = interval(units[name] - units[other], count_U)
    return result


def compare(result: dict, path: str) -> dict[str, dict]:
    """What this result has beyond that of another json, pair by pair. ValueError if it is of other
    texts, tokens or questions."""
    other = read_json(Path(path))
    if not isinstance(other, dict) or other.get("of") != result["of"]:
        found = other.get("of") if isinstance(other, dict) else "something else"
        raise UserError(f"{path} is of {found}, not of {result['of']}: only the same texts or "
                         "questions can be compared")
    mine, theirs = result["units"], other["units"]
    if list(theirs["count"]) != list(mine["count"]):
        raise UserError(f"{path} counts other tokens of the same texts: only the same tokens can "
                         "be compared")
    return {name: interval(np.subtract(mine[name], theirs[name]), mine["count"])
            for name in mine if name in theirs and name != "count"}


def table(result: dict[str, dict]) -> str:
    """A line for each measure, a column for each of VARIANTS, then what thinking changed."""
    measures = dict.fromkeys(name.rpartition("_")[0] for name in result
                             if name.endswith("_base") and "-" not in name)
    heads = [*VARIANTS.values(), "thinking - not", "thinking - temperature_scaled"]
    lines = [" " * 8 + "".join(f"{head:>28s}" for head in heads)] if measures else []
    for m in measures:
        names = [f"{m}_{variant}" for variant in VARIANTS]
        names += [f"{m}_mixed-{m}_base", f"{m}_mixed-{m}_sharp"]
        lines.append(f"{m:8s}" + "".join(f"{cell(result.get(n), '-' in n):>28s}" for n in names))
    others = [n for n in result if n.rpartition("_")[0] not in measures and "-" not in n]
    return "\n".join([*lines, *(f"{name:36s}{cell(result[name])}" for name in others)])


def cell(value: dict | None, signed: bool = False) -> str:
    if value is None:
        return "-"
    digits = ("+" if signed else "") + (".4f" if abs(value["high"]) < 10 else ".2f")
    mean, low, high = (f"{value[name]:{digits}}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


class Progress:
    """Work done, rate and time left, on stderr: each second on a screen, twice a minute elsewhere.

    The longest texts come first, so what is left takes rather less."""
    def __init__(self, n_work: int, what: str, place: parallel.Place, tell: bool = True):
        self.n_work, self.what, self.done = max(1, n_work), what, 0
        self.tell = tell and place.writes
        self.started = self.told = time.monotonic()
        self.wait = 1 if sys.stderr.isatty() else 30                   # seconds

    def __call__(self, work: int):
        self.done += work
        now = time.monotonic()
        if self.tell and now - self.told > self.wait:
            self.told, spent = now, now - self.started
            left = spent * (self.n_work - self.done) / self.done
            print(f"{self.what}: {self.done / self.n_work:.0%} in {spent:.0f} s, {left:.0f} s left",
                  file=sys.stderr, end="\r" if self.wait == 1 else "\n", flush=True)


class ResultsFile:
    """A jsonl file: what it is of, then a line per question in the order in which they were done.

    Every rank appends its own lines, each whole batch in one write (a local disk keeps writes
    apart). What is there already is not done again; a line that was cut is. ValueError if the file
    is of something else.
    """
    def __init__(self, path: str, of: dict, place: parallel.Place):
        self.path = Path(path)
        if place.writes:
            rows = self.lines() if self.path.is_file() else []
            if len(rows) > 1 and rows[0] != of:
                key = next((k for k in of if rows[0].get(k) != of[k]), "what it holds")
                raise UserError(f"{path} was made with another {key} ({rows[0].get(key)}, now "
                                 f"{of.get(key)}): delete it, or choose another --out")
            text = "".join(json.dumps(row) + "\n" for row in [of, *rows[1:]])
            self.path.parent.mkdir(parents=True, exist_ok=True)
            weights.atomic_write(self.path, lambda path: path.write_text(text))
        self.wait(place)
        self.done = self.rows()

    def wait(self, place: parallel.Place):
        """Until all ranks are here: a GPU's sum is not there before it is read."""
        parallel.total(torch.zeros(1, device=place.device)).item()

    def lines(self) -> list[dict]:
        """Those that are whole."""
        return [json.loads(line) for line in self.path.read_text().split("\n")[:-1]]

    def rows(self) -> dict[int, dict]:
        """By question number, rising."""
        return {row["number"]: row for row in sorted(self.lines()[1:], key=lambda r: r["number"])}

    def add(self, rows: list[dict]):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        with open(self.path, "ab", buffering=0) as file:
            file.write(text.encode())
            os.fsync(file.fileno())
