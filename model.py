"""Mistral: the language model that will learn to think. It knows nothing of thoughts.

A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention with an optional
sliding window, SwiGLU (arXiv 2310.06825). Llama and Qwen2 are the same rooms with other numbers.

The one seam: a block computes queries, keys and values, and asks the *context* it was given who
attends to whom. Text brings `CausalContext`, with or without a cache; thoughts bring their own
(`thoughts.py`). So a block never sees a mask, and a new attention pattern never touches this file.

Left out on purpose: dropout (the checkpoints are trained without), mixture of experts, tensor
parallelism, and anything that imports torch.distributed. Weights come and go in `weights.py`.

Shapes, as suffixes a tensor keeps for life:
  B batch   S tokens in this pass   L text positions   D width          V vocabulary
  H query heads   K key/value heads   E width of a head   F width of a feed-forward layer

Read next: head.py
"""
import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from config import UserError
from lm_head import chunked_cross_entropy

PIECE = 2048                          # tokens of a text that a feed-forward layer takes at a time


@dataclass(frozen=True)
class ModelConfig:
    """The numbers of an architecture; the defaults are Mistral-7B-v0.1."""
    vocab_size: int = 32000
    dim: int = 4096                   # width of the residual stream
    n_layers: int = 32
    n_heads: int = 32                 # query heads
    n_kv_heads: int = 8               # key/value heads, each shared by n_heads / n_kv_heads queries
    head_dim: int = 0                 # 0 means dim / n_heads (Mistral-Nemo: 128, not 160)
    ffn_dim: int = 14336
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_type: str = "default"        # default | linear | llama3
    rope_factor: float = 1.0          # linear, llama3: how much the context was stretched
    rope_low_freq: float = 1.0        # llama3: turns in old context below which all is stretched
    rope_high_freq: float = 4.0       # llama3: turns above which nothing is
    rope_old_context: int = 8192      # llama3: tokens of context before stretching
    windows: tuple[int, ...] = ()     # tokens seen, itself included, cycled over layers; 0 is all
    tied: bool = False                # the head is the embedding table
    qkv_bias: bool = False            # Qwen2
    max_seq_len: int = 32768          # tokens

    def __post_init__(self):
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} is below 1")
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        if self.n_heads % self.n_kv_heads:
            raise UserError(f"n_heads={self.n_heads} is not a multiple of "
                             f"n_kv_heads={self.n_kv_heads}: "
                             "each key/value head serves as many queries")
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} is odd: rotary positions turn pairs")
        if self.rope_type not in ("default", "linear", "llama3"):
            raise UserError(f"rope_type '{self.rope_type}' is not supported "
                             "(default, linear, llama3)")

    def window(self, layer: int) -> int | None:
        """Tokens that a query of this layer sees, itself included; None means all of them."""
        return (self.windows[layer % len(self.windows)] or None) if self.windows else None


def may_see(query_position, key_position, window: int | None):
    """Plain text: the key is no later than the query, and fewer than `window` tokens back."""
    distance = query_position - key_position
    return (distance >= 0) & (distance < window) if window else distance >= 0


class KVCache:
    """Keys and values of B texts, preallocated; slot t holds rotary position t.

    Forgetting is free: what lies beyond a query's own position is never seen, so to drop a thought
    one simply writes the next visible token over it.
    """
    def __init__(self, config: ModelConfig, batch: int, length: int, device=None, dtype=None):
        shape = (config.n_layers, batch, config.n_kv_heads, length, config.head_dim)
        self.k_BKLE, self.v_BKLE = (torch.zeros(shape, device=device, dtype=dtype)
                                    for _ in range(2))
        self.row_B1 = torch.arange(batch, device=device)[:, None]

    def write(self, layer: int, position_BS, k_BSKE, v_BSKE):
        """Store at `position_BS` and return this layer's whole [B, K, L, E] keys and values."""
        for store, new in ((self.k_BKLE[layer], k_BSKE), (self.v_BKLE[layer], v_BSKE)):
            store[self.row_B1, :, position_BS] = new.to(store.dtype)
        return self.k_BKLE[layer], self.v_BKLE[layer]

    def rows(self, rows_B):
        """That of some of the texts: a copy, unless they are all."""
        if rows_B.all():
            return self
        part = copy.copy(self)
        part.k_BKLE, part.v_BKLE = self.k_BKLE[:, rows_B], self.v_BKLE[:, rows_B]
        part.row_B1 = self.row_B1[:len(part.k_BKLE[0])]
        return part


