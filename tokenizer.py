"""Text to ids and back: sentencepiece, tiktoken and plain words behind one interface.

    tokenizer = load_tokenizer("checkpoints/mistral-7b")     # a file, or a folder that holds one

Every id stands for bytes; to decode, these are joined and read as UTF-8. data.py trains new ones.
Left out on purpose: chat templates, the kinds of tokenizer.json that are not byte-level BPE, and
special tokens written as text: "</s>" in a document is four characters, not its end.
"""
import base64
import codecs
import hashlib
import json
import re
import unicodedata
from pathlib import Path

import regex                          # tiktoken's own dependency
import sentencepiece
import tiktoken

from config import UserError, atomic_write, check_json, check_regular, read_json
from formats.gguf import gguf_ends, gguf_tokenizer

TOKENIZER_FILES = "tokenizer.model tokenizer.model.v3 tekken.json tokenizer.json words.json".split()
# GPT-2's expression between single digits, in one: white space before a digit stays whole.
_ONE_DIGIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
MAX_VOCAB = 1 << 20                   # ids; the largest known has 262,144
TEKKEN = {"default_num_special_tokens": int, "default_vocab_size": int, "pattern": str}
BYTE_LEVEL = {"added_tokens": [{"content": str, "id": int, "special": bool}],
              "model": {"vocab": {str: int}, "merges": [(str, [str])]}}
ENDS = {"eos_token_id": (None, int, [int])}
MANY_BLANKS = 400_000                 # tiktoken's regular expressions give up at a million


class Tokenizer:
    """Base class. `encode` makes ids below `vocab_size`; `pieces` has the bytes of each. `bos` and
    `eos` are ids or None, `ends` all ids that end a text. `load_tokenizer` adds `path`, `content`,
    `sha256`, a subclass `name`, the usual one of its file, and `_encode(text) -> ids`."""
    sample = "  a " + "".join(map(chr, range(32, 127))) + "\n\tb"     # text that must survive

    def __init__(self, pieces, bos, eos, space_first=False):
        self.vocab_size = len(pieces)
        self.bos, self.eos = bos, eos
        self.ends = {eos, bos} - {None}
        self.pieces = pieces
        self.space_first = space_first            # `_encode` puts a space before every text

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Return the ids of `text`, with bos before them if asked for and if there is one."""
        text = text.encode(errors="replace").decode()      # half a surrogate pair becomes "?"
        ids = self._encode(text)
        return [self.bos, *ids] if bos and self.bos is not None else ids

    def decode(self, ids) -> str:
        """Invert `encode`. Special tokens give no text; an id without text shows as <|id|>."""
        stream = Stream(self)
        return "".join(map(stream.push, ids)) + stream.flush()

    def copy_to(self, folder):
        """Write the file into `folder`, under a name that `load_tokenizer` finds there first."""
        for name in TOKENIZER_FILES:
            if name != self.name and Path(folder, name).exists():
                raise UserError(f"{folder} holds another tokenizer, {name}: choose another folder")
        with atomic_write(Path(folder, self.name)) as temporary:
            temporary.write_bytes(self.content)


class Stream:
    """Decode ids as they come; bytes of half a character wait for the rest. To continue a prompt,
    push its ids and drop the result: only at the very beginning is a space no part of the text."""
    def __init__(self, tokenizer):
        self.pieces = tokenizer.pieces
        self.space_first = tokenizer.space_first
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Return the text that this id completes, which may be empty."""
        known = 0 <= token < len(self.pieces)     # a model may embed more rows than have a text
        piece = self.pieces[token] if known else f"<|{int(token)}|>".encode()
        if self.space_first and piece:
            piece = piece.removeprefix(b" ")
            self.space_first = False
        return self.utf8.decode(piece)

    def flush(self) -> str:
        """Return a replacement character for an unfinished one, else nothing."""
        return self.utf8.decode(b"", final=True)


class SentencePieceTokenizer(Tokenizer):
    """Read tokenizer.model: Mistral 7B, Llama 2, TinyLlama, or one trained by data.py."""
    name = "tokenizer.model"
    def __init__(self, content):
        model = sentencepiece.SentencePieceProcessor()
        model.load_from_serialized_proto(content)

        def bytes_of(i):
            piece = model.id_to_piece(i)
            if model.is_byte(i):                  # "<0x0A>"
                return bytes.fromhex(piece[3:-1])
            if model.is_control(i):
                return b""
            return piece.replace("▁", " ").encode()
        pieces = list(map(bytes_of, range(len(model))))
        bos, eos = (None if i < 0 else i for i in (model.bos_id(), model.eos_id()))
        space_first = model.encode_as_pieces("a")[0].startswith("▁")
        super().__init__(pieces, bos, eos, space_first)
        self._encode = model.encode


