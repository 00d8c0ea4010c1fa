"""The vocabulary head, asked for losses and for samples without ever holding all its logits.

All thought tokens of a step times the vocabulary would be gigabytes; a visit takes as many rows as
`chunk_rows` allows and keeps of their logits only what was asked for.

Left out on purpose: torch's own fused loss (2.13 has one, 2.11 has not; it knows no temperature and
weighs no rows) and kernels of our own: at 7B the head is 1.5 % of a step.

Shapes: those of model.py, and R rows of hidden states, whatever they are the states of.

Read next: attention.py
"""
import torch
import torch.nn.functional as F

ROWS = 1024                           # whose logits exist at a time: 131 MB at V = 32000 in fp32


def chunk_rows(head_VD) -> int:
    """ROWS on a GPU, which wants large products; on a CPU no more than have 2 M logits, 8 MB."""
    return ROWS if head_VD.is_cuda else max(1, min(ROWS, (1 << 21) // len(head_VD)))


class ChunkedCrossEntropy(torch.autograd.Function):
    """sum_r weight[r] * -log softmax(head(hidden[r]) / temperature)[target[r]], a chunk at a time.

    The sum is linear in the rows, so its gradient is known as soon as their logits are: both are
    formed in one visit. Also returns the unweighted nll_R, without gradient.
    """
    @staticmethod
    def forward(ctx, hidden_RD, head_VD, target_R, weight_R, temperature, masked_ids):
        wants_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        nll_R = torch.empty(len(hidden_RD), device=hidden_RD.device)
        if wants_gradient:
            exact = torch.promote_types(head_VD.dtype, torch.float32)      # of the sum over visits
            d_hidden_RD = torch.empty_like(hidden_RD)
            d_head_VD = torch.zeros_like(head_VD, dtype=exact)
        own_dtype, head_VD = head_VD.dtype, head_VD.to(hidden_RD.dtype)
        n_rows = chunk_rows(head_VD)
        for start in range(0, len(hidden_RD), n_rows):
            rows = slice(start, start + n_rows)
            logits_RV = F.linear(hidden_RD[rows], head_VD).float().div_(temperature)
            logits_RV[:, masked_ids] = -torch.inf
            logp_RV = torch.log_softmax(logits_RV, dim=-1)
            nll_R[rows] = -logp_RV.gather(1, target_R[rows, None])[:, 0]
            if wants_gradient:                     # d nll / d logits = softmax - one_hot
                d_logits_RV, minus_one_R1 = logp_RV.exp_(), -torch.ones_like(logp_RV[:, :1])
                d_logits_RV.scatter_add_(1, target_R[rows, None], minus_one_R1)
                d_logits_RV.mul_(weight_R[rows, None] / temperature)
                d_logits_RV = d_logits_RV.to(hidden_RD.dtype)
                d_hidden_RD[rows] = d_logits_RV @ head_VD
                d_head_VD += d_logits_RV.T @ hidden_RD[rows]
        if wants_gradient:
            ctx.save_for_backward(d_hidden_RD, d_head_VD.to(own_dtype))
        ctx.mark_non_differentiable(nll_R)
        return (weight_R * nll_R).sum(), nll_R

    @staticmethod
    def backward(ctx, d_sum, _):
        d_hidden_RD, d_head_VD = ctx.saved_tensors
        return d_hidden_RD * d_sum, d_head_VD * d_sum, None, None, None, None


def chunked_cross_entropy(hidden_RD, head_VD, target_R, weight_R, temperature=1.0, masked_ids=()):
    """Weighted sum of the rows' negative log-likelihoods (nats), and each row's own, no gradient.

    `masked_ids`: vocabulary ids that take no part in the softmax.
    """
    return ChunkedCrossEntropy.apply(hidden_RD, head_VD, target_R, weight_R, temperature, list(masked_ids))


@torch.no_grad()
def sample_tokens(hidden_RD, head_VD, uniform_R=None, masked_ids=()):
    """One token per row and its -log p (nats), sampled at temperature 1, or the argmax.

    `uniform_R` in [0, 1) decides: the token whose stretch of the cumulative distribution holds it.
    So a thought is a function of the model and of these numbers, whatever the batch around it.
    None takes the argmax.
    """
    token_R = torch.empty(len(hidden_RD), dtype=torch.long, device=hidden_RD.device)
    thought_nll_R = torch.empty(len(hidden_RD), device=hidden_RD.device)
    n_rows = chunk_rows(head_VD)
    for start in range(0, len(hidden_RD), n_rows):
        rows = slice(start, start + n_rows)
        logits_RV = F.linear(hidden_RD[rows], head_VD.to(hidden_RD.dtype)).float()
        logits_RV[:, list(masked_ids)] = -torch.inf
        p_RV = logits_RV.softmax(dim=-1)
        if uniform_R is None:
            token_R[rows] = p_RV.argmax(dim=-1)
        else:
            below_RV = p_RV.cumsum(dim=-1)
            total_R1 = below_RV[:, -1:]
            mark_R1 = torch.minimum(uniform_R[rows, None] * total_R1,           # strictly below the
                                    torch.nextafter(total_R1, total_R1 * 0))    # total: p > 0 there
            found_R = torch.searchsorted(below_RV, mark_R1, right=True)[:, 0]
            token_R[rows] = found_R.clamp(max=p_RV.shape[1] - 1)       # nan: let the loss tell
        thought_nll_R[rows] = -p_RV.gather(1, token_R[rows, None])[:, 0].log()
    return token_R, thought_nll_R
