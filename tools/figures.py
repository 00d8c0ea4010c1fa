"""Figures (with matplotlib) and tables of log.jsonl, of eval.py's json, and of the attention rule.

    python -m tools.figures --kind=mask --out=mask.png
    python -m tools.figures --kind=learning --input=out/quiet/log.jsonl --plain=out/plain/log.jsonl
    python -m tools.figures --kind=seconds --input=N2-0/log.jsonl,N4-0/log.jsonl --pace=0.6,1.1
    python -m tools.figures --kind=table --input=0-base.json,1-base.json

Files named SEED-NAME.json are runs of one thing: shown are mean, lowest and highest. So are logs in
folders named NAME-SEED: shown is their mean.
"""
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

import config
from attention import may_attend
from config import UserError
from tasks.bootstrap import bootstrap_ci

BASE, MIXED, PLAIN = "#6f6f6f", "#0b6e4f", "#b5651d"
TABLE_MEASURES = "right_base right_mixed nll_base nll_scaled nll_mixed reasoning_is_right".split()


def mask(cfg, figure):
    """Draw who may attend to whom: rows attend to columns, a text of 5 tokens and its thoughts."""
    from matplotlib.colors import ListedColormap
    # text tokens have step 0; the k-th token branching off text position p has step k
    names = "x0 x1 x2 x3 x4 start y1 y2 end x1 start y1 y2 end x2 start y1 y2 end x3".split()
    position = np.array(list("01234" "00000" "11111" "22222"), int)
    step = np.array(list("00000" "12345" "12345" "12345"), int)
    query = position[:, None], step[:, None]
    sees = may_attend(query, (position, step), query[0] == position)
    ax = figure.subplots()
    ax.imshow(sees * (1 + np.sign(step)), cmap=ListedColormap(["#f1f1f1", BASE, MIXED]))
    ax.set_xticks(range(20), names, rotation=90)
    ax.set_yticks(range(20), names)
    ax.tick_params(length=0, labeltop=True, labelbottom=False)
    groups = "text", "thought\nafter x0", "thought\nafter x1", "thought\nafter x2"
    for n, group in enumerate(groups):
        ax.text(5 * n + 2, -3, group, ha="center")
        ax.text(-3, 5 * n + 2, group, ha="right", va="center")
        ax.axhline(5 * n - 0.5, color="white")
        ax.axvline(5 * n - 0.5, color="white")


def logged(paths, name):
    """Return the steps at which these log.jsonl have `name`, and its values, [runs, steps]."""
    runs = []
    shape = {"step": int, name: (None, float)}
    for path in paths:
        try:
            lines = config.read_text(path).splitlines()
            rows = [config.parse_json(line, shape, path) for line in lines]
            run = {row["step"]: row[name] for row in rows if row.get(name) is not None}
        except UserError:
            run = {}
        runs.append(run)
        if not run or run.keys() != runs[0].keys():
            raise UserError(f"{path} is not a log.jsonl with {name} at the same steps as the first")
    return list(runs[0]), np.array([list(run.values()) for run in runs])


def learning(cfg, figure):
    """Draw held-out accuracy by step: a thin line for each seed, a thick one for their mean."""
    ax = figure.subplots()
    ax.axhline(cfg.chance, color="black", linestyle="--")
    ends = [(cfg.chance, "chance", "black")]
    for label, logs, which, colour in (
            ("thinking", cfg.input, "mixed", MIXED),
            ("same model, not thinking", cfg.input, "base", BASE),
            ("plain training", cfg.plain, "base", PLAIN)):
        if logs:
            steps, values = logged(logs, f"eval/accuracy/{which}")
            mean = values.mean(0)
            ax.plot(steps, values.T, color=colour, linewidth=0.7, alpha=0.5)
            ax.plot(steps, mean, color=colour, linewidth=2.2)
            ends.append((mean[-1], label, colour))
    # labels stand at the ends of their lines, but never over each other
    height = -1.0
    for value, label, colour in sorted(ends):
        height = max(value, height + 0.06)
        ax.text(steps[-1], height, f" {value:.3f} {label}", color=colour, va="center")
    ax.set(xlabel="step", ylabel="held-out accuracy, seeds and mean", ylim=(0, 1.02), xmargin=0)


