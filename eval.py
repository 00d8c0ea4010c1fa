"""Does thinking help? Held-out likelihood and accuracy, with and without, easy to hard tokens.

    python eval.py --checkpoint=out/quiet --data=data/gsm8k --texts=100
    python eval.py --checkpoint=out/quiet --data=data/shell_game/silent --thoughts=swapped

Every scored token is predicted twice by the same model: by the base state, and by that state mixed
with the one after a single greedy thought (a true argmax) at that position. Only scored positions
think. Intervals are 95 % bootstrap intervals over whole texts, because tokens of one text are not
independent. On the shell game the scored tokens are the hidden answers, chosen among the five cups.

Left out on purpose: evaluating over several processes, and tasks with a format of their own.

Read next: weights.py
"""
import json
from dataclasses import dataclass, fields

import numpy as np
import torch

import config
import data
import shell_game
import tokenizer as tokenizers
import weights
from model import CausalContext
from thoughts import QuietSTaR, base_at

N_BINS = 10                               # of base difficulty, equally many tokens in each
N_BOOTSTRAP = 1000


@dataclass
class Scores:
    """One entry per scored token. Without thoughts the mixed ones repeat the base ones."""
    text: np.ndarray                      # which text it is in
    nll_base: np.ndarray                  # nats
    nll_mixed: np.ndarray                 # nats
    right_base: np.ndarray                # is the likeliest token (of the choices) the true one
    right_mixed: np.ndarray
    mixing_weight: np.ndarray
    thought: np.ndarray                   # [tokens, T] ids

    @property
    def gain(self) -> np.ndarray:         # nats by which thinking helped
        return self.nll_base - self.nll_mixed

    def mean(self, name: str) -> float:
        return float(getattr(self, name).mean())

    def interval(self, name: str, where=slice(None)) -> tuple[float, float]:
        """95 % interval of the mean over tokens, resampling texts."""
        text, value = self.text[where], getattr(self, name)[where].astype(float)
        total, count = np.bincount(text, value), np.bincount(text)
        total, count = total[count > 0], count[count > 0]
        equal = np.full(len(count), 1 / len(count))
        draws = np.random.default_rng(0).multinomial(len(count), equal, size=N_BOOTSTRAP)
        return tuple(np.percentile(draws @ total / (draws @ count), (2.5, 97.5)))


def pack_positions(where_BL):
    """Each text's chosen positions, [B, P], and which are real: shorter rows repeat their first."""
    count_B1 = where_BL.sum(1, keepdim=True)
    order_BL = where_BL.int().argsort(dim=1, descending=True, stable=True)
    order_BP = order_BL[:, :max(1, int(count_B1.max()))]
    real_BP = torch.arange(order_BP.shape[1], device=where_BL.device) < count_B1
    return torch.where(real_BP, order_BP, order_BP[:, :1]), real_BP


def nll_and_right(hidden_RD, head_VD, target_R, choices):
    """-log p of the target among all tokens (nats), and whether it is the best of the `choices`."""
    nll, right = [], []
    for hidden_rD, target_r in zip(hidden_RD.split(1024), target_R.split(1024)):
        logits_rV = torch.nn.functional.linear(hidden_rD, head_VD.to(hidden_rD.dtype)).float()
        nll.append(torch.nn.functional.cross_entropy(logits_rV, target_r, reduction="none"))
        best_r = (logits_rV.argmax(-1) if choices is None else
                  choices[logits_rV[:, choices].argmax(-1)])
        right.append(best_r == target_r)
    return torch.cat(nll).cpu().numpy(), torch.cat(right).cpu().numpy()


