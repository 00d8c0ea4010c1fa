"""The README's figures and tables, from log.jsonl, eval.py's json, and the attention rule.

    python figures.py --kind=mask --out=mask.png
    python figures.py --kind=curves --input=out/quiet/log.jsonl,out/plain/log.jsonl --out=curves.png
    python figures.py --kind=top --input=out/quiet/eval.json,out/quiet/log.jsonl --out=top.png
    python figures.py --kind=table --input=0-base.json,1-base.json   # mean and spread by file name

Needs matplotlib (pip install matplotlib), except for the table.

Read next: compare.py
"""
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import config
from config import UserError
from attention import may_attend

BASE, MIXED, MUTED = "#7f7f7f", "#0b6e4f", "#c8c8c8"


def canvas(columns: int, width: float = 4.2, height: float = 3.2):
    try:
        import matplotlib
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, columns, figsize=(width * columns, height),
                                   layout="constrained", squeeze=False)
    for ax in axes[0]:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def mask(out: str, text_len: int = 5, thought_len: int = 2, n_true: int = 2):
    """Rows attend to columns: the text, then what hangs off each of its positions."""
    figure, (ax,) = canvas(1, 7.2, 7.2)
    tokens = [(j, 0) for j in range(text_len)]
    names = [f"x{j}" for j in range(text_len)]
    branch = ["start", *(f"y{t + 1}" for t in range(thought_len)), "end"]
    for j in range(text_len - 1):
        inner = branch + [f"x{j + a + 1}" for a in range(n_true - 1)]
        tokens += [(j, s + 1) for s in range(len(inner))]
        names += inner
    position, step = torch.tensor(tokens).T
    same = position[:, None] == position[None]
    sees = may_attend((position[:, None], step[:, None]), (position[None], step[None]), same).int()
    colours = sees * (1 + (step[None] > 0).int())
    from matplotlib.colors import ListedColormap
    ax.imshow(colours, cmap=ListedColormap(["#f4f4f4", BASE, MIXED]), interpolation="nearest")
    ax.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    ax.set_yticks(range(len(names)), names, fontsize=7)
    edges = [text_len + (len(branch) + n_true - 1) * j - 0.5 for j in range(text_len)]
    for edge in edges:
        ax.axhline(edge, color="white", linewidth=2)
        ax.axvline(edge, color="white", linewidth=2)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title("each row sees: text up to its position (grey), its own thought so far (green)",
                 fontsize=9, loc="left")
    figure.savefig(out, dpi=130)


def rows(path: str, name: str):
    """Steps and values of one name in a log.jsonl."""
    try:
        lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
        pairs = [(step, row[name]) for step, row in [(r["step"], r) for r in lines] if name in row]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not the log.jsonl of a run: see its --out folder") from None
    return ([step for step, _ in pairs], [value for _, value in pairs])


def smooth(steps, values, window: int = 15):
    """A running mean, shorter at the beginning."""
    total = np.cumsum([0.0, *values])
    first = np.maximum(0, np.arange(len(values)) - window + 1)
    return steps, (total[1:] - total[first]) / (np.arange(len(values)) - first + 1)


def curves(logs: tuple[str, ...], out: str):
    """How a run learnt; further logs are drawn, grey, into the first panel for comparison."""
    figure, (accuracy, nll, reward, weight) = canvas(4, 3.6)
    log = logs[0]
    accuracy.plot(*rows(log, "eval/accuracy/mixed"), color=MIXED, label="thinking")
    accuracy.plot(*rows(log, "eval/accuracy/base"), color=BASE,
                  label="the same model, not thinking")
    for other in logs[1:]:
        accuracy.plot(*rows(other, "eval/accuracy/base"), color=MUTED, linestyle="--",
                      label=Path(other).parent.name)
    accuracy.set(title="held-out accuracy", ylim=(0, 1.02))
    nll.plot(*smooth(*rows(log, "nll/base")), color=BASE, label="base")
    nll.plot(*smooth(*rows(log, "nll/mixed")), color=MIXED, label="mixed")
    nll.set(title="training NLL (nats per token)")
    reward.plot(*smooth(*rows(log, "thought/reward")), color=MIXED)
    reward.axhline(0, color=MUTED, linewidth=0.8)
    reward.set(title="reward (nats per thought)")
    weight.plot(*smooth(*rows(log, "thought/mixing_weight")), color=MIXED, label="mixing weight")
    weight.plot(*smooth(*rows(log, "thought/entropy")), color=BASE,
                label="entropy of thoughts (nats)")
    weight.set(title="mixing weight and entropy")
    for ax in (accuracy, nll, weight):
        ax.legend(frameon=False, fontsize=8)
    for ax in (accuracy, nll, reward, weight):
        ax.set_xlabel("step")
        ax.title.set_fontsize(10)
    figure.savefig(out, dpi=130)


