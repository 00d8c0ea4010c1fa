"""FLOPs of a training step by formula: the oracle for what the counter of tools/bench.py finds."""
from model import ModelConfig
from thoughts import ThoughtConfig


def forward_flops(m: ModelConfig, tokens, pairs, predictions):
    """Count FLOPs of the blocks for `tokens`, of attention between `pairs`, and of the head."""
    heads = m.head_dim * (m.n_heads + m.n_kv_heads)
    matrices = m.dim * (2 * heads + 3 * m.ffn_dim)
    attention = 2 * m.head_dim * m.n_heads
    layers = m.n_layers * (matrices * tokens + attention * pairs)
    return 2.0 * (layers + m.dim * m.vocab_size * predictions)


def step_flops(m: ModelConfig, c: ThoughtConfig, B: int, L: int):
    """Count FLOPs by variant, without masked pairs and recomputation. Half of the thoughts (N = 1:
    none) have an advantage, and only they see the head. `once`: each token forward and backward.
    """
    P, T, A = L - 1, c.thought_len, c.n_true
    branches = B * c.n_thoughts       # at each position
    branch_len = T + A + 1
    causal = L * (L + 1) / 2

    def pairs(n):                     # n tokens of each branch see the text and one another
        text = n * P * (P + 1) / 2
        own = P * n * (n + 1) / 2
        return B * causal + branches * (text + own)

    # one forward pass over everything
    true_tokens = sum(range(P - A + 1, P + 1))
    policy = max(0, P - A) * T * 0.5 * (c.n_thoughts > 1)
    predictions = B * P + branches * (true_tokens + policy)
    tokens = B * L + branches * P * branch_len
    forward = forward_flops(m, tokens, pairs(branch_len), predictions)
    forward += 2.0 * m.dim * (3 * m.dim + 1) * branches * P * A        # the mixing head
    # sampling: at each position one start marker stands for those of all its thoughts
    sampled = branches * P * T
    shared = (branches - B) * P * (T > 0)
    saved = forward_flops(m, shared, shared * ((P + 1) / 2 + 1), 0)
    sampling = forward_flops(m, B * L + sampled, pairs(T), sampled) - saved
    once = 3 * forward + 2.0 * m.dim * m.vocab_size * sampled
    texts = B + branches * branch_len
    plain = 3 * forward_flops(m, texts * L, texts * causal, texts * P)
    return {"once": once, "quiet": once - 3 * saved, "plain_path": sampling + 3 * forward,
            "sampling": sampling, "plain": plain}
