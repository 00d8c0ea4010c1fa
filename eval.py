"""Does thinking help? The same text predicted with and without, and what else could explain it.

    python eval.py --checkpoint=out/quiet --data=data/gsm8k --texts=100
    python eval.py --checkpoint=out/quiet --data=data/shell_game/silent --thoughts=swapped
    python eval.py --checkpoint=out/quiet --task=gsm8k --file=gsm8k_test.jsonl
    python eval.py --checkpoint=out/quiet --task=gsm8k --file=gsm8k_test.jsonl --votes=8 --limit=128
    torchrun --nproc_per_node=8 eval.py ... --against=out/plain/gsm8k.json

Every scored token is predicted twice by the same model: by the base state, and by that state mixed
with the one after a single greedy thought at that position; only scored positions think. They are
the next tokens of a token file (on the shell game the hidden answers, among the five cups), or the
answers of a task (tasks.py, ask.py). The controls stand on the same footing: the base temperature_scaled by
a temperature is in every table; swapped thoughts are --thoughts=swapped; further training without
thoughts and filler tokens are other checkpoints, and --against compares any two results pair by
pair (evidence.py).

Left out on purpose: tasks with formats of their own (harness.py), averages over seeds (compare.py).

Read next: predict.py
"""
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from config import UserError
from tasks import ask
import config
import data
import distributed as parallel
from tasks import shell_game
from tasks import qa as tasks
import tokenizer as tokenizers
import weights
from tasks.bootstrap import TEMPERATURES, Progress, cell, compare, interval, temperature_scaled, summary, table
from predict import pack_positions, states, thinks
from thoughts import QuietSTaR, logits_without_markers

BINNED = dict(difficulty="nll_base", by_entropy="entropy_base", by_weight="mixing_weight")
N_BINS = 10                               # equally many tokens in each
ALONE = parallel.Place(0, 1, torch.device("cpu"))


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
    entropy_base: np.ndarray | None = None  # nats
    nll_at: np.ndarray | None = None      # [tokens, temperatures] of the base, nats

    @property
    def gain(self) -> np.ndarray:         # nats by which thinking helped
        return self.nll_base - self.nll_mixed

    def mean(self, name: str) -> float:
        return float(getattr(self, name).mean())

    def interval(self, name: str, where=slice(None)) -> tuple[float, float]:
        """95 % interval of the mean over tokens, resampling texts."""
        text = np.unique(self.text[where], return_inverse=True)[1]
        found = interval(np.bincount(text, getattr(self, name)[where]), np.bincount(text))
        return found["low"], found["high"]

    def units(self) -> dict[str, np.ndarray]:
        """Each text's sums, under the names of the tables, and how many tokens were added up."""
        nll_sharp, self.temperatures = temperature_scaled(self.nll_at, self.text, least=True)
        values = {name: getattr(self, name) for name in
                  ("nll_base", "nll_mixed", "right_base", "right_mixed", "mixing_weight")}
        values |= dict(nll_sharp=nll_sharp, count=np.ones(len(self.text)))
        count = np.bincount(self.text)
        return {name: np.bincount(self.text, values[name])[count > 0] for name in values}


@torch.no_grad()
def grade(objective, hidden_RD, target_R, choices, temperatures=()):
    """Of the target: -log p among all tokens (nats), whether it is the best of the `choices`, the
    entropy of what was predicted, and -log p at each temperature, [R, K]."""
    found = []
    for hidden_rD, target_r in zip(hidden_RD.split(1024), target_R.split(1024)):
        logits_rV = logits_without_markers(objective, hidden_rD)
        at_r1 = logits_rV.gather(1, target_r[:, None])
        logp_rV = logits_rV.log_softmax(-1)
        best_r = (logits_rV.argmax(-1) if choices is None else
                  choices[logits_rV[:, choices].argmax(-1)])
        nll_rK = [(logits_rV / t).logsumexp(-1, keepdim=True) - at_r1 / t for t in temperatures]
        found.append((-logp_rV.gather(1, target_r[:, None])[:, 0], best_r == target_r,
                      torch.special.entr(logp_rV.exp()).sum(-1),
                      torch.cat(nll_rK, dim=1) if nll_rK else at_r1[:, :0]))
    return [torch.cat(parts).cpu().numpy() for parts in zip(*found)]