class TiktokenTokenizer(Tokenizer):
    """Read tekken.json (Nemo, Ministral) or byte-level tokenizer.json (Qwen2, SmolLM2, Llama 3).
    tiktoken needs a regular expression that cuts text into words, and a vocabulary {bytes: id}; it
    merges the pair of neighbours with the lowest id first. tokenizer.json spells bytes as letters
    and lists merges, which is the same if ids were given in the order of the merges."""
    def __init__(self, spec):
        self.name = "tekken.json" if "config" in spec else "tokenizer.json"
        read = _tekken if "config" in spec else _byte_level
        pattern, ranks, special, bos, eos = read(spec)
        if not all(match[0] for match in regex.finditer(pattern, self.sample, timeout=2)):
            raise ValueError(f"its expression {pattern[:60]!r} matches empty text")
        known = {i: piece for piece, i in ranks.items()} | special
        n = max(known) + 1
        if n > MAX_VOCAB or min(known) < 0 or len(known) < len(ranks) + len(special):
            raise ValueError("some ids repeat, or are below 0 or too large")
        super().__init__([known.get(i, f"<|{i}|>".encode()) for i in range(n)], bos, eos)
        # SmolLM2 lacks 21 of the 256 bytes, but tiktoken needs all of them. Ids beyond the
        # vocabulary stand in and are then dropped, as `tokenizers` leaves such bytes out.
        absent = {bytes([b]): n + b for b in range(256) if bytes([b]) not in ranks}
        self.encoding = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks | absent,
                                          special_tokens={})
        self.normalizer = spec.get("normalizer")      # None, or NFC: e + accent becomes é (Qwen2)

    def _encode(self, text):
        if self.normalizer:
            text = unicodedata.normalize("NFC", text)
        if re.search(rf"(?<!\s)\s{{{MANY_BLANKS}}}", text):      # tried once in each run of them
            raise UserError(f"a text of {len(text)} characters has {MANY_BLANKS} blanks in a row, "
                            "more than tiktoken takes: shorten them")
        return [i for i in self.encoding.encode_ordinary(text) if i < self.vocab_size]


class WordTokenizer(Tokenizer):
    """Read words.json (shell game): {"words": [...], "bos": word or null, "eos": word or null}."""
    name = "words.json"
    sample = ""                                   # white space is not kept

    def __init__(self, spec):
        words, bos, eos = spec["words"], spec["bos"], spec["eos"]
        self.ids = {word: i for i, word in enumerate(words)}
        if " ".join(self.ids).split() != words or not {bos, eos} <= {None, *words}:
            raise ValueError("words repeat or hold white space, or bos or eos is not among them")
        pieces = [b" " + word.encode() for word in words]
        super().__init__(pieces, self.ids.get(bos), self.ids.get(eos), space_first=True)

    def _encode(self, text):
        try:
            return [self.ids[word] for word in text.split()]
        except KeyError as word:
            raise UserError(f"{word} is not one of the {len(self.ids)} words of "
                            f"{self.path}") from None


def has_tokenizer(path) -> bool:
    """Return True if a folder holds a tokenizer of a known name, or for a GGUF file."""
    return is_gguf(path) or any(Path(path, name).exists() for name in TOKENIZER_FILES)


def is_gguf(path) -> bool:
    """Return True for the name of a GGUF file, which holds weights and tokenizer."""
    return Path(path).suffix == ".gguf"


def read_tokenizer_file(path: Path):
    """Return the path and the content of a tokenizer's file, the first of a folder. A vocabulary
    in a GGUF file is written as tokenizer.json; if it is not byte-level, one beside it serves."""
    if is_gguf(path) and path.is_file():
        spec = gguf_tokenizer(path)
        if spec:
            return path, json.dumps(spec).encode()
        if not has_tokenizer(path.parent):
            raise UserError(f"{path}: its vocabulary is not of a known byte-level kind: put the "
                            f"model's {' or '.join(TOKENIZER_FILES[:4])} beside it")
        path = path.parent
    path = next(filter(Path.exists, [path / name for name in TOKENIZER_FILES]), path)
    check_regular(path)
    return path, path.read_bytes()


def load_tokenizer(path) -> Tokenizer:
    """Load a file, or the first of a folder. Raises UserError if it is damaged or loses text."""
    given = path = Path(path)
    try:
        path, content = read_tokenizer_file(path)
        kind, spec = SentencePieceTokenizer, content
        if path.suffix in (".json", ".gguf"):
            spec = json.loads(content)
            kind = WordTokenizer if "words" in spec else TiktokenTokenizer
        tokenizer = kind(spec)
        if tokenizer.decode(tokenizer.encode(tokenizer.sample)) != tokenizer.sample:
            raise ValueError("plain text comes back changed")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error}): name one of "
                        f"{', '.join(TOKENIZER_FILES)}, or a folder that holds one") from None
    except (RuntimeError, KeyError, TypeError, ValueError, regex.error) as error:
        raise UserError(f"{path} is no tokenizer of a known kind ({error}): download it again if "
                        "it is truncated or a git-lfs pointer, or else another of the model's "
                        f"{', '.join(TOKENIZER_FILES[:4])}") from None
    tokenizer.path, tokenizer.content = str(path), content
    tokenizer.sha256 = hashlib.sha256(content).hexdigest()
    # A fine-tune for chat ends a text with other ids, which the model's own files name.
    for own in (path.parent / "config.json", path.parent / "generation_config.json"):
        found = read_json(own, ENDS).get("eos_token_id") if own.exists() else None
        tokenizer.ends |= {found} if isinstance(found, int) else set(found or ())
    if is_gguf(given):
        tokenizer.ends |= gguf_ends(given)
    if not all(0 <= end < MAX_VOCAB for end in tokenizer.ends):
        raise UserError(f"{given}: eos_token_id {tokenizer.ends} is no token: repair config.json")
    return tokenizer


