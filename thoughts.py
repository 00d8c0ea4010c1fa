"""Quiet-STaR (arXiv 2403.09629): a language model that thinks before every token.

`QuietSTaR.forward` is the training objective, four steps in the order of the paper:

  1. sample   a short hidden thought after every position of the text, all positions in parallel
  2. read     one teacher-forced pass over the text, the thoughts and the true tokens after them
  3. mix      the prediction after each thought with the prediction without it
  4. learn    from the likelihood of the text, and by REINFORCE: a thought that raised it more than
              the others of its position did becomes more likely

  our word         meaning                                             the paper's, official code's
  thought_len      T: sampled tokens of a thought, without markers             t, n_ahead - 3
  n_thoughts       N: thoughts per position; mean reward is the baseline       -, n_passes
  n_true           A: true tokens a thought is scored on, next one included    n_true, n_ahead_talk
  base, mixed      prediction without a thought, and mixed with one            p_init, p_talk
  mixing_weight    0: base only, 1: thought only                               1 - w, talk_head
  reward           nats by which a thought raised the log-likelihood of the true tokens; those
                   further ahead may count less (`discount`)
  advantage        reward minus the mean over all N thoughts of the position, clamped at 0; or
                   minus the mean over the N - 1 others, with its sign
  branch           M = T + A + 1 tokens of a position: start marker, thought, end marker, true ones

Shapes: those of model.py, N, T, A and M as above, and P positions that think.
"""
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import torch
from torch import nn

from attention import GrowingContext, PackedContext
from config import check_ranges
from lm_head import chunked_cross_entropy, entropy_of, logits_of, sample_tokens
from model import CausalContext, Mistral


@dataclass(frozen=True)
class ThoughtConfig:
    """The defaults are those of the official code for Mistral-7B."""
    thought_len: int = 12             # sampled tokens of a thought; the paper trains 8 to 24
    n_thoughts: int = 2               # thoughts per position in training
    n_true: int = 4                   # true tokens that a thought is scored on
    policy_weight: float = 1e6        # weight of the REINFORCE loss (official code)
    policy_temperature: float = 3.0   # temperature of the softmax in REINFORCE (official code)
    base_weight: float = 0.5          # weight of the base likelihood; the mixed one has the rest
    advantage: Literal["clamped", "leave_one_out"] = "clamped"  # official, or signed and unbiased
    discount: float = 1.0             # factor of the reward for each true token further ahead
    filler: bool = False              # control experiment: every thought token is the start marker
    marker_ids: tuple[int, ...] = ()  # vocabulary rows of the markers, if any; never sampled

    def __post_init__(self):
        check_ranges(self, thought_len=(0, 4096), n_thoughts=(1, 4096), n_true=(1, 4096),
                     policy_weight=(0, 1e9), policy_temperature=(1e-3, 1000), base_weight=(0, 1),
                     discount=(0, 1))


@dataclass
class Losses:
    """The result of one forward pass."""
    loss: torch.Tensor                # carries the gradient; the others carry none
    policy_loss: torch.Tensor         # before policy_weight
    base_nll_BL: torch.Tensor         # nats, [B, L-1], 0 at padding
    mixed_nll_BNPA: torch.Tensor      # nats, 0 where there is no token to predict
    reward_BNP: torch.Tensor          # nats
    advantage_BNP: torch.Tensor       # nats, 0 outside policy_mask_BP
    mixing_weight_BNPA: torch.Tensor
    thought_BNPT: torch.Tensor        # token ids
    thought_nll_BNP: torch.Tensor     # mean over T; estimates the entropy of the thoughts
    target_mask_BPA: torch.Tensor     # which true tokens exist
    policy_mask_BP: torch.Tensor      # which positions REINFORCE looks at
    denominators: torch.Tensor        # see the function `denominators`

    def metrics(self) -> dict[str, torch.Tensor]:
        """Terms that add up over micro-batches and ranks to the averages of a step in log.jsonl."""
        n_base, n_mixed_A, n_rewards = split_denominators(self.denominators)
        policy_mask = self.policy_mask_BP[:, None]
        sum_of_weights = (self.mixing_weight_BNPA * self.target_mask_BPA[:, None]).sum()
        n_weights = self.denominators[1:-1].sum().clamp(min=1e-9)      # never 0 / 0
        return {
            "loss": self.loss.detach(),
            "loss/policy": self.policy_loss,
            "nll/base": self.base_nll_BL.sum() / n_base,
            "nll/mixed": (self.mixed_nll_BNPA.sum(dim=(0, 1, 2)) / n_mixed_A).mean(),
            "thought/reward": (self.reward_BNP * policy_mask).sum() / n_rewards,
            "thought/advantage": self.advantage_BNP.sum() / n_rewards,
            "thought/entropy": (self.thought_nll_BNP * policy_mask).sum() / n_rewards,
            "thought/mixing_weight": sum_of_weights / n_weights}


