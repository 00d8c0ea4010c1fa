"""What happened at each token: the text it adds, the thought before it, and what that changed.

    for token in generated(texts, tokenizer, ids, max_new=40, stop="\\n"): print(token.text)
    tokens = given(objective, tokenizer, ids)                    # a text that somebody else wrote

Both yield the same `Token`s, so the terminal (show.py) and the page (page.py) show either. Text
streams as it is decided: half a character waits for its other half, and what may be the beginning
of the stop string waits until it is or is not.

Left out on purpose: the look ahead's own predictions; `reward` sums them up.

Read next: show.py
"""
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from config import UserError
from inference import StepOutput, Gate, Generator
from lm_head import chunk_rows
from model import CausalContext
from thoughts import QuietSTaR, logits_without_markers

BEST = 5                                  # predictions kept of each token


@dataclass
class Token:
    """One visible token. Of a prompt's, and of a text's first, only `id` and `text` are known."""
    sample: int                           # which text of the batch
    place: int                            # position in its text
    id: int
    text: str                             # what it adds; "" until its last character is whole
    thinks: bool = False
    thought: str = ""
    thought_ids: tuple[int, ...] = ()
    mixing_weight: float = 0.0            # 0 base only, 1 thought only
    gain: float = 0.0                     # nats: log p with the thought, minus without
    logp: float | None = None             # of this token, with the thought (nats, temperature 1)
    entropy: float | None = None          # of the base prediction (nats)
    reward: float | None = None           # given texts: nats over the n_true tokens ahead
    base: tuple = ()                      # likeliest without the thought: id, text, probability
    mixed: tuple = ()                     # and with it


class Line:
    """One text as it grows: tokens go in, and come out when their text is decided."""
    def __init__(self, tokenizer, prompt_ids, sample: int = 0, stop: str = ""):
        self.stream, self.stop, self.eos = tokenizer.stream(), stop, tokenizer.eos
        self.prompt = [Token(sample, place, int(id), self.stream.push(id))
                       for place, id in enumerate(prompt_ids)]
        self.waiting, self.ended = [], False

    def push(self, token: Token) -> list[Token]:
        if token.id == self.eos:
            return self.end()
        token.text = self.stream.push(token.id)
        self.waiting.append(token)
        text = "".join(t.text for t in self.waiting)
        if self.stop and self.stop in text:
            return self._cut(text.index(self.stop))
        starts = (text.endswith(self.stop[:n]) for n in range(1, len(self.stop)))
        if any(starts) or self.stream.utf8.getstate()[0]:           # bytes of half a character
            return []
        return self._release()

    def end(self) -> list[Token]:
        """What is still waiting, when no more comes: half a character shows as U+FFFD."""
        if self.waiting:
            self.waiting[-1].text += self.stream.flush()
        self.ended = True
        return self._release()

    def _cut(self, length: int) -> list[Token]:
        """The first `length` characters of what waits; the text has ended there."""
        self.ended, kept = True, []
        for token in self._release():
            if length <= 0:
                break
            token.text = token.text[:length]
            length -= len(token.text)
            kept.append(token)
        return kept

    def _release(self) -> list[Token]:
        official, self.waiting = self.waiting, []
        return official


def best(logp_V, tokenizer) -> tuple:
    """The likeliest tokens: id, text (alone, as `decode` writes it) and probability."""
    top = logp_V.topk(min(BEST, len(logp_V)))
    return tuple((i, tokenizer.decode([i]), p)
                 for i, p in zip(top.indices.tolist(), top.values.exp().tolist()))


def observed(token: Token, tokenizer, base_logp_V, mixed_logp_V, weight, thought_T) -> Token:
    """The same token with what thinking changed; `thought_T` None if there was no thought."""
    token.logp = float(mixed_logp_V[token.id])
    token.gain = token.logp - float(base_logp_V[token.id])
    token.entropy = float(torch.special.entr(base_logp_V.exp()).sum())
    token.base, token.mixed = (best(logp_V, tokenizer) for logp_V in (base_logp_V, mixed_logp_V))
    if thought_T is not None:
        token.thinks, token.mixing_weight = True, float(weight)
        token.thought_ids = tuple(thought_T.tolist())
        token.thought = tokenizer.decode(token.thought_ids)
    return token