def top(path: str, log: str, out: str):
    """What it does and how it came about: NLL by difficulty, reward and mixing weight by step."""
    bins = evaluated(path, "difficulty")["difficulty"]
    figure, (nll, reward, weight) = canvas(3, 3.9)
    for name, colour, label in (("nll_base", BASE, "without thoughts"),
                                ("nll_mixed", MIXED, "with thoughts")):
        nll.plot(range(1, len(bins) + 1), [row[name] for row in bins], color=colour, marker="o",
                 label=label)
    reward.plot(*smooth(*rows(log, "thought/reward")), color=MIXED)
    weight.plot(*rows(log, "eval/mixing_weight"), color=MIXED)
    nll.set(title="held-out NLL (nats)", xlabel="easiest to hardest tenth for the base")
    reward.set(title="reward in training (nats per thought)", xlabel="step")
    weight.set(title="mixing weight, held-out", xlabel="step", ylim=(0, 1))
    nll.legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=130)


COLUMNS = ("right_base", "right_mixed", "nll_base", "nll_sharp", "nll_mixed", "reasoning_is_right")


def evaluated(path: str, *names: str) -> dict:
    """What eval.py found on texts, with these names in it."""
    try:
        found = json.loads(Path(path).read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict) or not found.keys() >= {"nll_base", *names}:
        raise UserError(f"{path} is not what an evaluation found: eval.py --data --out writes it")
    return found


def runs(paths: tuple[str, ...], *names: str) -> dict[str, list[dict]]:
    """What eval.py found, by file name without the seed in front of it."""
    found = defaultdict(list)
    for path in paths:
        found[re.sub(r"^\d+-", "", Path(path).stem)].append(evaluated(path, *names))
    return found


def table(paths: tuple[str, ...]) -> str:
    """Markdown: a line per file name without its seed; mean of its runs (lowest to highest)."""
    lines = ["| | runs | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, results in runs(paths).items():
        cells = []
        for column in COLUMNS:
            values = [r[column]["mean"] for r in results if column in r]
            spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{spread}" if values else "")
        lines.append(f"| {name} | {len(results)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@dataclass(frozen=True)
class FigureConfig:
    kind: str = ""                    # top | mask | curves | table
    input: tuple[str, ...] = ()       # files, by commas
    out: str = "figure.png"           # picture to write

    def __post_init__(self):
        if self.kind not in ("top", "mask", "curves", "table"):
            raise UserError(f"--kind={self.kind} is none of top, mask, curves, table")
        if self.kind != "mask" and not self.input:
            raise UserError(f"--kind={self.kind} needs --input=FILE[,FILE]")
        if self.kind == "top" and len(self.input) != 2:
            raise UserError("--kind=top needs --input=EVAL_JSON,LOG_JSONL")


def main():
    (cfg,) = config.parse(FigureConfig)
    if cfg.kind == "table":
        print(table(cfg.input))
        return
    if cfg.kind == "mask":
        mask(cfg.out)
    elif cfg.kind == "top":
        top(*cfg.input, cfg.out)
    else:
        curves(cfg.input, cfg.out)
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    config.run(main)