class QuietSTaR(nn.Module):
    """A language model, two marker embeddings and a mixing head."""
    def __init__(self, model: Mistral, config: ThoughtConfig):
        super().__init__()
        dim = model.config.dim
        self.model, self.config = model, config
        self.start_thought = nn.Parameter(torch.empty(dim))
        self.end_thought = nn.Parameter(torch.empty(dim))
        self.mixing_head = nn.Sequential(
            nn.Linear(2 * dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(),
            nn.Linear(dim, 1, bias=False))

    @torch.no_grad()
    def init_thoughts(self, embedding_D, generator: torch.Generator):
        """Initialise the markers with an em dash's embedding, as the paper does, and the mixing
        head as torch does, but its last layer with zero: a fresh model predicts like its base."""
        self.start_thought.copy_(embedding_D)
        self.end_thought.copy_(embedding_D)
        for layer in (self.mixing_head[0], self.mixing_head[2]):
            bound = 1 / math.sqrt(layer.in_features)
            layer.weight.uniform_(-bound, bound, generator=generator)
            layer.bias.uniform_(-bound, bound, generator=generator)
        self.mixing_head[4].weight.zero_()
        return self

    def forward(self, ids_BL, valid_BL, position_BP=None, uniform_BNPT=None, thought_BNPT=None,
                counts=None, n_chosen=None, probe_D=None) -> Losses:
        """The training objective of one micro-batch.

        valid_BL      which tokens are text; the others are padding
        position_BP   positions that think, rising; default 0 .. L-2
        uniform_BNPT  numbers in [0, 1) that decide the sampled tokens; default: argmax
        thought_BNPT  thoughts to use instead of sampling
        counts        `denominators` of the whole step; default: of this micro-batch
        n_chosen      think at so many positions of each text, where the base is least certain
        probe_D       instead, where this probe of the base state is highest (tools/gate.py)"""
        cfg, head_VD = self.config, self.model.head.weight
        # which positions think, and by what the averages over them are divided
        if n_chosen:
            position_BP = self.choose_positions(ids_BL, valid_BL, n_chosen, probe_D)
        all_positions = position_BP is None
        if all_positions:
            position_BP = every_position(ids_BL)
        if counts is None:
            counts = denominators(valid_BL, cfg, position_BP.shape[1])
        n_base, n_mixed_A, n_rewards = split_denominators(counts)

        # 1. sample a thought after every position, all in parallel
        # 2. read text, thoughts and true tokens in one teacher-forced pass
        base_BLD, branch_BNPMD, thought_BNPT, thought_nll_BNP = self.sample_and_read(
            ids_BL, position_BP, uniform_BNPT, thought_BNPT, all_positions)
        before_BNPTD = branch_BNPMD[..., :cfg.thought_len, :]        # predict the thought tokens
        after_BNPAD = branch_BNPMD[..., cfg.thought_len + 1:, :]     # predict the true tokens

        # 3. mix both predictions of the same true token
        base_BPAD = gather_ahead(base_BLD, position_BP, cfg.n_true)
        mixed_BNPAD, mixing_weight_BNPA = self.mix(base_BPAD[:, None], after_BNPAD)

        # 4. learn: the likelihood of the text, without and with thoughts
        target_BPA, target_mask_BPA = true_tokens(ids_BL, valid_BL, position_BP, cfg.n_true)
        base_loss, base_nll_BL = masked_cross_entropy(
            base_BLD[:, :-1], head_VD, target=ids_BL[:, 1:], mask=valid_BL[:, 1:],
            weight=cfg.base_weight / n_base)
        mixed_loss, mixed_nll_BNPA = masked_cross_entropy(
            mixed_BNPAD, head_VD, target=target_BPA[:, None], mask=target_mask_BPA[:, None],
            weight=(1 - cfg.base_weight) / (cfg.n_true * n_mixed_A))

        #    the reward of a thought: nats gained on the true tokens, compared with all N thoughts
        base_nll_BPA = gather_ahead(base_nll_BL, position_BP, cfg.n_true) * target_mask_BPA
        gain_BNPA = base_nll_BPA[:, None] - mixed_nll_BNPA
        discount_A = cfg.discount ** torch.arange(cfg.n_true, device=ids_BL.device)
        reward_BNP = (gain_BNPA * discount_A).sum(dim=-1)
        baseline_B1P = reward_BNP.mean(dim=1, keepdim=True)          # dim 1: thoughts
        policy_mask_BP = position_BP <= ids_BL.shape[1] - 2 - cfg.n_true     # as the official code
        advantage_BNP = (reward_BNP - baseline_B1P) * policy_mask_BP[:, None]
        if cfg.advantage == "clamped":
            advantage_BNP = advantage_BNP.clamp(min=0)
        else:                                            # against the mean of the others
            N = reward_BNP.shape[1]
            advantage_BNP = advantage_BNP * (N / max(1, N - 1))

        #    REINFORCE: raise log p of the thoughts that helped, in proportion to the advantage
        learns_BNP = (advantage_BNP != 0) & (not cfg.filler)
        policy_loss, _ = masked_cross_entropy(
            before_BNPTD, head_VD, target=thought_BNPT, mask=learns_BNP[..., None],
            weight=advantage_BNP[..., None] / (n_rewards * max(1, cfg.thought_len)),
            temperature=cfg.policy_temperature, masked_ids=cfg.marker_ids)

        return Losses(
            loss=base_loss + mixed_loss + cfg.policy_weight * policy_loss,
            policy_loss=policy_loss.detach(), base_nll_BL=base_nll_BL,
            mixed_nll_BNPA=mixed_nll_BNPA, reward_BNP=reward_BNP, advantage_BNP=advantage_BNP,
            mixing_weight_BNPA=mixing_weight_BNPA.detach(), thought_BNPT=thought_BNPT,
            thought_nll_BNP=thought_nll_BNP, target_mask_BPA=target_mask_BPA,
            policy_mask_BP=policy_mask_BP, denominators=counts)

    @torch.no_grad()
    def choose_positions(self, ids_BL, valid_BL, n: int, probe_D=None):
        """The n positions of each text, rising, whose base prediction has the highest entropy or,
        given a probe, the highest expected gain, [B, n]; those without a next token come last."""
        hidden_BLD = self.model(ids_BL, CausalContext(every_position(ids_BL, last=True)))
        hidden_RD = hidden_BLD[:, :-1].flatten(0, 1)
        if probe_D is None:
            score_R = entropy_of(hidden_RD, self.model.head.weight)
        else:
            score_R = (hidden_RD.float() * probe_D.to(hidden_RD.device)).sum(dim=-1)
        has_next_BP = valid_BL[:, 1:]
        score_BP = score_R.view(has_next_BP.shape).masked_fill(~has_next_BP, -torch.inf)
        highest_first_BP = score_BP.argsort(dim=1, descending=True, stable=True)
        return highest_first_BP[:, :n].sort(dim=1).values

    def sample_and_read(self, ids_BL, position_BP, uniform_BNPT, thought_BNPT, all_positions: bool):
        """Steps 1 and 2: final hidden states of the text [B, L, D] and of the branches
        [B, N, P, M, D], the thoughts, and their mean nll (0 where they were given)."""
        thought_nll_BNP = torch.zeros(())
        if thought_BNPT is None:
            with torch.no_grad():
                context = GrowingContext(ids_BL.shape[1], position_BP, all_positions)
                self.model(ids_BL, context)
                thought_BNPT, thought_nll_BNP, _ = self.sample_thoughts(
                    context, uniform_BNPT, self.config.n_thoughts)
        base_BLD, branch_BNPMD = self.read(ids_BL, position_BP, thought_BNPT, all_positions,
                                           n_after=self.config.n_true - 1)
        return base_BLD, branch_BNPMD, thought_BNPT, thought_nll_BNP

    def sample_thoughts(self, context: GrowingContext, uniform_BNPT, n_thoughts: int):
        """All thoughts grow together after the text that `context` has read, one token a pass.
        Returns ids [B, N, P, T], mean nll (nats), and the state before each id, [B, N, P, 1, D]."""
        N, T = n_thoughts, self.config.thought_len
        B, P = context.think_position_BP.shape
        thought_BNPT = self.start_thought.new_zeros(B, N, P, T, dtype=torch.long)
        nll_BNP = self.start_thought.new_zeros(B, N, P, dtype=torch.float32)
        states = []
        if self.config.filler:
            return thought_BNPT, nll_BNP, states
        # at the start marker the N thoughts are identical: one copy is computed and shared
        x_BNPD = self.start_thought.expand(B, 1, P, -1)
        for t in range(T):
            # read the newest token of every thought, all positions in one pass
            context.begin_pass(n_new=1, n_thoughts=x_BNPD.shape[1])
            hidden_BSD = self.model.transform(x_BNPD.flatten(1, 2), context)
            hidden_BNPD = hidden_BSD.view(x_BNPD.shape).expand(-1, N, -1, -1)
            # one_pass.py learns from these states; without gradients nobody needs them
            if torch.is_grad_enabled():
                states.append(hidden_BNPD[:, :, :, None])
            # sample the token after it, which the next pass reads
            uniform_R = None if uniform_BNPT is None else uniform_BNPT[..., t].flatten()
            token_R, nll_R = sample_tokens(hidden_BNPD.flatten(0, 2), self.model.head.weight,
                                           uniform_R, self.config.marker_ids)
            thought_BNPT[..., t] = token_R.view(B, N, P)
            nll_BNP += nll_R.view(B, N, P) / T
            x_BNPD = self.model.embed(token_R.view(B, N, P))
        return thought_BNPT, nll_BNP, states

    def read(self, ids_BL, position_BP, thought_BNPT, all_positions: bool, n_after: int):
        """Read in one pass: final hidden states of text [B, L, D] and branches [B, N, P, M, D]."""
        branch_BNPMD = self.embed_branch(ids_BL, position_BP, thought_BNPT, n_after)
        (_, N, P, M, _), L = branch_BNPMD.shape, ids_BL.shape[1]
        # one sequence: the text, then all branches; the context knows who sees whom
        x_BSD = torch.cat((self.model.embed(ids_BL), branch_BNPMD.flatten(1, 3)), dim=1)
        context = PackedContext(L, position_BP, N, M, all_positions)
        hidden_BSD = self.model.transform(x_BSD, context)
        return hidden_BSD[:, :L], hidden_BSD[:, L:].unflatten(1, (N, P, M))

    def read_rest(self, context: GrowingContext, ids_BL, position_BP, thought_BNPT, n_after: int):
        """Final hidden states [B, N, P, m, D] of the m branch tokens that are still unread."""
        branch_BNPMD = self.embed_branch(ids_BL, position_BP, thought_BNPT, n_after)
        rest_BNPmD = branch_BNPMD[:, :, :, context.n_cached:]
        context.begin_pass(n_new=rest_BNPmD.shape[3], n_thoughts=rest_BNPmD.shape[1])
        hidden_BSD = self.model.transform(rest_BNPmD.flatten(1, 3), context)
        return hidden_BSD.view(rest_BNPmD.shape)

    def embed_branch(self, ids_BL, position_BP, thought_BNPT, n_after: int):
        """Embeddings of `start, thought, end, n_after true tokens`, [B, N, P, M, D]."""
        B, N, P, _ = thought_BNPT.shape
        start = self.start_thought.expand(B, N, P, 1, -1)
        end = self.end_thought.expand(B, N, P, 1, -1)
        # the control experiment repeats the start marker instead
        thought = self.model.embed(thought_BNPT)
        if self.config.filler:
            thought = start.expand_as(thought)
        true_BPa = gather_ahead(ids_BL, position_BP + 1, n_after)
        true = self.model.embed(true_BPa)[:, None].expand(-1, N, -1, -1, -1)
        return torch.cat((start, thought, end, true), dim=3)

    def mix(self, base, thought):
        """Mix two states [..., D]: weight 0 gives `base`, weight 1 gives `thought`. Returns the
        mixture and the weight, which nothing bounds."""
        # the head is linear, so mixing states is mixing logits
        base = base.expand_as(thought)
        weight = self.mixing_head(torch.cat((base, thought), dim=-1))
        return (1 - weight) * base + weight * thought, weight[..., 0]

    @torch.no_grad()
    def predict(self, ids_BL, position_BP=None, uniform_BNPT=None, thought_BNPT=None):
        """Predictions of the next token at the given positions (default: all), after a thought: a
        greedy one (argmax) unless `uniform_BNPT` or `thought_BNPT` decides; N is theirs, else 1.
        Returns base_BPD, mixed_BNPD (states for the head), mixing_weight_BNP, thought_BNPT."""
        if position_BP is None:
            position_BP = every_position(ids_BL, last=True)
        all_positions = torch.equal(position_BP, every_position(position_BP, last=True))
        context = GrowingContext(ids_BL.shape[1], position_BP, all_positions)
        base_BLD = self.model(ids_BL, context)
        if thought_BNPT is None:
            n_thoughts = 1 if uniform_BNPT is None else uniform_BNPT.shape[1]
            thought_BNPT, _, _ = self.sample_thoughts(context, uniform_BNPT, n_thoughts)
        rest_BNPmD = self.read_rest(context, ids_BL, position_BP, thought_BNPT, n_after=0)
        # the state at the end marker, which comes last, predicts the next token
        base_BPD = gather_ahead(base_BLD, position_BP, 1)[:, :, 0]
        mixed_BNPD, weight_BNP = self.mix(base_BPD[:, None], rest_BNPmD[..., -1, :])
        return base_BPD, mixed_BNPD, weight_BNP, thought_BNPT


class PlainObjective(nn.Module):
    """Next-token prediction without thoughts: the control, and what pretrains a base."""
    def __init__(self, model: Mistral):
        super().__init__()
        self.model = model

    def forward(self, ids_BL, valid_BL, counts=None):
        """The mean nll as `.loss`; its denominator is counts[0], else that of this micro-batch."""
        n_tokens = valid_BL[:, 1:].sum() if counts is None else counts[0]
        hidden_BLD = self.model(ids_BL, CausalContext(every_position(ids_BL, last=True)))
        loss, _ = masked_cross_entropy(
            hidden_BLD[:, :-1], self.model.head.weight, target=ids_BL[:, 1:],
            mask=valid_BL[:, 1:], weight=1 / n_tokens.clamp(min=1))
        metrics = {"loss": loss.detach(), "nll/base": loss.detach()}
        return SimpleNamespace(loss=loss, metrics=lambda: metrics)


def denominators(valid_BL, config: ThoughtConfig, n_positions: int | None = None):
    """How many terms each average has: [base, mixed at each of A, rewards], float64. A step adds
    these up over its micro-batches and ranks first, so that each average has one denominator.
    Positions 0 .. L-1-A have A true tokens; as in the official code, REINFORCE skips the last one
    and divides by a count that includes padding. If only `n_positions` of the L-1 think, the counts
    shrink by that share: random positions estimate the averages over all, and uncertain ones give
    averages over the hardest tokens, another objective than the paper's."""
    share = 1.0 if n_positions is None else n_positions / (valid_BL.shape[1] - 1)
    # the next tokens of the text; for the thoughts, the true tokens a steps ahead; the thoughts
    n_base = valid_BL[:, 1:].sum()
    n_mixed_A = [valid_BL[:, a:].sum() for a in range(1, config.n_true + 1)]
    n_rewards = torch.ones_like(valid_BL[:, config.n_true + 1:]).sum()
    counts = torch.stack([n_base, *n_mixed_A, n_rewards])
    # a Mac's GPU has no float64
    counts = counts.to(torch.float32 if counts.device.type == "mps" else torch.float64)
    return torch.cat((counts[:1], counts[1:] * config.n_thoughts * share))


def split_denominators(counts):
    """The parts of `denominators` to divide by: n_base, n_mixed_A, n_rewards."""
    # if a count is 0, so is its sum, and this only avoids 0 / 0
    counts = torch.where(counts > 0, counts, 1)
    return counts[0], counts[1:-1], counts[-1]


def masked_cross_entropy(hidden, head_VD, target, mask, weight, **options):
    """sum(weight * nll) over the positions in `mask`, and nll (nats) of each, 0 outside, no grad.
    `hidden` is [..., D]; target, mask and weight broadcast to [...]."""
    # only the rows in the mask see the head
    shape = hidden.shape[:-1]
    target, mask, weight = (t.expand(shape) for t in (target, mask, weight))
    loss, nll_R = chunked_cross_entropy(
        hidden[mask], head_VD, target[mask], weight[mask].float(), **options)
    return loss, nll_R.new_zeros(shape).masked_scatter(mask, nll_R)


def true_tokens(ids_BL, valid_BL, position_BP, n_true: int):
    """The next A tokens after each position: their ids and whether they exist, [B, P, A] each."""
    ids_BPA = gather_ahead(ids_BL, position_BP + 1, n_true)
    # past the end of the text there is nothing to score
    exists_BL = nn.functional.pad(valid_BL, (0, n_true))
    return ids_BPA, gather_ahead(exists_BL, position_BP + 1, n_true)


def gather_ahead(x_BL, position_BP, n_true: int):
    """x at positions j .. j+A-1 of each position j, [B, P, A, ...]; past the end, the last one."""
    index_BPA = position_BP[:, :, None] + torch.arange(n_true, device=position_BP.device)
    row_B11 = torch.arange(len(x_BL), device=position_BP.device)[:, None, None]
    return x_BL[row_B11, index_BPA.clamp(max=x_BL.shape[1] - 1)]


def every_position(ids_BL, last: bool = False):
    """0 .. L-2 for each text, the positions that have a next token; `last` adds L-1."""
    n = ids_BL.shape[1] - (not last)
    return torch.arange(n, device=ids_BL.device).expand(len(ids_BL), -1)


def base_model(model) -> Mistral:
    """The language model inside: `model` itself, or that of a QuietSTaR."""
    return model.model if isinstance(model, QuietSTaR) else model


def logits_without_markers(model, hidden_RD):
    """Logits of the next token of a text, fp32; the markers of thoughts cannot be chosen (-inf)."""
    marker_ids = model.config.marker_ids if isinstance(model, QuietSTaR) else ()
    return logits_of(hidden_RD, base_model(model).head.weight, marker_ids)
