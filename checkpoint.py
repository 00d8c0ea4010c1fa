"""Checkpoints: read from any supported layout, write ours, and save and resume training runs.

    model = load_model("Mistral-7B-v0.1", dtype=torch.bfloat16)    # a Mistral, or a QuietSTaR
    save_model(model, "copy", tokenizer=load_tokenizer("Mistral-7B-v0.1"))
    python checkpoint.py --convert=model.gguf --out=FOLDER         # any layout to ours

    out/run/latest         names the last checkpoint; the one before is kept too
    out/run/step-000100/   config.json, model.safetensors, tokenizer; to resume, state.json and
                           optimizer/, with each rank's share of AdamW's moments

A run writes a draft, which rank 0 renames when it is whole: a kill leaves the checkpoint before.
Left out on purpose: downloading, saving while training goes on, and pickles, which can run code.
"""
import json
import re
import shutil
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

import config
from config import (UserError, atomic_write, file_errors, read_json, rename_folder, sampled_sha256,
                    write_text)
from distributed import (Distributed, fail_together, full_tensors, pick_device,
                         transfer_moments)
from formats.gguf import gguf_config, gguf_tensors
from formats.huggingface import (MARKER_SCALE, checked_names, file_name, from_config, open_tensors,
                                 own_parameters, permute_rope, to_config)
from formats.lora import (ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter, adapter_config, add_adapter,
                          merge_adapter, read_adapter)
from model import Mistral, ModelConfig
from thoughts import QuietSTaR, ThoughtConfig, base_model
from tokenizer import has_tokenizer, is_gguf, load_tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MISTRAL_WEIGHTS = "consolidated.safetensors"
KEEP = "keep"                         # a file in a run's checkpoint that is not to be deleted


@file_errors()
def find_checkpoint(folder: str | Path) -> Path:
    """Return `folder`, its newest checkpoint if it is a run's, or a GGUF file. Raises UserError."""
    folder = Path(folder)
    if is_gguf(folder) and folder.is_file():
        return folder
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: name a folder that holds a checkpoint")
    if pointed(folder):
        return pointed(folder)
    if (folder / "config.json").exists() or (folder / "params.json").exists():
        return folder                 # it holds a model itself, whatever lies beside it
    others = checkpoints_of(folder)
    if not others and (folder / "latest").is_file():
        raise UserError(f"{folder}/latest names no checkpoint beside it, and there is no other")
    return others[-1] if others else folder


def pointed(out: Path) -> Path | None:
    """Return the checkpoint that a run's `latest` names, if it is one beside it."""
    pointer = out / "latest"
    name = pointer.read_bytes()[:99].decode(errors="replace") if pointer.is_file() else ""
    return _beside(out, name.strip())


def _beside(out: Path, name) -> Path | None:
    """Return a run's checkpoint of this name, None if it is no such name, or not there."""
    is_name = re.fullmatch("step-[0-9]+", name or "")
    return out / name if is_name and (out / name).is_dir() else None


def read_config(folder: str | Path) -> tuple[ModelConfig, ThoughtConfig | None]:
    """Return a checkpoint's architecture, and the settings of its `quiet_star` section if any."""
    path, _ = _find_files(Path(folder))
    given = gguf_config(path) if is_gguf(path) else read_json(path)
    return from_config(given, path)


def load_model(folder: str | Path, device="cpu", dtype: torch.dtype | None = torch.float32,
               thought_config: ThoughtConfig | None = None) -> Mistral | QuietSTaR:
    """Load any layout: a QuietSTaR if tensors or config say so. `dtype` None keeps a tensor's own;
    `thought_config` replaces the stored settings, except `marker_ids`. Raises UserError."""
    with _or_the_one_before(Path(folder)):
        path, file = _find_files(Path(folder))
        shape, stored_config = read_config(folder)
        tensors = gguf_tensors(file) if is_gguf(file) else open_tensors(file)
    if file.name == ADAPTER_WEIGHTS:
        return _load_adapted(path, tensors, device, dtype, stored_config, thought_config)
    layout = "mistral" if path.name == "params.json" else "ours"
    if "start_embedding" in tensors:              # its markers own the vocabulary's last two rows
        layout, V = "official", shape.vocab_size
        stored_config = stored_config or ThoughtConfig(marker_ids=(V - 2, V - 1))
    elif "start_thought" in tensors:
        stored_config = stored_config or ThoughtConfig()
    if shape.n_layers > len(tensors):
        raise UserError(f"{path}: {shape.n_layers} layers, but there are {len(tensors)} tensors")
    # Build without memory; there, `normal_` would do nothing but import for a second.
    with torch.device("meta"), patch.object(nn.init, "normal_"):
        model = base = Mistral(shape)
        if stored_config:
            settings = thought_config or stored_config
            model = QuietSTaR(base, replace(settings, marker_ids=stored_config.marker_ids))
    if shape.tied:
        names = [file_name(name, layout) for name in ("embed.weight", "head.weight")]
        embed, head = map(tensors.get, names)
        if embed and head and not torch.equal(embed.read(None, "cpu"), head.read(None, "cpu")):
            raise UserError(f"{path}: tie_word_embeddings is true, but the head in the file is not "
                            "the embedding: write false if the head is meant")
    for name, theirs in checked_names(path, model, layout, tensors).items():
        tensor = tensors[theirs].read(dtype, device)
        if layout == "mistral":
            tensor = permute_rope(tensor, name, shape)
        if layout == "official" and name.endswith("_thought"):
            tensor = (tensor[0].float() * MARKER_SCALE).to(dtype or torch.float32)
        _set_parameter(model, name, tensor)
    if shape.tied:
        base.head.weight = base.embed.weight
    return model


