"""Who may attend to whom when thoughts hang off every position of a text, and how to compute it.

One predicate, `may_attend`, is the rule: of the code, the README's figure, the tests' dense mask.
`PackedContext` applies it to everything at once, `GrowingContext` a pass at a time.
A branch token sees two small groups of keys, the text up to its position and its own thought; so
there never is a [text + thoughts]^2 mask, but one softmax in two parts:

  thought_attention   explicit scores, any positions, any window: the reference
  TwoPartAttention     at a position all thoughts and their tokens see the same text, so they are
                      folded into its query heads: the text part is ONE causal grouped-query
                      attention, in a fused kernel that copies no key. The small own part is
                      merged exactly by the log-sum-exps, forward and backward

Shapes: those of model.py and thoughts.py, and m of M branch tokens are new in a pass.

Read next: thoughts.py
"""
import math

import torch

from model import CausalContext, may_see

flash = torch.ops.aten


def may_attend(query, key, same_thought, window: int | None = None):
    """The one rule. `query` and `key` are (text position, step): step 0 is the text itself, step
    s >= 1 the s-th token branch off that position, at rotary position `position + s`.

    A token sees the text up to its own position, and its own thought up to itself; in a window, as
    a plain causal pass over text + thought would count it.
    """
    (q_position, q_step), (k_position, k_step) = query, key
    text = (k_step == 0) & (k_position <= q_position)
    own = (k_step > 0) & (k_step <= q_step) & same_thought
    return (text | own) & may_see(q_position + q_step, k_position + k_step, window)


def thought_attention(q_BNPmHE, k_BNPMKE, v_BNPMKE, k_text_BLKE, v_text_BLKE, position_BP, window):
    """[B, N, P, m, H, E]: the last m of M branch tokens attend, one softmax over L + M scores."""
    m, M = q_BNPmHE.shape[3], k_BNPMKE.shape[3]
    step_M = torch.arange(1, M + 1, device=q_BNPmHE.device)
    step_m1, position_BP11 = step_M[M - m:, None], position_BP[:, :, None, None]
    text_L = torch.arange(k_text_BLKE.shape[1], device=q_BNPmHE.device)
    see_text_BPmL = may_attend((position_BP11, step_m1), (text_L, text_L * 0), False, window)
    see_own_BPmM = may_attend((position_BP11, step_m1), (position_BP11, step_M), True, window)

    q_BNPmKGE = q_BNPmHE.unflatten(-2, (k_text_BLKE.shape[2], -1)) / math.sqrt(q_BNPmHE.shape[-1])
    text = torch.einsum("bnpmkge,blke->bkgnpml", q_BNPmKGE, k_text_BLKE)
    own = torch.einsum("bnpmkge,bnpjke->bkgnpmj", q_BNPmKGE, k_BNPMKE)
    text = text.masked_fill(~see_text_BPmL[:, None, None, None], -torch.inf)
    own = own.masked_fill(~see_own_BPmM[:, None, None, None], -torch.inf)
    exact = torch.promote_types(q_BNPmHE.dtype, torch.float32)
    weight = torch.cat((text, own), dim=-1).softmax(dim=-1, dtype=exact).to(q_BNPmHE.dtype)
    text, own = weight.split((text.shape[-1], M), dim=-1)
    out_BNPmKGE = (torch.einsum("bkgnpml,blke->bnpmkge", text, v_text_BLKE)
                   + torch.einsum("bkgnpmj,bnpjke->bnpmkge", own, v_BNPMKE))
    return out_BNPmKGE.flatten(-3, -2)


def causal_flash(q_BhPE, k_BKPE, v_BKPE):
    """Output, log-sum-exp [B, h, P], and what else the backward needs."""
    if q_BhPE.is_cuda:
        out, lse, *rest = flash._scaled_dot_product_flash_attention(q_BhPE, k_BKPE, v_BKPE, 0, True)
        return out, lse, rest[:6]
    return *flash._scaled_dot_product_flash_attention_for_cpu(q_BhPE, k_BKPE, v_BKPE, 0.0, True), []


def causal_flash_backward(d_out, q, k, v, out, lse, rest):
    """The kernel forms P = exp(S - lse) and delta = sum(d_out * out) from what it is handed. Handed
    the *merged* out and lse it returns the text part's exact share of the merged gradient."""
    if q.is_cuda:
        cum_q, cum_k, max_q, max_k, seed, offset = rest
        return flash._scaled_dot_product_flash_attention_backward(
            d_out, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, 0.0, True, seed, offset)
    return flash._scaled_dot_product_flash_attention_for_cpu_backward(
        d_out, q, k, v, out, lse, 0.0, True)


