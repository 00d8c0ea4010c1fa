"""Checkpoint formats of others: names of tensors, numbers of architectures, safetensors files.

    tensors = open_tensors(Path("model.safetensors.index.json"))        # nothing is read yet
    weight = tensors["lm_head.weight"].read(torch.bfloat16, "cuda")

checkpoint.py reads three layouts and writes the first:
  ours      Hugging Face's names; thoughts add start_thought, end_thought, mixing_head.* and a
            `quiet_star` section in config.json, which other programs ignore
  official  as ezelikman/quietstar-8-ahead: talk_head.*, and markers that are divided by 100
  mistral   Mistral's own files, with other names and another order of the rows of q and k
Left out on purpose: yarn, mixtures of experts, quantised weights, and pickled files.
"""
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from config import UserError, check_json, check_regular, from_stored, read_json
from model import ModelConfig
from thoughts import ThoughtConfig

NAMES = [row.split() for row in (     # our module, Hugging Face's, Mistral's; # is a number
    "embed                    model.embed_tokens                       tok_embeddings",
    "norm                     model.norm                               norm",
    "head                     lm_head                                  output",
    "layers.#.attention_norm  model.layers.#.input_layernorm           layers.#.attention_norm",
    "layers.#.attention.q     model.layers.#.self_attn.q_proj          layers.#.attention.wq",
    "layers.#.attention.k     model.layers.#.self_attn.k_proj          layers.#.attention.wk",
    "layers.#.attention.v     model.layers.#.self_attn.v_proj          layers.#.attention.wv",
    "layers.#.attention.o     model.layers.#.self_attn.o_proj          layers.#.attention.wo",
    "layers.#.ffn_norm        model.layers.#.post_attention_layernorm  layers.#.ffn_norm",
    "layers.#.ffn.gate        model.layers.#.mlp.gate_proj             layers.#.feed_forward.w1",
    "layers.#.ffn.up          model.layers.#.mlp.up_proj               layers.#.feed_forward.w3",
    "layers.#.ffn.down        model.layers.#.mlp.down_proj             layers.#.feed_forward.w2")]
OFFICIAL = {"start_thought": "start_embedding", "end_thought": "end_embedding",
            "mixing_head.#": "talk_head.0.#"}
HUGGING_FACE = {ours: theirs for ours, theirs, _ in NAMES}
LAYOUTS = {"ours": HUGGING_FACE | {name: name for name in OFFICIAL},
           "official": HUGGING_FACE | OFFICIAL,
           "mistral": {ours: theirs for ours, _, theirs in NAMES}}
MARKER_SCALE = 100                    # embedding_scale of the official code

KEYS = [names.split() for names in (  # our number, Hugging Face's, Mistral's
    "vocab_size vocab_size vocab_size", "dim hidden_size dim",
    "n_layers num_hidden_layers n_layers", "n_heads num_attention_heads n_heads",
    "n_kv_heads num_key_value_heads n_kv_heads", "head_dim head_dim head_dim",
    "ffn_dim intermediate_size hidden_dim", "norm_eps rms_norm_eps norm_eps",
    "max_seq_len max_position_embeddings max_seq_len")]
IF_ABSENT = {"n_kv_heads": 0, "head_dim": 0, "norm_eps": 1e-6, "max_seq_len": 32768}
ROPE_TYPES = {"default": {}, "linear": {"rope_factor": "factor"}, "llama3": {
    "rope_factor": "factor", "rope_low_freq": "low_freq_factor",
    "rope_high_freq": "high_freq_factor", "rope_old_context": "original_max_position_embeddings"}}
FAMILIES = ("mistral", "llama", "qwen2", "ministral")
ONLY_VALUE = {"hidden_act": "silu", "partial_rotary_factor": 1.0} | dict.fromkeys((
    "quantization_config", "quantization", "num_local_experts", "num_experts", "moe", "mlp_bias",
    "vision_encoder", "vision_config", "lora", "yarn", "use_scaled_rope", "llama_4_scaling",
    "full_attention", "sliding_attention"))      # the last two: rope_parameters for each layer type