def _load_adapted(path, tensors, device, dtype, stored_config, thought_config):
    """Load the base of an adapter, and the adapter on it. Raises UserError if it is another."""
    folder = path.parent
    adapter = read_adapter(folder / ADAPTER_CONFIG)
    remedy = f"put it back, or correct base_model_name_or_path in {folder / ADAPTER_CONFIG}"
    with file_errors():
        if not Path(adapter.base).exists():
            raise UserError(f"{folder} is an adapter of {adapter.base}, which is missing: {remedy}")
    source = find_checkpoint(adapter.base)
    if fingerprint(source) != adapter.base_sha256:
        raise UserError(f"{source} is not the base of the adapter {folder}: {remedy}")
    base = model = base_model(load_model(source, device, dtype))
    if base.adapter:
        raise UserError(f"{source}, the base of {folder}, is an adapter: merge it (--convert)")
    if stored_config:
        settings = thought_config or stored_config
        with torch.device("meta"):
            model = QuietSTaR(base, replace(settings, marker_ids=stored_config.marker_ids))
    add_adapter(base, adapter, torch.Generator())
    for name, theirs in checked_names(path, model, "ours", tensors).items():
        _set_parameter(model, name, tensors[theirs].read(dtype, device))
    return model


def as_base(folder: Path, rank: int) -> Adapter:
    """Return an adapter of this rank for the checkpoint `folder`, which its run will not delete."""
    with file_errors():
        if (folder / "state.json").exists():
            (folder / KEEP).touch()
    return Adapter(rank, str(folder.resolve()), fingerprint(folder))


def _set_parameter(model, name: str, tensor) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, nn.Parameter(tensor))


def load_for_inference(folder: str, device: str, tokenizer, dtype="auto") -> Mistral | QuietSTaR:
    """Load a model to sample or evaluate; `dtype` auto is float32 on a CPU, bfloat16 on a GPU."""
    device = pick_device(device, allow_mps=True)
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    model = load_model(find_checkpoint(folder), device, getattr(torch, dtype))
    check_tokenizer(folder, base_model(model).config, tokenizer)
    return model


@file_errors()
def fingerprint(checkpoint: str | Path) -> str:
    """Hash what decides a checkpoint's answers: its config and weights, or its GGUF file."""
    found = find_checkpoint(checkpoint)
    names = "config.json", "params.json", ADAPTER_CONFIG, "*.safetensors"
    files = [path for name in names for path in sorted(found.glob(name))]
    if not files and not found.is_file():
        raise UserError(f"{found} holds no checkpoint: name a folder that does")
    return sampled_sha256(files or [found])


def check_tokenizer(folder: str | Path, shape: ModelConfig, tokenizer) -> None:
    """Raise UserError if `tokenizer` is not the checkpoint's own, or is too large for its model."""
    if tokenizer.vocab_size > shape.vocab_size:
        raise UserError(f"tokenizer {tokenizer.path} has {tokenizer.vocab_size} tokens, model "
                        f"embeds {shape.vocab_size}: it belongs to another model than {folder}")
    if not Path(folder).exists() or not has_tokenizer(find_checkpoint(folder)):
        return
    own = load_tokenizer(find_checkpoint(folder))
    if own.sha256 != tokenizer.sha256:
        raise UserError(f"{tokenizer.path} is another tokenizer than {own.path}: use that for both")
    tokenizer.ends |= own.ends            # a model's own files may name more


def add_thoughts(model: Mistral, settings: ThoughtConfig, dash_id: int, generator) -> QuietSTaR:
    """Wrap a model in a QuietSTaR, which predicts as the model does until it is trained. Both
    markers start as the em dash, row `dash_id` of the embedding. New parameters are float32."""
    if max(settings.marker_ids, default=0) >= model.config.vocab_size:
        raise UserError(f"--marker_ids={settings.marker_ids} exceed the vocabulary")
    embedding_D = model.embed.weight[dash_id].detach()
    quiet = QuietSTaR(model, settings).init_thoughts(embedding_D.cpu(), generator)
    return quiet.to(embedding_D.device)


