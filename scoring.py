"""Score given text: the prediction at chosen positions, without a thought and after one.

There are four ways of giving thoughts, the same for every evaluation:
  own        one greedy thought (argmax) at each chosen position, and at no other
  sampled    at temperature 1 instead, as in training: the mean of N predictions
  shuffled   the thought of another text of the batch: a control
  none       the base model alone

Shapes: those of thoughts.py, and R chosen positions of all texts of a batch.
"""
import importlib
import math
from collections import defaultdict

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from config import Progress, UserError
from data import uniform_by_text
from distributed import SINGLE, all_reduce_sum
from lm_head import CHUNK
from model import CausalContext
from thoughts import (QuietSTaR, ThoughtConfig, base_model, every_position, gather_ahead,
                      logits_without_markers)

THOUGHTS = "own", "sampled", "shuffled", "none"
DATA_TASKS = ("shell_game", "dates")      # files in tasks/ that say which tokens are answers
FIELDS = (                                # of each scored token
    "nll_base",                           # nats
    "right_base",                         # is the likeliest token (or candidate) the true one
    "entropy_base",                       # of the base prediction, nats
    "nll_at",                             # nll of the base at each temperature
    "nll_mixed",                          # without thoughts this and right_mixed repeat the base's
    "right_mixed",
    "mixing_weight",
    "thought")                            # token ids [T]


def thinks(model, thoughts="own"):
    """True if `model` makes use of thoughts in this way of scoring."""
    return thoughts != "none" and isinstance(model, QuietSTaR)


class ReasonsAloud(QuietSTaR):
    """A base model whose thoughts are text: its markers are em dashes, its mixing weight is 1."""
    def __init__(self, base, thought_len, dash_id):
        super().__init__(base, ThoughtConfig(thought_len=thought_len))
        dash_D = base.embed.weight[dash_id]
        self.init_thoughts(dash_D, torch.Generator())
        self.to(dash_D)

    def mix(self, base, thought):
        return thought, torch.ones_like(thought[..., 0])


def load_task(name):
    """The module tasks/NAME.py; None for "none". It offers `answer_positions`, `candidates` and, if
    there is a right way of reasoning, `reasoning_is_right`: see tasks/shell_game.py."""
    if name == "none":
        return None
    if name not in DATA_TASKS:
        raise UserError(f"task '{name}' is not one of none, {', '.join(DATA_TASKS)}, nor, in "
                        "eval.py, gsm8k and commonsense_qa")
    return importlib.import_module(f"tasks.{name}")


def check_context(model, n_tokens, n_true=1):
    """Raise UserError if a text, and a thought with `n_true` true tokens at its end (None: nobody
    thinks), are longer than the model's context."""
    context_len = base_model(model).config.max_seq_len
    branch_len = 0 if n_true is None else model.config.thought_len + n_true + 1
    if n_tokens + branch_len > context_len:
        raise UserError(f"a text of {n_tokens} tokens, and {branch_len} for a thought, exceed the "
                        f"context of {context_len}: shorten the text (--seq_len) or the thoughts")


def pad_ids(rows, device=None):
    """Right-pad lists of ids with 0: ids_BL and length_B."""
    tensors = [torch.as_tensor(ids, dtype=torch.long, device=device) for ids in rows]
    length_B = torch.tensor([len(ids) for ids in rows], device=device)
    return pad_sequence(tensors, batch_first=True), length_B


def pack_positions(where_BL):
    """Chosen positions of each text, [B, P], and which are real: short rows repeat their first."""
    P = max(1, int(where_BL.sum(1).max()))
    real_BL, chosen_first_BL = where_BL.int().sort(dim=1, descending=True, stable=True)
    position_BP = chosen_first_BL[:, :P]
    real_BP = real_BL[:, :P] == 1
    return torch.where(real_BP, position_BP, position_BP[:, :1]), real_BP


@torch.no_grad()
def states_at(model, ids_BL, position_BP, real_BP, thoughts="own"):
    """States from which the R real positions predict: base_RD, mixed_RD (base_RD itself if nobody
    thinks, [R, N, D] after N sampled thoughts), mixing weight_R, thought_RT (the first)."""
    if not thinks(model, thoughts):
        check_context(model, ids_BL.shape[1], n_true=None)
        context = CausalContext(every_position(ids_BL, last=True))
        hidden_BLD = base_model(model)(ids_BL, context)
        base_RD = gather_ahead(hidden_BLD, position_BP, 1)[real_BP][:, 0]
        weight_R = base_RD.new_zeros(len(base_RD))
        thought_RT = base_RD[:, :0].long()
        return base_RD, base_RD, weight_R, thought_RT
    check_context(model, ids_BL.shape[1])
    randoms = {}
    if thoughts == "sampled":
        randoms["uniform_BNPT"] = uniform_by_text(ids_BL, position_BP, model.config)
    base_BPD, mixed_BNPD, weight_BNP, thought_BNPT = model.predict(ids_BL, position_BP, **randoms)
    thought_BPT = thought_BNPT[:, 0]
    if thoughts == "shuffled":
        others = of_another_text(real_BP.nonzero()[:, 0])
        thought_BPT[real_BP] = thought_BPT[real_BP][others]
        _, mixed_BNPD, weight_BNP, _ = model.predict(ids_BL, position_BP, thought_BNPT=thought_BNPT)
    mixed_RD = mixed_BNPD.transpose(1, 2)[real_BP].squeeze(1)
    weight_R = weight_BNP.mean(dim=1)[real_BP]
    return base_BPD[real_BP], mixed_RD, weight_R, thought_BPT[real_BP]


