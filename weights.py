"""Checkpoints in and out: a folder to a model, and a model to a folder that others can read.

    model = load("Mistral-7B-v0.1", dtype=torch.bfloat16)    # a Mistral; a QuietSTaR if it thinks
    python weights.py --checkpoint=DIR --out=DIR --layout=official --dtype=bfloat16

A model is built without memory, every tensor of the checkpoint is checked against it, and only then
they are assigned, one by one. formats.py knows what the layouts call things, files.py how a tensor
gets out of its file.

Left out on purpose: downloading, and guessing. What is not exactly the model that its config tells
of is refused in one line, because nearly the same model would still write plausible text.

Read next: formats.py
"""
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.overrides import TorchFunctionMode

import config
from config import UserError
from formats import huggingface as formats
import distributed as parallel
import tokenizer as tokenizers
from formats.tensors import find_checkpoint, read_json, stored_tensors, atomic_write
from model import Mistral, ModelConfig, NextToken
from thoughts import QuietSTaR, ThoughtConfig

HF_FILES = ("model.safetensors.index.json", "model.safetensors",       # in order of preference
            "pytorch_model.bin.index.json", "pytorch_model.bin")
MISTRAL_FILES = ("consolidated.safetensors", "consolidated.00.pth")


def read_config(folder: str | Path) -> tuple[ModelConfig, ThoughtConfig | None]:
    """A checkpoint's architecture, and its `quiet_star` section if its config has one.

    Raises ValueError for what is not supported, FileNotFoundError where there is no checkpoint.
    """
    path, _ = _find(Path(folder))
    return formats.from_config(read_json(path), path)


def load(folder: str | Path, device="cpu", dtype: torch.dtype | None = torch.float32,
         thought_config: ThoughtConfig | None = None, reset_markers: bool = False,
         dash_id: int | None = None) -> Mistral | QuietSTaR:
    """A checkpoint of any layout: a QuietSTaR if its tensors say so, whatever its config does.

    `dtype` None keeps each tensor's own. `thought_config` replaces the stored settings, except for
    the rows of the vocabulary that are the markers'. `reset_markers` puts the em dash's embedding,
    row `dash_id`, in the place of the trained markers, as the official evaluation does. Raises
    ValueError or FileNotFoundError, one line with the remedy, for all that is not as it should be.
    """
    path, file = _find(Path(folder))
    if file.name == MISTRAL_FILES[1] and file.with_name("consolidated.01.pth").exists():
        raise UserError(f"{folder} is split for tensor parallelism: not supported")
    for name in MISTRAL_FILES:
        if path.name == "config.json" and path.with_name(name).exists():
            print(f"ignoring {name}")
    shape, settings = read_config(folder)
    tensors = stored_tensors(file)
    layout = ("mistral" if path.name == "params.json" else
              "official" if "start_embedding" in tensors else
              "ours" if settings or "start_thought" in tensors else "base")
    with torch.device("meta"), _Uninitialised():
        base = model = Mistral(shape)
        if layout in ("ours", "official"):
            rows = (shape.vocab_size - 2, shape.vocab_size - 1) if layout == "official" else ()
            settings = settings or ThoughtConfig(marker_ids=rows)
            thought_config = replace(thought_config or settings, marker_ids=settings.marker_ids)
            model = QuietSTaR(base, thought_config)
    for name, theirs in _checked_names(path, model, layout, tensors).items():
        tensor = tensors[theirs].read(dtype, device)
        if theirs in formats.MARKERS:
            tensor = (tensor[0].float() * formats.MARKER_SCALE).to(dtype or torch.float32)
        tensor = formats.turn(tensor, name, layout, shape, ours=True)
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensor))
    if shape.tied:
        base.head.weight = base.embed.weight
    if reset_markers and model is not base:
        for marker in model.start_thought, model.end_thought:
            marker.data = _embedding(base, dash_id) / formats.MARKER_SCALE * formats.MARKER_SCALE
    return model


def load_objective(folder: str, device: str, tokenizer) -> QuietSTaR | NextToken:
    """What is sampled from and evaluated; `device` auto, cpu (fp32) or cuda (bfloat16)."""
    here = parallel.pick_device(device)
    dtype = torch.float32 if here.type == "cpu" else torch.bfloat16
    model = load(find_checkpoint(folder), here, dtype)
    objective = model if isinstance(model, QuietSTaR) else NextToken(model)
    check_tokenizer(folder, objective.model.config, tokenizer)
    return objective


def check_tokenizer(folder: str, shape: ModelConfig, tokenizer) -> None:
    """ValueError if `tokenizer` is not the one beside the checkpoint, or is too large for it."""
    if tokenizer.vocab_size > shape.vocab_size:
        raise UserError(f"tokenizer {tokenizer.path} has {tokenizer.vocab_size} tokens, model "
                         f"embeds {shape.vocab_size}: it belongs to another model than {folder}")
    if not tokenizers.exists(find_checkpoint(folder)):         # some checkpoints come without
        return
    own = tokenizers.load(find_checkpoint(folder))
    if own.sha256 != tokenizer.sha256:
        raise UserError(f"{tokenizer.path} is another tokenizer than {own.path}: prepare the data "
                         f"with --tokenizer={own.path}")