def generated(texts: Generator, tokenizer, lines: list[Line], max_new: int) -> Iterator[Token]:
    """The tokens of all texts, as they are decided, until each has ended or is `max_new` longer."""
    place = [len(line.prompt) for line in lines]
    for n in range(max_new):
        emitted = texts.step()
        for b, line in enumerate(lines):
            if not line.ended:
                yield from line.push(_token(emitted, b, place[b] + n, tokenizer))
        if all(line.ended for line in lines):
            return
    for line in lines:
        yield from line.end()


def _token(emitted: StepOutput, b: int, place: int, tokenizer) -> Token:
    thought_T = emitted.thought_BT[b] if emitted.thinks_B[b] else None
    return observed(Token(b, place, int(emitted.token_B[b]), ""), tokenizer,
                    emitted.base_logp_BV[b], emitted.mixed_logp_BV[b], emitted.mixing_weight_B[b],
                    thought_T)


@torch.no_grad()
def given(objective, tokenizer, ids: list[int], think: bool = True,
          gate: Gate | None = None) -> list[Token]:
    """A text of two tokens or more under teacher forcing: a greedy thought before each but the
    first, or where the `gate` opens. `objective` is a QuietSTaR, or anything with a `.model`."""
    model, think = objective.model, think and isinstance(objective, QuietSTaR)
    branch_len = objective.config.thought_len + objective.config.n_true + 1 if think else 0
    if len(ids) + branch_len > model.config.max_seq_len:
        context = f"{model.config.max_seq_len} with {branch_len} kept for thoughts"
        raise UserError(f"the text is {len(ids)} tokens, context is {context}: shorten the text")
    ids_BL = torch.tensor([ids], device=model.embed.weight.device)
    every_BL = torch.arange(len(ids), device=ids_BL.device)[None]
    base_LD = model(ids_BL, CausalContext(every_BL))[0, :-1]
    thinks_L, n_rows = torch.full((len(base_LD),), think), chunk_rows(model.head.weight)
    if think and gate:
        thinks_L = torch.cat([gate.opens(h_RD, logits_without_markers(objective, h_RD))
                              for h_RD in base_LD.split(n_rows)])
    found = _think_at(objective, ids_BL, thinks_L) if thinks_L.any() else {}
    line, tokens = Line(tokenizer, ids), []
    for start in range(0, len(base_LD), n_rows):
        base_RV = logits_without_markers(objective, base_LD[start:start + n_rows]).log_softmax(-1)
        for j, base_V in enumerate(base_RV, start):             # the thought behind token j
            token, mixed_V, weight, thought_T = line.prompt[j + 1], base_V, 0.0, None
            if j in found:
                mixed_D, weight, thought_T, token.reward = found[j]
                mixed_V = logits_without_markers(objective, mixed_D[None])[0].log_softmax(-1)
            tokens.append(observed(token, tokenizer, base_V, mixed_V, weight, thought_T))
    tokens[-1].text += line.stream.flush()
    return [line.prompt[0], *tokens]


def _think_at(quiet: QuietSTaR, ids_BL, thinks_L) -> dict[int, tuple]:
    """By position that thinks: mixed state, mixing weight, thought and reward."""
    position_P = thinks_L.nonzero()[:, 0].to(ids_BL.device)
    P, position_BP = len(position_P), None if thinks_L.all() else position_P[None]
    _, mixed_BNPD, weight_BNP, thought_BNPT = quiet.predict(ids_BL, position_BP)
    outcome = quiet(ids_BL, torch.ones_like(ids_BL, dtype=torch.bool), position_BP,
                    thought_BNPT=thought_BNPT[:, :, :P])
    return dict(zip(position_P.tolist(), zip(mixed_BNPD[0, 0, :P], weight_BNP[0, 0, :P].tolist(),
                                             thought_BNPT[0, 0, :P],
                                             outcome.reward_BNP[0, 0].tolist())))