class CausalContext:
    """Every token of a text attends to itself and to what came before it, within the window.

    Without a cache the pass holds the whole text, positions 0 .. S-1. With one, each token is first
    written at its own position, which may differ by row (right-padded prompts, then decoding).
    `length`: how many cache slots can matter by now; the caller knows, the rest is not touched.
    """
    def __init__(self, position_BS, cache: KVCache | None = None, length: int | None = None):
        self.position_BS, self.cache, self.length = position_BS, cache, length

    def attend(self, q_BSHE, k_BSKE, v_BSKE, layer: int, window: int | None):
        q_BHSE = q_BSHE.transpose(1, 2)
        if self.cache is None:
            k_BKLE, v_BKLE = k_BSKE.transpose(1, 2), v_BSKE.transpose(1, 2)
        else:
            k_BKLE, v_BKLE = self.cache.write(layer, self.position_BS, k_BSKE, v_BSKE)
            k_BKLE, v_BKLE = (t[:, :, :self.length].to(q_BSHE.dtype) for t in (k_BKLE, v_BKLE))
        mask = None
        if self.cache is not None or (window and k_BKLE.shape[2] > window):
            key_position_L = torch.arange(k_BKLE.shape[2], device=q_BSHE.device)
            mask = may_see(self.position_BS[:, None, :, None], key_position_L, window)
        out_BHSE = F.scaled_dot_product_attention(q_BHSE, k_BKLE, v_BKLE, attn_mask=mask,
                                                  is_causal=mask is None, enable_gqa=True)
        return out_BHSE.transpose(1, 2)


def rope(position_BS, config: ModelConfig):
    """Cosine and sine, [B, S, 1, E/2] each, of every pair's angle at every position."""
    even = torch.arange(0, config.head_dim, 2, device=position_BS.device, dtype=torch.float32)
    turn = 1.0 / config.rope_theta ** (even / config.head_dim)           # radians per token
    if config.rope_type == "linear":
        turn = turn / config.rope_factor
    if config.rope_type == "llama3":
        turns = config.rope_old_context * turn / (2 * math.pi)
        low, high = config.rope_low_freq, config.rope_high_freq
        keep = ((turns - low) / (high - low)).clamp(0, 1)                # 1 keeps, 0 stretches
        turn = keep * turn + (1 - keep) * turn / config.rope_factor
    angle = position_BS[:, :, None, None].float() * turn
    return angle.cos(), angle.sin()


