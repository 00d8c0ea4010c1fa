"""Quiet-STaR the obvious way: the oracle that thoughts.py must equal.

The official code's scheme, written from the algorithm alone: the text repeated once per thought,
one pass with gradients per branch token over all positions at once, keys and values concatenated
and repeated for every query head, one dense mask per pass, two full sets of logits after every pass
(its own and the mixed ones), all kept. To generate, every position of the whole prefix thinks again
for every token. It wastes no more than that: no products with one-hot tokens, no masks in floating
point.
"""
import torch
import torch.nn.functional as F

from attention import may_attend


class NaiveContext:
    """The text, then in each pass one branch token of each of its first P positions."""
    def __init__(self, length: int):
        self.at, self.step = torch.arange(length), torch.zeros(length, dtype=torch.long)
        self.query, self.cache = (self.at, self.step), {}

    @property
    def position_BS(self):
        return sum(self.query)[None]

    def begin_pass(self, P: int):
        self.query = torch.arange(P), torch.full((P,), int(self.step[-1]) + 1)
        self.at, self.step = (torch.cat(pair) for pair in zip((self.at, self.step), self.query))
        return self

    def attend(self, q_BSHE, k_BSKE, v_BSKE, layer: int, window: int | None):
        if layer in self.cache:
            new = k_BSKE, v_BSKE
            k_BSKE, v_BSKE = (torch.cat(pair, dim=1) for pair in zip(self.cache[layer], new))
        self.cache[layer] = k_BSKE, v_BSKE
        at, step = (t[:, None] for t in self.query)
        mask = may_attend((at, step), (self.at, self.step), at == self.at, window)
        group = q_BSHE.shape[2] // k_BSKE.shape[2]
        k_BHSE, v_BHSE = (t.repeat_interleave(group, dim=2).transpose(1, 2)
                          for t in (k_BSKE, v_BSKE))
        out_BHSE = F.scaled_dot_product_attention(q_BSHE.transpose(1, 2), k_BHSE, v_BHSE, mask)
        return out_BHSE.transpose(1, 2)


def choose(logits_RPV, uniform_RP=None):
    """The first token whose cumulative probability exceeds the number; without it, the argmax."""
    if uniform_RP is None:
        return logits_RPV.argmax(-1)
    below_RPV = logits_RPV.detach().softmax(-1).cumsum(-1)
    return (below_RPV <= uniform_RP[..., None] * below_RPV[..., -1:]).sum(-1).clamp(
        max=logits_RPV.shape[-1] - 1)


def later(x_RL, a: int, P: int):
    """x at j + a for each of the first P positions j; past the end, values that are not scored."""
    return x_RL.roll(-a, dims=1)[:, :P]


class Passes:
    """The passes over one text (R copies), in turn, and the logits that they leave behind."""
    def __init__(self, quiet, ids_RL, P: int):
        self.quiet, self.context, self.P = quiet, NaiveContext(ids_RL.shape[1]), P
        self.base_RLD = quiet.model(ids_RL, self.context)
        self.base_logits_RLV = quiet.model.head(self.base_RLD)
        self.own_logits, self.mixed_logits, self.tokens = [], [], []

    def read(self, x_RPD, a: int = 0):
        """One branch token at each position; the mixed logits are of a true tokens further on."""
        quiet, base_RPD = self.quiet, later(self.base_RLD, a, self.P)
        hidden_RPD = quiet.model.transform(x_RPD, self.context.begin_pass(self.P))
        masked_V = torch.zeros(quiet.model.config.vocab_size, dtype=torch.bool)
        masked_V[list(quiet.config.marker_ids)] = True
        own_logits_RPV = quiet.model.head(hidden_RPD).masked_fill(masked_V, -torch.inf)
        weight_RP1 = quiet.mixing_head(torch.cat((base_RPD, hidden_RPD), dim=-1))
        mixed_RPD = (1 - weight_RP1) * base_RPD + weight_RP1 * hidden_RPD
        self.own_logits.append(own_logits_RPV)
        self.mixed_logits.append(quiet.model.head(mixed_RPD))

    def think(self, decide):
        """start, y_1 .. y_T, end, one pass each; `decide(t, logits)` returns y_t."""
        R = len(self.base_RLD)
        self.read(self.quiet.start_thought.expand(R, self.P, -1))
        for t in range(self.quiet.config.thought_len):
            self.tokens.append(decide(t, self.own_logits[-1]))
            self.read(self.quiet.model.embed(self.tokens[-1]))
        self.read(self.quiet.end_thought.expand(R, self.P, -1))


def nll(logits_RPV, target_RP):
    return F.cross_entropy(logits_RPV.transpose(1, 2), target_RP, reduction="none")


def naive_objective(quiet, ids_BL, valid_BL, thought_BNPT=None, uniform_BNPT=None):
    """The loss of `QuietSTaR.forward`, thoughts forced or decided by uniform numbers. No filler."""
    c, (B, L), P = quiet.config, ids_BL.shape, ids_BL.shape[1] - 1
    decided = (uniform_BNPT if thought_BNPT is None else thought_BNPT).flatten(0, 1)
    ids_RL, valid_RL = (t.repeat_interleave(c.n_thoughts, dim=0) for t in (ids_BL, valid_BL))
    passes = Passes(quiet, ids_RL, P)
    passes.think(lambda t, logits: (choose(logits, decided[..., t]) if thought_BNPT is None
                                    else decided[..., t]))
    for a in range(1, c.n_true):
        passes.read(quiet.model.embed(later(ids_RL, a, P)), a)

    base_nll_RL = nll(passes.base_logits_RLV, later(ids_RL, 1, L))
    scored_RP = valid_RL[:, 1:]
    loss = c.base_weight * (base_nll_RL[:, :P] * scored_RP).sum() / scored_RP.sum()
    reward_RP = torch.zeros(len(ids_RL), P)
    for a, logits_RPV in enumerate(passes.mixed_logits[c.thought_len + 1:]):
        scored_RP = later(valid_RL, a + 1, P) & (torch.arange(P) + a + 1 < L)
        mixed_nll_RP = nll(logits_RPV, later(ids_RL, a + 1, P)) * scored_RP
        mean = mixed_nll_RP.sum() / scored_RP.sum().clamp(min=1)
        loss = loss + (1 - c.base_weight) / c.n_true * mean
        reward_RP += (later(base_nll_RL, a, P) * scored_RP - mixed_nll_RP).detach()
    reward_BNP = reward_RP.unflatten(0, (B, -1))
    advantage_BNP = (reward_BNP - reward_BNP.mean(dim=1, keepdim=True)).clamp(min=0)
    thought_nll_RPT = torch.stack([nll(logits / c.policy_temperature, token)
                                for logits, token in zip(passes.own_logits, passes.tokens)], dim=-1)
    weighed_RPT = advantage_BNP.flatten(0, 1)[..., None] * thought_nll_RPT
    return loss + c.policy_weight * weighed_RPT[:, :L - 1 - c.n_true].mean()


@torch.no_grad()
def naive_step(quiet, ids_L):
    """The likeliest next token of one text, every position of which has thought anew, greedily."""
    passes = Passes(quiet, ids_L[None], len(ids_L))
    passes.think(lambda t, logits: choose(logits))
    return int(passes.mixed_logits[-1][0, -1].argmax())