def add_thoughts(model: Mistral, thought_config: ThoughtConfig, dash_id: int,
                 generator: torch.Generator) -> QuietSTaR:
    """A language model about to learn to think, with a fresh mixing head: it predicts as before.

    Both markers start as the em dash's embedding, row `dash_id`, as in the paper. What is new is
    fp32 even on a bf16 model, which then has to be cast before it runs.
    """
    embedding_D = _embedding(model, dash_id)
    quiet = QuietSTaR(model, thought_config)
    quiet.init_thoughts(embedding_D.cpu(), generator)
    return quiet.to(embedding_D.device)


class _Uninitialised(TorchFunctionMode):
    """Skips `normal_`, which does nothing on the meta device but imports for a second to do so."""
    def __torch_function__(self, called, types, args=(), kwargs=None):
        return kwargs["tensor"] if called is nn.init.normal_ else called(*args, **(kwargs or {}))


def _embedding(model: Mistral, dash_id: int | None):
    if dash_id is None or not 0 <= dash_id < model.config.vocab_size:
        raise UserError(f"dash_id={dash_id}: give the em dash's token id, which is below "
                         f"{model.config.vocab_size}")
    return model.embed.weight[dash_id].detach()


def _find(folder: Path) -> tuple[Path, Path]:
    """The config, and the weights or their index; Hugging Face's before Mistral's own."""
    for config_name, names in ("config.json", HF_FILES), ("params.json", MISTRAL_FILES):
        for name in names:
            if (folder / config_name).exists() and (folder / name).exists():
                return folder / config_name, folder / name
    raise UserError(f"{folder} holds no whole checkpoint: config.json and model.safetensors"
                            " (or its index, or .bin), or params.json and consolidated.safetensors")


def _checked_names(path: Path, model: nn.Module, layout: str, tensors: dict) -> dict[str, str]:
    """The layout's name of every parameter; ValueError unless all are there, and no others."""
    names = {name: formats.file_name(name, layout) for name, _ in model.named_parameters()}
    known = {*names.values(), formats.file_name("head.weight", layout)}    # which may be tied
    unknown = [name for name in tensors          # the frequencies: old Llama files repeat them
               if name not in known and not name.endswith("rotary_emb.inv_freq")]
    absent = [name for name in names.values() if name not in tensors]
    for trouble, found in ("has {} unknown tensors", unknown), ("lacks {} tensors", absent):
        if found:
            raise UserError(f"{path.parent}: checkpoint {trouble.format(len(found))}, "
                             f"first {min(found)}")
    for name, parameter in model.named_parameters():
        stored, implied = tensors[names[name]], tuple(parameter.shape)
        found, dtype = tuple(stored.tensor.shape), stored.tensor.dtype
        implied = (2, *implied) if names[name] in formats.MARKERS else implied
        if ".attention.q." in name and found[1:] == implied[1:] and found != implied:
            raise UserError(f"{names[name]} has {found[0]} rows, n_heads * head_dim = {implied[0]}"
                             f": wrong head_dim in {path}")
        if found != implied:
            raise UserError(f"{names[name]}: checkpoint {found}, config implies {implied}")
        if not dtype.is_floating_point or dtype.itemsize == 1:
            raise UserError(f"{stored.file}: checkpoint dtype {dtype} is quantised, not supported")
    return names


