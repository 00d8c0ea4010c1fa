"""Who may attend to whom when thoughts hang off every position of a text, and how to compute it.

One predicate, `may_attend`, is the rule; the code, the figure in the README and the tests' dense mask
all come from it. The two contexts apply it: `PackedContext` to everything at once, `SamplingContext`
a token at a time with caches. Neither ever forms a [text + thoughts]^2 mask: a hanging token sees two
small groups of keys, the text up to its position and its own thought, and there are two ways to
compute that one softmax,

  thought_attention   explicit scores; 12 lines, any positions, any window: the reference
  FoldedAttention     the text part as ONE causal grouped-query attention. For a fixed position all
                      thoughts and their tokens see the same text, so they are folded into the query
                      heads of that position; a fused kernel does it without copying a key. The small
                      own part is merged exactly by the log-sum-exps, forward and backward.

Shapes: those of model.py and thoughts.py, and m of M hanging tokens are new in a pass.

Read next: thoughts.py
"""
import math

import torch

from model import CausalContext, may_see

ops = torch.ops.aten


def may_attend(query, key, same_thought, window: int | None = None):
    """The one rule. `query` and `key` are (text position, step): step 0 is the text itself, step
    s >= 1 the s-th token hanging off that position, at rotary position `position + s`.

    A token sees the text up to its own position, and its own thought up to itself; in a window, as
    a plain causal pass over text + thought would count it.
    """
    (q_position, q_step), (k_position, k_step) = query, key
    text = (k_step == 0) & (k_position <= q_position)
    own = (k_step > 0) & (k_step <= q_step) & same_thought
    return (text | own) & may_see(q_position + q_step, k_position + k_step, window)


def thought_attention(q_BNPmHE, k_BNPMKE, v_BNPMKE, k_text_BLKE, v_text_BLKE, position_BP, window):
    """Attention of the last m of M hanging tokens to the text and to their own thought.

    One softmax over two small groups of scores: the text's L and the thought's own M.
    """
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
    weight = at_least_fp32(torch.cat((text, own), dim=-1)).softmax(dim=-1).to(q_BNPmHE.dtype)
    text, own = weight.split((text.shape[-1], M), dim=-1)
    out_BNPmKGE = (torch.einsum("bkgnpml,blke->bnpmkge", text, v_text_BLKE)
                   + torch.einsum("bkgnpmj,bnpjke->bnpmkge", own, v_BNPMKE))
    return out_BNPmKGE.flatten(-3, -2)


def at_least_fp32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def causal_flash(q_BhPE, k_BKPE, v_BKPE):
    """Fused causal attention: the output, its log-sum-exp [B, h, P], and what the backward needs."""
    if q_BhPE.is_cuda:
        out, lse, *rest = ops._scaled_dot_product_flash_attention(q_BhPE, k_BKPE, v_BKPE, 0.0, True)
        return out, lse, rest[:6]
    out, lse = ops._scaled_dot_product_flash_attention_for_cpu(q_BhPE, k_BKPE, v_BKPE, 0.0, True)
    return out, lse, []


def causal_flash_backward(d_out, q, k, v, out, lse, rest):
    """The kernel forms P = exp(S - lse) and delta = sum(d_out * out) from what it is handed. Handed
    the *merged* out and lse it returns the text part's exact share of the merged gradient."""
    if q.is_cuda:
        cum_q, cum_k, max_q, max_k, seed, offset = rest
        return ops._scaled_dot_product_flash_attention_backward(
            d_out, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, 0.0, True, seed, offset)
    return ops._scaled_dot_product_flash_attention_for_cpu_backward(d_out, q, k, v, out, lse, 0.0, True)


