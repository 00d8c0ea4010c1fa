"""Text to token files, and token files to batches.

    python data.py --input=a.jsonl.gz,b.txt --field=text --tokenizer=tokenizer.model --out=data/NAME

A folder of tokens holds train.bin and val.bin (uint16 or uint32, documents end to end), their
.idx.npy (where each document begins, then the end), the tokenizer, and meta.json, written last.

Left out on purpose: downloads, packing, epochs (crops are drawn at random, as nanoGPT does), loader
processes (a batch takes a millisecond), and tokenizing in parallel.

Read next: shell_game.py, text made for thinking
"""
import gzip
import hashlib
import json
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import config
from config import UserError
from formats.tensors import published
from tokenizer import load


def read_texts(path: str, fields: tuple[str, ...]) -> Iterator[str]:
    """The documents of a file: all of a .txt, else `fields` of each row joined by newlines."""
    fields = ("text",) if path.endswith(".txt") else fields
    for number, row in read_rows(path):
        has = [name for name in row if isinstance(row[name], str)] if isinstance(row, dict) else []
        missing = [field for field in fields if field not in has]
        if missing:
            raise UserError(f"{path}:{number}: no field '{missing[0]}' (it has {', '.join(has)})")
        text = "\n".join(row[field] for field in fields)
        yield text.encode(errors="replace").decode()           # JSON can hold half a surrogate


def read_rows(path: str) -> Iterator[tuple[int, dict]]:
    """Line number, from 1, and row; ValueError, one line, for a file that is damaged."""
    line = 1
    try:
        if path.endswith(".txt"):
            yield line, {"text": Path(path).read_text(encoding="utf-8")}
            return
        if path.endswith(".parquet"):
            from pyarrow.parquet import ParquetFile
            batches = ParquetFile(path).iter_batches(batch_size=1024)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
            return
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            for line, text in enumerate(file, start=1):
                yield line, json.loads(text)
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}:{line}: {error}: download it again") from None
    except ValueError as error:
        raise UserError(f"{path}:{line}: not UTF-8 text, JSON lines or parquet: {error}") from None


def prepare(texts: Iterable[str], tokenizer, out: str | Path, val_share: float, sources: list[str],
            split_key: Callable[[str], str] = lambda text: text) -> dict:
    """Write documents as bos + tokens + eos, as far as the tokenizer has them; return the meta.

    A hash of a document's `split_key` puts it into train or val, so the same document is never in
    both. Raises ValueError for an id outside the vocabulary: in uint16 it would wrap silently.
    """
    out, vocab_size, bos, eos = Path(out), tokenizer.vocab_size, tokenizer.bos, tokenizer.eos
    dtype = np.dtype("uint16" if vocab_size <= 2**16 else "uint32")
    ends = dict(train=array("Q", [0]), val=array("Q", [0]))     # all that memory holds
    with published(out / "train.bin") as train, published(out / "val.bin") as val:
        files = dict(train=train, val=val)
        for number, text in enumerate(filter(str.strip, texts), start=1):
            ids = tokenizer.encode(text, bos=bos is not None) + [eos] * (eos is not None)
            if max(ids, default=0) >= vocab_size:
                where = f"document {number}: token id {max(ids)} at position {ids.index(max(ids))}"
                raise UserError(f"{where} >= vocab_size {vocab_size}: the tokenizer is broken")
            hashed = int(hashlib.sha256(split_key(text).encode()).hexdigest(), 16) / 2**256
            split = "val" if hashed < val_share else "train"
            files[split].write(np.array(ids, dtype).tobytes())
            ends[split].append(ends[split][-1] + len(ids))
        (out / "meta.json").unlink(missing_ok=True)             # what it describes is about to go
    for split in ends:
        with published(out / f"{split}.idx.npy") as file:
            np.save(file, np.array(ends[split], np.uint64))
    tokenizer.copy_to(out)
    meta = dict(dtype=dtype.name, vocab_size=vocab_size, bos=bos, eos=eos, sources=sources,
                tokenizer=Path(tokenizer.path).name, tokenizer_sha256=tokenizer.sha256,
                n_tokens={split: ends[split][-1] for split in ends},
                n_docs={split: len(ends[split]) - 1 for split in ends})
    with published(out / "meta.json") as file:
        file.write(json.dumps(meta, indent=2).encode())
    return meta