_FLAGS = "attention_bias", "qkv_bias", "tie_word_embeddings", "use_sliding_window"
_WINDOW = None, int, str, [(None, int)]
_ROPE = None, {"rope_type": (None, str), "type": (None, str), "rope_theta": (None, float)}
SHAPE = dict.fromkeys(_FLAGS, (None, bool)) | {          # of a config.json or params.json
    "model_type": (None, str), "architectures": (None, [str]), "layer_types": (None, [str]),
    "rope_theta": (None, float), "rope_scaling": _ROPE, "rope_parameters": _ROPE,
    "sliding_window": _WINDOW, "_sliding_window": _WINDOW,
    "quiet_star": (None, {"marker_ids": (None, [int])})}
CONVERTED_BYTES = 64 << 20            # of a tensor, converted at a time


def file_name(name: str, layout: str) -> str:
    """Return a parameter's name in a layout: head.weight is lm_head.weight in ours."""
    pattern = r"(.+?)(\.weight|\.bias|\.lora_[AB])?"
    module, leaf = re.fullmatch(pattern, name.removeprefix("model.")).groups("")
    number = "".join(re.findall(r"\d+", module))
    stored = LAYOUTS[layout][re.sub(r"\d+", "#", module)].replace("#", number)
    if leaf.startswith(".lora"):      # as PEFT stores them
        return f"base_model.model.{stored}{leaf}.weight"
    return stored + leaf


def permute_rope(tensor, name: str, config: ModelConfig):
    """Reorder q and k of Mistral's files, whose rotary positions turn neighbours; nothing else."""
    n_heads = {"q": config.n_heads, "k": config.n_kv_heads}.get(name.split(".")[-2])
    return unpair(tensor, n_heads) if n_heads else tensor


def unpair(tensor, n_heads: int):
    """Reorder the rows of each head: neighbours (2e, 2e + 1) come to stand at (e, e + E/2)."""
    return tensor.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def from_config(given: dict, path: Path) -> tuple[ModelConfig, ThoughtConfig | None]:
    """Read a params.json, or a config.json of transformers 4 or 5. Raises UserError."""
    check_json(given, SHAPE, path)
    is_hf = path.name != "params.json"
    known = FAMILIES if is_hf else ("transformer", None)
    named = [name.removesuffix("ForCausalLM").lower() for name in given.get("architectures") or ()]
    for name in (given.get("model_type"), *named):
        if name not in known:
            raise UserError(f"{path}: model_type '{name}' is not supported ({', '.join(FAMILIES)})")
    rope = (given.get("rope_scaling") or {}) | (given.get("rope_parameters") or {})
    for key, only in ONLY_VALUE.items():
        for value in (given.get(key), rope.get(key)):
            if value not in (None, only) and (value or only):
                raise UserError(f"{path}: {key} = {str(value)[:60]} is not supported")
    # The numbers of the architecture.
    found = {"windows": _hf_windows(given, path) if is_hf else _mistral_windows(given, path)}
    for ours, hf_key, mistral_key in KEYS:
        key = hf_key if is_hf else mistral_key
        value = given.get(key)
        found[ours] = IF_ABSENT.get(ours) if value is None else value
        if found[ours] is None or value == 0:
            raise UserError(f"{path} lacks {key}, or has 0 for it")
    found["n_kv_heads"] = found["n_kv_heads"] or found["n_heads"]
    # If absent: 1e4, but 1e6 in a params.json without window, as in Mistral's first program.
    default = 1e4 if is_hf or any(found["windows"]) else 1e6
    thetas = [rope.get("rope_theta"), given.get("rope_theta"), default]
    found["rope_theta"] = next(theta for theta in thetas if theta is not None)
    bias = given.get("attention_bias") or given.get("qkv_bias")
    found["qkv_bias"] = bias or given.get("model_type") == "qwen2"
    found["tied"] = given.get("tie_word_embeddings")
    config = from_stored(ModelConfig, found | _rope(rope, path), path)
    # The settings of the thoughts.
    section = given.get("quiet_star")
    if not section:
        return config, None
    unknown = section.keys() - {field.name for field in fields(ThoughtConfig)}
    if unknown:
        raise UserError(f"{path}: quiet_star has the unknown setting '{min(unknown)}'")
    settings = from_stored(ThoughtConfig, section, path)
    if max(settings.marker_ids, default=0) >= config.vocab_size:
        raise UserError(f"{path}: marker_ids {settings.marker_ids} exceed the vocabulary")
    return config, settings


