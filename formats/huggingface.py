"""How others spell the same model: the names of its tensors, its numbers, the order of its rows.

Four layouts, all of them read and written by weights.py:
  base      Hugging Face's names, the language model only
  ours      the same, plus start_thought, end_thought, mixing_head.* and a `quiet_star` section in
            config.json: to other programs an ordinary model with a few tensors too many
  official  as ezelikman/quietstar-8-ahead: talk_head.*, and markers that are divided by 100
  mistral   Mistral's own files, the language model only: other names, other order in q and k

What is left out on purpose is refused by name: yarn, experts, quantised, multimodal, adapters.

Read next: files.py
"""
import re
from dataclasses import asdict, fields
from pathlib import Path

import torch

from config import UserError
from model import ModelConfig
from thoughts import ThoughtConfig

NAMES = (                             # our module, Hugging Face's, Mistral's; # is a number
    ("embed", "model.embed_tokens", "tok_embeddings"),
    ("norm", "model.norm", "norm"),
    ("head", "lm_head", "output"),
    ("layers.#.attention_norm", "model.layers.#.input_layernorm", "layers.#.attention_norm"),
    ("layers.#.attention.q", "model.layers.#.self_attn.q_proj", "layers.#.attention.wq"),
    ("layers.#.attention.k", "model.layers.#.self_attn.k_proj", "layers.#.attention.wk"),
    ("layers.#.attention.v", "model.layers.#.self_attn.v_proj", "layers.#.attention.wv"),
    ("layers.#.attention.o", "model.layers.#.self_attn.o_proj", "layers.#.attention.wo"),
    ("layers.#.ffn_norm", "model.layers.#.post_attention_layernorm", "layers.#.ffn_norm"),
    ("layers.#.ffn.gate", "model.layers.#.mlp.gate_proj", "layers.#.feed_forward.w1"),
    ("layers.#.ffn.up", "model.layers.#.mlp.up_proj", "layers.#.feed_forward.w3"),
    ("layers.#.ffn.down", "model.layers.#.mlp.down_proj", "layers.#.feed_forward.w2"))
HUGGING_FACE = {ours: theirs for ours, theirs, _ in NAMES}
OFFICIAL = {"start_thought": "start_embedding", "end_thought": "end_embedding",
            "mixing_head.#": "talk_head.0.#"}
LAYOUTS = {"base": HUGGING_FACE, "ours": HUGGING_FACE | {name: name for name in OFFICIAL},
           "official": HUGGING_FACE | OFFICIAL, "mistral": {ours: own for ours, _, own in NAMES}}
MARKERS, MARKER_SCALE = ("start_embedding", "end_embedding"), 100   # the official embedding_scale

KEYS = (                              # our number, Hugging Face's, Mistral's
    ("vocab_size", "vocab_size", "vocab_size"), ("dim", "hidden_size", "dim"),
    ("n_layers", "num_hidden_layers", "n_layers"), ("n_heads", "num_attention_heads", "n_heads"),
    ("n_kv_heads", "num_key_value_heads", "n_kv_heads"), ("head_dim", "head_dim", "head_dim"),
    ("ffn_dim", "intermediate_size", "hidden_dim"), ("norm_eps", "rms_norm_eps", "norm_eps"),
    ("max_seq_len", "max_position_embeddings", "max_seq_len"))
IF_ABSENT = {"n_kv_heads": 0, "head_dim": 0, "norm_eps": 1e-6, "max_seq_len": 32768}
ROPE_KEYS = (("rope_factor", "factor"), ("rope_low_freq", "low_freq_factor"),
             ("rope_high_freq", "high_freq_factor"),
             ("rope_old_context", "original_max_position_embeddings"))
ROPE_NEEDS = {"default": ROPE_KEYS[:0], "linear": ROPE_KEYS[:1], "llama3": ROPE_KEYS}
FAMILIES = ("mistral", "llama", "qwen2", "ministral")
REFUSED = {"hidden_act": "silu", "partial_rotary_factor": 1.0} | dict.fromkeys((    # if not this
    "quantization_config", "quantization", "num_local_experts", "num_experts", "moe", "mlp_bias",
    "vision_encoder", "vision_config", "lora", "yarn", "use_scaled_rope", "llama_4_scaling"))
