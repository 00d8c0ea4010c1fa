"""Mistral: the language model that will learn to think. This file knows nothing of thoughts.

A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention with an optional
sliding window, SwiGLU (arXiv 2310.06825). Llama and Qwen2 are the same modules with other numbers.
The one seam: a block computes queries, keys and values, and the *context* that it was given decides
who attends to whom. A text has a `CausalContext`; thoughts bring their own (attention.py).
Left out on purpose: dropout (checkpoints are trained without), mixture of experts.

Shapes, as suffixes of names:
  B batch   S tokens in this pass   L text positions   D width          V vocabulary
  H query heads   K key/value heads   E width of a head   F width of a feed-forward layer
"""
import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from config import UserError, check_ranges

CHUNK_TOKENS = 2048                   # tokens of a text that a feed-forward layer takes at a time
LARGEST = 1 << 24                     # of any number of an architecture


@dataclass(frozen=True)
class ModelConfig:
    """The numbers of an architecture; the defaults are Mistral-7B-v0.1."""
    vocab_size: int = 32000           # rows of the embedding table
    dim: int = 4096                   # width of the residual stream
    n_layers: int = 32                # number of blocks
    n_heads: int = 32                 # number of query heads
    n_kv_heads: int = 8               # number of key/value heads; each serves several query heads
    head_dim: int = 0                 # width of a head; 0 means dim / n_heads (Mistral-Nemo: 128)
    ffn_dim: int = 14336              # width of the feed-forward layers
    norm_eps: float = 1e-5            # epsilon of RMSNorm
    rope_theta: float = 10000.0       # base of the rotary frequencies
    rope_type: str = "default"        # rotary scaling: default, linear or llama3
    rope_factor: float = 1.0          # linear, llama3: how much the context was stretched
    rope_low_freq: float = 1.0        # llama3: with fewer rotations in old context, stretch fully
    rope_high_freq: float = 4.0       # llama3: with more rotations in old context, do not stretch
    rope_old_context: int = 8192      # llama3: tokens of context before stretching
    windows: tuple[int, ...] = ()     # attention windows, cycled over layers, in tokens; 0 is all
    tied: bool = False                # the head is the embedding table
    qkv_bias: bool = False            # queries, keys and values have a bias (Qwen2)
    max_seq_len: int = 32768          # context in tokens

    def __post_init__(self):
        sizes = "vocab_size dim n_layers n_heads n_kv_heads ffn_dim max_seq_len rope_old_context"
        check_ranges(self, **dict.fromkeys(sizes.split(), (1, LARGEST)), norm_eps=(0, 0.1),
                     rope_theta=(1, 1e12), rope_factor=(1e-3, 1e6))
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        if self.n_heads % self.n_kv_heads:
            raise UserError(f"n_heads={self.n_heads}: no multiple of n_kv_heads={self.n_kv_heads}")
        if self.head_dim % 2 or not 1 <= self.head_dim <= LARGEST:
            raise UserError(f"head_dim={self.head_dim}: rotary positions rotate pairs")
        if not self.rope_low_freq < self.rope_high_freq:
            raise UserError(f"rope_high_freq={self.rope_high_freq} is not above rope_low_freq")
        if self.rope_type not in ("default", "linear", "llama3"):
            raise UserError(f"rope_type '{self.rope_type}' is not supported (linear, llama3)")

    def window(self, layer: int) -> int | None:
        """Tokens that a query of this layer sees, itself included; None means all of them."""
        return (self.windows[layer % len(self.windows)] or None) if self.windows else None


def may_see(query_position, key_position, window: int | None):
    """In plain text a key is no later than the query and fewer than `window` tokens back."""
    # a window of w holds the query itself and the w - 1 tokens before it
    distance = query_position - key_position
    return (distance >= 0) & (distance < window) if window else distance >= 0


