"""Generate text, thinking before every token, or only where a gate says that it may pay.

    texts = Generator(model, ids_BL, length_B, max_new=40, temperature=0)
    while ...: emitted = texts.step()                     # a token for each of the B texts

To emit one token: the base state at the last position, one thought of T tokens behind it, one mixed
prediction; then the thought is dropped. A thought at the end of the text is an ordinary causal
continuation, so the text's own cache serves: thoughts are written beyond the last token and simply
overwritten by the next one. T + 1 passes a token, whatever the length of the text; with a gate
T + 2 for the texts that think, and 1 for those that do not.

Left out on purpose: beam search and serving.

Read next: trace.py
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from config import UserError
from formats.tensors import read_json
from lm_head import sample_tokens
from model import CausalContext, KVCache
from thoughts import QuietSTaR, mix, logits_without_markers

RNG_SAMPLING = 4                         # purpose of random numbers; train.py has 1 to 3
COMPILED = dict(mode="reduce-overhead", fullgraph=True, dynamic=False)     # that is, CUDA graphs


@dataclass
class StepOutput:
    """One visible token of each of the B texts, and what was thought before it (ids)."""
    token_B: torch.Tensor
    mixing_weight_B: torch.Tensor         # 0 base only, 1 thought only
    gain_B: torch.Tensor                  # nats: log p(token) with the thought, minus without
    thought_BT: torch.Tensor              # -1 in the rows that did not think
    thinks_B: torch.Tensor                # which did
    base_logp_BV: torch.Tensor            # log-probabilities at temperature 1, without the thought
    mixed_logp_BV: torch.Tensor           # and with it


@dataclass(frozen=True)
class Gate:
    """Where to think, from the base state alone: where a score reaches `threshold`.

    The score is the entropy of the base prediction (nats, never below 0) or, if there is a
    `probe_D`, the gain in nats that this linear probe of the base state expects (gate.py fits it).
    """
    threshold: float
    probe_D: torch.Tensor | None = None
    bias: float = 0.0

    def score(self, base_RD, logits_RV):
        if self.probe_D is None:
            return torch.special.entr(logits_RV.softmax(-1)).sum(-1).clamp(min=0)
        return base_RD.float() @ self.probe_D.to(base_RD.device) + self.bias

    def opens(self, base_RD, logits_RV):
        """[R] bool. At threshold 0 entropy opens it everywhere, at infinity nowhere."""
        return self.score(base_RD, logits_RV) >= self.threshold


def read_gate(said: str, quiet: QuietSTaR) -> Gate:
    """A threshold for the entropy in nats, or the file of a probe of this model's states."""
    try:
        return Gate(float(said))
    except ValueError:
        if not Path(said).is_file():
            raise UserError(f"--gate={said} is neither a number of nats nor a file of "
                             "gate.py's") from None
    found, marker_D = read_json(Path(said)), quiet.end_thought.detach().float().cpu()
    try:
        probe_D, theirs_D = (torch.tensor(found[name]) for name in ("probe", "end_thought"))
        gate = Gate(float(found["threshold"]), probe_D, float(found["bias"]))
    except (KeyError, TypeError, ValueError, RuntimeError):
        raise UserError(f"{said} is not a gate that gate.py writes: fit one (gate.py)") from None
    if not (probe_D.shape == theirs_D.shape == marker_D.shape                # or rounded to bf16
            and torch.allclose(theirs_D, marker_D, rtol=1e-2, atol=1e-4)):
        raise UserError(f"{said} is of another checkpoint: fit one on this (gate.py)")
    return gate


def row_streams(seed: int, rows) -> list[np.random.Generator]:
    """Each row's own random numbers: the same alone, or in any batch."""
    return [np.random.default_rng([seed, RNG_SAMPLING, row]) for row in rows]


