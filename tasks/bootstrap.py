"""Confidence intervals, paired differences, a control for sharpening; results printed and on disk.

The bootstrap draws whole clusters (texts or questions), because the tokens of one text are not
independent. A measure is one sum per cluster, and "count" says how many values were added up.
Left out on purpose: tests of significance. An interval of a paired difference says more.
"""
import json
from pathlib import Path

import numpy as np

from config import UserError, check_json, check_regular, file_errors, read_json, read_text

BINNED = {"difficulty": "nll_base", "by_entropy": "entropy_base", "by_weight": "mixing_weight"}
TEMPERATURES = 2.0 ** (np.arange(-12, 9) / 4)      # 1/8 to 4
RESULT = {"number": int, "settings": dict, "scores": {str: [float]}}
UNSCALED = 12                                      # index of temperature 1
TABLE_COLUMNS = {                                  # heading: name of the measure
    "not thinking": "{0}_base",
    "not thinking, scaled": "{0}_scaled",
    "thinking": "{0}_mixed",
    "thinking - not thinking": "{0}_mixed-{0}_base",
    "thinking - scaled": "{0}_mixed-{0}_scaled"}
BIN_ROW = ("{tokens:8d} {entropy_base:8.3f} {nll_base:9.3f} {nll_mixed:10.3f} {mixing_weight:+7.3f}"
           "  {gain:+.4f} [{interval_gain[0]:+.4f}, {interval_gain[1]:+.4f}]")
TABLE_ROW = "{:8s}" + "{:>28s}" * len(TABLE_COLUMNS)


def bootstrap_ci(total_C, count_C) -> dict:
    """Return `mean`, `low` and `high` (95 %) of values with these sums and counts per cluster."""
    n = len(total_C)
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=1000)
    means = drawn @ total_C / (drawn @ count_C)
    low, high = np.percentile(means, (2.5, 97.5))
    return dict(mean=np.sum(total_C) / np.sum(count_C), low=low, high=high)


def temperature_scaled(value_RK, cluster_R, least: bool):
    """Return value_R of the base model after temperature scaling, and the two temperatures.
    A gain from thinking may be mere sharpening. value_RK has a column for each of TEMPERATURES.
    Even clusters take the best one of the odd clusters and vice versa. `least`: lower is better."""
    value_R = value_RK[:, UNSCALED].copy()
    loss_RK = value_RK if least else -value_RK
    temperatures = []
    for half in (0, 1):
        own_R = cluster_R % 2 == half
        best = UNSCALED                            # a text alone leaves no others to fit on
        if not own_R.all():
            best = loss_RK[~own_R].mean(0).argmin()
        value_R[own_R] = value_RK[own_R, best]
        temperatures.append(TEMPERATURES[best])
    return value_R, temperatures


def summary(clusters: dict) -> dict:
    """Return mean and interval of each measure, and of each _mixed minus its _base or _scaled."""
    values = dict(clusters)
    count_C = values.pop("count")
    for name in [*values]:
        for variant in ("_base", "_scaled"):
            other = name.replace("_mixed", variant)
            if other != name and other in clusters:
                values[f"{name}-{other}"] = clusters[name] - clusters[other]
    return {name: bootstrap_ci(value_C, count_C) for name, value_C in values.items()}


def paired_differences(result: dict, path: str) -> dict:
    """Return mean and interval of this result minus that of a json file on the same clusters."""
    other = read_json(path, {"clusters": (None, {str: [float]})})
    mine, others = result["clusters"], other.get("clusters") or {}
    wanted = result["dataset_id"]
    count_C = list(mine["count"])
    alike = {len(values) for values in others.values()} == {len(count_C)}
    if other.get("dataset_id") != wanted or others.get("count") != count_C or not alike:
        raise UserError(f"{path} is of other texts or questions than {wanted}, or counts other "
                        "tokens of the same texts: only the same can be compared")
    names = [name for name in mine if name in others and name != "count"]
    return {name: bootstrap_ci(np.subtract(mine[name], others[name]), count_C) for name in names}