@torch.no_grad()
def score(objective, ids_BL, where_BL, choices=None, thoughts: str = "own") -> Scores:
    """Score the tokens that follow the positions `where_BL`.

    `thoughts`: own | swapped (every position is given the thought of another, for the same model) |
    none. `objective` is a QuietSTaR, or anything with a `.model`, which then predicts alone.
    """
    position_BP, real_BP = pack_positions(where_BL)
    target_R = ids_BL.gather(1, position_BP + 1)[real_BP]
    text_R = torch.arange(len(ids_BL), device=ids_BL.device)[:, None].expand_as(real_BP)[real_BP]
    head_VD = objective.model.head.weight
    if thoughts == "none" or not isinstance(objective, QuietSTaR):
        every_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device).expand_as(ids_BL)
        hidden_BLD = objective.model(ids_BL, CausalContext(every_BL))
        base_RD = base_at(hidden_BLD, position_BP, 1)[:, :, 0][real_BP]
        nll, right = nll_and_right(base_RD, head_VD, target_R, choices)
        return Scores(text_R.cpu().numpy(), nll, nll, right, right, nll * 0,
                      np.zeros((len(nll), 0), dtype=np.int64))
    base_BPD, mixed_BNPD, weight_BNP, thought_BNPT = objective.predict(ids_BL, position_BP)
    if thoughts == "swapped":
        thought_RT = thought_BNPT[:, 0][real_BP]
        shuffled_R = torch.randperm(len(thought_RT), generator=torch.Generator().manual_seed(0))
        given_RT = torch.empty_like(thought_RT)
        given_RT[shuffled_R] = thought_RT[shuffled_R.roll(1)]
        thought_BNPT[real_BP[:, None]] = given_RT
        _, mixed_BNPD, weight_BNP, _ = objective.predict(ids_BL, position_BP,
                                                         thought_BNPT=thought_BNPT)
    base = nll_and_right(base_BPD[real_BP], head_VD, target_R, choices)
    mixed = nll_and_right(mixed_BNPD[:, 0][real_BP], head_VD, target_R, choices)
    weight_R, thought_RT = weight_BNP[:, 0][real_BP].float(), thought_BNPT[:, 0][real_BP]
    return Scores(text_R.cpu().numpy(), base[0], mixed[0], base[1], mixed[1],
                  weight_R.cpu().numpy(), thought_RT.cpu().numpy())


def held_out_texts(token_file, n_texts: int, length: int):
    """The first documents of a split, cut at `length` tokens: ids_BL, valid_BL."""
    docs = [token_file.document(i)[:length] for i in range(min(n_texts, token_file.n_docs))]
    if not docs:
        raise ValueError(f"{token_file.path} holds no document to evaluate on: raise --val_share")
    width = max(2, max(len(doc) for doc in docs))
    ids_BL = torch.zeros(len(docs), width, dtype=torch.long)
    for row, doc in enumerate(docs):
        ids_BL[row, :len(doc)] = torch.as_tensor(doc)
    return ids_BL, torch.arange(width) < torch.tensor([len(doc) for doc in docs])[:, None]


def score_texts(objective, token_file, tokenizer, n_texts: int, length: int, thoughts: str = "own",
                batch: int = 64):
    """Scores of held-out documents: every next token, or the shell game's hidden answers."""
    ids_BL, valid_BL = held_out_texts(token_file, n_texts, length)
    where_BL = valid_BL.roll(-1, dims=1)
    where_BL[:, -1] = False
    choices, device = None, objective.model.embed.weight.device
    if shell_game.plays(tokenizer):
        where_BL &= shell_game.answer_positions(ids_BL, tokenizer)
        choices = torch.tensor(tokenizer.encode(" ".join(shell_game.CUPS)), device=device)
        batch = 1024                                                # one position in each text
    parts = [score(objective, ids.to(device), where.to(device), choices, thoughts)
             for ids, where in zip(ids_BL.split(batch), where_BL.split(batch)) if where.any()]
    for number, part in enumerate(parts):
        part.text = part.text + number * batch
    return Scores(*(np.concatenate([getattr(part, field.name) for part in parts])
                    for field in fields(Scores)))