def sample_next(logits_BV, uniform_B, temperature: float, top_k: int = 0, top_p: float = 1.0):
    """One token a row: the likeliest at temperature 0, else what `uniform_B` in [0, 1) picks from
    the likeliest that hold `top_p` of the probability, at most `top_k` of them (0: any)."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    p_BV, token_BV = (logits_BV / temperature).softmax(-1).sort(descending=True, stable=True)
    kept_BV = p_BV.cumsum(-1) - p_BV < top_p                # what precedes holds less: the first is
    kept_BV[:, top_k or p_BV.shape[1]:] = False             # always kept
    below_BV = (p_BV * kept_BV).cumsum(-1)
    total_B1 = below_BV[:, -1:]
    mark_B1 = torch.minimum(uniform_B[:, None] * total_B1,  # strictly below the total: p > 0 there
                            torch.nextafter(total_B1, total_B1 * 0))
    found_B1 = torch.searchsorted(below_BV, mark_B1, right=True).clamp(max=p_BV.shape[1] - 1)
    return token_BV.gather(1, found_B1)[:, 0]


class Generator:
    """B texts that grow by a token a call. `model` is a QuietSTaR, or a Mistral that cannot think.

    ids_BL is right-padded, length_B says how much of each row is text (at least one token); up to
    `max_new` tokens can follow. Thoughts are greedy; visible tokens are chosen as `sample_next`
    says. The numbers that draw them come from `generator`, or from `streams`, one for each row:
    then no text depends on its neighbours. Without a `gate` every token is thought about; without
    `think` none is. `compiled`: torch.compile and CUDA graphs, for many tokens on a GPU.
    """
    @torch.no_grad()
    def __init__(self, model, ids_BL, length_B, max_new: int, temperature: float = 1.0,
                 top_k: int = 0, generator: torch.Generator | None = None, think: bool = True,
                 top_p: float = 1.0, streams: list[np.random.Generator] | None = None,
                 gate: Gate | None = None, compiled: bool = False):
        self.quiet = model if isinstance(model, QuietSTaR) and think else None
        self.model, self.mistral = model, model.model if isinstance(model, QuietSTaR) else model
        self.choice, self.gate = (temperature, top_k, top_p), gate
        self.generator, self.streams = generator, streams
        self.n_thought = self.quiet.config.thought_len + 2 if self.quiet else 0
        slots = ids_BL.shape[1] + max_new + self.n_thought
        if slots > self.mistral.config.max_seq_len:
            context = f"{self.mistral.config.max_seq_len} with {self.n_thought} kept for thoughts"
            raise UserError(f"prompt is {ids_BL.shape[1]} tokens, {max_new} more are asked for, "
                             f"context is {context}: shorten the prompt or lower --max_new_tokens")
        weight, self.position_B1 = self.mistral.embed.weight, length_B[:, None] - 1
        if compiled:                          # few sizes: each is compiled anew
            slots = max(256, 1 << (slots - 1).bit_length())
        self.cache = KVCache(self.mistral.config, len(ids_BL), slots, weight.device, weight.dtype)
        self.transform, self.compiled = self.mistral.transform, compiled
        every_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device).expand_as(ids_BL)
        self.longest, self.last_B1 = ids_BL.shape[1], ids_BL.gather(1, self.position_B1)
        # fill the cache; the last token is read again
        self._read(self.mistral.embed(ids_BL), every_BL, self.cache)
        if compiled:
            self.transform = torch.compile(self.mistral.transform, **COMPILED)
            for store in (self.cache.k_BKLE, self.cache.v_BKLE):
                torch._dynamo.mark_static_address(store)     # graphs write to it where it lies

    def _read(self, x_BSD, position_BS, cache):
        """One pass over new tokens at their positions; hidden states."""
        length = None if self.compiled else self.longest + self.n_thought
        hidden_BSD = self.transform(x_BSD, CausalContext(position_BS, cache, length))
        return hidden_BSD.clone() if self.compiled else hidden_BSD     # the next pass overwrites it

    @torch.no_grad()
    def step(self) -> StepOutput:
        thinks_B, base_BD, base_logits_BV, started_bD = self._begin()
        thought_len = self.quiet.config.thought_len if self.quiet else 0
        thought_BT = base_BD.new_full((len(base_BD), thought_len), -1, dtype=torch.long)
        weight_B, logits_BV = base_BD.new_zeros(len(base_BD)), base_logits_BV.clone()
        if thinks_B.any():
            after_bD, thought_BT[thinks_B] = self._think(thinks_B, started_bD)
            base_bD = base_BD[thinks_B]
            weight_b1 = self.quiet.mixing_head(torch.cat((base_bD, after_bD), dim=-1))
            weight_B[thinks_B] = weight_b1[:, 0]
            logits_BV[thinks_B] = logits_without_markers(self.model, mix(base_bD, after_bD, weight_b1))
        token_B = sample_next(logits_BV, self._uniform(len(logits_BV)), *self.choice)
        base_logp_BV, logp_BV = base_logits_BV.log_softmax(-1), logits_BV.log_softmax(-1)
        gain_BV = logp_BV - base_logp_BV
        self.last_B1, self.position_B1 = token_B[:, None], self.position_B1 + 1
        self.longest += 1
        return StepOutput(token_B, weight_B, gain_BV.gather(1, token_B[:, None])[:, 0], thought_BT,
                       thinks_B, base_logp_BV, logp_BV)

    def _begin(self):
        """Which of the B texts think; base state and logits of all; of the b that think, the state
        at the start marker, if it was read in the same pass: without a gate."""
        x_B1D, B = self.mistral.embed(self.last_B1), len(self.last_B1)
        if self.quiet and self.gate is None:
            x_BSD = torch.cat((x_B1D, self.quiet.start_thought.expand(B, 1, -1)), dim=1)
            position_BS = torch.cat((self.position_B1, self.position_B1 + 1), dim=1)
            base_BD, started_BD = self._read(x_BSD, position_BS, self.cache).unbind(1)
            everyone_B = torch.ones(B, dtype=torch.bool, device=base_BD.device)
            return everyone_B, base_BD, logits_without_markers(self.model, base_BD), started_BD
        base_BD = self._read(x_B1D, self.position_B1, self.cache)[:, 0]
        logits_BV = logits_without_markers(self.model, base_BD)
        thinks_B = (self.gate.opens(base_BD, logits_BV) if self.quiet else
                    torch.zeros(B, dtype=torch.bool, device=base_BD.device))
        return thinks_B, base_BD, logits_BV, None

    def _uniform(self, B: int):
        device = self.last_B1.device
        if self.streams is None:
            return torch.rand(B, generator=self.generator, device=device)
        return torch.tensor([s.random(dtype=np.float32) for s in self.streams], device=device)

    def _think(self, thinks_B, state_bD):
        """The state after a greedy thought behind each text that thinks, and the thought."""
        quiet, position_b1 = self.quiet, self.position_B1[thinks_B]
        start_b1D, end_b1D = (marker.expand(len(position_b1), 1, -1)
                              for marker in (quiet.start_thought, quiet.end_thought))
        cache, position_bS = self.cache.rows(thinks_B), position_b1 + 1
        T, thought = quiet.config.thought_len, []
        if state_bD is None:
            state_bD = self._read(start_b1D, position_bS, cache)[:, -1]
        for t in range(T):
            token_b, _ = sample_tokens(state_bD, self.mistral.head.weight, None,
                                       quiet.config.marker_ids)
            thought.append(token_b)
            x_bSD = start_b1D if quiet.config.filler else self.mistral.embed(token_b[:, None])
            position_bS = position_bS[:, -1:] + 1
            if t == T - 1:
                x_bSD = torch.cat((x_bSD, end_b1D), dim=1)
                position_bS = torch.cat((position_bS, position_bS + 1), dim=1)
            state_bD = self._read(x_bSD, position_bS, cache)[:, -1]
        if T == 0:
            state_bD = self._read(end_b1D, position_bS + 1, cache)[:, -1]
        return state_bD, torch.stack(thought, 1) if T else position_b1[:, :0]

    def keep(self, rows_B):
        """Go on with these texts alone, each of which has its own draws (`streams`); eagerly."""
        self.streams = [s for s, stays in zip(self.streams, rows_B.tolist()) if stays]
        self.cache, self.last_B1 = self.cache.rows(rows_B), self.last_B1[rows_B]
        self.position_B1 = self.position_B1[rows_B]
