"""Text to token files, and token files to batches; it also trains a tokenizer.

    python data.py --train_tokenizer=tokenizer.model --vocab_size=1024 --input=a.jsonl,b.txt
    python data.py --input=a.jsonl,b.txt --tokenizer=tokenizer.model --out=data/NAME

A folder of tokens holds train.bin and val.bin (uint16 or uint32, documents end to end), their
.idx.npy (where each document begins, then the end), the tokenizer, and meta.json, written last.
Left out on purpose: downloads, packing, epochs, loader processes and tokenizing in parallel.
"""
import gzip
import hashlib
import io
import json
import zlib
from array import array
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import sentencepiece
import torch

from config import (UserError, atomic_write, check_ranges, check_regular, decode_text,
                    file_errors, parse, read_json, run, sampled_sha256, write_text)
from tokenizer import MAX_VOCAB, has_tokenizer, load_tokenizer, read_tokenizer_file

MAX_LINE = 256 << 20                  # bytes
META = {"dtype": str, "vocab_size": int, "eos": (None, int), "sources": [str],
        "tokenizer_sha256": str, "n_tokens": {"train": int, "val": int}}       # used of meta.json
# Random numbers come from generators keyed by (seed, purpose, ...), so there is no state to save.
# Windows of text and thoughts add (step, row), generated text adds the row, weights add nothing,
# and the rounding of weights adds (step, parameter).
RNG_BATCHES, RNG_THOUGHTS, RNG_WEIGHTS, RNG_SAMPLING, RNG_ROUNDING = 1, 2, 3, 4, 5


def seed_of(*key: int) -> int:
    """Return a seed for torch.Generator, which takes one number, from a key of several."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def uniform_by_text(ids_BL, position_BP, config):
    """Numbers in [0, 1) for thoughts, [B, N, P, T], keyed by each text up to its last position."""
    n_positions = position_BP.shape[1]
    shape = config.n_thoughts, n_positions, config.thought_len
    last_B = position_BP.amax(1)
    drawn = []
    for ids_L, last in zip(ids_BL, last_B):
        key = ids_L[:last + 1].tolist()
        rng = np.random.default_rng(key)
        drawn.append(rng.random(shape, np.float32))
    uniform_BNPT = torch.from_numpy(np.stack(drawn))
    return uniform_BNPT.to(ids_BL.device)


def read_texts(paths, fields):
    """Yield the documents of files: all of a .txt, else `fields` of each row with newlines."""
    for path in paths:
        names = ["text"] if path.endswith(".txt") else fields
        for number, row in read_rows(path):
            try:
                text = "\n".join(row[name] for name in names)
            except (KeyError, TypeError):
                raise UserError(f"{path}:{number}: --field={','.join(names)} does not name texts "
                                f"of {str(row)[:99]}") from None
            text = text.replace("\r\n", "\n").replace("\r", "\n")
            yield text.encode(errors="replace").decode()       # JSON can hold half a surrogate


def read_rows(path):
    """Yield line numbers, from 1, and rows, without blank lines. Raises UserError with the line."""
    number = 0
    try:
        for number, row in enumerate(_rows(path), start=1):
            if row is not None:
                yield number, row
    except UserError:
        raise
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise UserError(f"{path}:{number + 1}: damaged or absent ({error}): replace it") from None


def _rows(path):
    """Yield the rows of a file, and None for a blank line."""
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rb") as file:
        if path.lower().endswith(".txt"):
            yield {"text": decode_text(file.read(), path)}
            return
        if path.endswith(".parquet"):
            from pyarrow.parquet import ParquetFile
            for batch in ParquetFile(file).iter_batches(batch_size=1024):
                yield from batch.to_pylist()
            return
        while line := file.readline(MAX_LINE + 1):
            if len(line) > MAX_LINE:      # a small compressed file can blow up to it
                raise ValueError(f"a line of more than {MAX_LINE} bytes")
            yield json.loads(line) if line.strip() else None


def train_tokenizer(texts, vocab_size):
    """Return a sentencepiece model, as bytes, trained as Mistral's was; it is deterministic."""
    lines = (line for text in texts for line in text.split("\n"))
    content = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=content, vocab_size=vocab_size, num_threads=1,
            model_type="bpe", byte_fallback=True, split_digits=True, character_coverage=0.98,
            normalization_rule_name="identity", remove_extra_whitespaces=False,
            max_sentence_length=2**24, minloglevel=2)
    except RuntimeError as error:
        raise UserError(f"cannot make {vocab_size} tokens of this text: give more of it, or "
                        f"another --vocab_size ({error})") from None
    return content.getvalue()