class KVCache:
    """Keys and values of B texts, preallocated; slot t holds rotary position t. A dropped thought
    stays in later slots: no query attends to later positions, and the next tokens overwrite it."""
    def __init__(self, config: ModelConfig, batch: int, n_slots: int, device=None, dtype=None):
        shape = (config.n_layers, batch, config.n_kv_heads, n_slots, config.head_dim)
        self.k_BKLE, self.v_BKLE = (torch.zeros(shape, device=device, dtype=dtype) for _ in "kv")
        self.row_B1 = torch.arange(batch, device=device)[:, None]

    def write(self, layer: int, position_BS, k_BSKE, v_BSKE):
        """Store at each row's positions; return all keys and values of this layer, [B, K, L, E]."""
        # each row of the batch may be at other positions
        for store, new in ((self.k_BKLE[layer], k_BSKE), (self.v_BKLE[layer], v_BSKE)):
            store[self.row_B1, :, position_BS] = new.to(store.dtype)
        return self.k_BKLE[layer], self.v_BKLE[layer]

    def select(self, rows_B):
        """The cache of some of the texts: a copy, unless they are all."""
        if rows_B.all():
            return self
        part = copy.copy(self)
        part.k_BKLE, part.v_BKLE = self.k_BKLE[:, rows_B], self.v_BKLE[:, rows_B]
        part.row_B1 = self.row_B1[:part.k_BKLE.shape[1]]
        return part


class CausalContext:
    """Every token of a text attends to itself and to the tokens before it, within the window.
    Without a cache the pass holds the whole text. With one, each token is first written at its own
    position, which may differ by row; only the first `n_slots` slots of the cache are then read."""
    def __init__(self, position_BS, cache: KVCache | None = None, n_slots: int | None = None):
        self.position_BS, self.cache, self.n_slots = position_BS, cache, n_slots

    def attend(self, q_BSHE, k_BSKE, v_BSKE, layer: int, window: int | None):
        k_BKLE, v_BKLE = k_BSKE.transpose(1, 2), v_BSKE.transpose(1, 2)
        # with a cache: write the new keys and values, then attend to all that it holds
        if self.cache is not None:
            kv = self.cache.write(layer, self.position_BS, k_BSKE, v_BSKE)
            k_BKLE, v_BKLE = (t[:, :, :self.n_slots].to(q_BSHE.dtype) for t in kv)
        # a whole text without a binding window is plain causal attention, which needs no mask
        mask = None
        if self.cache is not None or (window and k_BKLE.shape[2] > window):
            key_position_L = torch.arange(k_BKLE.shape[2], device=q_BSHE.device)
            mask = may_see(self.position_BS[:, None, :, None], key_position_L, window)
        out_BHSE = F.scaled_dot_product_attention(
            q_BSHE.transpose(1, 2), k_BKLE, v_BKLE, mask, is_causal=mask is None, enable_gqa=True)
        return out_BHSE.transpose(1, 2)


def rope(position_BS, config: ModelConfig):
    """Cosine and sine, [B, S, 1, E/2] each, of the angle of every pair at every position."""
    even = torch.arange(0, config.head_dim, 2, device=position_BS.device, dtype=torch.float32)
    inv_freq = 1.0 / config.rope_theta ** (even / config.head_dim)          # radians per token
    if config.rope_type == "linear":
        inv_freq = inv_freq / config.rope_factor
    if config.rope_type == "llama3":
        # keep is 1 for fast pairs, which stay as they are, and 0 for slow ones, which are stretched
        rotations = config.rope_old_context * inv_freq / (2 * math.pi)
        low, high = config.rope_low_freq, config.rope_high_freq
        keep = ((rotations - low) / (high - low)).clamp(0, 1)
        inv_freq = keep * inv_freq + (1 - keep) * inv_freq / config.rope_factor
    # pair e turns by position * inv_freq[e]
    angle = position_BS[:, :, None, None].float() * inv_freq
    return angle.cos(), angle.sin()