def rotate(x_BSHE, cos, sin):
    """Turn the pairs (e, e + E/2): the Hugging Face order. Mistral's own files pair neighbours."""
    first, second = x_BSHE.chunk(2, dim=-1)
    cos, sin = cos.to(x_BSHE.dtype), sin.to(x_BSHE.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.window, self.head_dim = layer, config.window(layer), config.head_dim
        q_width, kv_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q = nn.Linear(config.dim, q_width, bias=config.qkv_bias)
        self.k = nn.Linear(config.dim, kv_width, bias=config.qkv_bias)
        self.v = nn.Linear(config.dim, kv_width, bias=config.qkv_bias)
        self.o = nn.Linear(q_width, config.dim, bias=False)

    def forward(self, x_BSD, cos, sin, context):
        q_BSHE, k_BSKE, v_BSKE = (f(x_BSD).unflatten(-1, (-1, self.head_dim))
                                  for f in (self.q, self.k, self.v))
        q_BSHE, k_BSKE = rotate(q_BSHE, cos, sin), rotate(k_BSKE, cos, sin)
        return self.o(self.attend(context, q_BSHE, k_BSKE, v_BSKE).flatten(-2))

    def attend(self, context, q_BSHE, k_BSKE, v_BSKE):
        return context.attend(q_BSHE, k_BSKE, v_BSKE, self.layer, self.window)


class SwiGLU(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x_BSD, norm):
        """x + ffn(norm(x)): the whole second half of a block, so that it can go in pieces."""
        pieces = [x + self.piece(norm(x)) for x in x_BSD.split(PIECE, dim=1)]
        return torch.cat(pieces, dim=1)

    def piece(self, x_BSD):
        gate_BSF, up_BSF = self.gate(x_BSD), self.up(x_BSD)
        if not torch.is_grad_enabled():
            return self.close(gate_BSF, up_BSF)
        return checkpoint(self.close, gate_BSF, up_BSF, use_reentrant=False)

    def close(self, gate_BSF, up_BSF):
        """The gated product is formed again in the backward pass: cheaper than keeping it."""
        return self.down(F.silu(gate_BSF) * up_BSF)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn = SwiGLU(config)

    def forward(self, x_BSD, cos, sin, context):
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cos, sin, context)
        return self.ffn(x_BSD, self.ffn_norm)


class Mistral(nn.Module):
    """Embedding, blocks, norm, and a head that the caller applies only where it predicts."""
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        self.recompute = 0            # activation checkpointing of every n-th block; 0 none, 1 all

    def init_weights(self, generator: torch.Generator):
        """As in GPT-2: N(0, 0.02), what writes to the residual stream scaled by depth."""
        for name, p in self.named_parameters():
            if p.dim() == 1:
                nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)
            else:
                writes_residual = name.endswith(("attention.o.weight", "ffn.down.weight"))
                std = 0.02 / math.sqrt(2 * self.config.n_layers) if writes_residual else 0.02
                nn.init.normal_(p, std=std, generator=generator)
        return self

    def compile_blocks(self, backend: str = "inductor"):
        """torch.compile what is the same in every block: all but the attention of the context."""
        for block in self.layers:
            block.attention.attend = torch.compiler.disable(block.attention.attend)
            block.compile(backend=backend)

    def forward(self, ids_BS, context):
        """Token ids to hidden states after the final norm, [B, S, D]."""
        return self.transform(self.embed(ids_BS), context)

    def transform(self, x_BSD, context):
        """The same from embeddings, for tokens that are in no vocabulary."""
        cos, sin = rope(context.position_BS, self.config)
        for i, block in enumerate(self.layers):
            if self.recompute and i % self.recompute == 0 and torch.is_grad_enabled():
                x_BSD = checkpoint(block, x_BSD, cos, sin, context, use_reentrant=False)
            else:
                x_BSD = block(x_BSD, cos, sin, context)
        return self.norm(x_BSD)


@dataclass
class NextTokenLoss:
    loss: torch.Tensor                # carries the gradient

    def metrics(self) -> dict[str, torch.Tensor]:
        """This batch's share of the step's averages, under their names in log.jsonl."""
        return {"loss": self.loss.detach(), "nll/base": self.loss.detach()}


class NextToken(nn.Module):
    """The plain objective: every token predicts the next. Stands beside thoughts.QuietSTaR."""
    def __init__(self, model: Mistral):
        super().__init__()
        self.model = model

    def forward(self, ids_BL, valid_BL, terms=None):
        """The mean nll (nats per token) of one micro-batch; terms[0], default the number of its
        predictions, is the whole step's denominator."""
        terms = valid_BL[:, 1:].sum()[None] if terms is None else terms
        position_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device).expand_as(ids_BL)
        hidden_BLD = self.model(ids_BL, CausalContext(position_BL))
        scored_BL = valid_BL[:, 1:]
        target_R = ids_BL[:, 1:][scored_BL]
        weight_R = (1 / terms[0].clamp(min=1)).float().expand_as(target_R)
        loss, _ = chunked_cross_entropy(hidden_BLD[:, :-1][scored_BL], self.model.head.weight,
                               target_R, weight_R)
        return NextTokenLoss(loss)