def of_another_text(text_R):
    """For each of R positions, given its text, a position of another text, in a random order."""
    generator = torch.Generator().manual_seed(0)
    order_R = torch.randperm(len(text_R), generator=generator)
    by_text = defaultdict(list)
    for r in order_R.tolist():
        by_text[int(text_R[r])].append(r)
    if len(by_text) == 1:
        raise UserError("--thoughts=shuffled: a batch in which one text has scored tokens holds no "
                        "thought of another: raise --batch_size")
    # in a circle, text by text: each position takes one of those before its own text
    circle = sum(by_text.values(), [])
    chosen = [0] * len(circle)
    start = 0
    for rows in by_text.values():
        for k, r in enumerate(rows):
            chosen[r] = circle[start - 1 - k % (len(circle) - len(rows))]
        start += len(rows)
    return chosen


@torch.no_grad()
def answer_logits(model, texts, thoughts="own"):
    """Yield base and mixed logits_SV, and weight_S, of each text (ids, start) from `start` on."""
    rows, starts = zip(*texts)
    ids_BL, length_B = pad_ids(rows, base_model(model).embed.weight.device)
    start_B = ids_BL.new_tensor(starts)
    # position j predicts token j + 1
    next_BL = every_position(ids_BL, last=True) + 1
    is_answer_BL = next_BL >= start_B[:, None]
    is_text_BL = next_BL < length_B[:, None]
    position_BP, real_BP = pack_positions(is_answer_BL & is_text_BL)
    base_RD, mixed_RD, weight_R, _ = states_at(model, ids_BL, position_BP, real_BP, thoughts)
    sizes = real_BP.sum(1).tolist()
    by_text = [x.split(sizes) for x in (base_RD, mixed_RD, weight_R)]
    for base_SD, mixed_SD, weight_S in zip(*by_text):
        base_SV = mixed_SV = logits_without_markers(model, base_SD)
        if mixed_RD is not base_RD:
            mixed_SV = logits_without_markers(model, mixed_SD)
        yield base_SV, mixed_SV, weight_S


def mean_prediction(model, hidden):
    """Logits of the next token from states [R, D]; from [R, N, D], after N thoughts each, the log
    of the mean of the N probabilities, which is a proper score."""
    *shape, _ = hidden.shape
    logits = logits_without_markers(model, hidden.flatten(0, -2)).unflatten(0, shape)
    if len(shape) == 1:
        return logits
    logp_RNV = logits.log_softmax(-1)
    return logp_RNV.logsumexp(dim=1) - math.log(shape[1])


