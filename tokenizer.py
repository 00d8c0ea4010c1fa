"""Text to ids and back: sentencepiece, tekken, byte-level BPE and plain words behind one interface.

    tokenizer = load("checkpoints/mistral-7b")            # a file, or a folder that holds one
    python tokenizer.py --input=a.jsonl --field=question --vocab_size=1024 --out=tokenizer.model

Each is a list of byte strings, one for every id; decoding, the same for all, joins and reads UTF-8.

Left out on purpose: chat templates, and special tokens written as text: "</s>" in a document is
four characters, not its end.

Read next: bpe.py
"""
import codecs
import hashlib
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from config import UserError
from formats import bpe
import config
from formats.tensors import published

START_THOUGHT, END_THOUGHT = "<|startthought|>", "<|endthought|>"
NAMES = ("tokenizer.model", "tokenizer.model.v3", "tekken.json", "tokenizer.json", "words.json")
PLAIN = "  a " + "".join(map(chr, range(32, 127))) + "\n\tb"      # what any but words must hold


class Tokenizer:
    """What all have: .vocab_size, .bos and .eos (ids or None), and by `load` .path and .sha256.

    `encode` makes no id beyond the vocabulary; the first two there are the markers of a thought.
    """
    def __init__(self, pieces: list[bytes], bos: int | None, eos: int | None, space_first=False):
        self.vocab_size, self.bos, self.eos = len(pieces), bos, eos
        self.pieces = [*pieces, START_THOUGHT.encode(), END_THOUGHT.encode()]
        self.space_first = space_first                      # encode puts a space before every text

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Ids of `text`, after bos if that is wanted and exists (Qwen2 and SmolLM2 have none)."""
        ids = self._encode(text.encode(errors="replace").decode())    # half a surrogate pair is "?"
        return [self.bos, *ids] if bos and self.bos is not None else ids

    def decode(self, ids: Iterable[int]) -> str:
        """Inverse of `encode`. Special tokens are silent; an id without text shows as <|id|>."""
        stream = self.stream()
        return "".join(map(stream.push, ids)) + stream.flush()

    def stream(self) -> "Stream":
        return Stream(self)

    def copy_to(self, folder: str | Path):
        """Put the file into `folder`, under the name that `find` looks for."""
        with published(Path(folder, self.name)) as file:
            file.write(Path(self.path).read_bytes())


class Stream:
    """Decoding as ids come: what `push` and then `flush` return, joined, is what `decode` returns.

    Half a character waits for the rest. To go on from a prompt, push its ids first and drop what
    they return: only at the very beginning is a space no part of the text.
    """
    def __init__(self, tokenizer: Tokenizer):
        self.pieces, self.space_first = tokenizer.pieces, tokenizer.space_first
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        known = 0 <= token < len(self.pieces)               # models may embed more rows
        piece = self.pieces[token] if known else f"<|{int(token)}|>".encode()
        if self.space_first and piece:
            piece, self.space_first = piece.removeprefix(b" "), False
        return self.utf8.decode(piece)

    def flush(self) -> str:
        return self.utf8.decode(b"", final=True)


class SentencePieceTokenizer(Tokenizer):
    """tokenizer.model of Mistral 7B, Llama 2, TinyLlama, or trained by this file."""
    name = "tokenizer.model"

    def __init__(self, content: bytes):
        self.model = model = sentencepiece.SentencePieceProcessor()
        model.load_from_serialized_proto(content)
        byte = {f"<0x{b:02X}>": bytes([b]) for b in range(256)}
        pieces = [b"" if model.is_control(i) else byte.get(name, name.replace("▁", " ").encode())
                  for i, name in enumerate(model.id_to_piece([*range(len(model))]))]
        bos, eos = (None if i < 0 else i for i in (model.bos_id(), model.eos_id()))
        super().__init__(pieces, bos, eos, model.encode_as_pieces("a")[0].startswith("▁"))

    def _encode(self, text: str) -> list[int]:
        return self.model.encode(text)


class TiktokenTokenizer(Tokenizer):
    """tekken.json of Nemo and Ministral, or the tokenizer.json of Qwen2, SmolLM2 and Llama 3."""
    def __init__(self, spec: dict):
        self.name = "tekken.json" if "config" in spec else "tokenizer.json"
        self._encode, pieces, bos, eos = bpe.read(spec)
        super().__init__(pieces, bos, eos)


class WordTokenizer(Tokenizer):
    """words.json of the shell game: {"words": [...], "bos": word or null, "eos": word or null}."""
    name = "words.json"

    def __init__(self, spec: dict):
        self.ids = {word: i for i, word in enumerate(spec["words"])}
        ends = spec["bos"], spec["eos"]
        if " ".join(self.ids).split() != spec["words"] or not {*ends} <= {None, *self.ids}:
            raise UserError("words repeat or hold white space, or bos or eos is not among them")
        bos, eos = map(self.ids.get, ends)
        super().__init__([b" " + word.encode() for word in self.ids], bos, eos, space_first=True)

    def _encode(self, text: str) -> list[int]:
        for word in text.split():
            if word not in self.ids:
                raise UserError(f"'{word}' is not one of the {len(self.ids)} words of {self.path}")
        return [self.ids[word] for word in text.split()]


def find(folder: str | Path) -> Path:
    """The tokenizer beside the weights: the first of NAMES that is there."""
    for path in (Path(folder, name) for name in NAMES):
        if path.exists():
            return path
    raise UserError(f"{folder} holds no tokenizer ({', '.join(NAMES)}): copy one there")


def exists(folder: str | Path) -> bool:
    return any(Path(folder, name).exists() for name in NAMES)


def load(path: str | Path) -> Tokenizer:
    """The tokenizer of a file or folder. ValueError if it is damaged, or changes plain text."""
    path = find(path) if Path(path).is_dir() else Path(path)
    if not path.exists():
        raise UserError(f"{path} is missing: name a tokenizer, or a folder that holds one")
    content = path.read_bytes()
    try:
        spec = json.loads(content) if path.suffix == ".json" else content
        kind = (SentencePieceTokenizer if spec is content else
                WordTokenizer if "words" in spec else TiktokenTokenizer)
        tokenizer = kind(spec)
        if kind is not WordTokenizer and tokenizer.decode(tokenizer.encode(PLAIN)) != PLAIN:
            raise UserError("plain text comes back changed (truncated? no byte fallback?)")
    except (RuntimeError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError):
        known = ("JSON of a known kind" if path.suffix == ".json" else
                 "a sentencepiece model (nor is Llama 3's: use its tokenizer.json)")
        raise UserError(f"{path} is not {known}; if it is truncated or a git-lfs pointer, "
                         "download it again") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    tokenizer.path, tokenizer.sha256 = str(path), hashlib.sha256(content).hexdigest()
    return tokenizer


def dash_id(tokenizer: Tokenizer) -> int:
    """The id whose embedding the markers start from: an em dash, else what "---" begins with."""
    ids = ((text, i) for text in ("—", "---") for i in tokenizer.encode(text))
    pieces = ((text, i, tokenizer.decode([i]).strip()) for text, i in ids)
    return next(i for text, i, piece in pieces if piece and text.startswith(piece))


def train(texts: Iterable[str], vocab_size: int) -> bytes:
    """A sentencepiece model built as Mistral's is; the same texts give the same bytes."""
    lines, content = (line for text in texts for line in text.split("\n")), io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=content, vocab_size=vocab_size, num_threads=1,
            model_type="bpe", byte_fallback=True, split_digits=True, character_coverage=0.98,
            normalization_rule_name="identity", remove_extra_whitespaces=False,
            max_sentence_length=2**24, minloglevel=2)
    except RuntimeError as error:
        reason = str(error).rpartition("]")[2].strip() or "it is empty"
        raise UserError(f"cannot make {vocab_size} tokens of this text: {reason}") from None
    return content.getvalue()


@dataclass(frozen=True)
class TrainConfig:
    input: tuple[str, ...] = ()         # .txt, .jsonl, .jsonl.gz files, by commas
    field: tuple[str, ...] = ("text",)  # fields of a row, joined by newlines
    vocab_size: int = 1024              # tokens; the 256 bytes and <unk>, <s>, </s> are 259 of them
    out: str = "tokenizer.model"        # file to write


def main():
    from data import read_texts                # data.py reads this file
    (cfg,) = config.parse(TrainConfig)
    texts = (text for path in cfg.input for text in read_texts(path, cfg.field))
    content = train(texts, cfg.vocab_size)
    with published(cfg.out) as file:
        file.write(content)
    print(f"{cfg.out}: {load(cfg.out).vocab_size} tokens")


if __name__ == "__main__":
    config.run(main)