class FoldedAttention(torch.autograd.Function):
    """`thought_attention` where the positions are 0 .. P-1 and no window binds.

    Text part: query heads h = (K, G, N, m), so that the kernel's grouped-query axis holds all hanging
    tokens of a position. Own part: (G, m) queries against M keys, for each (B, N, P, K).
    """
    @staticmethod
    def forward(ctx, q_BNPmHE, k_BNPMKE, v_BNPMKE, k_text_BLKE, v_text_BLKE):
        B, N, P, m, H, E = q_BNPmHE.shape
        K, M = k_BNPMKE.shape[4], k_BNPMKE.shape[3]
        q_BNPKqE = q_BNPmHE.view(B, N, P, m, K, H // K, E).permute(0, 1, 2, 4, 5, 3, 6).flatten(4, 5)
        q_BhPE = fold(q_BNPKqE)
        k_BNPKME, v_BNPKME = k_BNPMKE.transpose(3, 4), v_BNPMKE.transpose(3, 4)
        k_BKPE, v_BKPE = (t[:, :P].transpose(1, 2) for t in (k_text_BLKE, v_text_BLKE))

        text_BhPE, text_lse, rest = causal_flash(q_BhPE, k_BKPE, v_BKPE)
        score_BNPKqM = q_BNPKqE @ k_BNPKME.transpose(-1, -2) / math.sqrt(E)
        later_mM = torch.ones(m, M, dtype=torch.bool, device=q_BNPmHE.device).triu(M - m + 1)
        score_BNPKqM = at_least_fp32(score_BNPKqM).masked_fill_(later_mM.repeat(H // K, 1), -torch.inf)
        text_lse_BNPKq = unfold(text_lse[..., None], q_BNPKqE.shape).squeeze(-1)
        lse_BNPKq = torch.logaddexp(text_lse_BNPKq, score_BNPKqM.logsumexp(-1))
        own_BNPKqM = (score_BNPKqM - lse_BNPKq[..., None]).exp_().to(q_BNPmHE.dtype)
        share_BNPKq1 = (text_lse_BNPKq - lse_BNPKq).exp_()[..., None].to(q_BNPmHE.dtype)
        out_BNPKqE = unfold(text_BhPE, q_BNPKqE.shape) * share_BNPKq1 + own_BNPKqM @ v_BNPKME

        ctx.save_for_backward(q_BNPKqE, k_BNPKME, v_BNPKME, k_text_BLKE, v_text_BLKE, out_BNPKqE,
                              lse_BNPKq, own_BNPKqM)
        ctx.rest, ctx.m = rest, m
        return by_token(out_BNPKqE, m)

    @staticmethod
    def backward(ctx, d_out_BNPmHE):
        q, k, v, k_text_BLKE, v_text_BLKE, out, lse, own = ctx.saved_tensors
        P = q.shape[2]
        B, N, P, K, _, E = q.shape
        d_out = d_out_BNPmHE.unflatten(4, (K, -1)).permute(0, 1, 2, 4, 5, 3, 6).flatten(4, 5)
        k_BKPE, v_BKPE = (t[:, :P].transpose(1, 2) for t in (k_text_BLKE, v_text_BLKE))
        d_q_BhPE, d_k_text, d_v_text = causal_flash_backward(
            fold(d_out), fold(q), k_BKPE, v_BKPE, fold(out), fold(lse[..., None]).squeeze(-1), ctx.rest)

        d_own = d_out @ v.transpose(-1, -2)
        delta = (d_out * out).sum(-1, keepdim=True)
        d_score = own * (d_own - delta) / math.sqrt(E)
        d_q = unfold(d_q_BhPE, q.shape) + d_score @ k
        d_k, d_v = d_score.transpose(-1, -2) @ q, own.transpose(-1, -2) @ d_out
        d_k_text, d_v_text = (
            torch.nn.functional.pad(t.transpose(1, 2), (0, 0, 0, 0, 0, k_text_BLKE.shape[1] - P))
            for t in (d_k_text, d_v_text))
        return by_token(d_q, ctx.m), d_k.transpose(3, 4), d_v.transpose(3, 4), d_k_text, d_v_text


def fold(x_BNPKqE):
    """[B, N, P, K, q, E] to [B, K*q*N, P, E]: a position's hanging tokens become its query heads."""
    return x_BNPKqE.permute(0, 3, 4, 1, 2, 5).flatten(1, 3)


def unfold(x_BhPE, shape):
    """The inverse of `fold`, to a [B, N, P, K, q, ...] shape."""
    B, N, P, K, q, _ = shape
    return x_BhPE.reshape(B, K, q, N, P, -1).permute(0, 3, 4, 1, 2, 5)


def by_token(x_BNPKqE, m: int):
    """[B, N, P, K, (G, m), E] back to [B, N, P, m, H, E]."""
    return x_BNPKqE.unflatten(4, (-1, m)).permute(0, 1, 2, 5, 3, 4, 6).flatten(4, 5)


def attend_hanging(q_BNPmHE, k_BNPMKE, v_BNPMKE, k_text_BLKE, v_text_BLKE, position_BP, window, every):
    """`every`: the positions are 0 .. P-1. Folds where it can; a window that binds cannot."""
    tensors = q_BNPmHE, k_BNPMKE, v_BNPMKE, k_text_BLKE, v_text_BLKE
    binds = window is not None and window < k_text_BLKE.shape[1] + k_BNPMKE.shape[3]
    if not every or binds or (q_BNPmHE.is_cuda and q_BNPmHE.dtype == torch.float32):    # no such kernel
        return thought_attention(*tensors, position_BP, window)
    if q_BNPmHE.dtype == torch.bfloat16 and not q_BNPmHE.is_cuda:   # its CPU backward sums the folded
        out = FoldedAttention.apply(*(t.float() for t in tensors))  # heads in bf16, and takes 8 times
        return out.to(q_BNPmHE.dtype)                               # as long as in fp32
    return FoldedAttention.apply(*tensors)


class PackedContext:
    """One pass over the text (L tokens) followed by all that hangs off it (N * P * M tokens)."""
    def __init__(self, text_len: int, position_BP, n_thoughts: int, n_hanging: int, every: bool):
        self.text_len, self.think_position_BP, self.every = text_len, position_BP, every
        self.shape = (n_thoughts, position_BP.shape[1], n_hanging)
        step_M = torch.arange(1, n_hanging + 1, device=position_BP.device)
        hanging_BNPM = (position_BP[:, None, :, None] + step_M).expand(-1, *self.shape)
        text_BL = torch.arange(text_len, device=position_BP.device).expand(len(position_BP), -1)
        self.text = CausalContext(text_BL)
        self.position_BS = torch.cat((text_BL, hanging_BNPM.flatten(1)), dim=1)

    def attend(self, q_BSHE, k_BSKE, v_BSKE, layer: int, window: int | None):
        (q_text, q), (k_text, k), (v_text, v) = (
            (t[:, :self.text_len], t[:, self.text_len:].unflatten(1, self.shape))
            for t in (q_BSHE, k_BSKE, v_BSKE))
        text_BLHE = self.text.attend(q_text, k_text, v_text, layer, window)
        out_BNPMHE = attend_hanging(q, k, v, k_text, v_text, self.think_position_BP, window, self.every)
        return torch.cat((text_BLHE, out_BNPMHE.flatten(1, 3)), dim=1)


class SamplingContext:
    """The same rule a step at a time: what has been said stays in caches, only the new is computed.

    Step 0 is the text; then the thoughts grow together, `advance(m)` announcing m new tokens each.
    """
    def __init__(self, text_len: int, position_BP, n_thoughts: int, n_hanging: int, every: bool):
        self.think_position_BP, self.every = position_BP, every
        self.N, self.M = n_thoughts, n_hanging
        self.position_BS = torch.arange(text_len, device=position_BP.device).expand(len(position_BP), -1)
        self.seen, self.new, self.text, self.own = 0, 0, {}, {}

    def advance(self, new: int):
        self.seen, self.new = self.seen + self.new, new
        step_m = torch.arange(self.seen + 1, self.seen + new + 1, device=self.think_position_BP.device)
        position_BNPm = (self.think_position_BP[:, None, :, None] + step_m).expand(-1, self.N, -1, -1)
        self.position_BS = position_BNPm.flatten(1)
        return self

    def attend(self, q_BSHE, k_BSKE, v_BSKE, layer: int, window: int | None):
        if not self.new:
            self.text[layer] = k_BSKE, v_BSKE
            return CausalContext(self.position_BS).attend(q_BSHE, k_BSKE, v_BSKE, layer, window)
        shape = (self.N, self.think_position_BP.shape[1], self.new)
        q, k, v = (t.unflatten(1, shape) for t in (q_BSHE, k_BSKE, v_BSKE))
        if layer not in self.own:
            full = (*k.shape[:3], self.M, *k.shape[4:])
            self.own[layer] = k.new_empty(full), v.new_empty(full)
        until = self.seen + self.new
        for store, fresh in zip(self.own[layer], (k, v)):
            store[:, :, :, self.seen:until] = fresh
        k, v = (store[:, :, :, :until] for store in self.own[layer])
        out_BNPmHE = attend_hanging(q, k, v, *self.text[layer], self.think_position_BP, window, self.every)
        return out_BNPmHE.flatten(1, 3)