class TwoPartAttention(torch.autograd.Function):
    """`thought_attention` where the positions, and the text's, are 0 .. P-1 and no window binds.

    `own`: keys and values, [B, N, P, new, K, E], of each pass of the thoughts so far, in turn. Kept
    apart, T passes remember T tokens for their backward, not T^2 / 2.
    """
    @staticmethod
    def forward(ctx, q_BNPmHE, k_text_BPKE, v_text_BPKE, *own):
        k_BNPMKE, v_BNPMKE = join(own)
        m, M, K = q_BNPmHE.shape[3], *k_BNPMKE.shape[3:5]
        q_BNPmKGE = q_BNPmHE.unflatten(4, (K, -1))
        text_BhPE, text_lse, rest = causal_flash(
            thoughts_to_heads(q_BNPmKGE), k_text_BPKE.transpose(1, 2), v_text_BPKE.transpose(1, 2))
        text_lse_BNPmKG1 = heads_to_thoughts(text_lse[..., None], q_BNPmKGE.shape)
        score = torch.einsum("bnpmkge,bnpjke->bnpmkgj", q_BNPmKGE, k_BNPMKE)
        later_mM = torch.ones(m, M, dtype=torch.bool, device=score.device).triu(M - m + 1)
        score = (score / math.sqrt(q_BNPmHE.shape[-1])).to(text_lse.dtype)
        score = score.masked_fill_(later_mM[:, None, None], -torch.inf)
        lse_BNPmKG1 = torch.logaddexp(text_lse_BNPmKG1, score.logsumexp(-1, keepdim=True))
        own_BNPmKGM = (score - lse_BNPmKG1).exp_().to(q_BNPmHE.dtype)
        share_BNPmKG1 = (text_lse_BNPmKG1 - lse_BNPmKG1).exp_().to(q_BNPmHE.dtype)
        out_BNPmKGE = (heads_to_thoughts(text_BhPE, q_BNPmKGE.shape) * share_BNPmKG1
                       + torch.einsum("bnpmkgj,bnpjke->bnpmkge", own_BNPmKGM, v_BNPMKE))
        ctx.save_for_backward(q_BNPmKGE, k_text_BPKE, v_text_BPKE, out_BNPmKGE, lse_BNPmKG1,
                              own_BNPmKGM, *own)
        ctx.rest = rest
        return out_BNPmKGE.flatten(4, 5)

    @staticmethod
    def backward(ctx, d_out_BNPmHE):
        q, k_text_BPKE, v_text_BPKE, out, lse, weight, *own = ctx.saved_tensors
        k, v = join(own)
        d_out = d_out_BNPmHE.unflatten(4, q.shape[4:6])
        d_q_BhPE, d_k_text, d_v_text = causal_flash_backward(
            thoughts_to_heads(d_out), thoughts_to_heads(q), k_text_BPKE.transpose(1, 2), v_text_BPKE.transpose(1, 2),
            thoughts_to_heads(out), thoughts_to_heads(lse).squeeze(-1), ctx.rest)
        d_weight = torch.einsum("bnpmkge,bnpjke->bnpmkgj", d_out, v)
        d_score = weight * (d_weight - (d_out * out).sum(-1, keepdim=True)) / math.sqrt(q.shape[-1])
        d_q = heads_to_thoughts(d_q_BhPE, q.shape) + torch.einsum("bnpmkgj,bnpjke->bnpmkge", d_score, k)
        d_k, d_v = (torch.einsum("bnpmkgj,bnpmkge->bnpjke", *pair)
                    for pair in ((d_score, q), (weight, d_out)))
        new = [k.shape[3] for k in own[::2]]
        d_own = sum(zip(d_k.split(new, dim=3), d_v.split(new, dim=3)), ())
        return d_q.flatten(4, 5), d_k_text.transpose(1, 2), d_v_text.transpose(1, 2), *d_own


def join(own):
    """All keys and all values, [B, N, P, M, K, E], of the passes' own."""
    return torch.cat(own[::2], dim=3), torch.cat(own[1::2], dim=3)


