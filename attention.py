"""Who may attend to whom when thoughts branch off every position of a text, and how to compute it.

`may_attend` is the rule: the README's picture, the tests' dense mask and the reference below come
from it. The fast way, and `model.CausalContext` for plain text and for generation, restate it: to
change the rule, change all three; the tests compare them. No [text + thoughts]^2 mask is formed:

  thought_attention    the reference: explicit scores of text and own branch, any window
  TwoPartAttention     all tokens that branch off position p see the text 0 .. p. On the head axis
                       of query position p, they need ONE causal attention by a fused kernel; the
                       small part over the own branch is merged exactly, by the log-sum-exps

Shapes: those of model.py and thoughts.py, m of the M branch tokens are new in a pass, G = H / K,
and h = K * G * N * m query heads where thoughts are folded into heads.
"""
import math

import torch

from model import CausalContext, may_see

aten = torch.ops.aten


def may_attend(query, key, same_thought, window=None):
    """The attention rule. `query` and `key` are (text position, step) each: step 0 is the text
    itself, step s >= 1 the s-th token that branches off it, at rotary position `position + s`.
    A token sees the text up to its own position and its own thought up to itself. A window counts
    distances as a plain causal pass over text + thought would."""
    q_position, q_step = query
    k_position, k_step = key
    text = (k_step == 0) & (k_position <= q_position)
    own = (k_step > 0) & (k_step <= q_step) & same_thought
    return (text | own) & may_see(q_position + q_step, k_position + k_step, window)


def thought_attention(q_BNPmHE, k_BNPMKE, v_BNPMKE, k_text_BLKE, v_text_BLKE, position_BP, window):
    """The reference: [B, N, P, m, H, E] for the last m of M branch tokens, by explicit scores."""
    m = q_BNPmHE.shape[3]
    M = k_BNPMKE.shape[3]
    L, K, E = k_text_BLKE.shape[1:]
    # who sees whom, by the rule, [B, K, G, N, P, m, L or M]
    step_M = torch.arange(1, M + 1, device=q_BNPmHE.device)
    text_L = torch.arange(L, device=q_BNPmHE.device)
    position_B111P11 = position_BP[:, None, None, None, :, None, None]
    query = position_B111P11, step_M[M - m:, None]
    sees_text = may_attend(query, (text_L, torch.zeros_like(text_L)), False, window)
    sees_own = may_attend(query, (position_B111P11, step_M), True, window)
    # scores of both groups of keys, the text first
    q_BNPmKGE = q_BNPmHE.unflatten(-2, (K, -1)) / math.sqrt(E)
    text = torch.einsum("bnpmkge,blke->bkgnpml", q_BNPmKGE, k_text_BLKE)
    own = torch.einsum("bnpmkge,bnpjke->bkgnpmj", q_BNPmKGE, k_BNPMKE)
    text = text.masked_fill(~sees_text, -torch.inf)
    own = own.masked_fill(~sees_own, -torch.inf)
    # one softmax over both, in fp32 at least
    softmax_dtype = torch.promote_types(q_BNPmHE.dtype, torch.float32)
    score = torch.cat((text, own), -1)
    weight = score.softmax(-1, dtype=softmax_dtype).to(q_BNPmHE.dtype)
    text, own = weight.split((L, M), -1)
    text_BNPmKGE = torch.einsum("bkgnpml,blke->bnpmkge", text, v_text_BLKE)
    own_BNPmKGE = torch.einsum("bkgnpmj,bnpjke->bnpmkge", own, v_BNPMKE)
    return (text_BNPmKGE + own_BNPmKGE).flatten(-3, -2)


def causal_flash(q_BhPE, k_BKPE, v_BKPE):
    """The fused kernel: output, log-sum-exp [B, h, P], and what else its backward needs."""
    kernel = aten._scaled_dot_product_flash_attention_for_cpu        # needs nothing else
    if q_BhPE.is_cuda:
        kernel = aten._scaled_dot_product_flash_attention
    out, lse, *rest = kernel(q_BhPE, k_BKPE, v_BKPE, 0.0, True)
    return out, lse, rest[:6]


def causal_flash_backward(d_out, q, k, v, out, lse, rest):
    """The kernel's backward. It computes exp(score - lse) and sum(d_out * out) from its arguments,
    so given the *merged* out and lse it returns the text part's share of the merged gradient."""
    kernel = aten._scaled_dot_product_flash_attention_for_cpu_backward
    if q.is_cuda:
        kernel = aten._scaled_dot_product_flash_attention_backward
    return kernel(d_out, q, k, v, out, lse, *rest[:4], 0.0, True, *rest[4:])


