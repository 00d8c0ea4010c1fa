"""Generate text, thinking before every token, or only where a gate opens.

    texts = Generator(model, ids_BL, length_B, max_new_tokens=40)
    output = texts.step()                         # one more token for each of the B texts

One output token takes: the base state at the last position, one thought of T tokens behind it, one
mixed prediction; then the thought is dropped. The thought uses the text's cache: it is written
beyond the last token, where the next tokens overwrite it. That is T + 1 passes a token (T >= 1),
whatever the length of the text; with a gate, T + 2 for the texts that think and 1 for the others.
Left out on purpose: beam search and serving. Shapes: those of thoughts.py; b of B texts think.
"""
from dataclasses import dataclass

import numpy as np
import torch

from config import UserError
from data import RNG_SAMPLING
from lm_head import invert_cdf, sample_tokens
from model import CausalContext, KVCache
from scoring import pad_ids
from thoughts import QuietSTaR, base_model, every_position, logits_without_markers


@dataclass
class StepOutput:
    """One output token of each of the B texts, and the thought before it."""
    token_B: torch.Tensor
    mixing_weight_B: torch.Tensor         # 0 base only, 1 thought only
    thought_BT: torch.Tensor              # ids; -1 in the rows that did not think
    thinks_B: torch.Tensor                # which rows did
    base_logp_BV: torch.Tensor            # log-probabilities at temperature 1, without the thought
    mixed_logp_BV: torch.Tensor           # and with it


def row_generators(seed: int, rows) -> list[np.random.Generator]:
    """A random generator for each row, so that a text is the same alone or in any batch."""
    return [np.random.default_rng([seed, RNG_SAMPLING, row]) for row in rows]


def sample_next(logits_BV, uniform_B, temperature: float, top_k: int = 0, top_p: float = 1.0):
    """One token a row: the argmax at temperature 0, else the one that `uniform_B` in [0, 1) picks
    from the likeliest tokens that hold the probability `top_p`, at most `top_k` of them (0: any).
    """
    if logits_BV.isnan().any():
        raise UserError("the model predicts nan: its weights are damaged, or overflow in this type")
    if temperature == 0:
        return logits_BV.argmax(-1)
    p_BV = (logits_BV / temperature).softmax(-1)
    p_BV, token_BV = p_BV.sort(descending=True, stable=True)
    # a token stays if the likelier ones hold less than top_p: so the first one always does
    before_BV = p_BV.cumsum(-1) - p_BV
    kept_BV = before_BV < top_p
    if top_k:
        kept_BV[:, top_k:] = False
    found_B = invert_cdf(p_BV * kept_BV, uniform_B)
    return token_BV.gather(1, found_B[:, None])[:, 0]


