"""What a model expects at chosen positions of a text, without a thought and after one; and goes on.

One place decides how thoughts are given for every evaluation (eval.py, ask.py, harness.py):
  own       a single greedy thought (a true argmax) at each chosen position, and only there
  swapped   the thought of another position of the batch, for the same model: a control
  none      the base alone

`complete` lets texts go on from there, a batch at a time with one cache. Every row draws from
random numbers of its own, so what it says depends neither on its batch nor on the rank.

Read next: evidence.py
"""
from collections.abc import Callable, Iterator

import numpy as np
import torch

from inference import Generator
from model import CausalContext
from thoughts import QuietSTaR, gather_ahead, logits_without_markers


def thinks(objective, thoughts: str = "own") -> bool:
    return thoughts != "none" and isinstance(objective, QuietSTaR)


def pack_positions(where_BL):
    """Each text's chosen positions, [B, P], and which are real: shorter rows repeat their first."""
    count_B1 = where_BL.sum(1, keepdim=True)
    order_BL = where_BL.int().argsort(dim=1, descending=True, stable=True)
    order_BP = order_BL[:, :max(1, int(count_B1.max()))]
    real_BP = torch.arange(order_BP.shape[1], device=where_BL.device) < count_B1
    return torch.where(real_BP, order_BP, order_BP[:, :1]), real_BP


@torch.no_grad()
def states(objective, ids_BL, position_BP, real_BP, thoughts: str = "own"):
    """What the R real positions predict from: base_RD, mixed_RD, mixing weight_R, thought_RT.

    `objective` is a QuietSTaR, or anything with a `.model`, which then predicts alone: mixed_RD is
    base_RD itself.
    """
    if not thinks(objective, thoughts):
        every_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device).expand_as(ids_BL)
        hidden_BLD = objective.model(ids_BL, CausalContext(every_BL))
        base_RD = gather_ahead(hidden_BLD, position_BP, 1)[:, :, 0][real_BP]
        return base_RD, base_RD, base_RD[:, 0] * 0, base_RD[:, :0].long()
    base_BPD, mixed_BNPD, weight_BNP, thought_BNPT = objective.predict(ids_BL, position_BP)
    if thoughts == "swapped":
        thought_RT = thought_BNPT[:, 0][real_BP]
        shuffled_R = torch.randperm(len(thought_RT), generator=torch.Generator().manual_seed(0))
        given_RT = torch.empty_like(thought_RT)
        given_RT[shuffled_R] = thought_RT[shuffled_R.roll(1)]
        thought_BNPT[:, 0][real_BP] = given_RT
        _, mixed_BNPD, weight_BNP, _ = objective.predict(ids_BL, position_BP,
                                                         thought_BNPT=thought_BNPT)
    return base_BPD[real_BP], *(t[:, 0][real_BP] for t in (mixed_BNPD, weight_BNP, thought_BNPT))


@torch.no_grad()
def predictions(objective, texts: list[tuple[list[int], int]], thoughts: str = "own") -> Iterator:
    """For each text (ids, start): base and mixed logits_SV of its tokens from `start` on, each
    predicted by the position before it, and the mixing weight_S. One batch; logits as they are
    asked for. Without thoughts the mixed logits are the base's own tensor."""
    device = objective.model.embed.weight.device
    ids_BL = torch.zeros(len(texts), max(len(ids) for ids, _ in texts), dtype=torch.long)
    where_BL = torch.zeros(ids_BL.shape, dtype=torch.bool)
    for row, (ids, start) in enumerate(texts):
        ids_BL[row, :len(ids)] = torch.tensor(ids)
        where_BL[row, start - 1:len(ids) - 1] = True
    position_BP, real_BP = pack_positions(where_BL.to(device))
    base_RD, mixed_RD, weight_R, _ = states(objective, ids_BL.to(device), position_BP, real_BP,
                                            thoughts)
    sizes = real_BP.sum(1).tolist()
    parts = [t.split(sizes) for t in (base_RD, mixed_RD, weight_R)]
    for base_SD, mixed_SD, weight_S in zip(*parts):
        base_SV = mixed_SV = logits_without_markers(objective, base_SD)
        if mixed_RD is not base_RD:
            mixed_SV = logits_without_markers(objective, mixed_SD)
        yield base_SV, mixed_SV, weight_S


@torch.no_grad()
def complete(objective, prompts: list[list[int]], tokenizer, max_new: int,
             stop: Callable[[int, str], bool], think: bool = True, temperature: float = 0.0,
             keys: list[tuple[int, ...]] | None = None) -> list[str]:
    """How each prompt (ids) goes on, as text, in one batch: up to `max_new` tokens, the end of the
    text, or `stop(row, what it said so far)`. `keys` (seeds) decide what chance does to each row.
    """
    device, n_rows = objective.model.embed.weight.device, len(prompts)
    ids_BL = torch.zeros(n_rows, max(map(len, prompts)), dtype=torch.long, device=device)
    for row, ids in enumerate(prompts):
        ids_BL[row, :len(ids)] = torch.tensor(ids)
    length_B = torch.tensor([len(ids) for ids in prompts], device=device)
    model = objective if thinks(objective) else objective.model
    chance = [np.random.default_rng(key) for key in keys or [(0, row) for row in range(n_rows)]]
    generator = Generator(model, ids_BL, length_B, max_new, temperature, think=think,
                          streams=chance)
    streams, texts, rows = [tokenizer.stream() for _ in prompts], [""] * n_rows, list(range(n_rows))
    going = set(rows)
    for stream, ids in zip(streams, prompts):
        for token in ids:
            stream.push(token)
    for _ in range(max_new):
        for row, token in zip(rows, generator.step().token_B.tolist()):
            ended = row not in going or token in (tokenizer.eos, tokenizer.bos)
            texts[row] += "" if ended else streams[row].push(token)
            if ended or stop(row, texts[row]):
                going.discard(row)
        if not going:
            break
        if 2 * len(going) <= len(rows):            # the others would cost as much as these
            generator.keep(torch.tensor([row in going for row in rows], device=device))
            rows = [row for row in rows if row in going]
    return [text + stream.flush() for text, stream in zip(texts, streams)]