def is_held_out(key: str, val_share: float) -> bool:
    """Choose the split by a hash of the key, so that no key is ever in both."""
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) / 2**256 < val_share


def prepare(texts, tokenizer, out, val_share, sources, split_key=str):
    """Write documents as bos + tokens + eos; return the meta. A single one gives its end to val."""
    out = Path(out)
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    end = [] if tokenizer.eos is None else [tokenizer.eos]
    lengths = {"train": array("Q"), "val": array("Q")}          # all that memory holds
    with (atomic_write(out / "train.bin") as train, atomic_write(out / "val.bin") as val,
          open(train, "wb") as train_file, open(val, "wb") as val_file):
        files = {"train": train_file, "val": val_file}
        texts = filter(str.strip, texts)
        first = list(islice(texts, 2))
        for text in chain(first, texts):
            ids = tokenizer.encode(text, bos=True) + end
            n_train = 0 if is_held_out(split_key(text), val_share) else len(ids)
            if len(first) == 1:
                n_train = round((1 - val_share) * len(ids))
            parts = {"train": ids[:n_train], "val": ids[n_train:]}
            for split in filter(parts.get, parts):
                files[split].write(np.array(parts[split], dtype))
                lengths[split].append(len(parts[split]))
        if not first:
            raise UserError(f"{', '.join(sources)}: no text, so {out} stays as it is: give more")
        tokenizer.copy_to(out)
        (out / "meta.json").unlink(missing_ok=True)             # the files it describes go now
    for split, of_split in lengths.items():
        with atomic_write(out / f"{split}.idx.npy") as path, open(path, "wb") as file:
            np.save(file, np.cumsum([0, *of_split], dtype=np.uint64))
    meta = dict(dtype=dtype, vocab_size=tokenizer.vocab_size, bos=tokenizer.bos,
                eos=tokenizer.eos, tokenizer_sha256=tokenizer.sha256, sources=sources,
                n_tokens={split: sum(lengths[split]) for split in lengths},
                n_docs={split: len(lengths[split]) for split in lengths})
    write_text(out / "meta.json", json.dumps(meta, indent=2))
    return meta


class TokenFile:
    """One split of a folder that `prepare` wrote: .meta, .n_tokens, .n_docs, .offsets."""
    def __init__(self, folder, split):
        self.path = Path(folder, f"{split}.bin")
        try:
            self.meta = read_json(Path(folder, "meta.json"), META)
            self.n_tokens = self.meta["n_tokens"][split]
            if self.meta["dtype"] not in ("uint16", "uint32"):
                raise ValueError(f"dtype {self.meta['dtype']} is neither uint16 nor uint32")
            self.dtype = np.dtype(self.meta["dtype"])
            index = Path(folder, f"{split}.idx.npy")
            check_regular(index)
            self.offsets = np.lib.format.open_memmap(index, mode="r")
            if self.offsets.ndim != 1 or self.offsets.dtype not in (np.uint64, np.int64):
                raise ValueError(f"{index} is not a row of whole numbers")
            stored = self.path.stat().st_size / self.dtype.itemsize
            if not 0 < stored == self.offsets[-1] == self.n_tokens:
                raise UserError(f"{self.path} has {stored} tokens, its index {self.offsets[-1]}, "
                                f"meta.json {self.n_tokens}")
            if self.offsets[0] or not (self.offsets[1:] > self.offsets[:-1]).all():
                raise ValueError("its index does not rise from 0")
            if not 0 <= (self.meta["eos"] or 0) < self.meta["vocab_size"]:
                raise ValueError(f"eos {self.meta['eos']} is no token")
            if has_tokenizer(folder):
                _, content = read_tokenizer_file(Path(folder))
                if hashlib.sha256(content).hexdigest() != self.meta["tokenizer_sha256"]:
                    raise ValueError("its tokenizer is another than that of its tokens")
        except (OSError, ValueError, EOFError, LookupError, TypeError) as error:
            raise UserError(f"{folder} holds no whole {split} split ({error}): prepare it again "
                            "(data.py), if it is empty with another --val_share") from None
        self.n_docs = len(self.offsets) - 1

    @property
    def sha256(self):
        """Return a hash of the text and of where its documents begin."""
        return sampled_sha256([self.path, self.path.with_suffix(".idx.npy")])

    def document(self, i):
        """Return the tokens of document i."""
        return self.read(*self.offsets[i:i + 2].tolist())

    @file_errors()
    def read(self, start, end):
        """Return tokens start to end - 1, int64. Raises UserError for an id of no token."""
        ids = np.fromfile(self.path, self.dtype, end - start, offset=start * self.dtype.itemsize)
        if ids.max(initial=0) >= self.meta["vocab_size"]:
            raise UserError(f"{self.path}: token id {ids.max()} at position {start + ids.argmax()} "
                            f">= vocab_size {self.meta['vocab_size']}: prepare the data again")
        return ids.astype(np.int64)