def format_table(result: dict) -> str:
    """Lay out a summary: a line for each measure with its variants, then all other measures."""
    single = [name for name in result if "-" not in name]
    measures = [name.removesuffix("_base") for name in single if name.endswith("_base")]
    lines = [TABLE_ROW.format("", *TABLE_COLUMNS)] if measures else []
    for measure in measures:
        names = [pattern.format(measure) for pattern in TABLE_COLUMNS.values()]
        cells = [format_cell(result.get(name), "-" in name) for name in names]
        lines.append(TABLE_ROW.format(measure, *cells))
    for name in single:
        if name.rpartition("_")[0] not in measures:
            lines.append(f"{name:36s}{format_cell(result[name])}")
    return "\n".join(lines)


def format_cell(value: dict | None, signed: bool = False) -> str:
    """Write a mean and its interval, "0.1234 [0.1000, 0.1500]", or "-" for None."""
    if value is None:
        return "-"
    digits = ".4f" if abs(value["high"]) < 10 else ".2f"
    return "{mean:{0}} [{low:{0}}, {high:{0}}]".format("+" * signed + digits, **value)


def bin_scores(scores: dict, by: str) -> list:
    """Return ten bins of equally many tokens, from the least to the greatest `by`."""
    order = np.argsort(scores[by], kind="stable")
    gain = scores["nll_base"] - scores["nll_mixed"]
    bins = []
    for part in filter(len, np.array_split(order, 10)):
        row = {"tokens": len(part)}
        for name in ("nll_base", "nll_mixed", "entropy_base", "mixing_weight"):
            row[name] = scores[name][part].mean()
        _, text = np.unique(scores["text"][part], return_inverse=True)
        interval = bootstrap_ci(np.bincount(text, gain[part]), np.bincount(text))
        row["gain"] = interval["mean"]
        row["interval_gain"] = interval["low"], interval["high"]
        bins.append(row)
    return bins


def format_bins(bins: list) -> str:
    """Lay out the bins of bin_scores, a line for each."""
    head = "  tokens  entropy  base nll  mixed nll  weight  gain"
    return "\n".join([head, *(BIN_ROW.format(**row) for row in bins)])


def print_result(result: dict, means: dict, cfg) -> None:
    """Print what eval.py found: the table, bins if thinking changed anything, and differences."""
    what = "questions" if cfg.asks_questions else "texts"
    n = len(result["clusters"]["count"])
    print(f"{cfg.file or cfg.data}: {n} {what}, {result.get('tokens', n)} scored; "
          f"thoughts: {cfg.thoughts}; 95 % intervals over {what}")
    if n < 50:
        print(f"intervals over {n} {what} are too narrow: they cover 87 to 90 %")
    print(format_table(means))
    for measure, halves in result["temperatures"].items():
        print(measure, "scaled at {:.2f} and {:.2f}: a temperature per half".format(*halves))
    if not cfg.asks_questions and means["nll_mixed-nll_base"]["mean"] != 0:
        for name, by in BINNED.items():
            print(f"\nfrom the least to the greatest {by}\n" + format_bins(result[name]))
    if cfg.against:
        print(f"\ndifference from {cfg.against}, on the same {what}")
        for name, value in result.get("differences", {}).items():
            print(f"{name:20s}{format_cell(value, signed=True)}")


class ResultsFile:
    """A jsonl file of results: `rows` by question number, each with the settings it was made with.
    Every rank appends to it. Raises UserError if it was made with other settings."""
    def __init__(self, path: Path, settings: dict):
        self.path, self.settings = path, settings
        self.rows = {}
        check_regular(path)
        text = read_text(path) if path.is_file() else ""
        for line in text.splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):   # empty, or cut by a crash
                continue
            check_json(row, RESULT, f"{path} (or choose another --out)")
            self.rows[row["number"]] = row
            found = row["settings"]
            other = {name: found.get(name) for name, value in settings.items()
                     if found.get(name) != value}
            if other:
                raise UserError(f"{path} was made with {other}: choose another --out")
        kinds = set()
        for row in self.rows.values():
            sizes = {name: len(values) for name, values in row["scores"].items()}
            kinds.add(str(sizes))
            least = min(sizes.values(), default=0)
            if least == 0:
                raise UserError(f"{path} has a row without scores: choose another --out")
        if len(kinds) > 1:
            raise UserError(f"{path} holds several kinds of rows: choose another --out")

    def add(self, rows: list) -> None:
        """Append the results that were not in the file at the start, in a single write."""
        new = [row | {"settings": self.settings} for row in rows if row["number"] not in self.rows]
        text = "\n".join(["", *map(json.dumps, new), ""])   # "": a crash may have cut a line
        with file_errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as file:
                file.write(text.encode())
