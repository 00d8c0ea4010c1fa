"""Byte pair encoding for tiktoken: tekken.json, and Hugging Face's byte-level tokenizer.json.

tiktoken needs a regular expression that cuts text into words, and a vocabulary {bytes: id}. Of
neighbours in a word that together are in the vocabulary, it merges those of the lowest id first.
tekken.json (Mistral Nemo, Ministral) holds just that. tokenizer.json (Qwen2, SmolLM2, Llama 3)
spells bytes as letters and lists merges: the same, if ids were given in the order of the merges.

Left out on purpose: every other kind of tokenizer.json, and finding special tokens in text.

Read next: data.py
"""
import base64
import unicodedata
from collections.abc import Callable

import tiktoken
from config import UserError

# GPT-2's expression, applied between single digits, as one: white space before a digit stays whole.
BETWEEN_DIGITS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
BOS, EOS = ("<|begin_of_text|>", "<s>"), ("<|endoftext|>", "<|end_of_text|>", "</s>")
INSTEAD = "use the model's tokenizer.model or tekken.json"


def read(spec: dict) -> tuple[Callable[[str], list[int]], list[bytes], int | None, int | None]:
    """A function from text to ids, the bytes of each id (none for a special token), bos, eos.

    Raises ValueError, KeyError or TypeError for a file that is damaged, or not of the two kinds.
    """
    regex, ranks, special, bos, eos = (_tekken if "config" in spec else _byte_level)(spec)
    known = {token: piece for piece, token in ranks.items()} | special
    n = max(known) + 1
    # SmolLM2 lacks 21 of the 256 bytes, but tiktoken needs all of them. Ids beyond the vocabulary
    # stand in, and are then dropped, just as `tokenizers` leaves such bytes out of the text.
    lacks = {bytes([b]): n + b for b in range(256) if bytes([b]) not in ranks}
    encoding = tiktoken.Encoding("bpe", pat_str=regex, mergeable_ranks=ranks | lacks,
                                 special_tokens={})
    nfc = spec.get("normalizer") is not None                # Qwen2: e + accent becomes é

    def encode(text: str) -> list[int]:
        ids = encoding.encode_ordinary(unicodedata.normalize("NFC", text) if nfc else text)
        return [i for i in ids if i < n] if lacks else ids

    return encode, [known.get(i, f"<|{i}|>".encode()) for i in range(n)], bos, eos


def _tekken(spec: dict) -> tuple:
    """Regular expression, {bytes: id}, {special id: bytes}, bos, eos."""
    settings, vocab = spec["config"], spec["vocab"]
    n_special = settings["default_num_special_tokens"]      # these come first
    n = settings["default_vocab_size"] - n_special          # the file lists more than models know
    if len(vocab) < n:
        raise UserError(f"vocab needs {n} entries, has {len(vocab)}: download it again")
    for i, entry in enumerate(vocab[:n]):
        if entry["rank"] != i:
            raise UserError(f"vocab entry {i} has rank {entry['rank']}: download it again")
    ranks = {base64.b64decode(entry["token_bytes"]): n_special + i
             for i, entry in enumerate(vocab[:n])}
    return settings["pattern"], ranks, dict.fromkeys(range(n_special), b""), 1, 2


def _byte_level(spec: dict) -> tuple:
    """As `_tekken`. An added token that is not special has bytes, but no text is encoded as one."""
    regex, vocab = _regex(spec), spec["model"]["vocab"]
    merged = ["".join(merge).replace(" ", "") for merge in spec["model"]["merges"]]
    ids = list(dict.fromkeys(vocab[piece] for piece in merged))
    if ids != sorted(ids):
        raise UserError(f"merges are not in the order of their ids, and tiktoken's are: {INSTEAD}")
    added, byte = {token["content"]: token for token in spec["added_tokens"]}, _byte_of_letter()
    ranks = {bytes(byte[c] for c in piece): i for piece, i in vocab.items() if piece not in added}
    special = {a["id"]: b"" if a["special"] else text.encode() for text, a in added.items()}
    bos, eos = (next((added[name]["id"] for name in names if name in added), None)
                for names in (BOS, EOS))
    return regex, ranks, special, bos, eos


def _regex(spec: dict) -> str:
    """How text is cut into words, if it is done in one of the two ways known here."""
    before = spec["pre_tokenizer"]
    steps = before["pretokenizers"] if before and "pretokenizers" in before else [before]
    shape = [spec["normalizer"], *steps, spec["model"]]
    match shape:
        case [None | {"type": "NFC"},
              {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated",
               "invert": False},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
              {"type": "BPE"}]:
            return regex
        case [None | {"type": "NFC"},
              {"type": "Digits", "individual_digits": True},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
              {"type": "BPE"}]:
            return BETWEEN_DIGITS
    names = " + ".join(part["type"] if part else "nothing" for part in shape)
    raise UserError(f"{names} with its settings is not known here, and 'pip install tokenizers' "
                     f"will not help, it is not used: {INSTEAD}")


def _byte_of_letter() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes are their own letters, the others go on from chr(256)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
