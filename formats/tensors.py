"""Tensors in files: whole, or refused in one line; and every file written whole or not at all.

    tensors = stored_tensors(Path("model.safetensors.index.json"))     # nothing is read yet
    weight = tensors["lm_head.weight"].read(torch.bfloat16, "cuda")
    atomic_write("out/latest", lambda path: path.write_text("step-000100"))

A stored tensor stays in its file if nothing has to change. Else it is converted in pieces, with no
more than one in memory beside the result (of a .bin file, all pages that were read).

Left out on purpose: unpickling anything but tensors, writing pickles, and repairing.

Read next: tokenizer.py
"""
import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from config import UserError

PIECE = 64 << 20                      # bytes that are converted at a time


@dataclass(frozen=True)
class Stored:
    """A tensor that is mapped from its file: its shape is known, its pages are read when used."""
    file: Path
    name: str
    tensor: torch.Tensor

    def read(self, dtype: torch.dtype | None, device):
        """As `dtype` (None keeps its own) on `device`."""
        source, dtype = self.tensor, dtype or self.tensor.dtype
        if dtype == source.dtype and torch.device(device).type == "cpu":
            return source.contiguous()
        result = torch.empty(source.shape, dtype=dtype, device=device)
        step = max(1, PIECE * len(source) // source.nbytes)
        for start in range(0, len(result), step):
            stop = min(start + step, len(result))
            if self.file.suffix == ".safetensors":    # opened anew: pages go when a mapping closes
                source = safe_open(self.file, framework="pt").get_slice(self.name)
            result[start:stop] = source[start:stop]
        return result


def stored_tensors(path: Path) -> dict[str, Stored]:
    """All tensors of a .safetensors or .bin file, or of all files that an index (.json) names.

    Raises ValueError or FileNotFoundError if one of them is missing, cut short, or something else.
    """
    if path.suffix != ".json":
        return {name: Stored(path, name, tensor) for name, tensor in _open(path).items()}
    index = read_json(path).get("weight_map", {})
    files = {name: path.parent / name for name in sorted(set(index.values()))}
    absent = [name for name, file in files.items() if not file.exists()]
    if absent:
        raise UserError(f"{path} names {len(absent)} of {len(files)} files that are missing"
                                f": {absent[0]}")
    shards = {name: stored_tensors(file) for name, file in files.items()}
    for name, shard in index.items():
        if name not in shards[shard]:
            raise UserError(f"{name} is in the index but not in {files[shard]}")
    return {name: stored for shard in shards.values() for name, stored in shard.items()}


def _open(file: Path) -> dict[str, torch.Tensor]:
    size = file.stat().st_size
    with open(file, "rb") as opened:
        start = opened.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{file} is a git-lfs pointer ({size} bytes), not weights: "
                         "run 'git lfs pull'")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise UserError(f"{file} is an HTML page ({size} bytes), not weights: download it again")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        is_zip = start.startswith(b"PK")      # files from before torch 1.6 cannot be mapped
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except SafetensorError:
        raise UserError(f"{file} is incomplete ({size} bytes; header expects "
                         f"{_expected_size(file)}): download it again") from None
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise UserError(f"{file} holds objects other than tensors ({found[1] if found else '?'}); "
                         "refusing to run code from a checkpoint") from None
    except (RuntimeError, OSError, EOFError):
        raise UserError(f"{file} is not a readable checkpoint (interrupted save?)") from None
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise UserError(f"{file} holds objects other than tensors: it is not a state_dict")
    return tensors


def _expected_size(file: Path) -> int:
    """Bytes that a safetensors file has by its own header, or by as much of it as there is."""
    with open(file, "rb") as opened:
        start = 8 + int.from_bytes(opened.read(8), "little")
        ends = re.findall(rb'"data_offsets":\[\d+,(\d+)\]', opened.read(min(start, 100 << 20)))
    return start + max(map(int, ends), default=0)


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): download it again") from None


def checkpoints(out: Path) -> list[Path]:
    """A run's own, oldest first; a copy under another name is not one."""
    own = [path for path in out.glob("step-*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted(own, key=lambda path: int(path.name[5:]))


def find_checkpoint(folder: str) -> Path:
    """A folder with a model in it, or the newest checkpoint of a run's folder."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is missing: name a folder that holds a checkpoint")
    pointer = Path(folder, "latest")
    if not pointer.is_file():
        return Path(folder)
    named = Path(folder, pointer.read_text().strip())
    whole = checkpoints(Path(folder))
    if not named.is_dir() and not whole:
        raise UserError(f"{pointer} names {named.name}, which is gone as are all others")
    return named if named.is_dir() else whole[-1]


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder; what has been written there is put in place."""
    path, temporary = Path(path), Path(f"{path}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        temporary.chmod(path.parent.stat().st_mode & 0o666)   # safetensors makes private files
        _to_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: str | Path, write: Callable[[Path], object]) -> None:
    """`write(temporary)` makes a file beside `path`, which is then put in place: all or nothing."""
    with _beside(path) as temporary:
        write(temporary)


@contextmanager
def published(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write, which gets its name when it is whole: half of it is never found there."""
    with _beside(path) as temporary, open(temporary, "wb") as file:
        yield file


def rename_folder(draft: Path, folder: Path) -> None:
    """Rename a whole folder, once all that is in it is on the disk; it may replace another."""
    for path in (*draft.rglob("*"), draft):
        _to_disk(path)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(draft, folder)
    _to_disk(folder.parent)


def _to_disk(path: Path) -> None:
    """Of a folder: the names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fingerprint(path: str | Path, pieces: int = 256, size: int = 4096) -> str:
    """A hash of a file's length and of pieces spread over it: of all of it, up to a megabyte."""
    length, found = Path(path).stat().st_size, hashlib.sha256()
    found.update(str(length).encode())
    step = max(size, (length - size) // (pieces - 1))
    with open(path, "rb") as file:
        for piece in range(pieces):
            file.seek(piece * step)
            found.update(file.read(size))
    return found.hexdigest()