def rotate(x_BSHE, cos, sin):
    """Rotate the pairs (e, e + E/2): Hugging Face's order; Mistral's own files pair neighbours."""
    first, second = x_BSHE.chunk(2, dim=-1)
    # each pair is a point in the plane: rotate it by its angle
    cos, sin = cos.to(x_BSHE.dtype), sin.to(x_BSHE.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Queries, keys and values of every token; the context does the attending."""
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.window, self.head_dim = layer, config.window(layer), config.head_dim
        q_width = config.n_heads * config.head_dim
        kv_width = config.n_kv_heads * config.head_dim
        self.q = nn.Linear(config.dim, q_width, bias=config.qkv_bias)
        self.k = nn.Linear(config.dim, kv_width, bias=config.qkv_bias)
        self.v = nn.Linear(config.dim, kv_width, bias=config.qkv_bias)
        self.o = nn.Linear(q_width, config.dim, bias=False)

    def forward(self, x_BSD, cos, sin, context):
        # project, and split the width into heads
        heads = (-1, self.head_dim)
        q_BSHE, k_BSKE, v_BSKE = (f(x_BSD).unflatten(-1, heads) for f in (self.q, self.k, self.v))
        # positions enter here, and nowhere else
        q_BSHE, k_BSKE = rotate(q_BSHE, cos, sin), rotate(k_BSKE, cos, sin)
        out_BSHE = context.attend(q_BSHE, k_BSKE, v_BSKE, self.layer, self.window)
        return self.o(out_BSHE.flatten(-2))


class SwiGLU(nn.Module):
    """The feed-forward layer, CHUNK_TOKENS tokens of each text at a time to bound its memory."""
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x_BSD):
        return torch.cat([self.chunk(x) for x in x_BSD.split(CHUNK_TOKENS, dim=1)], dim=1)

    def chunk(self, x_BSD):
        gate_BSF, up_BSF = self.gate(x_BSD), self.up(x_BSD)
        if not torch.is_grad_enabled():
            return self.gated_down(gate_BSF, up_BSF)
        # computing the gated product again in the backward pass is cheaper than keeping it
        return checkpoint(self.gated_down, gate_BSF, up_BSF, use_reentrant=False)

    def gated_down(self, gate_BSF, up_BSF):
        return self.down(F.silu(gate_BSF) * up_BSF)


class Block(nn.Module):
    """One layer: attention, then the feed-forward layer, each added to the residual stream."""
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn = SwiGLU(config)

    def forward(self, x_BSD, cos, sin, context):
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cos, sin, context)
        return x_BSD + self.ffn(self.ffn_norm(x_BSD))


class Mistral(nn.Module):
    """Embedding, blocks, final norm, and a head that the caller applies where it predicts."""
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        # small models share one table between embedding and head
        if config.tied:
            self.head.weight = self.embed.weight
        self.recompute = 0            # activation checkpointing of every n-th block; 0 none, 1 all
        self.adapter = None           # formats/lora.py: what learns instead of the weights

    def init_weights(self, generator: torch.Generator):
        """Initialise as GPT-2: N(0, 0.02), and less by depth for what writes to the residual."""
        for name, p in self.named_parameters():
            if p.dim() == 1:
                nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)
                continue
            # 2 * n_layers layers add to the stream: together they have the variance of one
            writes_residual = name.endswith(("attention.o.weight", "ffn.down.weight"))
            std = 0.02 / math.sqrt(2 * self.config.n_layers) if writes_residual else 0.02
            nn.init.normal_(p, std=std, generator=generator)
        return self

    def forward(self, ids_BS, context):
        """Token ids to hidden states after the final norm, [B, S, D]."""
        return self.transform(self.embed(ids_BS), context)

    def transform(self, x_BSD, context):
        """The same from embeddings, which need not be in the vocabulary."""
        # one rotary table serves all layers
        cos, sin = rope(context.position_BS, self.config)
        for i, block in enumerate(self.layers):
            # activation checkpointing keeps a block's input alone, and runs the block again later
            if self.recompute and i % self.recompute == 0 and torch.is_grad_enabled():
                x_BSD = checkpoint(block, x_BSD, cos, sin, context, use_reentrant=False)
            else:
                x_BSD = block(x_BSD, cos, sin, context)
        return self.norm(x_BSD)