class TwoPartAttention(torch.autograd.Function):
    """Equal to `thought_attention` where positions are 0 .. P-1 and no window binds, but faster.
    `branch_kv`: keys and values, [B, N, P, m, K, E] each, of every pass so far: separate tensors,
    of which autograd saves each once, instead of a concatenation that grows with every pass."""
    @staticmethod
    def forward(ctx, q_BNPmHE, k_text_BPKE, v_text_BPKE, *branch_kv):
        k_BNPMKE, v_BNPMKE = concatenated(branch_kv)
        m = q_BNPmHE.shape[3]
        M, K, E = k_BNPMKE.shape[3:]
        q_BNPmKGE = q_BNPmHE.unflatten(4, (K, -1))
        # text part: all branch tokens of a position as query heads of one causal attention
        q_BhPE = thoughts_to_heads(q_BNPmKGE)
        k_text_BKPE = k_text_BPKE.transpose(1, 2)
        v_text_BKPE = v_text_BPKE.transpose(1, 2)
        text_BhPE, text_lse_BhP, rest = causal_flash(q_BhPE, k_text_BKPE, v_text_BKPE)
        text_BNPmKGE = heads_to_thoughts(text_BhPE, q_BNPmKGE.shape)
        text_lse = heads_to_thoughts(text_lse_BhP[..., None], q_BNPmKGE.shape)
        # own part: the few keys of the branch itself
        score = torch.einsum("bnpmkge,bnpjke->bnpmkgj", q_BNPmKGE, k_BNPMKE)
        score = (score / math.sqrt(E)).to(text_lse.dtype)
        later_mM = torch.ones(m, M, dtype=torch.bool, device=score.device).triu(M - m + 1)
        score = score.masked_fill_(later_mM[:, None, None], -torch.inf)
        # merge: each part weighs as much as its share of the whole softmax
        own_lse = score.logsumexp(-1, keepdim=True)
        lse = torch.logaddexp(text_lse, own_lse)
        own_weight = (score - lse).exp_().to(q_BNPmHE.dtype)
        text_share = (text_lse - lse).exp_().to(q_BNPmHE.dtype)
        own_BNPmKGE = torch.einsum("bnpmkgj,bnpjke->bnpmkge", own_weight, v_BNPMKE)
        out_BNPmKGE = text_BNPmKGE * text_share + own_BNPmKGE
        ctx.save_for_backward(q_BNPmKGE, k_text_BPKE, v_text_BPKE, out_BNPmKGE, lse, own_weight,
                              *branch_kv)
        ctx.rest = rest
        return out_BNPmKGE.flatten(4, 5)

    @staticmethod
    def backward(ctx, d_out_BNPmHE):
        q, k_text_BPKE, v_text_BPKE, out, lse, own_weight, *branch_kv = ctx.saved_tensors
        k, v = concatenated(branch_kv)
        d_out = d_out_BNPmHE.unflatten(4, q.shape[4:6])
        # text part, by the kernel
        d_q_BhPE, d_k_text, d_v_text = causal_flash_backward(
            thoughts_to_heads(d_out),
            thoughts_to_heads(q),
            k_text_BPKE.transpose(1, 2),
            v_text_BPKE.transpose(1, 2),
            thoughts_to_heads(out),
            thoughts_to_heads(lse).squeeze(-1).contiguous(),
            ctx.rest)
        # own part, by hand: the backward of a softmax and two products
        d_weight = torch.einsum("bnpmkge,bnpjke->bnpmkgj", d_out, v)
        d_score = own_weight * (d_weight - (d_out * out).sum(-1, keepdim=True))
        d_score = d_score / math.sqrt(q.shape[-1])
        d_q_text = heads_to_thoughts(d_q_BhPE, q.shape)
        d_q_own = torch.einsum("bnpmkgj,bnpjke->bnpmkge", d_score, k)
        d_q = (d_q_text + d_q_own).flatten(4, 5)
        d_k = torch.einsum("bnpmkgj,bnpmkge->bnpjke", d_score, q)
        d_v = torch.einsum("bnpmkgj,bnpmkge->bnpjke", own_weight, d_out)
        # back to the passes that the keys and values came from
        lengths = [k.shape[3] for k in branch_kv[::2]]
        d_branch_kv = sum(zip(d_k.split(lengths, 3), d_v.split(lengths, 3)), ())
        return d_q, d_k_text.transpose(1, 2), d_v_text.transpose(1, 2), *d_branch_kv


def concatenated(branch_kv):
    """All keys and all values, [B, N, P, M, K, E] each, from those of every pass in turn."""
    return torch.cat(branch_kv[::2], 3), torch.cat(branch_kv[1::2], 3)


def thoughts_to_heads(x_BNPmKGE):
    """Fold thoughts and their new tokens into query heads: [B, h, P, E] with h = (K, G, N, m)."""
    return x_BNPmKGE.permute(0, 4, 5, 1, 3, 2, 6).flatten(1, 4)


def heads_to_thoughts(x_BhPE, shape):
    """The inverse of `thoughts_to_heads`; `shape` is [B, N, P, m, K, G, _]."""
    B, N, P, m, K, G, _ = shape
    return x_BhPE.reshape(B, K, G, N, m, P, -1).permute(0, 3, 5, 4, 1, 2, 6)