@torch.no_grad()
def score(objective, ids_BL, where_BL, choices=None, thoughts="own", temperatures=()) -> Scores:
    """Score the tokens that follow the positions `where_BL`; `thoughts` as in `states`."""
    position_BP, real_BP = pack_positions(where_BL)
    target_R = ids_BL.gather(1, position_BP + 1)[real_BP]
    text_R = torch.arange(len(ids_BL), device=ids_BL.device)[:, None].expand_as(real_BP)[real_BP]
    base_RD, mixed_RD, weight_R, thought_RT = states(objective, ids_BL, position_BP, real_BP,
                                                     thoughts)
    nll, right, entropy, nll_at = grade(objective, base_RD, target_R, choices, temperatures)
    mixed = (nll, right) if mixed_RD is base_RD else grade(objective, mixed_RD, target_R, choices)
    return Scores(text_R.cpu().numpy(), nll, mixed[0], right, mixed[1],
                  weight_R.float().cpu().numpy(), thought_RT.cpu().numpy(), entropy, nll_at)


def held_out_texts(token_file, n_texts: int, length: int):
    """The first documents of a split, cut at `length` tokens: ids_BL, valid_BL."""
    docs = [token_file.document(i)[:length] for i in range(min(n_texts, token_file.n_docs))]
    if not docs:
        raise UserError(f"{token_file.path} holds no document to evaluate on: raise --val_share")
    width = max(2, max(len(doc) for doc in docs))
    ids_BL = torch.zeros(len(docs), width, dtype=torch.long)
    for row, doc in enumerate(docs):
        ids_BL[row, :len(doc)] = torch.as_tensor(doc)
    return ids_BL, torch.arange(width) < torch.tensor([len(doc) for doc in docs])[:, None]


def score_texts(objective, token_file, tokenizer, n_texts: int, length: int, thoughts: str = "own",
                batch: int = 64, place: parallel.Place = ALONE, tell: bool = True,
                temperatures=()) -> Scores:
    """Scores of held-out documents: every next token, or the shell game's hidden answers.

    Texts of like length share a batch, the longest first; the ranks of `place` share the batches.
    """
    ids_BL, valid_BL = held_out_texts(token_file, n_texts, length)
    where_BL, length_B = torch.nn.functional.pad(valid_BL[:, 1:], (0, 1)), valid_BL.sum(1)
    choices, device = None, objective.model.embed.weight.device
    if shell_game.plays(tokenizer):
        where_BL &= shell_game.answer_positions(ids_BL, tokenizer)
        choices = torch.tensor(tokenizer.encode(" ".join(shell_game.CUPS)), device=device)
        batch = 1024                                                # one position in each text
    order_B = length_B.argsort(descending=True, stable=True)
    chunks = [rows for rows in order_B.split(batch) if where_BL[rows].any()]
    if not chunks:
        raise UserError(f"{token_file.path}: the first {n_texts} texts hold nothing to score")
    progress, parts = Progress(int(where_BL.sum()), "scoring tokens", place, tell), []
    for rows in chunks[place.rank::place.world]:
        width = max(2, int(length_B[rows[0]]))
        part = score(objective, ids_BL[rows, :width].to(device), where_BL[rows, :width].to(device),
                     choices, thoughts, temperatures)
        part.text = rows.numpy()[part.text]
        parts.append(part)
        progress(len(part.text) * place.world)
    n_thought = objective.config.thought_len if thinks(objective, thoughts) else 0
    return gathered(parts, where_BL, dict(nll_at=(len(temperatures),), thought=(n_thought,)), place)


def gathered(parts: list[Scores], where_BL, shape: dict, place: parallel.Place) -> Scores:
    """All ranks' scores on all ranks, in the texts' order: each rank adds its own to zeros."""
    first_B = np.concatenate(([0], np.cumsum(where_BL.sum(1).numpy())))
    whole = {}
    for field in fields(Scores):
        value = torch.zeros(int(first_B[-1]), *shape.get(field.name, ()), dtype=torch.float64)
        for part in parts:
            n, starts = len(part.text), np.flatnonzero(np.diff(part.text, prepend=-1))
            nth = np.arange(n) - np.repeat(starts, np.diff(starts, append=n))   # in its own text
            value[first_B[part.text] + nth] = torch.from_numpy(getattr(part, field.name)).double()
        value = parallel.total(value.to(place.device)) if place.world > 1 else value
        whole[field.name] = value.cpu().numpy()
    return Scores(**{name: value.astype(np.int64) if name in ("text", "thought") else value
                     for name, value in whole.items()})


