"""GGUF, the files of llama.cpp: weights, often quantised, and the tokenizer in one file.

    gguf_config(path), gguf_tensors(path), gguf_tokenizer(path)

give what the config.json, the weights and the tokenizer.json of a Hugging Face folder would hold.
The package `gguf` (optional) reads and dequantises. Architectures: llama (Mistral, Llama, SmolLM2)
and qwen2. Left out on purpose: writing, files in several parts, and what is not byte-level BPE.
"""
import re
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from config import UserError
from formats.huggingface import NAMES, unpair

MODULES = dict(zip((                  # in the order of NAMES; # is a number
    "token_embd", "output_norm", "output", "blk.#.attn_norm", "blk.#.attn_q", "blk.#.attn_k",
    "blk.#.attn_v", "blk.#.attn_output", "blk.#.ffn_norm", "blk.#.ffn_gate", "blk.#.ffn_up",
    "blk.#.ffn_down"), (theirs for _, theirs, _ in NAMES)))
NUMBERS = {                           # Hugging Face's, and GGUF's behind the architecture's name
    "hidden_size": "embedding_length", "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count", "intermediate_size": "feed_forward_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon", "max_position_embeddings": "context_length"}
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {                            # how a vocabulary's `pre` cuts text into words
    "smollm": {"type": "Digits", "individual_digits": True},
    "llama-bpe": _LETTERS + r"\p{N}{1,3}" + _OTHERS,
    "qwen2": _LETTERS + r"\p{N}" + _OTHERS}
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5                      # types of tokens


@contextmanager
def readable(path: Path):
    """Make one line of what goes wrong in reading a damaged file."""
    try:
        yield
    except UserError:
        raise
    except ImportError:
        raise UserError(f"{path}: reading GGUF needs a package: pip install gguf") from None
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"cannot read {path} as GGUF ({error}): download it again") from None


@lru_cache(maxsize=1)
def _opened(path: Path):
    """The architecture, all metadata, and the tensors by name; their values are mapped."""
    from gguf import GGUFReader

    class Reader(GGUFReader):
        """The package's, but no size that the file names leads beyond its end."""
        def _get(self, offset, dtype, count=1, override_order=None):
            if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError("a size in it leads beyond its end")
            return super()._get(offset, dtype, count, override_order)
    reader = Reader(path)
    given = {name: field.contents() for name, field in reader.fields.items()}
    if given.get("split.count", 1) > 1:
        raise UserError(f"{path} is one of {given['split.count']} parts: join them by gguf-split")
    architecture = given.get("general.architecture")
    if architecture not in ("llama", "qwen2"):
        raise UserError(f"{path}: architecture '{architecture}' is not supported (llama, qwen2)")
    return architecture, given, {tensor.name: tensor for tensor in reader.tensors}