def _mistral_windows(given: dict, path: Path) -> tuple[int, ...]:
    """Return the windows of the layers in turn, 0 for none: a number, a list, or either as text."""
    value = given.get("sliding_window") or given.get("_sliding_window")
    words = re.sub(r"\b(None|null)\b", "0", str(value)).strip("[]").split(",")
    if not all(re.fullmatch(r"\s*\d{1,9}\s*", word) for word in words):
        raise UserError(f"{path}: sliding_window is {str(value)[:60]!r}: write numbers or null")
    return tuple(map(int, words))


def _hf_windows(given: dict, path: Path) -> tuple[int, ...]:
    """Return the windows of the layers in turn, 0 for none; `layer_types` names those with one."""
    family = given["model_type"]
    window = given.get("sliding_window", 4096)               # the default of transformers
    check_json(window, (None, int), f"{path}: sliding_window")
    unused = family == "llama" or (family == "qwen2" and not given.get("use_sliding_window"))
    if unused or window is None:
        return ()
    if window < 1:
        raise UserError(f"{path}: sliding_window is {window}: write null for none")
    types = given.get("layer_types")
    if family == "mistral" and not types:
        return (window,)
    n_layers = given.get("num_hidden_layers")
    if not types or not {*types} <= {"sliding_attention", "full_attention"}:
        raise UserError(f"{path}: sliding_window with layer_types {types} is not supported")
    if len(types) != n_layers:
        raise UserError(f"{path}: {len(types)} layer_types for {n_layers} layers")
    return tuple(window if name == "sliding_attention" else 0 for name in types)


def _rope(rope: dict, path: Path) -> dict:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise UserError(f"{path}: rope_scaling '{kind}' is not supported ({', '.join(ROPE_TYPES)})")
    for theirs in ROPE_TYPES[kind].values():
        if rope.get(theirs) is None:
            raise UserError(f"{path}: rope_scaling of type '{kind}' lacks {theirs}")
    return {"rope_type": kind} | {ours: rope[theirs] for ours, theirs in ROPE_TYPES[kind].items()}


def to_config(config: ModelConfig, thoughts: ThoughtConfig | None, dtype: torch.dtype) -> dict:
    """Return a config.json of transformers 4. Raises UserError for windows of several lengths."""
    windows = [config.window(i) or 0 for i in range(config.n_layers)]
    if len(set(windows)) > 1:         # among several, a window as long as the context is none
        windows = [w if w < config.max_seq_len else 0 for w in windows]
    sizes = sorted(set(windows) - {0})
    if len(sizes) > 1:
        raise UserError(f"config.json holds one sliding_window, not {sizes}")
    family = "mistral"
    if config.qkv_bias:
        family = "qwen2"
    elif sizes and 0 in windows:
        family = "ministral"
    elif not sizes and config.rope_type != "default":
        family = "llama"
    rope = {theirs: getattr(config, ours) for ours, theirs in ROPE_TYPES[config.rope_type].items()}
    given = {theirs: getattr(config, ours) for ours, theirs, _ in KEYS}
    given |= {"model_type": family, "architectures": [family.capitalize() + "ForCausalLM"],
              "hidden_act": "silu", "tie_word_embeddings": config.tied,
              "rope_theta": config.rope_theta, "sliding_window": max(windows) or None,
              "rope_scaling": {"rope_type": config.rope_type} | rope if rope else None,
              "torch_dtype": str(dtype).removeprefix("torch.")}
    if family in ("qwen2", "ministral"):
        types = ["sliding_attention" if w else "full_attention" for w in windows]
        given |= {"use_sliding_window": bool(sizes), "layer_types": types}
    if thoughts:
        given["quiet_star"] = asdict(thoughts)
    return given