def checkpoints_of(out: Path) -> list[Path]:
    """List a run's checkpoints: first those that another was saved after, then by step."""
    own = [path for path in out.glob("step-*") if _beside(out, path.name)]
    followed = {_former(path) for path in own}
    own.sort(key=lambda path: _state_of(path)["step"])
    return sorted(own, key=lambda path: path not in followed)


def _state_of(folder: Path) -> dict:
    """Return a checkpoint's `step` by its state, else by its name, and the name of the `former`."""
    state = {"step": int(folder.name[5:])}
    with suppress(UserError):
        state |= read_json(folder / "state.json", {"step": int, "former": (None, str)})
    return state


def _former(folder: Path) -> Path | None:
    """Return the checkpoint that the run saved before this one, if it is still there."""
    return _beside(folder.parent, _state_of(folder).get("former"))


def _find_files(folder: Path) -> tuple[Path, Path]:
    """Return the paths of the config and of the weights or their index; Hugging Face's first."""
    if is_gguf(folder):
        return folder, folder
    for config_name, name in (("config.json", WEIGHTS), ("config.json", INDEX),
                              ("config.json", ADAPTER_WEIGHTS), ("params.json", MISTRAL_WEIGHTS)):
        if (folder / config_name).is_file() and (folder / name).is_file():
            return folder / config_name, folder / name
    raise UserError(f"{folder} holds no whole checkpoint: config.json and {WEIGHTS} or its index, "
                    f"or params.json and {MISTRAL_WEIGHTS}; see docs/CHECKPOINTS.md for .bin files")


def save_model(model: Mistral | QuietSTaR, folder: str | Path, dtype: torch.dtype | None = None,
               shard_bytes: float = 5e9, tokenizer=None, tensors: dict | None = None) -> None:
    """Write `model` in our layout, and `tokenizer` beside it. Raises UserError if it cannot.
    `dtype` None keeps each tensor's own, `shard_bytes` bounds a file, `tensors` by name replace the
    parameters. A killed save leaves no config.json, hence nothing that looks like a checkpoint."""
    folder, base = Path(folder), base_model(model)
    thoughts = None if model is base else model.config
    given = to_config(base.config, thoughts, dtype or base.embed.weight.dtype)
    if base.adapter:                  # goes into one file
        shard_bytes = torch.inf
    # Fill one file after the other.
    shards, left, total = [], 0.0, 0
    for name, tensor in (tensors or own_parameters(model)).items():
        n_bytes = tensor.numel() * (dtype or tensor.dtype).itemsize
        if n_bytes > left:
            shards, left = [*shards, {}], shard_bytes
        shards[-1][file_name(name, "ours")] = tensor.detach()
        left -= n_bytes
        total += n_bytes
    entry = INDEX if len(shards) > 1 else WEIGHTS
    if base.adapter:
        entry = ADAPTER_WEIGHTS
    for name in {INDEX, WEIGHTS, MISTRAL_WEIGHTS, ADAPTER_WEIGHTS} - {entry}:
        if (folder / name).exists():
            raise UserError(f"{folder} holds another checkpoint ({name}): choose an empty folder")
    if base.adapter:
        write_text(folder / ADAPTER_CONFIG, json.dumps(adapter_config(base.adapter), indent=1))
    if tokenizer:
        tokenizer.copy_to(folder)
    file_of = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors" if entry == INDEX else entry
        file_of |= dict.fromkeys(shard, file)
        shard = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in shard.items()}
        with atomic_write(folder / file) as temporary:
            (folder / "config.json").unlink(missing_ok=True)
            try:
                save_file(shard, temporary, {"format": "pt"})
            except SafetensorError as error:                 # a full disk, for one
                raise UserError(f"cannot write {folder / file}: {error}") from None
    if entry == INDEX:
        index = {"metadata": {"total_size": total}, "weight_map": file_of}
        write_text(folder / INDEX, json.dumps(index))
    if tokenizer:
        others = sorted(tokenizer.ends - {tokenizer.bos, tokenizer.eos})
        ends = [i for i in (tokenizer.eos, *others) if i is not None] if others else tokenizer.eos
        given |= {"bos_token_id": tokenizer.bos, "eos_token_id": ends}
    write_text(folder / "config.json", json.dumps(given, indent=1))


