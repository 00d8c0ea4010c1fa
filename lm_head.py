"""The output head: cross-entropy and sampling over the vocabulary, a chunk of rows at a time.

The logits of all thought tokens of a step would take gigabytes: at most CHUNK rows exist at once.
Left out on purpose: torch's fused loss (in 2.13, not in 2.11; without temperature and row weights)
and kernels of our own: at 7B the head is 1.5 % of a step. Shapes: those of model.py, and R rows.
"""
import torch
import torch.nn.functional as F

CHUNK = 1024                          # rows whose logits exist at a time: 131 MB at V = 32000, fp32
CPU_LOGITS = 1 << 23                  # on a CPU 34 MB: fewer rows read the head more often


def chunk_rows(head_VD) -> int:
    """How many rows of logits to form at a time for this head."""
    return CHUNK if head_VD.is_cuda else max(1, min(CHUNK, CPU_LOGITS // len(head_VD)))


def operands(hidden_RD, head_VD):
    """Both as logits need them: in fp32, but on a GPU that computes in bf16 in bf16, because there
    the sums can stay fp32. A CPU would round them to bf16, which is coarser than most rewards."""
    dtype = torch.promote_types(hidden_RD.dtype, torch.float32)
    if hidden_RD.is_cuda:
        is_autocast = torch.is_autocast_enabled("cuda")
        dtype = torch.get_autocast_dtype("cuda") if is_autocast else hidden_RD.dtype
    return hidden_RD.to(dtype), head_VD.to(dtype)


def logits_of(hidden_RD, head_VD, masked_ids=()):
    """Logits [R, V] in fp32; -inf at `masked_ids`, which can be neither predicted nor sampled."""
    hidden_RD, head_VD = operands(hidden_RD, head_VD)
    with torch.autocast(hidden_RD.device.type, enabled=False):
        if hidden_RD.dtype == torch.bfloat16:
            logits_RV = torch.mm(hidden_RD, head_VD.T, out_dtype=torch.float32)
        else:
            logits_RV = F.linear(hidden_RD, head_VD).float()
    for i in masked_ids:              # one by one: a list would be copied to the GPU
        logits_RV[:, i] = -torch.inf
    return logits_RV


class ChunkedCrossEntropy(torch.autograd.Function):
    """sum_r weight[r] * -log softmax(logits[r] / temperature)[target[r]], and each row's own nll.
    The sum is linear in the rows, so the gradient of a chunk is known as soon as its logits are:
    `forward` computes both, and `backward` only scales. The nll of the rows has no gradient."""
    @staticmethod
    def forward(ctx, hidden_RD, head_VD, target_R, weight_R, temperature, masked_ids):
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        nll_R = torch.empty(len(hidden_RD), device=hidden_RD.device)
        if needs_grad:
            d_hidden_RD = torch.empty_like(hidden_RD)
            # the head's gradient is summed over chunks, so it is summed in fp32 at least
            sum_dtype = torch.promote_types(head_VD.dtype, torch.float32)
            d_head_VD = None
            if ctx.needs_input_grad[1]:                  # but not of a frozen head
                d_head_VD = torch.zeros_like(head_VD, dtype=sum_dtype)
        # cast once; under autocast the products of the gradient are in bf16 on a CPU too
        cast_hidden_RD, cast_head_VD = operands(hidden_RD, head_VD)
        size = chunk_rows(head_VD)
        for start in range(0, len(hidden_RD), size):
            rows = slice(start, start + size)
            target_R1 = target_R[rows, None]
            # logits and log-probabilities of this chunk
            logits_RV = logits_of(cast_hidden_RD[rows], cast_head_VD, masked_ids)
            logp_RV = torch.log_softmax(logits_RV.div_(temperature), dim=-1)
            nll_R[rows] = -logp_RV.gather(1, target_R1)[:, 0]
            if not needs_grad:
                continue
            # d nll / d logits = softmax - one_hot, in the memory of the log-probabilities
            d_logits_RV = logp_RV.exp_()
            d_logits_RV.scatter_add_(1, target_R1, -torch.ones_like(d_logits_RV[:, :1]))
            d_logits_RV.mul_(weight_R[rows, None] / temperature)
            d_logits_RV = d_logits_RV.to(cast_head_VD.dtype)
            d_hidden_RD[rows] = (d_logits_RV @ cast_head_VD).to(hidden_RD.dtype)
            if d_head_VD is not None:
                d_head_VD += d_logits_RV.T @ cast_hidden_RD[rows]
        # the gradient is whole: `backward` has only to scale it
        if needs_grad:
            ctx.save_for_backward(d_hidden_RD, d_head_VD)
        ctx.mark_non_differentiable(nll_R)
        return (weight_R * nll_R).sum(), nll_R

    @staticmethod
    def backward(ctx, d_sum, _):
        d_hidden_RD, d_head_VD = ctx.saved_tensors
        if d_head_VD is not None:
            d_head_VD = d_head_VD * d_sum
        return d_hidden_RD * d_sum, d_head_VD, None, None, None, None


def chunked_cross_entropy(hidden_RD, head_VD, target_R, weight_R, temperature=1.0, masked_ids=()):
    """Return the weighted sum of the rows' nll (nats), and each row's nll [R] without gradient."""
    return ChunkedCrossEntropy.apply(hidden_RD, head_VD, target_R, weight_R, temperature,
                                     masked_ids)


@torch.no_grad()
def sample_tokens(hidden_RD, head_VD, uniform_R=None, masked_ids=()):
    """Sample one token per row at temperature 1; return its id and its -log p (nats), both [R]: the
    first whose cumulative probability exceeds `uniform_R` in [0, 1); without it, the argmax."""
    token_R = torch.empty(len(hidden_RD), dtype=torch.long, device=hidden_RD.device)
    nll_R = torch.empty(len(hidden_RD), device=hidden_RD.device)
    hidden_RD, head_VD = operands(hidden_RD, head_VD)
    # the numbers decide, not the batch: chunks change nothing
    size = chunk_rows(head_VD)
    for start in range(0, len(hidden_RD), size):
        rows = slice(start, start + size)
        p_RV = logits_of(hidden_RD[rows], head_VD, masked_ids).softmax(dim=-1)
        token_R[rows] = p_RV.argmax(-1) if uniform_R is None else invert_cdf(p_RV, uniform_R[rows])
        nll_R[rows] = -p_RV.gather(1, token_R[rows, None])[:, 0].log()
    return token_R, nll_R


@torch.no_grad()
def entropy_of(hidden_RD, head_VD):
    """The entropy of each row's prediction (nats), [R]."""
    hidden_RD, head_VD = operands(hidden_RD, head_VD)
    found = []
    for rows in hidden_RD.split(chunk_rows(head_VD)):
        p_RV = logits_of(rows, head_VD).softmax(dim=-1)
        found.append(torch.special.entr(p_RV).sum(dim=-1))
    return torch.cat(found)


def invert_cdf(p_RV, uniform_R):
    """Each row's column, never of probability 0, where the cumulative share exceeds `uniform_R`."""
    cumulative_RV = p_RV.cumsum(dim=-1)
    # stay strictly below the total, where the last columns may have no share
    total_R1 = cumulative_RV[:, -1:]
    below_total_R1 = torch.nextafter(total_R1, torch.zeros_like(total_R1))
    mark_R1 = torch.minimum(uniform_R[:, None] * total_R1, below_total_R1)
    found_R = torch.searchsorted(cumulative_RV, mark_R1, right=True)[:, 0]
    return found_R.clamp(max=p_RV.shape[1] - 1)      # p is nan: any index will do
