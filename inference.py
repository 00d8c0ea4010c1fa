"""Generate text, thinking before every token, or only where a gate opens.

    texts = Generator(model, ids_BL, length_B, max_new_tokens=40)
    output = texts.step()                         # one more token for each of the B texts

One output token takes the base state at the last position, a thought of T tokens behind it, and a
mixed prediction; then the thought is dropped: the next tokens overwrite it in the cache. That is
T + 1 passes (T >= 1), however long the text; with a gate, T + 2 for texts that think, else 1.
Left out on purpose: beam search and serving. Shapes: those of thoughts.py; b of B texts think.
"""
from dataclasses import dataclass
from itertools import compress

import numpy as np
import torch

from config import UserError
from data import RNG_SAMPLING
from lm_head import invert_cdf, sample_tokens
from model import CausalContext, KVCache
from scoring import pad_ids
from thoughts import QuietSTaR, base_model, logits_without_markers
from tokenizer import Stream


@dataclass
class StepOutput:
    """One output token of each of the B texts, and the thought before it."""
    token_B: torch.Tensor
    mixing_weight_B: torch.Tensor         # 0 base only, 1 thought only
    thought_BT: torch.Tensor              # ids; -1 in the rows that did not think
    thinks_B: torch.Tensor                # which rows did
    base_logp_BV: torch.Tensor            # log-probabilities at temperature 1, without the thought
    mixed_logp_BV: torch.Tensor           # and with it


def row_generators(seed, rows):
    """A random generator for each row, so that a text is the same alone or in any batch."""
    return [np.random.default_rng([seed, RNG_SAMPLING, row]) for row in rows]


def sample_next(logits_BV, uniform_B, temperature, top_k=0, top_p=1.0):
    """One token a row: the argmax at temperature 0, else the one that `uniform_B` in [0, 1) picks
    from the likeliest that hold the probability `top_p`, at most `top_k` of them (0: any)."""
    highest_B = logits_BV.amax(-1)
    if not highest_B.isfinite().all():
        raise UserError("the model predicts nan or infinity: its weights are damaged, or overflow")
    if temperature == 0:
        return logits_BV.argmax(-1)
    p_BV = (logits_BV / temperature).softmax(-1)
    p_BV, token_BV = p_BV.sort(descending=True, stable=True)
    # a token stays if the likelier ones hold less than top_p: so the first one always does
    before_BV = p_BV.cumsum(-1) - p_BV
    kept_BV = before_BV < top_p
    kept_BV[:, 0] = True              # even if top_p is too small for fp32
    if top_k:
        kept_BV[:, top_k:] = False
    found_B = invert_cdf(p_BV * kept_BV, uniform_B)
    return token_BV.gather(1, found_B[:, None])[:, 0]