def save_run(out: Path, step: int, model, optimizer, settings: dict, tokenizer, dist, data=""):
    """Save a step of a run on text of hash `data`. All ranks call; UserError on one ends all."""
    folder, draft, former = out / f"step-{step:06d}", out / "draft", pointed(out)
    tensors = full_tensors(own_parameters(model), dist)
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    try:
        with fail_together(dist), file_errors():
            if broken:
                raise UserError(f"{broken[0]} holds nan or infinity after step {step}")
            if dist.is_main:
                _delete_draft(draft)
                save_model(model, draft, tokenizer=tokenizer, tensors=tensors)
        with fail_together(dist), file_errors():
            transfer_moments(model, optimizer, step, draft / "optimizer", dist, save=True)
            if dist.is_main:          # all ranks have written
                shares = sorted(path.name for path in (draft / "optimizer").iterdir())
                state = {"step": step, "settings": settings, "shares": shares, "data": data,
                         "former": former and former.name}
                write_text(draft / "state.json", json.dumps(state))
                rename_folder(draft, folder)
                write_text(out / "latest", folder.name)
                _delete_older(former)
    except UserError as error:
        raise UserError(f"cannot save to {out}: {error}; last good: "
                        f"{pointed(out) or 'none yet'}") from None
    finally:
        if dist.is_main:
            with suppress(UserError):
                _delete_draft(draft)


def _delete_draft(draft: Path) -> None:
    """Delete what a save that failed or was killed has left, and nothing else."""
    known = "(config|state|words|tekken|model|tokenizer|adapter_(config|model)).*|optimizer"
    foreign = [path.name for path in draft.glob("*") if not re.fullmatch(known, path.name)]
    if draft.is_symlink() or draft.is_file() or foreign:
        raise UserError(f"{draft} is in the way, and no run wrote {foreign or 'it'}: move it")
    shutil.rmtree(draft, ignore_errors=True)


def _delete_older(kept: Path | None) -> None:
    """Delete what this run saved before the checkpoint `kept`, and nothing else."""
    old = kept and _former(kept)
    while old:
        older = _former(old)
        if not (old / KEEP).exists():
            shutil.rmtree(old, ignore_errors=True)     # what cannot be removed stays
        old = older if older and not old.exists() else None


def read_state(folder: Path) -> dict:
    """Return a checkpoint's `step`, `settings`, and the optimizer's file names in `shares`."""
    with _or_the_one_before(folder):
        state = read_json(folder / "state.json", {"step": int, "settings": dict, "shares": [str]})
        if state["step"] < 0:
            raise UserError(f"{folder}/state.json: step {state['step']} is below 0")
    settings = state["settings"].items()          # JSON has no tuples
    return state | {"settings": {n: tuple(v) if isinstance(v, list) else v for n, v in settings}}


def load_optimizer(folder: Path, state: dict, model, optimizer, dist: Distributed) -> None:
    """Fill the optimizer's moments, each rank its share, whatever number of ranks saved them."""
    shares = folder / "optimizer"
    with _or_the_one_before(folder):
        for name in state["shares"]:              # of a missing file the loader would make zeros
            open_tensors(shares / Path(name).name)
        transfer_moments(model, optimizer, state["step"], shares, dist, save=False)


@contextmanager
def _or_the_one_before(folder: Path):
    """Add to an error in reading a run's checkpoint which other one could be resumed from."""
    try:
        yield
    except UserError as error:
        others = [path for path in checkpoints_of(folder.parent) if path != folder]
        if not others or not _beside(folder.parent, folder.name):
            raise
        raise UserError(f"{error}; to go on from {others[-1]}, write {others[-1].name} into "
                        f"{folder.parent / 'latest'}") from None


@dataclass(frozen=True)
class ConvertConfig:
    convert: str = ""                 # checkpoint of any layout: a folder, or a GGUF file
    out: str = ""                     # empty folder to write it to, in our layout
    dtype: Literal["as_stored", "float32", "bfloat16", "float16"] = "as_stored"  # of the weights


def main():
    (cfg,) = config.parse(ConvertConfig)
    if not cfg.convert or not cfg.out:
        raise UserError("--convert=CHECKPOINT and --out=FOLDER are needed")
    if Path(cfg.out).is_dir() and any(Path(cfg.out).iterdir()):
        raise UserError(f"--out={cfg.out} is not empty: name a new folder")
    source, dtype = find_checkpoint(cfg.convert), getattr(torch, cfg.dtype, None)
    if (source / ADAPTER_CONFIG).exists():        # bf16 would round most of an adapter away
        dtype = dtype or torch.float32
    tokenizer = load_tokenizer(source) if has_tokenizer(source) else None
    model = load_model(source, dtype=dtype)
    if base_model(model).adapter:
        merge_adapter(base_model(model))
    save_model(model, cfg.out, tokenizer=tokenizer)
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    config.run(main)