def thoughts_to_heads(x_BNPmKGE):
    """[B, h, P, E], h = (K, G, N, m): a position's branch tokens become its query heads."""
    return x_BNPmKGE.permute(0, 4, 5, 1, 3, 2, 6).flatten(1, 4)


def heads_to_thoughts(x_BhPE, shape):
    """The inverse of `thoughts_to_heads`."""
    B, N, P, m, K, G, _ = shape
    return x_BhPE.reshape(B, K, G, N, m, P, -1).permute(0, 3, 5, 4, 1, 2, 6)


def attend_branch(q, own, k_text, v_text, position_BP, window, every: bool):
    """Folds where it can: `every` says that the positions are 0 .. P-1, and no window may bind."""
    binds = window is not None and window < k_text.shape[1] + sum(k.shape[3] for k in own[::2])
    if not every or binds or (q.is_cuda and q.dtype == torch.float32):        # no such kernel there
        return thought_attention(q, *join(own), k_text, v_text, position_BP, window)
    exact = q.dtype if q.is_cuda else torch.promote_types(q.dtype, torch.float32)
    seen = (t[:, :q.shape[2]] for t in (k_text, v_text))          # in bf16 the CPU's backward is 8
    tensors = (t.to(exact) for t in (q, *seen, *own))             # times slower, and less accurate
    return TwoPartAttention.apply(*tensors).to(q.dtype)


class PackedContext:
    """One pass over the text (L tokens) followed by all that hangs off it (N * P * M tokens)."""
    def __init__(self, text_len: int, position_BP, n_thoughts: int, branch_len: int, every: bool):
        self.text_len, self.think_position_BP, self.every = text_len, position_BP, every
        self.shape = (n_thoughts, position_BP.shape[1], branch_len)
        step_M = torch.arange(1, branch_len + 1, device=position_BP.device)
        branch_BNPM = (position_BP[:, None, :, None] + step_M).expand(-1, *self.shape)
        text_BL = torch.arange(text_len, device=position_BP.device).expand(len(position_BP), -1)
        self.text = CausalContext(text_BL)
        self.position_BS = torch.cat((text_BL, branch_BNPM.flatten(1)), dim=1)

    def attend(self, q_BSHE, k_BSKE, v_BSKE, layer: int, window: int | None):
        text = [t[:, :self.text_len] for t in (q_BSHE, k_BSKE, v_BSKE)]
        q, *own = (t[:, self.text_len:].unflatten(1, self.shape) for t in (q_BSHE, k_BSKE, v_BSKE))
        text_BLHE = self.text.attend(*text, layer, window)
        out_BNPMHE = attend_branch(q, own, *text[1:], self.think_position_BP, window, self.every)
        return torch.cat((text_BLHE, out_BNPMHE.flatten(1, 3)), dim=1)


class GrowingContext:
    """The same rule a pass at a time: what was said before is kept, only the new is computed.

    The first pass is the text; then the thoughts grow together, `advance(m)` announcing m new
    tokens of each. While they are all alike, one per position stands for all N.
    """
    def __init__(self, text_len: int, position_BP, every: bool):
        self.think_position_BP, self.every = position_BP, every
        text_L = torch.arange(text_len, device=position_BP.device)
        self.position_BS = text_L.expand(len(position_BP), -1)
        self.until, self.shape, self.text, self.own = 0, None, {}, {}

    def advance(self, new: int, n_thoughts: int):
        position_BP = self.think_position_BP
        step_m = torch.arange(self.until + 1, self.until + new + 1, device=position_BP.device)
        self.position_BS = (position_BP[..., None] + step_m).flatten(1).repeat(1, n_thoughts)
        self.until, self.shape = self.until + new, (n_thoughts, position_BP.shape[1], new)
        return self

    def attend(self, q_BSHE, k_BSKE, v_BSKE, layer: int, window: int | None):
        if not self.until:
            self.text[layer] = k_BSKE, v_BSKE
            return CausalContext(self.position_BS).attend(q_BSHE, k_BSKE, v_BSKE, layer, window)
        q, *fresh = (t.unflatten(1, self.shape) for t in (q_BSHE, k_BSKE, v_BSKE))
        self.own[layer] = self.own.get(layer, []) + fresh
        own = [t.expand(-1, self.shape[0], -1, -1, -1, -1) for t in self.own[layer]]
        return attend_branch(q, own, *self.text[layer], self.think_position_BP, window,
                              self.every).flatten(1, 3)