class TokenFile:
    """One split of a folder that `prepare` wrote: .meta, .n_tokens, .n_docs, .offsets."""
    def __init__(self, folder: str | Path, split: str):
        names = ("meta.json", f"{split}.idx.npy", f"{split}.bin")
        meta, index, self.path = (Path(folder, name) for name in names)
        for path in (meta, index, self.path):
            if not path.exists():
                raise UserError(f"{path} is missing: prepare the data first (data.py)")
        self.meta, self.offsets = json.loads(meta.read_text()), np.load(index, mmap_mode="r")
        self.n_tokens, self.n_docs = (self.meta[key][split] for key in ("n_tokens", "n_docs"))
        self.dtype, size = np.dtype(self.meta["dtype"]), self.path.stat().st_size
        if size == 0:
            raise UserError(f"{self.path} is empty: prepare more text, or a larger --val_share")
        if size != self.n_tokens * self.dtype.itemsize or self.offsets[-1] != self.n_tokens:
            raise UserError(f"{self.path} is {size} bytes, its index ends at {self.offsets[-1]}; "
                             f"{meta} says {self.n_tokens} tokens of {self.dtype.itemsize} bytes: "
                             "copy or prepare them again")

    def document(self, i: int) -> np.ndarray:
        return self.read(*self.offsets[i:i + 2].tolist())

    def read(self, start: int, end: int) -> np.ndarray:
        """Tokens start .. end - 1, int64. Raises ValueError for one outside the vocabulary."""
        # Mapped anew each time: a mapping that lasts keeps every page it touched in memory.
        ids = np.memmap(self.path, self.dtype, "r")[start:end].astype(np.int64)
        if ids.max(initial=0) >= self.meta["vocab_size"]:
            where = f"{self.path}: token id {ids.max()} at position {start + ids.argmax()}"
            raise UserError(f"{where} >= vocab_size {self.meta['vocab_size']}: wrong tokenizer")
        return ids


class Batches:
    """Random crops of `length` tokens. Stateless: row r of step s depends on (seed, s, r) alone.

    So any number of ranks or micro-batches, each asking for its own rows, sees the same data, and
    resuming needs nothing but the step. Two manners:
      document  a random document; a random window of it if it is longer, else right-padded (with
                eos or 0, `valid` False): the official code's, which draws each window only once
      stream    a random window of all the documents end to end: nanoGPT's
    """
    PURPOSE = 1                       # keeps these draws apart from others of the same seed

    def __init__(self, token_file: TokenFile, length: int, manner: str = "stream", seed: int = 0):
        if manner not in ("document", "stream"):
            raise UserError(f"manner '{manner}' is neither 'document' nor 'stream'")
        if manner == "stream" and token_file.n_tokens < length:
            raise UserError(f"{token_file.path} has {token_file.n_tokens} tokens, one crop needs "
                             f"{length}: prepare more text, or take shorter crops")
        self.token_file, self.length, self.manner, self.seed = token_file, length, manner, seed

    def batch(self, step: int, rows: Iterable[int]):
        """ids_BL int64 and valid_BL bool, one row for each of `rows`."""
        crops = [self._crop(step, row) for row in rows]
        ids_BL = torch.full((len(crops), self.length), self.token_file.meta["eos"] or 0)
        valid_BL = torch.zeros(ids_BL.shape, dtype=torch.bool)
        for b, crop in enumerate(crops):
            ids_BL[b, :len(crop)], valid_BL[b, :len(crop)] = torch.from_numpy(crop), True
        return ids_BL, valid_BL

    def _crop(self, step: int, row: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, self.PURPOSE, step, row])
        start, end = 0, self.token_file.n_tokens
        if self.manner == "document":
            i = rng.integers(self.token_file.n_docs)
            start, end = self.token_file.offsets[i:i + 2].tolist()
        start = int(rng.integers(start, max(start, end - self.length) + 1))
        return self.token_file.read(start, min(start + self.length, end))


@dataclass(frozen=True)
class DataConfig:
    input: tuple[str, ...] = ()       # .txt, .jsonl, .jsonl.gz, .json.gz or .parquet files
    field: tuple[str, ...] = ("text",)  # of each row, joined by newlines
    tokenizer: str = ""               # file, or folder that holds one
    out: str = ""                     # folder to write
    val_share: float = 0.01           # of the documents, held out


def main():
    (cfg,) = config.parse(DataConfig)
    if not (cfg.input and cfg.tokenizer and cfg.out):
        raise UserError("needs --input=FILE, --tokenizer=FILE and --out=FOLDER")
    texts = (text for path in cfg.input for text in read_texts(path, cfg.field))
    meta = prepare(texts, load(cfg.tokenizer), cfg.out, cfg.val_share, list(cfg.input))
    print(f"{cfg.out}: {meta['n_docs']} documents, {meta['n_tokens']} tokens ({meta['dtype']})")


if __name__ == "__main__":
    config.run(main)