def held_out(objective, token_file, tokenizer, n_texts: int, length: int) -> dict[str, float]:
    """Means for the training log."""
    scores = score_texts(objective, token_file, tokenizer, n_texts, length, tell=False)
    names = {"nll/base": "nll_base", "nll/mixed": "nll_mixed", "accuracy/base": "right_base",
             "accuracy/mixed": "right_mixed", "mixing_weight": "mixing_weight"}
    if not isinstance(objective, QuietSTaR):
        names = {"nll/base": "nll_base", "accuracy/base": "right_base"}
    return {key: scores.mean(name) for key, name in names.items()}


def bins(scores: Scores, by: str) -> list[dict]:
    """Bins of equally many tokens, from the least to the greatest `by`, a name of Scores."""
    order = np.argsort(getattr(scores, by), kind="stable")
    names = ("nll_base", "nll_mixed", "entropy_base", "mixing_weight")
    return [dict(tokens=len(part), interval_gain=scores.interval("gain", part),
                 **{name: float(getattr(scores, name)[part].mean()) for name in names})
            for part in np.array_split(order, N_BINS) if len(part)]


@dataclass(frozen=True)
class EvalConfig:
    checkpoint: str = ""                  # folder
    data: str = ""                        # folder that data.py wrote: score the next tokens of it
    split: str = "val"                    # train | val
    texts: int = 200                      # documents
    seq_len: int = 256                     # tokens of each at most
    task: str = ""                        # gsm8k | commonsense_qa: ask the questions of --file
    file: str = ""                        # .jsonl, .jsonl.gz or .parquet, as published
    limit: int = 0                        # questions, drawn as the official code draws its 128
    votes: int = 0                        # chains of thought for each question; 0 asks directly
    temperature: float = 0.9              # of the visible tokens of a vote; the official code's
    max_new_tokens: int = 384                    # tokens of a chain of thought; the official code's
    seed: int = 0                         # of the votes
    thoughts: str = "own"                 # own | swapped | none
    thought_len: tuple[int, ...] = ()     # instead of the trained one; several: a sweep over --data
    batch_size: int = 16                       # texts at once
    against: str = ""                     # json of another run on the same: paired differences
    out: str = ""                         # json to write; default for a task: CHECKPOINT/TASK.json
    device: str = "auto"                  # auto | cpu | cuda

    def __post_init__(self):
        if not self.checkpoint or not (self.data or self.task):
            raise UserError("--checkpoint=FOLDER and --data=FOLDER (or --task and --file) are "
                             "needed")
        if self.task and (self.task not in tasks.TASKS or not self.file):
            raise UserError(f"--task={self.task} --file={self.file}: a task is one of "
                             f"{', '.join(tasks.TASKS)}, and its questions are in --file=FILE")
        if self.thoughts not in ("own", "swapped", "none"):
            raise UserError(f"--thoughts={self.thoughts} is not one of own, swapped, none")
        if self.votes and self.thoughts == "swapped":
            raise UserError("--votes with --thoughts=swapped: text being written has none")
        if self.against and not Path(self.against).is_file():
            raise UserError(f"--against={self.against} is not there: name the json of another run")
        if self.task and len(self.thought_len) > 1:
            raise UserError(f"--thought_len={self.thought_len} sweeps over --data; a task takes "
                             "one length")
        config.check_at_least(self, texts=1, seq_len=2, limit=0, votes=0, temperature=0, max_new_tokens=1, seed=0,
                        batch_size=1)

    @property
    def name(self) -> str:
        """Of a task's json when --out does not say."""
        return "-".join([self.task] + [f"votes{self.votes}"] * (self.votes > 0)
                        + [self.thoughts] * (self.thoughts != "own")
                        + [f"T{length}" for length in self.thought_len])