def save(model: Mistral | QuietSTaR, folder: str | Path, layout: str = "ours",
         dtype: torch.dtype | None = None, shard_bytes: float = 5e9, tokenizer=None,
         tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Write `model` in one of the layouts of formats.py, and `tokenizer` beside it.

    `dtype` None keeps each tensor's own; `shard_bytes` bounds a file, unless it is "mistral"'s only
    one; "base" and "mistral" leave the thoughts out; `tensors`, by name, replace the parameters of
    a model that is sharded. An old config goes first and the new one comes last: a save that is
    killed leaves a folder that no program takes for a checkpoint.
    """
    folder, tensors = Path(folder), tensors or dict(model.named_parameters())
    tensors, given = _export(model, tensors, layout, dtype)
    single, config_name = ((MISTRAL_FILES[0], "params.json") if layout == "mistral" else
                           (HF_FILES[1], "config.json"))
    sizes = {name: t.numel() * (dtype or t.dtype).itemsize for name, t in tensors.items()}
    shards = _shards(sizes, float("inf") if layout == "mistral" else shard_bytes)
    files, entry = {single: shards[0]}, single
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        files, entry = dict(zip(names, shards)), HF_FILES[0]
    for name in (*HF_FILES, *MISTRAL_FILES, "config.json", "params.json"):
        if name not in (entry, config_name) and (folder / name).exists():
            raise UserError(f"{folder} holds another checkpoint ({name}): choose an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / config_name).unlink(missing_ok=True)
    for file, names in files.items():
        shard = {name: tensors[name].to("cpu", dtype or tensors[name].dtype).contiguous()
                 for name in names}
        atomic_write(folder / file, lambda path: save_file(shard, path, {"format": "pt"}))
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())},
                 "weight_map": {name: file for file, names in files.items() for name in names}}
        atomic_write(folder / entry, lambda path: path.write_text(json.dumps(index)))
    if tokenizer:
        tokenizer.copy_to(folder)
        given |= {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    text = json.dumps(given, indent=1)
    atomic_write(folder / config_name, lambda path: path.write_text(text))


def _shards(sizes: dict[str, int], limit: float) -> list[list[str]]:
    shards, room = [], 0.0
    for name, n_bytes in sizes.items():
        if n_bytes > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= n_bytes
    return shards


def _export(model: Mistral | QuietSTaR, parameters: dict[str, torch.Tensor], layout: str,
            dtype: torch.dtype | None) -> tuple[dict, dict]:
    """The layout's tensors by name, without gradient, and its config, which says `dtype`."""
    quiet = model if isinstance(model, QuietSTaR) else None
    if layout not in formats.LAYOUTS or (layout == "official" and not quiet):
        raise UserError(f"layout '{layout}' is not one of {', '.join(formats.LAYOUTS)}, or needs "
                         "a model that thinks")
    base, settings = (quiet.model, quiet.config) if quiet else (model, None)
    shape, tensors = base.config, {}
    for name, parameter in parameters.items():             # a tied head is not named
        theirs = formats.file_name(name, layout)
        if theirs:
            tensors[theirs] = formats.turn(parameter.detach(), name, layout, shape, ours=False)
    if layout == "mistral" and shape.tied:                 # params.json cannot say so
        tensors["output.weight"] = tensors["tok_embeddings.weight"].clone()
    if layout == "official":
        shape, settings = _as_official(tensors, shape, settings)
    return tensors, formats.to_config(shape, layout, settings, dtype or base.embed.weight.dtype)


def _as_official(tensors: dict, shape: ModelConfig, settings: ThoughtConfig) -> tuple:
    """Scale the markers, and give them rows of the vocabulary if they have none; in place.

    A marker's second row is the log of a standard deviation that nothing uses, here what the
    official code starts it from. The new rows are the markers in the embedding and zeros in the
    head: the official programs mask these logits, and where one does not a zero favours nothing.
    """
    embed_VD = tensors["model.embed_tokens.weight"]
    markers_2D = torch.stack([tensors[name] for name in formats.MARKERS])
    log_std_D = (embed_VD.float().std(dim=0) * 0.01 / formats.MARKER_SCALE).log().to(markers_2D)
    for name, marker_D in zip(formats.MARKERS, markers_2D):
        tensors[name] = torch.stack((marker_D / formats.MARKER_SCALE, log_std_D))
    if settings.marker_ids:
        return shape, settings
    for name, rows_2D in (("model.embed_tokens.weight", markers_2D),
                          ("lm_head.weight", torch.zeros_like(markers_2D))):
        if name in tensors:
            tensors[name] = torch.cat((tensors[name], rows_2D))
    V = shape.vocab_size
    return replace(shape, vocab_size=V + 2), replace(settings, marker_ids=(V, V + 1))


@dataclass(frozen=True)
class ConvertConfig:
    """From any layout that can be read to any that can be written."""
    checkpoint: str = ""              # folder to read
    out: str = ""                     # folder to write
    layout: str = "ours"              # ours | base | official | mistral
    reset_markers: bool = False       # to the em dash's embedding, as the official evaluation does
    dtype: str = ""                   # float32 | bfloat16 | float16; empty keeps what is stored

    def __post_init__(self):
        if not self.checkpoint or not self.out:
            raise UserError("--checkpoint=FOLDER and --out=FOLDER are needed")
        if self.dtype not in ("", "float32", "bfloat16", "float16"):
            raise UserError(f"--dtype={self.dtype} is not one of float32, bfloat16, float16")


def main():
    (cfg,) = config.parse(ConvertConfig)
    folder = find_checkpoint(cfg.checkpoint)
    tokenizer = tokenizers.load(folder) if tokenizers.exists(folder) else None
    if tokenizer is None:
        print(f"no tokenizer is copied: {folder} holds none")
    if cfg.reset_markers and not tokenizer:
        raise UserError("--reset_markers needs the tokenizer, for its em dash, beside the weights")
    dash_id = tokenizers.dash_id(tokenizer) if cfg.reset_markers else None
    model = load(folder, dtype=None, reset_markers=cfg.reset_markers, dash_id=dash_id)
    save(model, cfg.out, cfg.layout, getattr(torch, cfg.dtype, None), tokenizer=tokenizer)
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    config.run(main)
