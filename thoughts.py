"""Quiet-STaR: a thought before every token, learnt from what it does to the text.

From arXiv 2403.09629.

Three verbs are the algorithm, and `QuietSTaR.forward` says them in this order:

  think   sample a short hidden thought off every position of the text, all positions in parallel
  grade   read on, from the end of each thought, the true tokens that follow in the text
  learn   mix the prediction after the thought with the one without; thoughts that raised the
          likelihood of the true future text more than their siblings did are made more likely

The glossary, once for all files (the paper's word, the official code's):

  thought_len      T: sampled tokens in a thought, markers not counted        (t, n_ahead - 3)
  n_thoughts       N: thoughts per position; their mean reward is the baseline (-, n_passes)
  n_true           A: true tokens a thought is scored on, the next included   (n_true, n_ahead_talk)
  start/end_thought  the two marker embeddings, in no vocabulary             (start_embedding * 100)
  base, mixed      prediction without a thought, and with it mixed in         (p_init, p_talk)
  mixing_weight    0 is base only, 1 is thought only                 (1 - w of the paper, talk_head)
  reward           nats by which the thought raised the true tokens' log-likelihood       (r, -)
  advantage        reward minus its mean over the N thoughts, never below 0

What differs from the official code, none of it in the result (tests/test_golden.py): N thoughts
share the text; attention is computed in two small parts, not under one large mask; logits are never
kept; thoughts can be sampled first, without gradients, and all be graded in one pass (`two_phase`).

Shapes: those of model.py, and
  N thoughts per position   P positions that think   T thought tokens   A true tokens   G = H / K
  M = T + A + 1 tokens branch off a position: start, thought, end, then A - 1 true tokens

Read next: train.py
"""
import math
from dataclasses import dataclass

import torch
from torch import nn

from config import UserError
from attention import GrowingContext, PackedContext
from lm_head import sample_tokens, chunked_cross_entropy
from model import Mistral


