"""Where thinking pays: a gate that opens at a given share of the positions, and what it keeps.

    python gate.py --checkpoint=out/demo/quiet --data=data/shell_game/silent --out=out/gate.json
    python sample.py --checkpoint=out/demo/quiet --prompt="..." --think=gate --gate=out/gate.json

A gate sees the base state alone, before any thought is spent. Two scores are compared: the entropy
of the base prediction, and the gain that a linear probe of the base state expects. The probe is
fitted (ridge regression) on texts of the training split; thresholds come from one half of the
held-out texts, and the curve, gain against share of positions that think, from the other half.

Entropy cannot tell what nobody could know from what a thought could work out; a probe can.

Left out on purpose: training the gate with the model, and probes with hidden layers.

Read next: eval.py
"""
import json
from dataclasses import dataclass

import numpy as np
import torch

import config
import data
from config import UserError
from tools import figures
import tokenizer as tokenizers
import weights
from eval import Scores, held_out_texts
from inference import Gate
from lm_head import chunk_rows
from thoughts import QuietSTaR, logits_without_markers

SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)   # of the positions, in the table


@dataclass
class Positions:
    """Every prediction of some texts: what a gate may see, and what thinking there would bring."""
    base_RD: torch.Tensor                 # states
    entropy_R: np.ndarray                 # of the base predictions, nats
    nll_base_R: np.ndarray                # of the true next token, nats
    nll_mixed_R: np.ndarray
    text_R: np.ndarray                    # which text it is in

    def gated(self, thinks_R) -> Scores:
        """The scores if only these positions think."""
        nll_R, none_R = np.where(thinks_R, self.nll_mixed_R, self.nll_base_R), self.text_R * 0
        return Scores(text=self.text_R, nll_base=self.nll_base_R, nll_mixed=nll_R,
                      right_base=none_R, right_mixed=none_R, mixing_weight=none_R,
                      thought=none_R[:, None])


@torch.no_grad()
def observe(quiet: QuietSTaR, token_file, texts: slice, length: int, batch: int = 32) -> Positions:
    """Think greedily at every position of the chosen documents."""
    ids_BL, valid_BL = (t[texts] for t in held_out_texts(token_file, texts.stop, length))
    found, device = [], quiet.model.embed.weight.device
    for start in range(0, len(ids_BL), batch):
        ids, scored = ids_BL[start:start + batch].to(device), valid_BL[start:start + batch, 1:]
        base_BPD, mixed_BNPD, _, _ = quiet.predict(ids)
        scored = scored.to(device)
        base_RD, mixed_RD = base_BPD[:, :-1][scored], mixed_BNPD[:, 0, :-1][scored]
        target_R1 = ids[:, 1:][scored][:, None]
        text_R = torch.arange(start, start + len(ids), device=device)[:, None]
        n_rows = chunk_rows(quiet.model.head.weight)
        for base, mixed, target, text in zip(*(t.split(n_rows) for t in (
                base_RD, mixed_RD, target_R1, text_R.expand_as(scored)[scored]))):
            logits = logits_without_markers(quiet, base)
            logp, logp_mixed = (x.log_softmax(-1).gather(1, target)[:, 0]
                                for x in (logits, logits_without_markers(quiet, mixed)))
            found.append((base.float(), Gate(0).score(base, logits), -logp, -logp_mixed, text))
    base_RD, *rest = map(torch.cat, zip(*found))
    return Positions(base_RD.cpu(), *(t.float().cpu().numpy() for t in rest[:-1]),
                     rest[-1].cpu().numpy())


def fit_probe(seen: Positions, ridge: float = 1e-3) -> Gate:
    """Least squares from base state to gain; `ridge` in units of the states' mean variance."""
    x_RD, y_R = seen.base_RD.double(), torch.from_numpy(seen.nll_base_R - seen.nll_mixed_R).double()
    mean_D, mean = x_RD.mean(0), y_R.mean()
    x_RD = x_RD - mean_D
    square_DD = x_RD.T @ x_RD
    square_DD.diagonal().add_(ridge * square_DD.diagonal().mean())
    probe_D = torch.linalg.solve(square_DD, x_RD.T @ (y_R - mean))
    return Gate(0.0, probe_D.float(), float(mean - mean_D @ probe_D))


def threshold(score_R, share: float) -> float:
    """The score that this share of the positions reaches: at least one, and all at share 1."""
    return float(np.sort(score_R)[len(score_R) - max(1, round(share * len(score_R)))])


