"""Runs side by side, from eval.py's json: the controls, the length of thoughts, the hard tokens.

    python compare.py --kind=controls --input=0-base.json,1-base.json,0-thinking.json,... --out=...
    python compare.py --kind=difficulty --input=out/quiet.json --out=difficulty.png

Files of the same name but for the seed in front (SEED-NAME.json, as runs/shell_game.sh names them)
are runs of the same thing: a small dot for each, a large one for their mean, a line from the lowest
to the highest. Three seeds cannot carry a narrower interval. Within a run, intervals are eval.py's:
95 %, over texts.

Needs matplotlib (pip install matplotlib).

Read next: bench.py
"""
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import config
from config import UserError
from eval import BINNED
from tools.figures import BASE, MIXED, MUTED, canvas, runs

CONTROLS = (                              # what is said, whose runs, which of their predictions
    ("base", "base", "base"),
    ("base, temperature_scaled by a temperature", "base", "sharp"),
    ("plain training goes on", "plain", "base"),
    ("the same, temperature_scaled", "plain", "sharp"),
    ("filler tokens, trained alike", "filler", "mixed"),
    ("without REINFORCE", "no-reinforce", "mixed"),
    ("Quiet-STaR, not thinking", "thinking", "base"),
    ("Quiet-STaR, thoughts swapped", "thinking-swapped", "mixed"),
    ("Quiet-STaR, thinking", "thinking", "mixed"))


def dots(ax, place, values, colour, upright: bool):
    """Every run, their mean, and the line from the lowest to the highest."""
    where = [place] * len(values)
    ends, middle = (min(values), max(values)), np.mean(values)
    along = (lambda a, b: (a, b)) if upright else (lambda a, b: (b, a))
    ax.plot(*along([place] * 2, ends), color=colour, linewidth=1.2, alpha=0.6)
    ax.plot(*along(where, values), "o", color=colour, markersize=3, alpha=0.6)
    ax.plot(*along([place], [middle]), "o", color=colour, markersize=7)


def controls(paths: tuple[str, ...], out: str):
    """Accuracy and NLL of each control, and accuracy by the length of the thoughts."""
    found = runs(paths)
    figure, (right, nll, length) = canvas(3, 4.4, 3.6)
    shown = [control for control in CONTROLS if control[1] in found]
    if not shown:
        raise UserError(f"no control among {', '.join(found)}: files are named after "
                         f"{', '.join(dict.fromkeys(name for _, name, _ in CONTROLS))}")
    for place, (_, name, which) in enumerate(reversed(shown)):
        colour = MIXED if (name, which) == ("thinking", "mixed") else BASE
        best = "base" if which == "sharp" else which      # a temperature leaves the best choice
        for ax, key in (right, f"right_{best}"), (nll, f"nll_{which}"):
            dots(ax, place, [r[key]["mean"] for r in found[name]], colour, upright=False)
    for ax, title in (right, "cup right"), (nll, "NLL of the answer (nats)"):
        ax.set_yticks(range(len(shown)), [label for label, *_ in reversed(shown)], fontsize=8)
        ax.grid(axis="x", color=MUTED, linewidth=0.4)
        ax.set_title(title, fontsize=10)
    nll.set_yticklabels([])
    lengths(length, found)
    figure.savefig(out, dpi=130)


def lengths(ax, found: dict[str, list[dict]]):
    """Models trained with thoughts of each length, and one model given other lengths than its own.
    """
    trained = {len_of(found[name]): [r["right_mixed"]["mean"] for r in found[name]]
               for name in found if name == "thinking" or name[:10] == "thinking-T"}
    for n in sorted(trained):
        dots(ax, n, trained[n], MIXED, upright=True)
    ax.plot(sorted(trained), [np.mean(trained[n]) for n in sorted(trained)], color=MIXED,
            label="trained with this length")
    swept = [r["sweep"] for r in found.get("thinking", []) if "sweep" in r]
    if swept:
        x = [row["thought_len"] for row in swept[0]]
        values = np.array([[row["right_mixed"]["mean"] for row in sweep] for sweep in swept])
        ax.plot(x, values.mean(0), color=BASE, linestyle="--", marker="o", markersize=3,
                label=f"trained with {len_of(found['thinking'])}, given this length")
    ax.set_title("cup right, by tokens in a thought", fontsize=10)
    ax.set_xlabel("thought_len")
    ax.legend(frameon=False, fontsize=8)


def len_of(results: list[dict]) -> int:
    return results[0]["thought_len"]


def difficulty(paths: tuple[str, ...], out: str):
    """Nats gained by thinking, in tenths of the tokens by three measures; a line for each run.

    By NLL a gain must rise somewhat: what was hard by bad luck is in the last tenths. Entropy does
    not look at the token, and knows nothing of luck.
    """
    figure, axes = canvas(3, 4.0, 3.2)
    titles = {"nll_base": "NLL without thoughts (nats)", "mixing_weight": "mixing weight",
              "entropy_base": "entropy without thoughts (nats)"}
    for ax, (name, by) in zip(axes, BINNED.items()):
        for path, marker in zip(paths, "os^v<>DPX*" * len(paths)):
            (result,), = runs((path,), name).values()
            rows = result[name]
            mean = np.array([row["nll_base"] - row["nll_mixed"] for row in rows])
            low, high = np.array([row["interval_gain"] for row in rows]).T
            ax.errorbar([row[by] for row in rows], mean, yerr=(mean - low, high - mean), capsize=2,
                        color=MIXED, ecolor=MUTED, marker=marker, markersize=4, linewidth=1,
                        alpha=0.8, label=re.sub(r"^(\d+)-(.*)", r"\2, seed \1", Path(path).stem))
        ax.axhline(0, color=BASE, linewidth=0.8)
        ax.set_xlabel(titles[by] + ", mean of each tenth")
    axes[0].set_ylabel("nats gained by thinking, 95 %")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=130)


@dataclass(frozen=True)
class CompareConfig:
    kind: str = ""                    # controls | difficulty
    input: tuple[str, ...] = ()       # eval.py's json files, by commas
    out: str = "figure.png"           # picture to write

    def __post_init__(self):
        if self.kind not in ("controls", "difficulty") or not self.input:
            raise UserError(f"--kind={self.kind} --input={','.join(self.input)}: a kind is one of "
                             "controls, difficulty, and needs --input=FILE[,FILE]")


def main():
    (cfg,) = config.parse(CompareConfig)
    (controls if cfg.kind == "controls" else difficulty)(cfg.input, cfg.out)
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    config.run(main)