class Generator:
    """B texts that grow by one token a call. `model` is a QuietSTaR, or a Mistral without thoughts.

    ids_BL is right-padded; length_B says how much of each row is text. Thoughts are greedy; output
    tokens come from `sample_next` with the random numbers of `generators`, one for each row. A
    `gate` (tools/gate.py) decides from the base state who thinks; without `think` nobody does.
    """
    @torch.no_grad()
    def __init__(self, model, ids_BL, length_B, max_new_tokens: int, temperature: float = 0.0,
                 top_k: int = 0, top_p: float = 1.0, generators=None, think: bool = True,
                 gate=None):
        B, L = ids_BL.shape
        self.model = model
        self.mistral = base_model(model)
        self.think = think and isinstance(model, QuietSTaR)
        self.gate = gate
        self.choice = temperature, top_k, top_p
        self.generators = generators or row_generators(0, range(B))
        # a cache with room for the text, what follows, and a thought behind the last token
        self.thought_len = model.config.thought_len if self.think else 0
        self.thought_slots = self.thought_len + 2 if self.think else 0
        n_slots = L + max_new_tokens + self.thought_slots
        context_len = self.mistral.config.max_seq_len
        if n_slots > context_len:
            raise UserError(f"prompt is {L} tokens, {max_new_tokens} more are asked for, context "
                            f"is {context_len} with {self.thought_slots} kept for thoughts: "
                            "shorten the prompt or lower --max_new_tokens")
        weight = self.mistral.embed.weight
        self.cache = KVCache(
            self.mistral.config, B, n_slots, weight.device, weight.dtype)
        self.longest = L
        self.position_B1 = length_B[:, None] - 1
        self.last_B1 = ids_BL.gather(1, self.position_B1)
        # fill the cache; `step` reads the last token of each text again
        x_BLD = self.mistral.embed(ids_BL)
        self._read(x_BLD, every_position(ids_BL, last=True), self.cache)

    @torch.no_grad()
    def step(self) -> StepOutput:
        """Emit one token for every text, and read it at the next step."""
        # 1. the base prediction, and which texts think
        base_BD, start_BD = self._read_last_token()
        base_logits_BV = logits_without_markers(self.model, base_BD)
        B = len(base_BD)
        device = base_BD.device
        thinks_B = torch.full((B,), self.think, device=device)
        if self.think and self.gate:
            thinks_B = self.gate.opens(base_BD, base_logits_BV)
        # 2. a thought, and the mixed prediction after it
        thought_BT = torch.full((B, self.thought_len), -1, device=device)
        weight_B = torch.zeros_like(base_BD[:, 0])
        logits_BV = base_logits_BV.clone()
        if thinks_B.any():
            after_bD, thought_bT = self._think(thinks_B, start_BD)
            mixed_bD, weight_b = self.model.mix(base_BD[thinks_B], after_bD)
            thought_BT[thinks_B] = thought_bT
            weight_B[thinks_B] = weight_b
            logits_BV[thinks_B] = logits_without_markers(self.model, mixed_bD)
        # 3. the token; the thought is dropped, because the token will take its place in the cache
        uniform = [generator.random(dtype=np.float32) for generator in self.generators]
        uniform_B = torch.tensor(uniform, device=device)
        token_B = sample_next(logits_BV, uniform_B, *self.choice)
        self.last_B1 = token_B[:, None]
        self.position_B1 = self.position_B1 + 1
        self.longest += 1                     # tokens of the longest text
        return StepOutput(
            token_B=token_B,
            mixing_weight_B=weight_B,
            thought_BT=thought_BT,
            thinks_B=thinks_B,
            base_logp_BV=base_logits_BV.log_softmax(-1),
            mixed_logp_BV=logits_BV.log_softmax(-1))

    def drop_finished(self, rows_B):
        """Go on with the texts `rows_B` (bool) alone."""
        rows = rows_B.nonzero()[:, 0].tolist()
        self.generators = [self.generators[row] for row in rows]
        self.cache = self.cache.select(rows_B)
        self.last_B1 = self.last_B1[rows_B]
        self.position_B1 = self.position_B1[rows_B]

    def _read(self, x_BSD, position_BS, cache):
        """One pass over new tokens at their positions; returns their hidden states."""
        n_slots = self.longest + self.thought_slots
        context = CausalContext(position_BS, cache, n_slots)
        return self.mistral.transform(x_BSD, context)

    def _read_last_token(self):
        """The base states, and the states at the start marker if there is no gate."""
        # without a gate every text thinks: the start marker is read in the same pass
        x_BSD = self.mistral.embed(self.last_B1)
        if not self.think or self.gate:
            hidden_B1D = self._read(x_BSD, self.position_B1, self.cache)
            return hidden_B1D[:, 0], None
        B = len(x_BSD)
        start_B1D = self.model.start_thought.expand(B, 1, -1)
        x_BSD = torch.cat([x_BSD, start_B1D], dim=1)
        position_BS = torch.cat([self.position_B1, self.position_B1 + 1], dim=1)
        return self._read(x_BSD, position_BS, self.cache).unbind(1)

    def _think(self, thinks_B, start_BD):
        """A greedy thought after each text that thinks: the state at its end, and its tokens."""
        cfg = self.model.config
        T = self.thought_len
        # of the texts that think: cache, positions, markers
        cache = self.cache.select(thinks_B)
        position_b1 = self.position_B1[thinks_B] + 1
        b = len(position_b1)
        start_b1D = self.model.start_thought.expand(b, 1, -1)
        end_b1D = self.model.end_thought.expand(b, 1, -1)
        if start_BD is None:
            state_bD = self._read(start_b1D, position_b1, cache)[:, -1]
        else:
            state_bD = start_BD[thinks_B]
        thought_bT = torch.zeros(b, T, dtype=torch.long, device=state_bD.device)
        if T == 0:
            hidden_b1D = self._read(end_b1D, position_b1 + 1, cache)
            return hidden_b1D[:, -1], thought_bT
        # T greedy tokens, one pass each
        for t in range(T):
            head_VD = self.mistral.head.weight
            token_b, _ = sample_tokens(state_bD, head_VD, masked_ids=cfg.marker_ids)
            thought_bT[:, t] = token_b
            x_bSD = start_b1D if cfg.filler else self.mistral.embed(token_b[:, None])
            position_bS = position_b1 + t + 1
            # the last token and the end marker are read in one pass
            if t == T - 1:
                x_bSD = torch.cat([x_bSD, end_b1D], dim=1)
                position_bS = torch.cat([position_bS, position_bS + 1], dim=1)
            state_bD = self._read(x_bSD, position_bS, cache)[:, -1]
        return state_bD, thought_bT


def cut_at(text: str, stops) -> tuple[str, bool]:
    """The text before the first of the strings `stops`, and whether one was found."""
    # the first stop in the text counts, whatever its place in the list
    found = [text.index(stop) for stop in stops if stop in text]
    end = min(found, default=len(text))
    return text[:end], bool(found)


@torch.no_grad()
def complete(model, prompts, tokenizer, max_new_tokens: int, stop, think=True, temperature=0.0,
             keys=None):
    """Continue prompts (ids) in one batch, each up to `max_new_tokens` tokens, the end of the text,
    or until `stop(row, its text so far)` is true. `keys` seed the random numbers of each row."""
    device = base_model(model).embed.weight.device
    ids_BL, length_B = pad_ids(prompts, device)
    keys = keys or [(0, row) for row in range(len(prompts))]
    generators = [np.random.default_rng(key) for key in keys]
    generator = Generator(
        model, ids_BL, length_B, max_new_tokens, temperature,
        generators=generators, think=think)
    # the decoders read the prompts first, because a token's text can depend on those before it
    streams = []
    for ids in prompts:
        stream = tokenizer.stream()
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
            stays = [row in going for row in rows]
            generator.drop_finished(torch.tensor(stays, device=device))
            rows = [row for row in rows if row in going]
    return [text + stream.flush() for text, stream in zip(texts, streams)]