class Batches:
    """Random windows of `seq_len` tokens. Row r of step s depends on (seed, s, r) alone. Mode
    "document" (official code) draws a document, and a window of it if it is longer; a shorter one
    is padded on the right (eos or 0, `valid` False). "stream" (nanoGPT): a window of them all."""
    def __init__(self, token_file: TokenFile, seq_len, mode="stream", seed=0):
        if mode == "stream" and token_file.n_tokens < seq_len:
            raise UserError(f"{token_file.path} has {token_file.n_tokens} tokens, one window needs "
                            f"{seq_len}: prepare more text, or take a shorter --seq_len")
        self.token_file, self.seq_len = token_file, seq_len
        self.mode, self.seed = mode, seed

    def batch(self, step, rows):
        """Return ids_BL int64 and valid_BL bool, a row for each of `rows`, numbers."""
        file = self.token_file
        ids_BL = torch.full((len(rows), self.seq_len), file.meta["eos"] or 0)
        valid_BL = torch.zeros_like(ids_BL, dtype=torch.bool)
        bounds = file.offsets if self.mode == "document" else [0, file.n_tokens]
        for b, row in enumerate(rows):
            rng = np.random.default_rng([self.seed, RNG_BATCHES, step, row])
            i = rng.integers(len(bounds) - 1)          # draws nothing if there is but one
            start, end = map(int, bounds[i:i + 2])
            start = int(rng.integers(start, max(start, end - self.seq_len) + 1))
            ids = file.read(start, min(start + self.seq_len, end))
            ids_BL[b, :len(ids)] = torch.from_numpy(ids)
            valid_BL[b, :len(ids)] = True
        return ids_BL, valid_BL


@dataclass(frozen=True)
class DataConfig:
    input: tuple[str, ...] = ()       # .txt, .jsonl, .jsonl.gz, .json.gz or .parquet files
    field: tuple[str, ...] = ("text",)  # fields of a row, joined by newlines
    tokenizer: str = ""               # tokenizer file, or a folder that holds one
    out: str = ""                     # folder to write token files to
    val_share: float = 0.01           # share of the documents that is held out
    train_tokenizer: str = ""         # train a tokenizer instead, and write it to this file
    vocab_size: int = 1024            # tokens of the new tokenizer; 259 are bytes and specials

    def __post_init__(self):
        check_ranges(self, val_share=(0, 1), vocab_size=(0, MAX_VOCAB))


def main():
    (cfg,) = parse(DataConfig)
    given = {bool(cfg.tokenizer), bool(cfg.out), not cfg.train_tokenizer}
    if not cfg.input or not cfg.field or len(given) > 1:
        raise UserError("needs --input, --field, and --tokenizer with --out, or --train_tokenizer")
    texts = read_texts(cfg.input, cfg.field)
    if cfg.train_tokenizer:
        with atomic_write(cfg.train_tokenizer) as path:
            path.write_bytes(train_tokenizer(texts, cfg.vocab_size))
        print(f"{cfg.train_tokenizer}: {cfg.vocab_size} tokens")
    else:
        meta = prepare(texts, load_tokenizer(cfg.tokenizer), cfg.out, cfg.val_share, cfg.input)
        print(f"{cfg.out}: {meta['n_docs']} documents, {meta['n_tokens']} tokens ({meta['dtype']})")


if __name__ == "__main__":
    run(main)