def held_out(objective, token_file, tokenizer, n_texts: int, length: int) -> dict[str, float]:
    """Means for the training log."""
    scores = score_texts(objective, token_file, tokenizer, n_texts, length)
    names = {"nll/base": "nll_base", "nll/mixed": "nll_mixed", "accuracy/base": "right_base",
             "accuracy/mixed": "right_mixed", "mixing_weight": "mixing_weight"}
    if not isinstance(objective, QuietSTaR):
        names = {"nll/base": "nll_base", "accuracy/base": "right_base"}
    return {key: scores.mean(name) for key, name in names.items()}


def by_difficulty(scores: Scores) -> list[dict]:
    """Bins of equally many tokens, from those that the base finds easiest to the hardest."""
    order = np.argsort(scores.nll_base, kind="stable")
    bins = [part for part in np.array_split(order, N_BINS) if len(part)]
    return [dict(tokens=len(part), nll_base=float(scores.nll_base[part].mean()),
                 nll_mixed=float(scores.nll_mixed[part].mean()),
                 interval_gain=scores.interval("gain", part),
                 mixing_weight=float(scores.mixing_weight[part].mean())) for part in bins]


@dataclass(frozen=True)
class EvalConfig:
    checkpoint: str = ""                  # folder
    data: str = ""                        # folder that data.py wrote
    split: str = "val"                    # train | val
    texts: int = 200                      # documents
    length: int = 256                     # tokens of each at most
    thoughts: str = "own"                 # own | swapped | none
    batch: int = 16                       # texts at once
    out: str = ""                         # write the numbers here too, as json
    device: str = "auto"                  # auto | cpu | cuda

    def __post_init__(self):
        if not self.checkpoint or not self.data:
            raise ValueError("--checkpoint=FOLDER and --data=FOLDER are needed")
        if self.thoughts not in ("own", "swapped", "none"):
            raise ValueError(f"--thoughts={self.thoughts} is not one of own, swapped, none")


def main():
    (cfg,) = config.parse(EvalConfig)
    tokenizer, token_file = tokenizers.load(cfg.data), data.TokenFile(cfg.data, cfg.split)
    objective = weights.load_objective(cfg.checkpoint, cfg.device, tokenizer)
    scores = score_texts(objective, token_file, tokenizer, cfg.texts, cfg.length, cfg.thoughts,
                         cfg.batch)
    result = dict(tokens=len(scores.text), thoughts=cfg.thoughts)
    n_texts = len(np.unique(scores.text))
    print(f"{len(scores.text)} tokens of {n_texts} texts, thoughts: {cfg.thoughts}")
    for name in ("nll_base", "nll_mixed", "gain", "right_base", "right_mixed"):
        low, high = scores.interval(name)
        result[name] = dict(mean=scores.mean(name), low=low, high=high)
        print(f"{name:12s} {scores.mean(name):+.4f}  [{low:+.4f}, {high:+.4f}]")
    if shell_game.plays(tokenizer) and scores.thought.shape[1]:
        share = np.mean([shell_game.working_is_right(token_file.document(i), thought, tokenizer)
                         for i, thought in zip(scores.text, scores.thought)])
        result["working_is_right"] = dict(mean=float(share))
        print(f"thoughts that are the text's own kind of working, and right: {share:.3f}")
    result["difficulty"] = by_difficulty(scores)
    print("\nfrom the base's easiest tokens to its hardest")
    print("  tokens  base nll  mixed nll   gain  weight")
    for row in result["difficulty"]:
        print(f"{row['tokens']:8d} {row['nll_base']:9.3f} {row['nll_mixed']:10.3f} "
              f"{row['nll_base'] - row['nll_mixed']:+6.3f} {row['mixing_weight']:+7.3f}")
    if cfg.out:
        weights.write_atomically(cfg.out, lambda path: path.write_text(json.dumps(result)))


if __name__ == "__main__":
    config.run(main)
