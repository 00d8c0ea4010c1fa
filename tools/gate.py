"""A gate: think only where that is likely to pay. Fits one, and prints how much gain it keeps.

    python -m tools.gate --checkpoint=out/demo/quiet --data=data/shell_game/without_reasoning
    python sample.py --checkpoint=out/demo/quiet --prompt="..." --think=gate --gate=gate.json

Two scores of the base state are compared: the entropy of its prediction, and the gain that a linear
probe expects, fitted on the training split. One half of the held-out texts sets the thresholds, the
other gives the curves. Left out on purpose: training the gate with the model.
"""
import json
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

import config
from checkpoint import load_for_inference
from config import UserError
from data import TokenFile
from scoring import held_out_texts, score_texts, states_at
from tasks.bootstrap import bootstrap_ci
from thoughts import QuietSTaR, every_position
from tokenizer import load_tokenizer

SHARES = np.arange(1, 21) / 20            # of the positions that think, in the table
HEADER = "  think  from (nats)     gain  95 % interval       of the gain everywhere"
ROW = "{share:7.1%} {threshold:12.4f} {mean:+8.4f}  [{low:+.4f}, {high:+.4f}]  {kept:8.1%}"


@dataclass(frozen=True)
class Gate:
    """Opens where a score of the base state reaches `threshold` (nats): the entropy of the base
    prediction or, if there is a `probe_D`, the gain that this linear probe of the state expects."""
    threshold: float
    probe_D: torch.Tensor | None = None
    bias: float = 0.0

    def score(self, base_RD, logits_RV):
        if self.probe_D is not None:
            return base_RD.float() @ self.probe_D.to(base_RD.device) + self.bias
        entropy_R = torch.special.entr(logits_RV.softmax(-1)).sum(-1)
        return entropy_R.clamp(min=0)     # so that threshold 0 opens everywhere

    def opens(self, base_RD, logits_RV):
        """Return [R] bool. At threshold 0 entropy opens it everywhere, at infinity nowhere."""
        return self.score(base_RD, logits_RV) >= self.threshold


def read_gate(value, quiet):
    """Return a gate from a threshold of the entropy in nats, or from a file that --out wrote."""
    try:
        threshold = float(value)
    except ValueError:
        with config.file_errors():
            found = config.read_json(value, {
                "threshold": float, "bias": float, "probe": [float], "end_thought": [float]})
    else:
        if not threshold >= 0:
            raise UserError(f"--gate={value} is no threshold: give 0 nats or more, or a file")
        return Gate(threshold)
    # the end marker identifies the checkpoint; on a GPU it is rounded to bfloat16
    marker_D = quiet.end_thought.float().cpu()
    own_D = torch.tensor(found["end_thought"])
    probe_D = torch.tensor(found["probe"])
    fits = probe_D.shape == own_D.shape == marker_D.shape
    if not fits or not torch.allclose(own_D, marker_D, rtol=1e-2, atol=1e-4):
        raise UserError(f"{value} is not a gate of this checkpoint: fit one with tools.gate")
    return Gate(float(found["threshold"]), probe_D, float(found["bias"]))


def observe(quiet, tokenizer, cfg, split):
    """Return base_RD, gain_R, entropy_R and text_R of every prediction of the first texts."""
    token_file = TokenFile(cfg.data, split)
    scores = score_texts(quiet, token_file, tokenizer, cfg.texts, cfg.seq_len)
    gain_R = scores["nll_base"] - scores["nll_mixed"]
    ids_BL, valid_BL = held_out_texts(token_file, cfg.texts, cfg.seq_len)
    ids_BL = ids_BL.to(quiet.end_thought.device)
    base_RD, *_ = states_at(quiet, ids_BL, every_position(ids_BL), valid_BL[:, 1:], "none")
    return base_RD.float().cpu(), gain_R, scores["entropy_base"], scores["text"]


def fit_probe(base_RD, gain_R):
    """Fit base state to gain by ridge regression; the gate's threshold stays to be set."""
    mean_D = base_RD.double().mean(0)
    y_R = torch.from_numpy(gain_R)
    x_RD = base_RD - mean_D
    square_DD = x_RD.T @ x_RD
    square_DD.diagonal().add_(1e-3 * square_DD.diagonal().mean())
    probe_D = torch.linalg.solve(square_DD, x_RD.T @ y_R)
    return Gate(0.0, probe_D.float(), float(y_R.mean() - mean_D @ probe_D))


def curve(score_R, gain_R, text_R, tuned_R):
    """Yield the gain (mean, low, high) of thinking at each share, with thresholds of `tuned_R`."""
    for share in SHARES:
        threshold = np.quantile(tuned_R, 1 - share, method="higher")
        opens_R = score_R >= threshold
        gain = bootstrap_ci(np.bincount(text_R, opens_R * gain_R), np.bincount(text_R))
        kept = gain["mean"] / (gain_R.mean() or 1)
        yield dict(gain, share=opens_R.mean(), threshold=threshold, kept=kept)


@dataclass(frozen=True)
class GateConfig:
    checkpoint: str = ""              # folder of the model
    data: str = ""                    # folder that data.py wrote
    share: float = 0.2                # share of the positions at which the written gate opens
    texts: int = 400                  # number of training texts to fit, and of held-out texts
    seq_len: int = 128                # tokens of each text at most
    out: str = "gate.json"            # file to write the probe's gate to, for sample.py --gate
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes a GPU if there is one

    def __post_init__(self):
        config.check_ranges(self, texts=2, seq_len=2)     # half of the texts set the thresholds
        if not (self.checkpoint and self.data and 0 < self.share <= 1):
            raise UserError("--checkpoint and --data are needed, and a --share above 0, at most 1")


def main():
    (cfg,) = config.parse(GateConfig)
    tokenizer = load_tokenizer(cfg.data)
    quiet = load_for_inference(cfg.checkpoint, cfg.device, tokenizer)
    if not isinstance(quiet, QuietSTaR):
        raise UserError(f"{cfg.checkpoint} has no thoughts to gate: train it to think (train.py)")
    probe = fit_probe(*observe(quiet, tokenizer, cfg, "train")[:2])
    base_RD, gain_R, entropy_R, text_R = observe(quiet, tokenizer, cfg, "val")
    probe_R = probe.score(base_RD, None).numpy()
    tunes_R = text_R < text_R.max() / 2
    if not tunes_R.any():
        raise UserError(f"{cfg.data} holds one held-out text, and two are needed")
    for name, score_R in ("entropy", entropy_R), ("probe", probe_R):
        print(f"gate by {name}, {sum(~tunes_R)} held-out tokens\n{HEADER}")
        for point in curve(score_R[~tunes_R], gain_R[~tunes_R], text_R[~tunes_R], score_R[tunes_R]):
            print(ROW.format(**point))
    threshold = np.quantile(probe_R[tunes_R], 1 - cfg.share, method="higher")
    gate = dict(threshold=float(threshold), probe=probe.probe_D.tolist(), bias=probe.bias,
                end_thought=quiet.end_thought.tolist())
    config.write_text(cfg.out, json.dumps(gate))
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    config.run(main)