@dataclass(frozen=True)
class LazyTensor:
    """A tensor mapped from a safetensors file: its values are read when they are used."""
    file: Path
    name: str
    mapped: torch.Tensor

    def read(self, dtype: torch.dtype | None, device):
        """Return the tensor as `dtype` (None keeps its own) on `device`."""
        dtype = dtype or self.mapped.dtype
        if dtype == self.mapped.dtype and torch.device(device).type == "cpu":
            return self.mapped.contiguous()
        result = torch.empty(self.mapped.shape, dtype=dtype, device=device)
        n_rows = max(1, CONVERTED_BYTES * len(result) // self.mapped.nbytes)
        for start in range(0, len(result), n_rows):
            # Opened anew for each chunk: pages leave the memory when a mapping is closed.
            source = safe_open(self.file, framework="pt").get_slice(self.name)
            stop = min(start + n_rows, len(result))
            result[start:stop] = source[start:stop]
        return result


def open_tensors(path: Path) -> dict[str, LazyTensor]:
    """Map the tensors of a .safetensors file, or of all that an index names. Raises UserError."""
    if path.suffix == ".json":
        file_of = read_json(path, {"weight_map": {str: str}})["weight_map"]
        for file in file_of.values():
            if not re.fullmatch(r"[\w.-]+\.safetensors", file):
                raise UserError(f"{path} names {file!r}, which is no safetensors file beside it")
        shards = {file: open_tensors(path.parent / file) for file in sorted({*file_of.values()})}
        absent = [name for name, file in file_of.items() if name not in shards[file]]
        if absent:
            raise UserError(f"{path} names {min(absent)}, but {file_of[min(absent)]} lacks it")
        return {name: shards[file][name] for name, file in file_of.items()}
    try:
        check_regular(path)
        mapped = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot read {path} as safetensors: {error}: download it again, with "
                        "'git lfs pull' if git cloned it") from None
    return {name: LazyTensor(path, name, tensor) for name, tensor in mapped.items()}


def own_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that a checkpoint holds by name: all, or with adapters what learns."""
    parameters = dict(model.named_parameters())
    if not any(".lora_" in name for name in parameters):
        return parameters
    new = "start_thought", "end_thought", "mixing_head"
    return {name: p for name, p in parameters.items() if ".lora_" in name or name.startswith(new)}


def checked_names(path: Path, model: torch.nn.Module, layout: str, tensors: dict) -> dict[str, str]:
    """Return the stored name of every parameter. Raises UserError unless all fit, and no others."""
    parameters = own_parameters(model)
    names = {name: file_name(name, layout) for name in parameters}
    known = {*names.values(), file_name("head.weight", layout)}        # the head may be tied
    # Old Llama files repeat the frequencies of the rotary positions.
    unknown = {name for name in tensors if not name.endswith("rotary_emb.inv_freq")} - known
    absent = set(names.values()) - tensors.keys()
    for trouble, found in ("has unknown tensors", unknown), ("lacks tensors", absent):
        if found:
            raise UserError(f"{path.parent} {trouble}: {min(found)} ({len(found)} in all)")
    for name, theirs in names.items():
        stored = tensors[theirs].mapped
        found = tuple(stored.shape)
        implied = tuple(parameters[name].shape)
        if layout == "official" and name.endswith("_thought"):
            implied = (2, *implied)
        if found != implied:
            raise UserError(f"{theirs}: checkpoint {found}, {path} implies {implied}")
        if not stored.is_floating_point() or stored.dtype.itemsize == 1:
            raise UserError(f"{tensors[theirs].file}: quantised {stored.dtype} is not supported")
    return names
