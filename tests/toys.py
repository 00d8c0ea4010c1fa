"""Small models and the slow, obvious versions of every clever thing: the oracles."""
import torch

from attention import may_attend
from model import Mistral, ModelConfig
from thoughts import QuietSTaR, ThoughtConfig
from tools.one_pass import use_one_pass

TINY = dict(vocab_size=23, dim=16, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=24)


def tiny_mistral(seed: int = 0, **changes) -> Mistral:
    """Random weights large enough that every path matters to the output."""
    generator = torch.Generator().manual_seed(seed)
    model = Mistral(ModelConfig(**{**TINY, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.dim() > 1 else 0.1)
                    + (p.dim() == 1))
    return model


def tiny_quiet(seed: int = 0, model: dict | None = None, one_pass: bool = False,
               **thought) -> QuietSTaR:
    """A QuietSTaR whose mixing head is no longer fresh."""
    settings = dict(thought_len=3, n_thoughts=2, n_true=2, policy_weight=1.0,
                    policy_temperature=1.5)
    generator = torch.Generator().manual_seed(seed + 1)
    quiet = QuietSTaR(tiny_mistral(seed, **(model or {})), ThoughtConfig(**{**settings, **thought}))
    quiet.init_thoughts(torch.randn(quiet.model.config.dim, generator=generator), generator)
    with torch.no_grad():
        quiet.end_thought.add_(torch.randn(quiet.end_thought.shape, generator=generator))
        quiet.mixing_head[4].weight.copy_(torch.randn(quiet.mixing_head[4].weight.shape,
                                                      generator=generator))
    return use_one_pass(quiet) if one_pass else quiet


def texts(B: int, L: int, vocab_size: int = 23, seed: int = 0):
    return torch.randint(vocab_size, (B, L), generator=torch.Generator().manual_seed(seed))


def uniforms(*shape, seed: int = 0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def assert_one_pass_loses_no_more(quiet: QuietSTaR, ids_BL, uniform_BNPT):
    """In bfloat16 every gradient of one pass is as near to fp32 as that of sample-then-read."""
    found, draws = [], dict(uniform_BNPT=uniform_BNPT)
    use_one_pass(quiet)
    for half in (True, True, False):      # one pass; forced thoughts are read: in bf16, in fp32
        quiet.zero_grad()
        with torch.autocast(ids_BL.device.type, torch.bfloat16, enabled=half):
            outcome = quiet(ids_BL, ids_BL >= 0, **draws)
        outcome.loss.backward()
        found.append({name: p.grad for name, p in quiet.named_parameters()})
        draws = dict(thought_BNPT=outcome.thought_BNPT)
    ours, theirs, exact = found
    for name in exact:
        error, oracle = ((gradients[name] - exact[name]).norm() / exact[name].norm()
                         for gradients in (ours, theirs))
        assert error <= 1.25 * oracle + 1e-3, f"{name}: {error:.2e} against {oracle:.2e}"


class DenseContext:
    """Attention under one dense boolean mask, [queries, keys], per window."""
    def __init__(self, position_BS, mask_of_window):
        self.position_BS, self.mask_of_window = position_BS, mask_of_window

    def attend(self, q_BSHE, k_BSKE, v_BSKE, layer, window):
        group = q_BSHE.shape[2] // k_BSKE.shape[2]
        k_BSHE, v_BSHE = (t.repeat_interleave(group, dim=2) for t in (k_BSKE, v_BSKE))
        score = torch.einsum("bqhe,bkhe->bhqk", q_BSHE, k_BSHE) / q_BSHE.shape[-1] ** 0.5
        score = score.masked_fill(~self.mask_of_window(window), -torch.inf)
        return torch.einsum("bhqk,bkhe->bqhe", score.softmax(-1), v_BSHE)


def dense_read(quiet: QuietSTaR, ids_BL, position_BP, thought_BNPT):
    """`QuietSTaR.read` under the whole [text + thoughts]^2 mask of the one rule."""
    n_after = quiet.config.n_true - 1
    branch_BNPMD = quiet.embed_branch(ids_BL, position_BP, thought_BNPT, n_after)
    true_BPaD = quiet.model.embed(ahead(ids_BL, position_BP, n_after))
    assert torch.equal(branch_BNPMD[:, 0, :, -n_after:] if n_after else true_BPaD, true_BPaD)
    (B, L), (_, N, P, M, _) = ids_BL.shape, branch_BNPMD.shape
    text = torch.arange(L).expand(B, L)
    position = torch.cat((text, position_BP[:, None, :, None].expand(B, N, P, M).flatten(1)), dim=1)
    step = torch.cat((torch.zeros(L).long(), torch.arange(1, M + 1).repeat(N * P)))
    thought = torch.cat((torch.full((L,), -1), torch.arange(N * P).repeat_interleave(M)))
    same = thought[:, None] == thought[None]

    def mask_of_window(window):
        return may_attend((position[:, :, None], step[:, None]), (position[:, None], step[None]),
                          same, window)[:, None]
    x_BSD = torch.cat((quiet.model.embed(ids_BL), branch_BNPMD.flatten(1, 3)), dim=1)
    hidden_BSD = quiet.model.transform(x_BSD, DenseContext(position + step, mask_of_window))
    return hidden_BSD[:, :L], hidden_BSD[:, L:].unflatten(1, (N, P, M))


def ahead(ids_BL, position_BP, n: int):
    """The n true tokens after each position, one index at a time; past the end, the last token."""
    L = ids_BL.shape[1]
    if n == 0:
        return ids_BL.new_zeros(*position_BP.shape, 0)
    return torch.stack([ids_BL.gather(1, (position_BP + k).clamp(max=L - 1))
                        for k in range(1, n + 1)], dim=-1)
