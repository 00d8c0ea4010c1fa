"""What a run leaves behind: whole checkpoints, to use and to go on from with any number of ranks.

    out/run/latest                     names the last one; the one before is kept too
    out/run/step-000100/               config.json, model.safetensors, tokenizer: anyone can load it
                        state.json     step and settings
                        optimizer/     AdamW's two moments, each rank's share in a file

A checkpoint is written beside its place by all ranks, brought to the disk, and renamed into place
by rank 0 when all are done. So a kill, a lost rank or a full disk leaves the one before as it was.

The shares go through torch.distributed.checkpoint, which deals them out again to any layout, in
safetensors files: its own format keeps an index in a pickle and reads it with plain unpickling,
which runs whatever code the file holds. Plain values are JSON. Nothing here is ever unpickled.

Left out on purpose: saving while training goes on (at the paper's 100 steps it would hide seconds),
and keeping more than two.

Read next: config.py
"""
import json
import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

import distributed as parallel
import weights
from config import UserError
from formats.tensors import checkpoints, rename_folder, stored_tensors, atomic_write
from model import NextToken

MOMENTS = "exp_avg", "exp_avg_sq"        # AdamW's, of the gradient and of its square


def save(out: Path, step: int, objective, optimizer, settings: dict, tokenizer,
         place: parallel.Place) -> Path:
    """All ranks call. ValueError, on one of them, if it cannot be written; no draft is left."""
    folder, draft = out / f"step-{step:06d}", out / "draft"
    model = objective.model if isinstance(objective, NextToken) else objective
    tensors = whole(model, place)
    try:
        with parallel.together(place), _written(out):
            if place.writes:
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir(parents=True)
                weights.save(model, draft, tensors=tensors)
                tokenizer.copy_to(draft)
        with parallel.together(place), _written(out):
            _save_shares(_moments(objective, optimizer, step), draft / "optimizer", place)
        with parallel.together(place), _written(out):
            if place.writes:
                shares = sorted(path.name for path in (draft / "optimizer").iterdir())
                text = json.dumps({"step": step, "settings": settings, "shares": shares})
                atomic_write(draft / "state.json", lambda path: path.write_text(text))
                rename_folder(draft, folder)
                atomic_write(out / "latest", lambda path: path.write_text(folder.name))
    except BaseException:
        if place.writes:
            shutil.rmtree(draft, ignore_errors=True)
        raise
    for old in checkpoints(out)[:-2] if place.writes else ():
        shutil.rmtree(old)
    return folder


def whole(model, place: parallel.Place) -> dict[str, torch.Tensor]:
    """Every parameter of a model by name, on rank 0. All ranks call; elsewhere it is empty."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        if place.kind == "fsdp":
            tensor = tensor.full_tensor().cpu()
        if place.writes:
            tensors[name] = tensor
    return tensors


@contextmanager
def _written(out: Path):
    """One line for whatever kept a file from being written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        pointer = out / "latest"
        former = out / pointer.read_text() if pointer.is_file() else "none yet"
        raise UserError(f"cannot save to {out}: {error}; last good checkpoint: {former}") from None


def read_state(folder: Path) -> dict:
    """`step`, `settings` and the files' names in `shares`. One line if they are damaged."""
    try:
        state = json.loads((folder / "state.json").read_text())
        settings, _, _ = state["settings"], state["step"], state["shares"]
    except (ValueError, OSError, LookupError, TypeError) as error:
        raise UserError(f"{folder / 'state.json'} is not readable ({type(error).__name__})"
                         + other(folder)) from None
    state["settings"] = {name: tuple(value) if isinstance(value, list) else value
                         for name, value in settings.items()}           # JSON has no tuples
    return state


def load_optimizer(folder: Path, state: dict, objective, optimizer, place: parallel.Place):
    """Each rank's share of the moments, whoever wrote them, in whatever layout."""
    try:
        for name in state["shares"]:              # of a missing one the loader would make zeros
            stored_tensors(folder / "optimizer" / name)
        _load_shares(_moments(objective, optimizer, state["step"]), folder / "optimizer", place)
    except (ValueError, OSError) as error:
        raise UserError(f"{folder / 'optimizer'} is not readable: {error}"
                         + other(folder)) from None


def other(folder: Path) -> str:
    """What to do about a checkpoint that is damaged."""
    others = [path for path in checkpoints(folder.parent) if path != folder]
    return (f": the one before is {others[-1]}; delete {folder} to resume from it" if others
            else ": there is no earlier one; start again with --init_from=scratch or a checkpoint")


def _moments(objective, optimizer, step: int) -> dict[str, torch.Tensor]:
    """AdamW's state by name, to read from or to write into; zeros where it has none yet."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if not optimizer.state[p]:
                optimizer.state[p] = {"step": torch.full((), float(step), device=p.device),
                                      **{key: torch.zeros_like(p) for key in MOMENTS}}
    return {f"{name}.{key}": optimizer.state[p][key]
            for name, p in objective.named_parameters() for key in MOMENTS}


def _save_shares(tensors: dict[str, torch.Tensor], folder: Path, place: parallel.Place):
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    _transfer(save, tensors, place, storage_writer=writer)


def _load_shares(tensors: dict[str, torch.Tensor], folder: Path, place: parallel.Place):
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load
    _transfer(load, tensors, place, storage_reader=HuggingFaceStorageReader(str(folder)))


def _transfer(move, tensors, place: parallel.Place, **storage):
    """OSError, one line, in place of an exception that is none and holds every rank's traceback."""
    from torch.distributed.checkpoint.api import CheckpointException
    try:
        with warnings.catch_warnings(action="ignore"):                  # that a process is alone
            move(tensors, no_dist=place.kind == "none", **storage)
    except CheckpointException as found:
        error, _ = next(iter(found.failures.values()))
        raise OSError(f"{type(error).__name__}: {error}") from None