class Generator:
    """B texts that grow by one token a call. `model` is a QuietSTaR, or a Mistral without thoughts.
    ids_BL is right-padded; length_B says how much of each row is text. Thoughts are greedy; output
    tokens come from `sample_next` with the random numbers of `generators`, one for each row. A
    `gate` (tools/gate.py) decides from the base state who thinks; without `think` nobody does."""
    @torch.no_grad()
    def __init__(self, model, ids_BL, length_B, max_new_tokens, temperature=0.0, top_k=0,
                 top_p=1.0, generators=None, think=True, gate=None):
        B, L = ids_BL.shape
        self.model = model
        self.mistral = base_model(model)
        self.think = think and isinstance(model, QuietSTaR)
        self.gate = gate
        self.choice = temperature, top_k, top_p
        self.generators = generators or row_generators(0, range(B))
        # a cache with room for the text, what follows, and a thought behind the last token
        self.thought_len = model.config.thought_len if self.think else 0
        thought_slots = self.thought_len + 2 if self.think else 0
        n_slots = L + max_new_tokens + thought_slots
        context_len = self.mistral.config.max_seq_len
        if n_slots > context_len:
            raise UserError(f"prompt is {L} tokens, {max_new_tokens} more are asked for, context "
                            f"is {context_len} with {thought_slots} kept for thoughts: "
                            "shorten the prompt or lower --max_new_tokens")
        weight = self.mistral.embed.weight
        self.cache = KVCache(
            self.mistral.config, B, n_slots, weight.device, weight.dtype)
        self.n_slots = L + thought_slots      # in use: those of the longest text and a thought
        self.position_B1 = length_B[:, None] - 1
        self.last_B1 = ids_BL.gather(1, self.position_B1)
        # fill the cache; `step` reads the last token of each text again
        self._read(self.mistral.embed(ids_BL), torch.zeros_like(self.position_B1), self.cache)

    @torch.no_grad()
    def step(self):
        """Emit one token for every text, and read it at the next step."""
        # 1. the base prediction; without a gate every text thinks, and its start marker is read too
        x_BSD = self.mistral.embed(self.last_B1)
        B, device = len(x_BSD), x_BSD.device
        if self.think and not self.gate:
            start_B1D = self.model.start_thought.expand(B, 1, -1)
            x_BSD = torch.cat([x_BSD, start_B1D], dim=1)
        hidden_BSD = self._read(x_BSD, self.position_B1, self.cache)
        base_BD = hidden_BSD[:, 0]
        base_logits_BV = logits_without_markers(self.model, base_BD)
        thinks_B = torch.full((B,), self.think, device=device)
        if self.gate:
            thinks_B &= self.gate.opens(base_BD, base_logits_BV)
        # 2. a thought, and the mixed prediction after it
        thought_BT = torch.full((B, self.thought_len), -1, device=device)
        weight_B = torch.zeros_like(base_BD[:, 0])
        logits_BV = base_logits_BV.clone()
        if thinks_B.any():
            after_bD, thought_bT = self._think(thinks_B, hidden_BSD)
            mixed_bD, weight_b = self.model.mix(base_BD[thinks_B], after_bD)
            thought_BT[thinks_B] = thought_bT
            weight_B[thinks_B] = weight_b
            logits_BV[thinks_B] = logits_without_markers(self.model, mixed_bD)
        # 3. the token; the thought is dropped, because the token will take its place in the cache
        uniform = [generator.random(dtype=np.float32) for generator in self.generators]
        uniform_B = torch.tensor(uniform, device=device)
        token_B = sample_next(logits_BV, uniform_B, *self.choice)
        self.last_B1 = token_B[:, None]
        self.position_B1 += 1
        self.n_slots += 1
        return StepOutput(
            token_B=token_B,
            mixing_weight_B=weight_B,
            thought_BT=thought_BT,
            thinks_B=thinks_B,
            base_logp_BV=base_logits_BV.log_softmax(-1),
            mixed_logp_BV=logits_BV.log_softmax(-1))

    def drop_finished(self, stays):
        """Go on with the texts for which the list `stays` is true."""
        rows_B = torch.tensor(stays, device=self.position_B1.device)
        self.generators = list(compress(self.generators, stays))
        self.cache = self.cache.select(rows_B)
        self.last_B1 = self.last_B1[rows_B]
        self.position_B1 = self.position_B1[rows_B]

    def _read(self, x_BSD, first_B1, cache):
        """One pass over new tokens, at `first_B1` and after; returns their hidden states."""
        position_BS = first_B1 + torch.arange(x_BSD.shape[1], device=x_BSD.device)
        context = CausalContext(position_BS, cache, self.n_slots)
        return self.mistral.transform(x_BSD, context)

    def _think(self, thinks_B, hidden_BSD):
        """A greedy thought after each text that thinks: the state at its end, and its tokens."""
        cfg = self.model.config
        T = self.thought_len
        # of the texts that think: cache, positions, markers
        cache = self.cache.select(thinks_B)
        position_b1 = self.position_B1[thinks_B] + 1
        b = len(position_b1)
        start_b1D = self.model.start_thought.expand(b, 1, -1)
        end_b1D = self.model.end_thought.expand(b, 1, -1)
        # behind a gate, the start marker is still unread
        state_bD = hidden_BSD[thinks_B, -1]
        if self.gate:
            state_bD = self._read(start_b1D, position_b1, cache)[:, -1]
        thought_bT = torch.zeros(b, T, dtype=torch.long, device=state_bD.device)
        if T == 0:
            state_bD = self._read(end_b1D, position_b1 + 1, cache)[:, -1]
        # T greedy tokens, one pass each
        for t in range(T):
            head_VD = self.mistral.head.weight
            token_b, _ = sample_tokens(state_bD, head_VD, masked_ids=cfg.marker_ids)
            thought_bT[:, t] = token_b
            x_bSD = start_b1D if cfg.filler else self.mistral.embed(token_b[:, None])
            # the last token and the end marker are read in one pass
            if t == T - 1:
                x_bSD = torch.cat([x_bSD, end_b1D], dim=1)
            state_bD = self._read(x_bSD, position_b1 + t + 1, cache)[:, -1]
        return state_bD, thought_bT


def cut_at(text, stops):
    """The text before the first of the strings `stops`, and whether one was found."""
    # the first stop in the text counts, whatever its place in the list
    found = [text.index(stop) for stop in stops if stop in text]
    end = min(found, default=len(text))
    return text[:end], bool(found)


@torch.no_grad()
def complete(model, prompts, tokenizer, max_new_tokens, stop, think=True, temperature=0.0,
             keys=None):
    """Continue prompts (ids) in one batch, each up to `max_new_tokens` tokens, the end of the text,
    or until `stop(row, its text so far)` is true. `keys` seed the random numbers of each row."""
    ids_BL, length_B = pad_ids(prompts, base_model(model).embed.weight.device)
    generators = [np.random.default_rng(key) for key in keys or ()]
    generator = Generator(model, ids_BL, length_B, max_new_tokens, temperature,
                          generators=generators, think=think)
    # the decoders read the prompts first, because a token's text can depend on those before it
    streams = []
    for ids in prompts:
        stream = Stream(tokenizer)
        for token in ids:
            stream.push(token)
        streams.append(stream)
    texts = [""] * len(prompts)
    rows = list(range(len(prompts)))          # whose texts are in the batch
    going = set(rows)                         # whose texts have not ended
    for _ in range(max_new_tokens):
        token_B = generator.step().token_B
        for row, token in zip(rows, token_B.tolist()):
            ended = token in tokenizer.ends or row not in going
            if not ended:
                texts[row] += streams[row].push(token)
            if ended or stop(row, texts[row]):
                going.discard(row)
        if not going:
            break
        # once half of the batch has ended, go on with the rest alone
        if 2 * len(going) <= len(rows):
            generator.drop_finished([row in going for row in rows])
            rows = [row for row in rows if row in going]
    return [text + stream.flush() for text, stream in zip(texts, streams)]
