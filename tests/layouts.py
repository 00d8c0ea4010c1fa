"""Checkpoints in the layouts that the project reads but does not write: Mistral's, the official."""
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

import checkpoint
from formats.huggingface import KEYS, MARKER_SCALE, file_name
from model import Mistral
from thoughts import QuietSTaR


def save_mistral(model: Mistral, folder: Path, tokenizer=None):
    """Write consolidated.safetensors and params.json, as Mistral does."""
    shape, tensors = model.config, {}
    for name, p in model.named_parameters():
        tensor = p.detach()
        if ".attention.q." in name or ".attention.k." in name:        # our pairs become neighbours
            n_heads = shape.n_heads if ".q." in name else shape.n_kv_heads
            tensor = tensor.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        tensors[file_name(name, "mistral")] = tensor.contiguous()
    if shape.tied:                                                    # params.json cannot say so
        tensors["output.weight"] = tensors["tok_embeddings.weight"].clone()
    assert shape.rope_type == "default"
    params = {theirs: getattr(shape, ours) for ours, _, theirs in KEYS}
    window = shape.windows[0] if len(shape.windows) == 1 else list(shape.windows)
    params |= dict(rope_theta=shape.rope_theta, sliding_window=window or None,
                   qkv_bias=shape.qkv_bias)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "consolidated.safetensors")
    (folder / "params.json").write_text(json.dumps(params))
    if tokenizer:
        tokenizer.copy_to(folder)


def save_official(quiet: QuietSTaR, folder: Path, dtype=torch.float32, tokenizer=None):
    """Write talk_head.* and two rows for each marker / 100; the vocabulary ends in the markers."""
    tensors = {file_name(name, "official"): p.detach().to(dtype)
               for name, p in quiet.named_parameters()}
    markers_2D = torch.stack((quiet.start_thought, quiet.end_thought)).detach().to(dtype)
    for name, marker_D in zip(("start_embedding", "end_embedding"), markers_2D):
        tensors[name] = torch.stack((marker_D / MARKER_SCALE, torch.zeros_like(marker_D)))
    shape, V = quiet.model.config, quiet.model.config.vocab_size
    if not quiet.config.marker_ids:
        for name, rows_2D in (("model.embed_tokens.weight", markers_2D),
                              ("lm_head.weight", torch.zeros_like(markers_2D))):
            tensors[name] = torch.cat((tensors[name], rows_2D))
        shape = replace(shape, vocab_size=V + 2)
    config = checkpoint.to_config(shape, None, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer:
        tokenizer.copy_to(folder)


def add_settings(folder: Path, quiet: QuietSTaR):
    """Add the `quiet_star` section, as this project once did when it wrote the official layout."""
    V = json.loads((folder / "config.json").read_text())["vocab_size"]
    settings = asdict(replace(quiet.config, marker_ids=(V - 2, V - 1)))
    config = json.loads((folder / "config.json").read_text()) | {"quiet_star": settings}
    (folder / "config.json").write_text(json.dumps(config))