@torch.no_grad()
def score_targets(model, hidden_RD, target_R, candidates=None, temperatures=()):
    """For each target token: its nll (nats), whether it is the argmax (of `candidates`, if given),
    the entropy of the prediction (nats), and its nll at each of `temperatures`, [R, k]."""
    found = []
    n_thoughts = math.prod(hidden_RD.shape[1:-1])
    size = max(1, CHUNK // n_thoughts)
    for hidden_RD, target_R in zip(hidden_RD.split(size), target_R.split(size)):
        target_R1 = target_R[:, None]
        logits_RV = mean_prediction(model, hidden_RD)
        logp_RV = logits_RV.log_softmax(-1)
        nll_R = -logp_RV.gather(1, target_R1)[:, 0]
        entropy_R = torch.special.entr(logp_RV.exp()).sum(-1)
        # right: among the candidates, or in the whole vocabulary
        best_R = logits_RV.argmax(-1)
        if candidates is not None:
            best_R = candidates[logits_RV[:, candidates].argmax(-1)]
        right_R = best_R == target_R
        # the nll after temperature scaling
        logit_R = logits_RV.gather(1, target_R1)[:, 0]
        nll_Rk = nll_R.new_empty(len(nll_R), len(temperatures))
        for k, t in enumerate(temperatures):
            scaled_RV = logits_RV / t
            nll_Rk[:, k] = scaled_RV.logsumexp(-1) - logit_R / t
        found.append((nll_R, right_R, entropy_R, nll_Rk))
    return list(map(torch.cat, zip(*found)))


def score_positions(model, ids_BL, where_BL, candidates=None, thoughts="own", temperatures=()):
    """Score the tokens that follow the positions `where_BL`, text by text: tensors by FIELDS."""
    position_BP, real_BP = pack_positions(where_BL)
    target_R = ids_BL.gather(1, position_BP + 1)[real_BP]
    base_RD, mixed_RD, weight_R, thought_RT = states_at(
        model, ids_BL, position_BP, real_BP, thoughts)
    base = score_targets(model, base_RD, target_R, candidates, temperatures)
    mixed = base
    if mixed_RD is not base_RD:
        mixed = score_targets(model, mixed_RD, target_R, candidates)
    values = *base, *mixed[:2], weight_R, thought_RT
    return dict(zip(FIELDS, values))


def held_out_texts(token_file, n_texts, seq_len):
    """The first documents of a split, cut at `seq_len` tokens: ids_BL, valid_BL."""
    n = min(n_texts, token_file.n_docs)
    docs = [token_file.document(i)[:seq_len] for i in range(n)]
    ids_BL, length_B = pad_ids(docs)
    column_BL = every_position(ids_BL, last=True)
    return ids_BL, column_BL < length_B[:, None]


def score_texts(
        model, token_file, tokenizer, n_texts, seq_len,
        thoughts="own",
        batch_size=64,
        dist=SINGLE,
        temperatures=(),
        task=None):
    """Score held-out documents: every next token, or the answers of `task` alone. Returns arrays
    with an entry for each scored token: those of FIELDS, and "text", the number of its text."""
    device = base_model(model).embed.weight.device
    ids_BL, valid_BL = held_out_texts(token_file, n_texts, seq_len)
    # the positions that have a next token, or an answer
    where_BL = torch.zeros_like(valid_BL)
    where_BL[:, :-1] = valid_BL[:, 1:]
    candidates = None
    if task:
        where_BL &= task.answer_positions(ids_BL, tokenizer)
        candidates = torch.tensor(task.candidates(tokenizer), device=device)
    n_scored = int(where_BL.sum())
    if not n_scored:
        raise UserError(f"{token_file.path}: the first {n_texts} texts hold nothing to score")
    # each rank fills its own rows of zeros
    thought_len = model.config.thought_len if thinks(model, thoughts) else 0
    widths = {"thought": [thought_len], "nll_at": [len(temperatures)]}
    scores = {}
    for name in FIELDS:
        scores[name] = torch.zeros(n_scored, *widths.get(name, []), dtype=torch.float64)
    index_BL = torch.zeros_like(ids_BL)
    index_BL[where_BL] = torch.arange(n_scored)       # where each scored token goes
    # texts of like length share a batch, the longest first
    length_B = valid_BL.sum(1)
    longest_first_B = length_B.argsort(descending=True, stable=True)
    batches = longest_first_B.tensor_split(-(-len(ids_BL) // batch_size))     # of like size
    progress = Progress(n_scored, "scoring tokens", dist.is_main)
    for rows in batches[dist.rank::dist.world_size]:
        width = int(length_B[rows[0]])
        ids_bL = ids_BL[rows, :width].to(device)
        where_bL = where_BL[rows, :width].to(device)
        if not where_bL.any():
            continue
        part = score_positions(model, ids_bL, where_bL, candidates, thoughts, temperatures)
        index_R = index_BL[rows][where_BL[rows]]
        for name, value in part.items():
            scores[name][index_R] = value.cpu().double()
        progress(len(index_R) * dist.world_size)
    arrays = {}
    for name, value in scores.items():
        if dist.world_size > 1:           # the sum over ranks is the whole
            value = all_reduce_sum(value.to(dist.device)).cpu()
        arrays[name] = value.numpy()
    if not np.isfinite(arrays["nll_base"] + arrays["nll_mixed"]).all():
        raise UserError("the model predicts nan or infinity: its weights are damaged, or overflow")
    arrays["text"] = where_BL.nonzero()[:, 0].numpy()
    return arrays


def evaluate_held_out(model, token_file, tokenizer, n_texts, seq_len, task):
    """Means over held-out text under their names in log.jsonl (behind "eval/")."""
    scores = score_texts(model, token_file, tokenizer, n_texts, seq_len, task=task)
    names = {"nll/base": "nll_base", "accuracy/base": "right_base"}
    if thinks(model):
        names |= {"nll/mixed": "nll_mixed", "accuracy/mixed": "right_mixed",
                  "mixing_weight": "mixing_weight"}
    return {key: float(scores[name].mean()) for key, name in names.items()}