OFFICIAL_CONFIG = {                   # the variant of the official code that was trained
    "merged_talk_heads": True, "merged_lm_and_talk_heads": False, "merged_lm_and_think_heads": True,
    "use_concat_talk_head": True, "use_shallow_think": True, "use_shallow_talk": False,
    "use_complex_think_head": False, "use_complex_talk_head": True, "use_weighted_talk_head": True}


def file_name(name: str, layout: str) -> str | None:
    """'layers.3.ffn.up.weight' -> 'model.layers.3.mlp.up_proj.weight'; None: not in this layout."""
    module, leaf = re.fullmatch(r"(.+?)(\.weight|\.bias)?", name.removeprefix("model.")).groups("")
    theirs = LAYOUTS[layout].get(re.sub(r"\d+", "#", module))
    return theirs and theirs.replace("#", "".join(re.findall(r"\d+", module))) + leaf


def turn(tensor, name: str, layout: str, config: ModelConfig, ours: bool):
    """The rows (or biases) of q and k in our order, or in the layout's; others stay as they are.

    Rotary positions turn the pairs (e, e + E/2) of a head, in Mistral's own files (2e, 2e + 1).
    """
    found = re.search(r"attention\.([qk])\.", name)
    if layout != "mistral" or not found:
        return tensor
    heads = {"q": config.n_heads, "k": config.n_kv_heads}[found[1]]
    pairs = tensor.unflatten(0, (heads, -1, 2) if ours else (heads, 2, -1))
    return pairs.transpose(1, 2).flatten(0, 2)


def from_config(given: dict, path: Path) -> tuple[ModelConfig, ThoughtConfig | None]:
    """What a params.json says, or a config.json of transformers 4 or 5.

    The second is the config's `quiet_star` section. Raises ValueError for what is not supported.
    """
    is_hf = path.name == "config.json"
    known, family = FAMILIES if is_hf else ("transformer", None), given.get("model_type")
    named = [name.removesuffix("ForCausalLM").lower() for name in given.get("architectures") or ()]
    for name in (family, *named):
        if name not in known:
            raise UserError(f"{path}: model_type '{name}' is not supported "
                             f"({', '.join(FAMILIES)})")
    rope = (given.get("rope_scaling") or {}) | (given.get("rope_parameters") or {})
    for key, only in REFUSED.items():
        value = given.get(key) or rope.get(key)
        if value and value != only:
            raise UserError(f"{path}: {key} = {str(value)[:60]} is not supported")
    found = {"windows": _windows(given, is_hf, path)}
    for ours, *theirs in KEYS:
        value = given.get(theirs[not is_hf])
        found[ours] = IF_ABSENT.get(ours) if value is None else value
        if found[ours] is None:
            raise UserError(f"{path} lacks {theirs[not is_hf]}")
    found["n_kv_heads"] = found["n_kv_heads"] or found["n_heads"]
    # where not given: 1e4, but 1e6 in a params.json without window, as in Mistral's first program
    unsaid = 1e4 if is_hf or any(found["windows"]) else 1e6
    found["rope_theta"] = rope.get("rope_theta") or given.get("rope_theta") or unsaid
    found["qkv_bias"] = any((family == "qwen2", given.get("attention_bias"), given.get("qkv_bias")))
    found["tied"] = bool(given.get("tie_word_embeddings"))
    section = given.get("quiet_star") or {}
    unknown = section.keys() - {field.name for field in fields(ThoughtConfig)}
    if unknown:
        raise UserError(f"{path}: quiet_star has the unknown setting '{min(unknown)}'")
    marker_ids = tuple(section.get("marker_ids", ()))
    settings = ThoughtConfig(**section | {"marker_ids": marker_ids}) if section else None
    return ModelConfig(**found, **_rope(rope, path)), settings