def gguf_config(path: Path) -> dict:
    """Return the architecture as a config.json would spell it. Raises UserError."""
    with readable(path):
        architecture, given, tensors = _opened(path)
        own = {name.removeprefix(architecture + "."): value for name, value in given.items()}
        numbers = {theirs: own[ours] for theirs, ours in NUMBERS.items()}
        n_heads, eps = numbers["num_attention_heads"], numbers["rms_norm_eps"]
        head_dim = own.get("attention.key_length", numbers["hidden_size"] // n_heads)
        n_kv_heads = own.get("attention.head_count_kv", n_heads)
        window = own.get("attention.sliding_window")
        rope_dim = own.get("rope.dimension_count", head_dim)
        refused = {"a mixture of experts": own.get("expert_count"),
                   "head_count_kv that differs by layer": isinstance(n_kv_heads, list),
                   f"rope.dimension_count below {head_dim}": rope_dim != head_dim}
        for what in filter(refused.get, refused):
            raise UserError(f"{path}: {what} is not supported")
        numbers["rms_norm_eps"] = float(f"{eps:.6g}")         # stored as float32
        numbers["rope_theta"] = own.get("rope.freq_base", 10000.0)
        return numbers | {
            "model_type": "mistral" if window and architecture == "llama" else architecture,
            "vocab_size": int(tensors["token_embd.weight"].shape[1]), "head_dim": head_dim,
            "num_key_value_heads": n_kv_heads, "sliding_window": window,
            "tie_word_embeddings": "output.weight" not in tensors,
            "rope_scaling": _rope_scaling(path, own, tensors, head_dim, numbers["rope_theta"])}


def _rope_scaling(path: Path, own: dict, tensors: dict, head_dim: int, theta: float):
    """Return how rotary positions are scaled; llama3's way is stored as a factor per frequency."""
    kind = own.get("rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": kind, "factor": own["rope.scaling.factor"]}
    if kind != "none":
        raise UserError(f"{path}: rope scaling '{kind}' is not supported (none, linear)")
    if "rope_freqs.weight" not in tensors:
        return None
    stored = np.array(tensors["rope_freqs.weight"].data, np.float64)
    factor = float(stored.max())
    # Llama 3's formula: how many rotations fit into the old context, between 1 and 4
    rotations = 8192 / (2 * np.pi * theta ** (np.arange(len(stored)) * 2 / head_dim))
    keep = ((rotations - 1) / 3).clip(0, 1)
    if not np.allclose(stored * (keep + (1 - keep) / factor), 1, rtol=1e-3):
        raise UserError(f"{path}: rope_freqs.weight is not Llama 3's, hence not supported")
    return {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class QuantisedTensor:
    """A tensor in a GGUF file: its values are computed when they are used."""
    file: Path
    stored: object                    # gguf's ReaderTensor
    n_paired: int                     # heads whose rows are stored as pairs (2e, 2e + 1), or 0

    @property
    def mapped(self) -> torch.Tensor:
        """A tensor of its shape and type, without values; what is quantised becomes float32."""
        dtypes = {"F16": torch.float16, "BF16": torch.bfloat16}
        shape, kind = self.stored.shape.tolist()[::-1], self.stored.tensor_type.name
        return torch.empty(shape, dtype=dtypes.get(kind, torch.float32), device="meta")

    def read(self, dtype: torch.dtype | None, device):
        """Return the tensor as `dtype` (None keeps its own) on `device`. Raises UserError."""
        from gguf.quants import dequantize
        try:
            values = dequantize(self.stored.data, self.stored.tensor_type)
        except NotImplementedError:
            raise UserError(f"{self.file}: {self.stored.name} is {self.stored.tensor_type.name}, "
                            "which the package gguf cannot dequantise") from None
        tensor = torch.from_numpy(np.array(values, np.float32))
        if self.n_paired:
            tensor = unpair(tensor, self.n_paired)
        return tensor.to(device, dtype or self.mapped.dtype)


def gguf_tensors(path: Path) -> dict[str, QuantisedTensor]:
    """Map the tensors of a file by Hugging Face's names. Raises UserError."""
    config = gguf_config(path)
    architecture, _, stored_by_name = _opened(path)
    # the rows of q and k are paired, but not in qwen2
    paired = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for name, stored in stored_by_name.items():
        module, _, leaf = name.rpartition(".")
        number = "".join(re.findall(r"\d+", module))
        theirs = MODULES.get(re.sub(r"\d+", "#", module), module).replace("#", number)
        n_paired = paired.get(module.rpartition(".")[2], 0) if architecture == "llama" else 0
        tensors[f"{theirs}.{leaf}"] = QuantisedTensor(path, stored, n_paired)
    tensors.pop("rope_freqs.weight", None)                   # in the config
    return tensors


def gguf_ends(path: Path) -> set[int]:
    """Return the ids that end a text, where the file names them."""
    with readable(path):
        _, given, _ = _opened(path)
        names = {f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot")}
        return {int(given[name]) for name in names & given.keys()}


def gguf_tokenizer(path: Path) -> dict | None:
    """Return the vocabulary as a tokenizer.json spells it; None if it is of an unknown kind."""
    with readable(path):
        _, given, _ = _opened(path)
        pre = given.get("tokenizer.ggml.pre")
        if given.get("tokenizer.ggml.model") != "gpt2" or pre not in SPLITS:
            return None
        split = SPLITS[pre]
        if isinstance(split, str):
            split = {"type": "Split", "behavior": "Isolated", "invert": False,
                     "pattern": {"Regex": split}}
        types = given["tokenizer.ggml.token_type"]
        vocab = {text: i for i, text in enumerate(given["tokenizer.ggml.tokens"])
                 if types[i] != UNUSED}
        as_it_is = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added = [dict(id=i, content=text, special=types[i] == CONTROL, **as_it_is)
                 for text, i in vocab.items() if types[i] in (CONTROL, USER_DEFINED)]
        letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        splits = [split, letters | {"use_regex": pre == "smollm"}]
        return {"version": "1.0", "added_tokens": added, "decoder": letters | {"use_regex": True},
                "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits},
                "model": dict(type="BPE", vocab=vocab, merges=given["tokenizer.ggml.merges"])}