def has_fused_kernel(q) -> bool:
    """True if `causal_flash` takes tensors like `q`; on any other device there is the reference."""
    if not q.is_cuda:
        return q.device.type == "cpu"
    # bf16 and heads of 8 to 256, from Ampere on
    fits = q.dtype == torch.bfloat16 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return fits and torch.cuda.get_device_capability(q.device) >= (8, 0)


def attend_branch(q, branch_kv, k_text, v_text, position_BP, window, all_positions):
    """Attention of branch tokens, by TwoPartAttention if `all_positions`, 0 .. P-1, think."""
    M = sum(k.shape[3] for k in branch_kv[::2])
    window_binds = window and window < k_text.shape[1] + M
    # on a CPU the kernel's backward is 8 times slower in bf16, and less accurate: use fp32 there
    dtype = q.dtype if q.is_cuda else torch.promote_types(q.dtype, torch.float32)
    tensors = [t.to(dtype) for t in (q, k_text, v_text, *branch_kv)]
    q_BNPmHE, k_text, v_text, *branch_kv = tensors
    # and autocast would make products of them bf16 again
    with torch.autocast(q.device.type, enabled=False):
        if not all_positions or window_binds or not has_fused_kernel(q_BNPmHE):
            k, v = concatenated(branch_kv)
            out = thought_attention(q_BNPmHE, k, v, k_text, v_text, position_BP, window)
        else:
            P = q.shape[2]
            out = TwoPartAttention.apply(q_BNPmHE, k_text[:, :P], v_text[:, :P], *branch_kv)
    return out.to(q.dtype)


class GrowingContext:
    """A text in the first pass, then m more tokens of every thought in each pass, with a KV cache.
    While the N thoughts of a position are identical, one may stand for all."""
    def __init__(self, text_len, position_BP, all_positions):
        self.think_position_BP = position_BP
        self.all_positions = all_positions
        text_L = torch.arange(text_len, device=position_BP.device)
        self.position_BS = text_L.expand(len(position_BP), -1)
        self.n_cached = 0                               # branch tokens so far
        self.text_kv = {}                               # by layer
        self.branch_kv = {}

    def begin_pass(self, n_new, n_thoughts):
        """Announce that the next pass adds `n_new` tokens to each of `n_thoughts` thoughts."""
        # rotary positions: the s-th branch token of position p sits at p + s
        step_m = self.n_cached + torch.arange(1, n_new + 1, device=self.position_BS.device)
        position_BPm = self.think_position_BP[:, :, None] + step_m
        self.position_BS = position_BPm.flatten(1).repeat(1, n_thoughts)
        self.shape = n_thoughts, *position_BPm.shape[1:]                # N, P, m of the pass
        self.n_cached += n_new

    def attend(self, q_BSHE, k_BSKE, v_BSKE, layer, window):
        if not self.n_cached:
            self.text_kv[layer] = k_BSKE, v_BSKE
            return CausalContext(self.position_BS).attend(q_BSHE, k_BSKE, v_BSKE, layer, window)
        q, *kv = (t.unflatten(1, self.shape) for t in (q_BSHE, k_BSKE, v_BSKE))
        self.branch_kv.setdefault(layer, []).extend(kv)
        # the first pass computed one copy for all N thoughts: repeat it N times
        N = self.shape[0]
        branch_kv = [t.expand(-1, N, -1, -1, -1, -1) for t in self.branch_kv[layer]]
        out_BNPmHE = attend_branch(q, branch_kv, *self.text_kv[layer], self.think_position_BP,
                                   window, self.all_positions)
        return out_BNPmHE.flatten(1, 3)


class PackedContext(GrowingContext):
    """All in one pass: the text (L tokens), followed by all branches (N * P * M tokens)."""
    def __init__(self, text_len, position_BP, n_thoughts, branch_len, all_positions):
        super().__init__(text_len, position_BP, all_positions)
        self.text_len = text_len
        self.text_context = CausalContext(self.position_BS)
        self.begin_pass(branch_len, n_thoughts)
        self.position_BS = torch.cat((self.text_context.position_BS, self.position_BS), 1)

    def attend(self, q_BSHE, k_BSKE, v_BSKE, layer, window):
        qkv = q_BSHE, k_BSKE, v_BSKE
        # the text comes first in the pass: ordinary causal attention
        q_text, *kv_text = (t[:, :self.text_len] for t in qkv)
        q, *kv = (t[:, self.text_len:].unflatten(1, self.shape) for t in qkv)
        text_BLHE = self.text_context.attend(q_text, *kv_text, layer, window)
        branch_BNPMHE = attend_branch(q, kv, *kv_text, self.think_position_BP, window,
                                      self.all_positions)
        return torch.cat((text_BLHE, branch_BNPMHE.flatten(1, 3)), 1)