def seconds(cfg, figure):
    """Draw the mean over seeds of held-out accuracy by seconds, a line for each name."""
    runs = {}
    for path in cfg.input:
        name = re.sub(r"-\d+$", "", Path(path).parent.name)
        runs.setdefault(name, []).append(path)
    start = cfg.start or [0.0] * len(runs)
    if not len(cfg.pace) == len(start) == len(runs):
        raise UserError(f"--pace and --start need a number for each of {', '.join(runs)}")
    ax = figure.subplots()
    for (name, paths), pace, before in zip(runs.items(), cfg.pace, start):
        steps, values = logged(paths, "eval/accuracy/mixed")
        mean = values.mean(0)
        x = before + pace * np.array(steps)
        shown = config.printable(name).replace("$", "")
        label = f"{shown.strip('_')}: {mean[-1]:.3f}"
        ax.plot(x, mean, label=label)
    ax.legend(frameon=False)
    ax.set_xlabel("seconds of one thread")
    ax.set_ylabel("held-out accuracy, mean of seeds")
    ax.set_ylim(0, 1.02)


def by_name(paths):
    """Return lists of what eval.py wrote, by file name without the seed in front of it."""
    found = {}
    for path in paths:
        wanted = dict.fromkeys(TABLE_MEASURES, (None, {"mean": float}))
        wanted |= {"nll_base": {"mean": float}, "clusters": {str: [float]}}
        result = config.read_json(path, wanted)
        name = re.sub(r"^\d+-", "", Path(path).stem)
        found.setdefault(name, []).append(result)
    return found


def interval_over_texts(results, column):
    """Return the 95 % interval of the mean over runs, "" if they did not score the same texts, or
    fewer than 50, whose intervals are too narrow."""
    sums, counts = [], []
    for result in results:
        clusters = result["clusters"]
        sums.append(clusters.get(column, []))
        counts.append(clusters.get("count", []))
    texts = {str(result.get("dataset_id")) for result in results}
    sizes = set(map(len, sums + counts))
    if len(sizes) > 1 or min(sizes) < 50:
        return ""
    if np.min(counts) <= 0 or len(texts) > 1:
        return ""
    interval = bootstrap_ci(np.sum(sums, 0), np.sum(counts, 0))
    return " [{low:.3f}, {high:.3f}]".format(**interval)


def table(cfg):
    """Print a line of Markdown for each name: mean (lowest to highest) [interval over texts]."""
    print("| | runs | " + " | ".join(TABLE_MEASURES) + " |")
    print("|---" * (len(TABLE_MEASURES) + 2) + "|")
    for name, results in by_name(cfg.input).items():
        shown = config.printable(name)
        cells = [shown, str(len(results))]
        for column in TABLE_MEASURES:
            values = [result[column]["mean"] for result in results if column in result]
            cell = f"{np.mean(values):.3f}" if values else ""
            if len(values) > 1:
                cell += f" ({min(values):.3f} to {max(values):.3f})"
            if len(values) == len(results):
                cell += interval_over_texts(results, column)
            cells.append(cell)
        print("| " + " | ".join(cells) + " |")


@dataclass(frozen=True)
class FigureConfig:
    kind: Literal["mask", "learning", "seconds", "table"] = "table"  # what to draw or print
    input: tuple[str, ...] = ()       # files to read, separated by commas
    plain: tuple[str, ...] = ()       # log.jsonl files of plain training, for --kind=learning
    chance: float = 0.2               # accuracy of guessing, for --kind=learning: a cup of five
    pace: tuple[float, ...] = ()      # seconds a step of each name, for --kind=seconds
    start: tuple[float, ...] = ()     # seconds that each name took before its log
    out: str = "figure.png"           # picture to write


def main():
    (cfg,) = config.parse(FigureConfig)
    if cfg.kind != "mask" and not cfg.input:
        raise UserError(f"--kind={cfg.kind} needs --input=FILE[,FILE]")
    if cfg.kind == "table":
        return table(cfg)
    import matplotlib.figure
    matplotlib.rc("axes.spines", top=False, right=False)
    figure = matplotlib.figure.Figure((8, 4.5), layout="constrained")
    draw = {"mask": mask, "learning": learning, "seconds": seconds}
    draw[cfg.kind](cfg, figure)
    with config.atomic_write(cfg.out) as temporary:
        figure.savefig(temporary, dpi=160, format="png", bbox_inches="tight")
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    config.run(main)