def _windows(given: dict, is_hf: bool, path: Path) -> tuple[int, ...]:
    """Tokens that the layers see in turn, 0 for all. Hugging Face says with `layer_types` which."""
    if not is_hf:                     # in real files a number, a list, or the text of either
        value = str(given.get("sliding_window") or given.get("_sliding_window"))
        return tuple(int(w) if w.isdigit() else 0 for w in re.findall(r"\d+|None|null", value))
    family, window = given["model_type"], given.get("sliding_window", 4096)  # transformers' default
    unused = family == "llama" or (family == "qwen2" and not given.get("use_sliding_window"))
    if unused or not window:
        return ()
    types = ["sliding_attention"] if family == "mistral" else given.get("layer_types") or ["no"]
    if not set(types) <= {"sliding_attention", "full_attention"}:
        raise UserError(f"{path}: sliding_window with {types[0]} layer_types is not supported")
    return tuple(window if name == "sliding_attention" else 0 for name in types)


def _rope(rope: dict, path: Path) -> dict:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_NEEDS:
        raise UserError(f"{path}: rope_scaling type '{kind}' is not supported "
                         f"({', '.join(ROPE_NEEDS)})")
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError(f"{path}: rope_parameters for each layer type are not supported")
    for _, theirs in ROPE_NEEDS[kind]:
        if theirs not in rope:
            raise UserError(f"{path}: rope_scaling of type '{kind}' lacks {theirs}")
    return {"rope_type": kind} | {ours: rope[theirs] for ours, theirs in ROPE_NEEDS[kind]}


def to_config(config: ModelConfig, layout: str, thoughts: ThoughtConfig | None,
              dtype: torch.dtype) -> dict:
    """What `from_config` reads: a params.json, or a config.json in the words of transformers 4.

    Transformers 5 reads them too. Raises ValueError for what the layout has no words for.
    """
    if layout == "mistral":
        if config.rope_type != "default":
            raise UserError(f"params.json has no rope '{config.rope_type}': use --layout=ours")
        window = config.windows[0] if len(config.windows) == 1 else list(config.windows)
        given = {theirs: getattr(config, ours) for ours, _, theirs in KEYS}
        return given | {"rope_theta": config.rope_theta, "sliding_window": window or None,
                        "qkv_bias": config.qkv_bias}
    windows = [config.window(i) or 0 for i in range(config.n_layers)]
    if len(set(windows)) > 1:         # of several, one as long as the context is none
        windows = [w if w < config.max_seq_len else 0 for w in windows]
    sizes = sorted(set(windows) - {0})
    if len(sizes) > 1:
        raise UserError(f"config.json holds one sliding_window, not {sizes}: use --layout=mistral")
    family = ("qwen2" if config.qkv_bias else "ministral" if sizes and 0 in windows else
              "mistral" if sizes or config.rope_type == "default" else "llama")
    rope = {"rope_type": config.rope_type} | {
        theirs: getattr(config, ours) for ours, theirs in ROPE_NEEDS[config.rope_type]}
    given = {theirs: getattr(config, ours) for ours, theirs, _ in KEYS} | {
        "model_type": family, "architectures": [family.capitalize() + "ForCausalLM"],
        "hidden_act": "silu", "tie_word_embeddings": config.tied, "rope_theta": config.rope_theta,
        "rope_scaling": rope if len(rope) > 1 else None, "sliding_window": max(windows) or None,
        "torch_dtype": str(dtype).removeprefix("torch.")}
    if family in ("qwen2", "ministral"):
        given |= {"use_sliding_window": bool(sizes), "layer_types": [
            "sliding_attention" if w else "full_attention" for w in windows]}
    if layout == "official":          # the official script's: both of its lengths and one
        given |= OFFICIAL_CONFIG | {"max_thoughts": thoughts.thought_len + 3 + thoughts.n_true + 1}
    if thoughts and layout != "base":
        given["quiet_star"] = asdict(thoughts)
    return given