@dataclass(frozen=True)
class ThoughtConfig:
    """The defaults are the paper's for Mistral-7B."""
    thought_len: int = 12             # sampled tokens in a thought; the paper trains 8 to 24
    n_thoughts: int = 2               # thoughts per position in training
    n_true: int = 4                   # true tokens that a thought is scored on
    policy_weight: float = 1e6        # of the REINFORCE term; the official code's
    policy_temperature: float = 3.0   # of the softmax inside REINFORCE; the official code's
    base_weight: float = 0.5          # of the base likelihood; the mixed one has the rest
    filler: bool = False              # control: thoughts are the start marker, repeated
    marker_ids: tuple[int, ...] = ()  # vocabulary rows that belong to the markers; never sampled

    def __post_init__(self):
        for name, least in (("thought_len", 0), ("n_thoughts", 1), ("n_true", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} is below {least}")


# ------------------------------------------------------------------------------------ small pieces

def mix(base, thought, weight):
    """weight 0 returns base (the pretrained model); weight 1 returns thought."""
    return (1 - weight) * base + weight * thought


def true_tokens(ids_BL, valid_BL, position_BP, n_true: int):
    """The next A tokens of each position: ids, and whether they exist to be scored, [B, P, A]."""
    index_BPA = position_BP[:, :, None] + torch.arange(1, n_true + 1, device=ids_BL.device)
    inside_BPA = index_BPA < ids_BL.shape[1]
    flat = index_BPA.clamp(max=ids_BL.shape[1] - 1).flatten(1)
    target_BPA, valid_BPA = (t.gather(1, flat).view_as(index_BPA) for t in (ids_BL, valid_BL))
    return target_BPA, valid_BPA & inside_BPA


def denominators(valid_BL, config: ThoughtConfig, n_positions: int | None = None):
    """How many terms each average of the loss has: [1 + A + 1] = base, mixed at each a, policy.

    A step over several micro-batches or ranks adds these up first, so that its averages have one
    denominator. REINFORCE looks at 0 .. L-2-A, one position fewer than have all their true tokens,
    and counts padded ones in its average: both as official. If only `n_positions` of the L-1 think,
    drawn at random, their terms stand for all: the sums shrink by that share, and so do the counts.
    """
    position_BP, L = every_position(valid_BL), valid_BL.shape[1]
    share = 1.0 if n_positions is None else n_positions / (L - 1)
    _, target_mask_BPA = true_tokens(valid_BL, valid_BL, position_BP, config.n_true)
    policy = (position_BP <= L - 2 - config.n_true).sum() * config.thought_len
    terms = torch.cat((target_mask_BPA.sum((0, 1)), policy[None])).double() * config.n_thoughts * share
    return torch.cat((valid_BL[:, 1:].sum()[None].double(), terms))


@dataclass
class Losses:
    """What one forward found; `loss` carries the gradient, the rest carries none."""
    loss: torch.Tensor
    base_nll_BL: torch.Tensor         # [B, L-1] nats, 0 where there is nothing to predict
    mixed_nll_BNPA: torch.Tensor      # nats, 0 where there is nothing to predict
    reward_BNP: torch.Tensor          # nats
    advantage_BNP: torch.Tensor       # nats, 0 where REINFORCE does not look
    mixing_weight_BNPA: torch.Tensor
    thought_BNPT: torch.Tensor        # token ids
    thought_nll_BNP: torch.Tensor        # mean -log p of the sampled tokens: estimates the entropy
    logp_BNPT: torch.Tensor           # at policy_temperature; nan where it was not needed
    loss_policy: torch.Tensor         # before policy_weight
    target_mask_BPA: torch.Tensor          # which predictions exist
    policy_mask_BP: torch.Tensor           # which positions REINFORCE looks at
    terms: torch.Tensor               # the denominators that were used

    def metrics(self) -> dict[str, torch.Tensor]:
        """This batch's share of the step's averages, under their names in log.jsonl."""
        n_rewards = (self.terms[-1] / max(1, self.thought_BNPT.shape[-1])).clamp(min=1)
        learns, scored = self.policy_mask_BP[:, None], self.target_mask_BPA[:, None]
        return {"loss": self.loss.detach(), "loss/policy": self.loss_policy,
                "nll/base": self.base_nll_BL.sum() / self.terms[0].clamp(min=1),
                "nll/mixed": (self.mixed_nll_BNPA.sum((0, 1, 2))
                              / self.terms[1:-1].clamp(min=1)).mean(),
                "thought/reward": (self.reward_BNP * learns).sum() / n_rewards,
                "thought/advantage": self.advantage_BNP.sum() / n_rewards,
                "thought/entropy": (self.thought_nll_BNP * learns).sum() / n_rewards,
                "thought/mixing_weight": (self.mixing_weight_BNPA * scored).sum()
                / self.terms[1:-1].sum().clamp(min=1)}


class QuietSTaR(nn.Module):
    """A language model, two markers and a mixing head."""
    def __init__(self, model: Mistral, config: ThoughtConfig):
        super().__init__()
        self.model, self.config, dim = model, config, model.config.dim
        self.two_phase = False        # sample without gradients, then grade all in one pass
        self.start_thought, self.end_thought = (nn.Parameter(torch.empty(dim)) for _ in range(2))
        self.mixing_head = nn.Sequential(nn.Linear(2 * dim, dim), nn.ReLU(), nn.Linear(dim, dim),
                                         nn.ReLU(), nn.Linear(dim, 1, bias=False))

    def init_thoughts(self, embedding_D, generator: torch.Generator):
        """Markers start as an em dash; the mixing head as torch's default, its last layer at zero,
        so that a fresh QuietSTaR predicts exactly like its base."""
        with torch.no_grad():
            self.start_thought.copy_(embedding_D)
            self.end_thought.copy_(embedding_D)
            for layer in self.mixing_head[0], self.mixing_head[2]:
                bound = 1 / math.sqrt(layer.in_features)
                layer.weight.uniform_(-bound, bound, generator=generator)
                layer.bias.uniform_(-bound, bound, generator=generator)
            self.mixing_head[4].weight.zero_()
        return self

    def forward(self, ids_BL, valid_BL, position_BP=None, uniform_BNPT=None, thought_BNPT=None,
                terms=None, all_logp: bool = False) -> Losses:
        """The training objective of one micro-batch.

        `position_BP`: which positions think, rising; default 0 .. L-2. A random choice estimates
        the same loss at a share of the cost. `uniform_BNPT` in [0, 1) decides the thoughts that are
        not forced. `terms`: `denominators` of the step, default this batch's. `all_logp`: of all.
        """
        c, every = self.config, position_BP is None
        position_BP = every_position(ids_BL) if every else position_BP
        terms = denominators(valid_BL, c, position_BP.shape[1]) if terms is None else terms
        base_BLD, branch_BNPMD, thought_BNPT, thought_nll_BNP = self.think_and_grade(
            ids_BL, position_BP, uniform_BNPT, thought_BNPT, every)
        after_BNPAD = branch_BNPMD[..., c.thought_len + 1:, :]             # from the end marker on
        mixed_BNPAD, weight_BNPA = self.mixed(base_BLD, after_BNPAD, position_BP)

        target_BPA, target_mask_BPA = true_tokens(ids_BL, valid_BL, position_BP, c.n_true)
        loss, base_nll_BL, mixed_nll_BNPA = self.likelihood(
            base_BLD, mixed_BNPAD, ids_BL, valid_BL, target_BPA, target_mask_BPA, terms)
        base_nll_BPA = gather_ahead(base_nll_BL, position_BP, c.n_true) * target_mask_BPA
        reward_BNP = (base_nll_BPA[:, None] - mixed_nll_BNPA).sum(-1)       # nats gained
        policy_mask_BP = position_BP <= ids_BL.shape[1] - 2 - c.n_true
        baseline_B1P = reward_BNP.mean(dim=1, keepdim=True)                 # dim 1 = thoughts
        advantage_BNP = (reward_BNP - baseline_B1P).clamp(min=0) * policy_mask_BP[:, None]
        loss_policy, logp_BNPT = self.policy(branch_BNPMD, thought_BNPT, advantage_BNP, terms,
                                             all_logp)
        return Losses(loss + c.policy_weight * loss_policy, base_nll_BL, mixed_nll_BNPA,
                       reward_BNP, advantage_BNP, weight_BNPA.detach(), thought_BNPT, thought_nll_BNP,
                       logp_BNPT, loss_policy.detach(), target_mask_BPA, policy_mask_BP, terms)

    # -------------------------------------------------------------------------------- think

    @torch.no_grad()
    def think(self, ids_BL, position_BP, uniform_BNPT, every: bool):
        """The first of two phases: all thoughts, in T single-token passes, and their surprise."""
        context = GrowingContext(ids_BL.shape[1], position_BP, every)
        self.model(ids_BL, context)
        return self._grow(context, uniform_BNPT, self.config.n_thoughts)

    def _grow(self, context, uniform_BNPT, n_thoughts: int, states: list | None = None):
        """From the start marker on, one token a pass; the last one is chosen but not yet read.
        The states before each token, [B, N, P, 1, D], are added to `states`."""
        (B, P), N, T = context.think_position_BP.shape, n_thoughts, self.config.thought_len
        thought_BNPT = torch.zeros(B, N, P, T, dtype=torch.long, device=self.start_thought.device)
        thought_nll_BNP = torch.zeros(B, N, P, device=self.start_thought.device)
        x_BNP1D = self.start_thought.expand(B, 1, P, 1, -1)              # one for all N thoughts
        for t in range(T if not self.config.filler else 0):
            hidden_BNP1D = self._read(context, x_BNP1D).expand(-1, N, -1, -1, -1)
            uniform_R = None if uniform_BNPT is None else uniform_BNPT[..., t].flatten()
            token_R, thought_nll_R = sample_tokens(hidden_BNP1D.flatten(0, 3), self.model.head.weight,
                                                uniform_R, self.config.marker_ids)
            thought_BNPT[..., t] = token_R.view(B, N, P)
            thought_nll_BNP += thought_nll_R.view(B, N, P) / T
            if states is not None:
                states.append(hidden_BNP1D)
            x_BNP1D = self.model.embed(token_R.view(B, N, P, 1))
        return thought_BNPT, thought_nll_BNP

    def _read(self, context, x_BNPmD):
        """States of the next m tokens of each thought, of one for all N while they are alike."""
        _, n_thoughts, _, new, _ = x_BNPmD.shape
        hidden_BSD = self.model.transform(x_BNPmD.flatten(1, 3), context.advance(new, n_thoughts))
        return hidden_BSD.view(x_BNPmD.shape)

    # -------------------------------------------------------------------------------- grade

    def embed_branch(self, thought_BNPT, ahead_BPa=None):
        """start, thought, end and true tokens as embeddings, [B, N, P, M, D]."""
        start, end = (marker.expand(*thought_BNPT.shape[:3], 1, -1)
                      for marker in (self.start_thought, self.end_thought))
        inner = (self.start_thought.expand(*thought_BNPT.shape, -1) if self.config.filler
                 else self.model.embed(thought_BNPT))
        ahead = () if ahead_BPa is None else (
            self.model.embed(ahead_BPa)[:, None].expand(-1, thought_BNPT.shape[1], -1, -1, -1),)
        return torch.cat((start, inner, end, *ahead), dim=3)

    def grade(self, ids_BL, position_BP, thought_BNPT, every: bool):
        """The second of two phases, in one pass: states of the text, and of what hangs off it."""
        ahead_BPa, _ = true_tokens(ids_BL, ids_BL >= 0, position_BP, self.config.n_true - 1)
        branch_BNPMD = self.embed_branch(thought_BNPT, ahead_BPa)
        L, shape = ids_BL.shape[1], branch_BNPMD.shape[1:4]
        x_BSD = torch.cat((self.model.embed(ids_BL), branch_BNPMD.flatten(1, 3)), dim=1)
        hidden_BSD = self.model.transform(x_BSD, PackedContext(L, position_BP, shape[0], shape[2],
                                                               every))
        return hidden_BSD[:, :L], hidden_BSD[:, L:].unflatten(1, shape)

    def think_and_grade(self, ids_BL, position_BP, uniform_BNPT, thought_BNPT, every: bool):
        """States of the text and of what hangs off it, the thoughts, and their surprise. One phase
        reads each token once, with gradients: up to a fifth cheaper. But a block runs T + 2 times
        before its backward, and its context remembers: no activation checkpointing, and fsdp would
        exchange gradients after each of those passes."""
        thought_nll_BNP = torch.zeros(())                     # of thoughts that are forced
        if thought_BNPT is None and (self.two_phase or self.model.recompute):
            thought_BNPT, thought_nll_BNP = self.think(ids_BL, position_BP, uniform_BNPT, every)
        if thought_BNPT is not None:
            return *self.grade(ids_BL, position_BP, thought_BNPT, every), thought_BNPT, thought_nll_BNP
        c, context = self.config, GrowingContext(ids_BL.shape[1], position_BP, every)
        base_BLD, states = self.model(ids_BL, context), []
        thought_BNPT, thought_nll_BNP = self._grow(context, uniform_BNPT, c.n_thoughts, states)
        ahead_BPa, _ = true_tokens(ids_BL, ids_BL >= 0, position_BP, c.n_true - 1)
        states.append(self._read_on(context, thought_BNPT, ahead_BPa))
        return base_BLD, torch.cat(states, dim=3), thought_BNPT, thought_nll_BNP

    def _read_on(self, context, thought_BNPT, ahead_BPa=None):
        """States of what is unread of each thought, up to its end marker, and of what follows."""
        said = context.until              # start, and every token of the thought but the last
        x_BNPmD = self.embed_branch(thought_BNPT[..., max(0, said - 1):], ahead_BPa)
        return self._read(context, x_BNPmD[:, :, :, min(1, said):])

    # -------------------------------------------------------------------------------- learn

    def mixed(self, base_BLD, after_BNPAD, position_BP):
        """Mix each state after a thought with the base state of the same text position."""
        base_BPAD = gather_ahead(base_BLD, position_BP, after_BNPAD.shape[3])
        base_BNPAD = base_BPAD[:, None].expand_as(after_BNPAD)
        weight_BNPA1 = self.mixing_head(torch.cat((base_BNPAD, after_BNPAD), dim=-1))
        return mix(base_BNPAD, after_BNPAD, weight_BNPA1), weight_BNPA1[..., 0]

    def likelihood(self, base_BLD, mixed_BNPAD, ids_BL, valid_BL, target_BPA, target_mask_BPA, terms):
        """Both likelihood terms in one visit to the head: their loss; each nll, no gradient."""
        c, scored_BL, target_mask_BNPA = self.config, valid_BL[:, 1:], target_mask_BPA[:, None].expand(
            mixed_BNPAD.shape[:-1])
        weight_A = (1 - c.base_weight) / (c.n_true * terms[1:-1].clamp(min=1)).float()
        hidden_RD = torch.cat((base_BLD[:, :-1][scored_BL], mixed_BNPAD[target_mask_BNPA]))
        target_R = torch.cat((ids_BL[:, 1:][scored_BL],
                              target_BPA[:, None].expand_as(target_mask_BNPA)[target_mask_BNPA]))
        weight_R = torch.cat(((c.base_weight / terms[0]).float().expand_as(scored_BL)[scored_BL],
                              weight_A.expand_as(target_mask_BNPA)[target_mask_BNPA]))
        loss, nll_R = chunked_cross_entropy(hidden_RD, self.model.head.weight, target_R, weight_R)
        n_base = int(scored_BL.sum())
        return loss, spread(nll_R[:n_base], scored_BL), spread(nll_R[n_base:], target_mask_BNPA)

    def policy(self, branch_BNPMD, thought_BNPT, advantage_BNP, terms, all_logp):
        """REINFORCE, only where there is an advantage: the other rows never see the head."""
        c = self.config
        chosen_BNP = (advantage_BNP > 0) | all_logp
        if c.filler:
            chosen_BNP = torch.zeros_like(chosen_BNP)
        chosen_BNPT = chosen_BNP[..., None].expand_as(thought_BNPT)
        before_BNPTD = branch_BNPMD[..., :c.thought_len, :]   # the state before each thought token
        weight_R = advantage_BNP[..., None].expand_as(chosen_BNPT)[chosen_BNPT]
        weight_R = weight_R / terms[-1].clamp(min=1).float()
        loss, nll_R = chunked_cross_entropy(before_BNPTD[chosen_BNPT], self.model.head.weight,
                                   thought_BNPT[chosen_BNPT], weight_R, c.policy_temperature,
                                   c.marker_ids)
        return loss, spread(-nll_R, chosen_BNPT, torch.nan)       # ascend on thoughts that helped

    # -------------------------------------------------------------------------------- use

    @torch.no_grad()
    def predict(self, ids_BL, position_BP=None, uniform_BNPT=None, thought_BNPT=None):
        """What the model expects next at the given positions (default: all), after a thought each.

        Greedy thoughts (a true argmax) unless `uniform_BNPT` decides or `thought_BNPT` forces them;
        N is theirs, else 1. Returns base_BPD and mixed_BNPD (states for the head, without the look
        ahead), mixing_weight_BNP and thought_BNPT.
        """
        decided = uniform_BNPT if thought_BNPT is None else thought_BNPT
        n_thoughts = 1 if decided is None else decided.shape[1]
        every = position_BP is None
        position_BP = every_position(ids_BL, last=True) if every else position_BP
        context = GrowingContext(ids_BL.shape[1], position_BP, every)
        base_BLD = self.model(ids_BL, context)
        if thought_BNPT is None:
            thought_BNPT, _ = self._grow(context, uniform_BNPT, n_thoughts)
        after_BNPAD = self._read_on(context, thought_BNPT)[..., -1:, :]
        mixed_BNPAD, weight_BNPA = self.mixed(base_BLD, after_BNPAD, position_BP)
        base_BPD = gather_ahead(base_BLD, position_BP, 1)[:, :, 0]
        return base_BPD, mixed_BNPAD[..., 0, :], weight_BNPA[..., 0], thought_BNPT


def logits_without_markers(model, hidden_RD):
    """Of what may come next in a text, fp32: rows of the vocabulary that belong to markers are out.

    `model`: a QuietSTaR, a Mistral, or anything else with a `.model` that is one.
    """
    head_VD = (model if isinstance(model, Mistral) else model.model).head.weight
    logits_RV = nn.functional.linear(hidden_RD, head_VD.to(hidden_RD.dtype)).float()
    if isinstance(model, QuietSTaR):
        logits_RV[:, list(model.config.marker_ids)] = -torch.inf
    return logits_RV


def gather_ahead(x_BL, position_BP, n_true: int):
    """The text's values (or vectors) at positions j .. j+A-1 of each thinker j, [B, P, A, ...].

    Past the end of `x_BL` the last one is repeated; nothing is scored there.
    """
    index_BPA = position_BP[:, :, None] + torch.arange(n_true, device=position_BP.device)
    row_B11 = torch.arange(len(x_BL), device=position_BP.device)[:, None, None]
    return x_BL[row_B11, index_BPA.clamp(max=x_BL.shape[1] - 1)]


def spread(value_R, where, fill: float = 0.0):
    """Values back to the places they were selected from."""
    return torch.full(where.shape, fill, device=value_R.device).masked_scatter(where, value_R)


def every_position(ids_BL, last: bool = False):
    """0 .. L-2 for each text, the positions with something to predict; `last` adds L-1."""
    length = ids_BL.shape[1] - (not last)
    return torch.arange(length, device=ids_BL.device).expand(len(ids_BL), -1)


def base_model(model) -> Mistral:
    """Return the language model inside: `model` itself, or that of a QuietSTaR."""
    return model.model if isinstance(model, QuietSTaR) else model