def score_data(objective, tokenizer, cfg: EvalConfig, place) -> dict:
    """The tokens of cfg.data: means, bins and, if asked for, the sweep over lengths of thoughts."""
    token_file = data.TokenFile(cfg.data, cfg.split)

    def measure() -> Scores:
        return score_texts(objective, token_file, tokenizer, cfg.texts, cfg.seq_len, cfg.thoughts,
                           cfg.batch_size, place, temperatures=TEMPERATURES)
    scores = measure()
    units = scores.units()
    of = dict(sources=token_file.meta["sources"], tokenizer=tokenizer.sha256, split=cfg.split,
              texts=cfg.texts, length=cfg.seq_len)
    result = dict(of=of, tokens=len(scores.text), thoughts=cfg.thoughts, units=units,
                  thought_len=scores.thought.shape[1], temperatures=dict(nll=scores.temperatures),
                  **{name: bins(scores, by) for name, by in BINNED.items()})
    if shell_game.plays(tokenizer) and scores.thought.shape[1]:
        right = [shell_game.reasoning_is_right(token_file.document(i), thought, tokenizer)
                 for i, thought in zip(scores.text, scores.thought)]
        units["reasoning_is_right"] = np.bincount(scores.text, right)[np.bincount(scores.text) > 0]
    for length in cfg.thought_len if len(cfg.thought_len) > 1 else ():
        objective.config = replace(objective.config, thought_len=length)
        swept = summary(measure().units())
        result.setdefault("sweep", []).append(dict(thought_len=length, **swept))
    return result


def show(result: dict, means: dict, cfg: EvalConfig):
    """The same numbers for people."""
    what, n = "questions" if cfg.task else "texts", len(result["units"]["count"])
    print(f"{cfg.file or cfg.data}: {n} {what}, {result.get('tokens', n)} scored; thoughts: "
          f"{cfg.thoughts}; 95 % intervals over {what}")
    print(table(means))
    for measure, (first, second) in result["temperatures"].items():
        print(f"{measure} is temperature_scaled at temperature {first:.2f} and {second:.2f}, each fitted on "
              "the other half")
    changed = means.get("nll_mixed-nll_base", dict(mean=0.0))["mean"] != 0
    for name in [name for name in BINNED if name in result and changed]:
        print(f"\nfrom the least to the greatest {BINNED[name]}\n  tokens  entropy  base nll  mixed"
              " nll  weight  gain")
        for row in result[name]:
            gain = row["nll_base"] - row["nll_mixed"], *row["interval_gain"]
            print("{tokens:8d} {entropy_base:8.3f} {nll_base:9.3f} {nll_mixed:10.3f} "
                  "{mixing_weight:+7.3f}".format(**row), "{:+.4f} [{:+.4f}, {:+.4f}]".format(*gain))
    if "sweep" in result:
        print("\nthought_len  nll thinking, and what it changed")
    for row in result.get("sweep", []):
        print(f"{row['thought_len']:11d}  {cell(row['nll_mixed'])}  "
              f"{cell(row['nll_mixed-nll_base'], True)}")
    if cfg.against:
        print(f"\nbeyond {cfg.against}, the same {what}")
        for name, value in result["differences"].items():
            print(f"{name:20s}{cell(value, True)}")


def main():
    (cfg,) = config.parse(EvalConfig)
    place, folder = parallel.join(cfg.device), weights.find_checkpoint(cfg.checkpoint)
    tokenizer = tokenizers.load(cfg.data or folder)
    objective = weights.load_objective(cfg.checkpoint, cfg.device, tokenizer)
    if cfg.thought_len and not thinks(objective):
        raise UserError(f"--thought_len={cfg.thought_len}: {cfg.checkpoint} does not think")
    if len(cfg.thought_len) == 1:
        objective.config = replace(objective.config, thought_len=cfg.thought_len[0])
    out = cfg.out or (cfg.task and str(Path(cfg.checkpoint, cfg.name + ".json")))
    if cfg.task:
        result = ask.ask(objective, tokenizer, cfg, place, out)
    else:
        result = score_data(objective, tokenizer, cfg, place)
    means = summary(result["units"])
    result["units"] = {name: total.tolist() for name, total in result["units"].items()}
    try:
        result |= dict(differences=compare(result, cfg.against)) if cfg.against else {}
    finally:                                  # what was measured stays, whatever it is compared to
        if place.writes and out:
            weights.atomic_write(out, lambda path: path.write_text(json.dumps(result | means)))
    if place.writes:
        show(result, means, cfg)
    if place.writes and out:
        print(f"wrote {out}")
    parallel.leave()


if __name__ == "__main__":
    config.run(main)