def dash_id(tokenizer: Tokenizer) -> int:
    """Return the id whose embedding the markers start from: an em dash, else the start of "---"."""
    for text in ("—", "---"):
        for i in tokenizer.encode(text):
            if tokenizer.decode([i]).strip() in ("—", "-", "--", "---"):
                return i
    raise UserError(f"{tokenizer.path} has neither an em dash nor a hyphen to start markers from")


def _tekken(spec):
    """Return regular expression, {bytes: id}, {special id: bytes}, bos, eos."""
    settings = spec["config"]
    check_json(settings, TEKKEN, "config")
    n_special = settings["default_num_special_tokens"]                      # these come first
    n = settings["default_vocab_size"] - n_special          # the file lists more than models use
    if min(n, n_special) < 0 or n + n_special > MAX_VOCAB:
        raise ValueError(f"{n_special} special tokens and {n} others, of {MAX_VOCAB} at most")
    entries = spec["vocab"][:n]
    if [entry["rank"] for entry in entries] != list(range(n)):
        raise ValueError(f"vocab does not begin with {n} entries in the order of their ranks")
    ranks = {base64.b64decode(entry["token_bytes"]): n_special + entry["rank"] for entry in entries}
    if len(ranks) < n:
        raise ValueError("some token_bytes repeat")
    special = dict.fromkeys(range(n_special), b"")
    return settings["pattern"], ranks, special, 1, 2


def _byte_level(spec):
    """Do the same as `_tekken`. Added tokens have bytes, but no text is encoded as one of them."""
    shape = [spec["normalizer"], spec["pre_tokenizer"], spec["model"]["type"]]
    match shape:
        case [None | {"type": "NFC"}, {"pretokenizers": [
                {"type": "Split", "behavior": "Isolated", "invert": False,
                 "pattern": {"Regex": pattern}},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}, "BPE"]:
            pass
        case [None | {"type": "NFC"}, {"pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]}, "BPE"]:
            pattern = _ONE_DIGIT
        case _:
            raise ValueError(f"normalizer, pre_tokenizer and model are {shape}")
    check_json(spec, BYTE_LEVEL, "tokenizer.json")
    model = spec["model"]
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout", "byte_fallback"):
        if model.get(name):
            raise ValueError(f"{name} is {model[name]}")
    vocab = model["vocab"]
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    merged = list(map("".join, pairs))
    made = {piece for piece in vocab if len(piece) == 1} | {*merged}
    if any(len(pair) != 2 or not made.issuperset(pair) for pair in pairs):
        raise ValueError("some merge is not of two pieces that are made before")
    ids = dict.fromkeys(vocab[piece] for piece in merged)
    if list(ids) != sorted(ids):
        raise ValueError("merges are not in the order of their ids, and tiktoken's are")
    added = {token["content"]: token["id"] for token in spec["added_tokens"]}
    lost = [piece for piece in vocab.keys() & added.keys() if len(piece) == 1]
    if lost:
        raise ValueError(f"the added token {lost[0]!r} is a letter of plain text")
    special = {token["id"]: b"" if token["special"] else token["content"].encode()
               for token in spec["added_tokens"]}
    # GPT-2's alphabet spells bytes: printable ones as themselves, the others from chr(256) on.
    byte = {chr(b): b for b in range(33, 256) if chr(b).isprintable()}
    others = sorted({*range(256)} - {*byte.values()})
    byte |= zip(map(chr, range(256, 512)), others)
    # What no merge makes is never an id of text; tiktoken would find it.
    unmade = vocab.keys() - made - added.keys()
    if unmade and model.get("ignore_merges"):
        raise ValueError(f"no merge makes {min(unmade)}, and ignore_merges is true")
    if model.get("unk_token") and not byte.keys() <= vocab.keys():
        raise ValueError("some bytes have no token, and unk_token is set")
    special |= {vocab[piece]: bytes(map(byte.get, piece)) for piece in unmade}
    no_text = unmade | added.keys()
    ranks = {bytes(map(byte.get, piece)): i for piece, i in vocab.items() if piece not in no_text}
    bos = added.get("<|begin_of_text|>", added.get("<s>"))
    eos = added.get("<|endoftext|>", added.get("<|end_of_text|>", added.get("</s>")))
    return pattern, ranks, special, bos, eos