def curve(score_R, seen: Positions, tuned_R) -> list[dict]:
    """For each share, the threshold that `tuned_R` gives it, and what that keeps of the gain."""
    full, points = seen.gated(True).mean("gain"), []
    for share in SHARES:
        limit = threshold(tuned_R, share)
        thinks_R = score_R >= limit
        scores = seen.gated(thinks_R)
        gain = scores.mean("gain")
        points.append(dict(share=float(thinks_R.mean()), threshold=limit, gain=gain,
                           interval=scores.interval("gain"), kept=gain / (full or 1)))
    return points


def draw(curves: dict[str, list[dict]], title: str, out: str):
    """Gain against share of positions that think; the dashed line is thinking at random places."""
    figure, (ax,) = figures.canvas(1)
    for (name, points), colour in zip(curves.items(), (figures.BASE, figures.MIXED)):
        share, gain = ([0, *(point[key] for point in points)] for key in ("share", "gain"))
        low, high = np.array([(0, 0), *(point["interval"] for point in points)]).T
        ax.fill_between(share, low, high, color=colour, alpha=0.15, linewidth=0)
        ax.plot(share, gain, color=colour, marker=".", label=f"gate by {name}")
    ax.plot((0, 1), (0, gain[-1]), color=figures.MUTED, linestyle="--", label="at random")
    ax.set(title=title, xlabel="share of positions that think", ylabel="gain (nats per token)")
    ax.title.set_fontsize(10)
    ax.legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=130)


@dataclass(frozen=True)
class GateConfig:
    checkpoint: str = ""              # folder
    data: str = ""                    # folder that data.py wrote
    share: float = 0.2                # of the positions, that the written gate opens at
    texts: int = 400                  # training documents to fit, and as many held-out ones
    seq_len: int = 128                 # tokens of each at most
    out: str = ""                     # write the probe's gate here, for sample.py --gate
    figure: str = ""                  # draw the curves here
    device: str = "auto"              # auto | cpu | cuda

    def __post_init__(self):
        if not self.checkpoint or not self.data:
            raise UserError("--checkpoint=FOLDER and --data=FOLDER are needed")
        if not 0 < self.share <= 1:
            raise UserError(f"--share={self.share} is not above 0 and at most 1")
        if self.texts < 2:
            raise UserError(f"--texts={self.texts} is below 2: half of them choose thresholds")


def main():
    (cfg,) = config.parse(GateConfig)
    tokenizer = tokenizers.load(cfg.data)
    quiet = weights.load_objective(cfg.checkpoint, cfg.device, tokenizer)
    if not isinstance(quiet, QuietSTaR):
        raise UserError(f"{cfg.checkpoint} has no thoughts to gate: train it to think (train.py)")
    train, val = (data.TokenFile(cfg.data, split) for split in ("train", "val"))
    n = min(cfg.texts, val.n_docs)
    fitted = observe(quiet, train, slice(0, min(cfg.texts, train.n_docs)), cfg.seq_len)
    tuned = observe(quiet, val, slice(0, n // 2), cfg.seq_len)
    seen = observe(quiet, val, slice(n // 2, n), cfg.seq_len)
    probe, curves = fit_probe(fitted), {}
    for name, gate in (("entropy", None), ("probe", probe)):
        tuned_R, score_R = (p.entropy_R if gate is None else gate.score(p.base_RD, None).numpy()
                            for p in (tuned, seen))
        curves[name] = curve(score_R, seen, tuned_R)
        limit = threshold(tuned_R, cfg.share)
        print(f"gate by {name}, {len(score_R)} held-out tokens; the {cfg.share:.0%} of the "
              f"positions are those from {limit:.4f} nats on")
        print("  think  from (nats)     gain  95 % interval       of the gain everywhere (if any)")
        for p in curves[name]:
            kept = f"{p['kept']:8.1%}" if curves[name][-1]["interval"][0] > 0 else "-"
            print(f"{p['share']:7.1%} {p['threshold']:12.4f} {p['gain']:+8.4f}  "
                  f"[{p['interval'][0]:+.4f}, {p['interval'][1]:+.4f}]  {kept}")
        print()
    if cfg.out:
        gate = dict(threshold=limit, probe=probe.probe_D.tolist(), bias=probe.bias,
                    end_thought=quiet.end_thought.tolist())         # whose it is
        weights.atomic_write(cfg.out, lambda path: path.write_text(json.dumps(gate)))
        print(f"wrote {cfg.out}")
    if cfg.figure:
        draw(curves, cfg.checkpoint, cfg.figure)
        print(f"wrote {cfg.figure}")


if __name__ == "__main__":
    config.run(main)
