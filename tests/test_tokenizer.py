"""tokenizer.py: no text is lost, and ids are those that the model's own library gives."""
import base64
import hashlib
import io
import json
import os
import random
import time
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
import torch

import data
import tokenizer as tokenizers
from config import UserError
from data import train_tokenizer
from tokenizer import Stream, dash_id, has_tokenizer, load_tokenizer
from tools.show import START_THOUGHT

DATA = Path(os.environ.get("DATA_DIR", Path(__file__).parents[1] / "../shared/data"))
LINES = [f"{who} has {n} apples, buys {n * 7} more — and doesn't eat {what}: {n * 8 % 97}."
         for n in range(60)
         for who, what in (("Zoë", "any"), ("The naïve baker", "2 of them"), ("Mr O'Neil", "it"))]
TEXTS = ["", "a", " ", "   ", " lead", "trail ", "  two  spaces   three ", "\ttab\t\tx", "\n",
         "\n\n lines\r\n\r end\n", "Zoë's naïve café, façade — “quoted”…",
         "数学の問題を解く。한국어 텍스트, العربية", "😀 👩‍👩‍👧‍👦 🇫🇷 x²", "1234567890 3.14, 1,000 x7 7x  12 3   45",
         "don't WE'LL i'm 's 't '", "def f(x):\n    return x  # \\n",
         "\0 \x01\x7f \u200b\u00a0\u2028 \ufeff \ufffd", "𝔘𝔫𝔦 \U00042000 \U0010ffff",
         "a" * 300 + " " * 50 + "!" * 50]
END_THOUGHT = "<|endthought|>"
SPECIALS = ["<s>", "</s>", "<unk>", "[INST]", "<|endoftext|>", "<|im_start|>", "<tool>", "<0x0A>",
            "<SPECIAL_3>", "ENDOFTEXT", "<|startofthought|>", START_THOUGHT, END_THOUGHT,
            f"a{START_THOUGHT} b </s>{END_THOUGHT}"]
WORDLIKE = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + WORDLIKE
WORDS = {"words": ["ball", "a", "b", ":", "—", "."], "bos": None, "eos": "."}
KINDS = ["v1", "v3", "tekken", "qwen2", "smollm2"]


def trained(**options) -> bytes:
    content = io.BytesIO()
    settings = dict(vocab_size=360, model_type="bpe", byte_fallback=True, split_digits=True,
                    normalization_rule_name="identity", remove_extra_whitespaces=False,
                    character_coverage=0.98, num_threads=1, minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(LINES), model_writer=content,
                                             **{**settings, **options})
    return content.getvalue()


def tekken_file() -> dict:
    """Every prefix of a few words is a token; 30 entries at the end are beyond the vocabulary."""
    words = [" apples", " bakers", "ing", "\n\n", "—", "é", "ng", "    "]
    prefixes = [word.encode()[:n] for word in words for n in range(2, len(word.encode()) + 1)]
    pieces = [bytes([b]) for b in range(256)] + list(dict.fromkeys(prefixes))
    extra = [f" {'z' * n}".encode() for n in range(1, 31)]
    return {"config": {"pattern": WORDLIKE, "num_vocab_tokens": len(pieces + extra),
                       "default_vocab_size": len(pieces) + 10, "default_num_special_tokens": 10},
            "vocab": [{"rank": i, "token_bytes": base64.b64encode(piece).decode()}
                      for i, piece in enumerate(pieces + extra)]}


def train_byte_level(kind: str, alphabet=None):
    """The library's own, as Qwen2 has it (NFC, specials behind) or SmolLM2 (specials in front)."""
    library = pytest.importorskip("tokenizers")
    cut, trainers = library.pre_tokenizers, library.trainers
    own = library.Tokenizer(library.models.BPE())
    if kind == "qwen2":
        own.normalizer = library.normalizers.NFC()
        first = cut.Split(library.Regex(QWEN2), "isolated")
    else:
        first = cut.Digits(individual_digits=True)
    own.pre_tokenizer = cut.Sequence([
        first, cut.ByteLevel(add_prefix_space=False, use_regex=kind == "smollm2")])
    specials = ["<|endoftext|>", "<|im_start|>", "ENDOFTEXT"]
    own.train_from_iterator(LINES + TEXTS, trainers.BpeTrainer(
        vocab_size=600, show_progress=False, special_tokens=specials if kind == "smollm2" else [],
        initial_alphabet=alphabet or cut.ByteLevel.alphabet()))
    own.add_special_tokens(specials)
    own.add_tokens(["<tool>"])
    return own


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(kind) is the path of a tokenizer of that kind, built once."""
    folder = tmp_path_factory.mktemp("tokenizers")
    build = {
        "v1": lambda: trained(),
        "v3": lambda: trained(control_symbols=["[INST]", "[/INST]", "[control_8]"]),
        "tekken": lambda: json.dumps(tekken_file()).encode(),
        "qwen2": lambda: train_byte_level("qwen2").to_str().encode(),
        "smollm2": lambda: train_byte_level("smollm2").to_str().encode(),
        "words": lambda: json.dumps(WORDS).encode()}
    names = {"v1": "tokenizer.model", "v3": "tokenizer.model", "tekken": "tekken.json",
             "words": "words.json"}

    def path(kind: str) -> Path:
        file = folder / kind / names.get(kind, "tokenizer.json")
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(build[kind]())
        return file
    return path


@pytest.fixture
def tokenizer(made, request):
    return load_tokenizer(made(request.param))


every_kind = pytest.mark.parametrize("tokenizer", KINDS, indirect=True)


@every_kind
@pytest.mark.parametrize("text", TEXTS + SPECIALS)
def test_decode_inverts_encode(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, bos=True)) == text


@every_kind
def test_streaming_equals_decoding_and_never_shows_half_a_character(tokenizer):
    text = "".join(TEXTS).replace("\ufffd", "")
    stream, ids = Stream(tokenizer), tokenizer.encode(text)
    shown = [stream.push(id) for id in ids]
    assert "".join(shown) + stream.flush() == text
    assert "\ufffd" not in "".join(shown)


@every_kind
def test_streaming_equals_decoding_for_ids_that_are_not_text(tokenizer):
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(-3, tokenizer.vocab_size + 5) for _ in range(8)]
        stream, decoded = Stream(tokenizer), tokenizer.decode(torch.tensor(ids))
        assert "".join(map(stream.push, ids)) + stream.flush() == decoded


@every_kind
def test_half_a_character_at_the_end_is_flushed_as_one_replacement(tokenizer):
    stream, ids = Stream(tokenizer), tokenizer.encode("a\U00042000")
    shown = "".join(map(stream.push, ids[:-1]))
    assert (shown, stream.flush()) == ("a", "\ufffd")


@pytest.mark.parametrize("tokenizer", KINDS + ["words"], indirect=True)
def test_text_that_follows_a_pushed_prompt_keeps_its_space(tokenizer):
    stream, prompt = Stream(tokenizer), tokenizer.encode("ball a")
    for id in prompt:
        stream.push(id)
    rest = tokenizer.encode("ball a b b")[len(prompt):]
    assert "".join(map(stream.push, rest)) == " b b"


@every_kind
def test_text_never_becomes_a_special_token_or_a_marker(tokenizer):
    silent = (b"", b"<unk>", b"<tool>")
    special = {i for i in range(tokenizer.vocab_size) if tokenizer.pieces[i] in silent}
    assert tokenizer.eos in special
    ids = [i for text in TEXTS + SPECIALS + ["".join(SPECIALS)] for i in tokenizer.encode(text)]
    assert not special & set(ids)
    assert 0 <= min(ids) and max(ids) < tokenizer.vocab_size


@pytest.mark.parametrize("tokenizer", KINDS + ["words"], indirect=True)
def test_ids_beyond_the_vocabulary_show_as_numbers_and_never_as_markers(tokenizer):
    n = tokenizer.vocab_size
    assert tokenizer.decode([n, n + 1, -7, 10**9]) == f"<|{n}|><|{n + 1}|><|-7|><|1000000000|>"


@every_kind
def test_special_tokens_give_no_text(tokenizer):
    hi = tokenizer.encode("hi")
    assert tokenizer.decode([tokenizer.eos, *hi, tokenizer.eos]) == "hi"


@pytest.mark.parametrize("tokenizer, bos, eos", [
    ("v1", 1, 2), ("v3", 1, 2), ("tekken", 1, 2), ("smollm2", None, 0), ("words", None, 5)],
    indirect=["tokenizer"])
def test_bos_is_put_in_front_once_and_only_where_there_is_one(tokenizer, bos, eos):
    assert (tokenizer.bos, tokenizer.eos) == (bos, eos)
    assert tokenizer.encode("a") == tokenizer.encode("a", bos=True)[bos is not None:]
    assert tokenizer.encode("", bos=True) == ([] if bos is None else [bos])


def test_qwen2_ends_with_endoftext_and_composes_loose_accents(made):
    tokenizer = load_tokenizer(made("qwen2"))
    (eos,) = [added["id"] for added in json.loads(made("qwen2").read_text())["added_tokens"]
              if added["content"] == "<|endoftext|>"]
    assert (tokenizer.bos, tokenizer.eos) == (None, eos)
    assert tokenizer.decode(tokenizer.encode("cafe\u0301")) == "café"


@every_kind
def test_half_a_surrogate_pair_is_replaced(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


@pytest.mark.parametrize("kind", ["v1", "v3"])
def test_sentencepiece_ids_and_text_equal_the_librarys(made, kind):
    own = sentencepiece.SentencePieceProcessor(model_file=str(made(kind)))
    tokenizer = load_tokenizer(made(kind))
    assert tokenizer.vocab_size == own.vocab_size()
    for text in TEXTS + SPECIALS + LINES:
        ids = own.encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode([1, *ids, 2]) == own.decode([1, *ids, 2]) == text


def test_tekken_ids_are_ranks_behind_the_special_ones_and_the_rest_of_the_file_is_unused(made):
    tokenizer, spec = load_tokenizer(made("tekken")), tekken_file()
    assert tokenizer.vocab_size == spec["config"]["default_vocab_size"] < len(spec["vocab"])
    assert tokenizer.encode("AB") == [10 + ord("A"), 10 + ord("B")]
    assert tokenizer.encode(" zz") == [10 + ord(" "), 10 + ord("z"), 10 + ord("z")]


@pytest.mark.parametrize("kind", ["qwen2", "smollm2"])
def test_byte_level_ids_equal_the_librarys(made, kind):
    tokenizer, rng = load_tokenizer(made(kind)), random.Random(0)
    own = pytest.importorskip("tokenizers").Tokenizer.from_file(str(made(kind)))
    characters = "".join(TEXTS) + " \n\t'7e\u0301" * 20
    noise = ["".join(rng.choices(characters, k=60)) for _ in range(300)]
    for text in TEXTS + LINES + noise:
        assert tokenizer.encode(text) == own.encode(text, add_special_tokens=False).ids, repr(text)
        expected = unicodedata.normalize("NFC", text) if kind == "qwen2" else text
        assert tokenizer.decode(tokenizer.encode(text)) == expected


def test_a_token_that_no_merge_makes_is_no_id_of_text_as_the_library_has_it(made, tmp_path):
    library = pytest.importorskip("tokenizers")
    for kind, text in (("smollm2", "zebra"), ("qwen2", "quagga")):
        spec = json.loads(made(kind).read_text())
        n = max(*spec["model"]["vocab"].values(), *(t["id"] for t in spec["added_tokens"])) + 1
        spec["model"]["vocab"] |= {text: n, "Ġ" + text: n + 1}
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
        own, ours = library.Tokenizer.from_str(json.dumps(spec)), load_tokenizer(tmp_path)
        for sample in (text, f"a {text}", f"{text}s {text}", *TEXTS, *LINES[:9]):
            assert ours.encode(sample) == own.encode(sample, add_special_tokens=False).ids
        assert ours.decode([n, n + 1]) == f"{text} {text}" and ours.vocab_size == n + 2
        spec["model"]["ignore_merges"] = True
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
        with pytest.raises(UserError, match="ignore_merges is true"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize("change", [dict(continuing_subword_prefix="##"), dict(dropout=0.1),
                                    dict(end_of_word_suffix="</w>"), dict(byte_fallback=True)])
def test_parts_of_a_tokenizer_json_that_would_change_ids_are_refused(made, tmp_path, change):
    spec = json.loads(made("smollm2").read_text())
    spec["model"] |= change
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=next(iter(change))):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("config, generation, ends", [
    (dict(eos_token_id=7), None, {7}), (dict(eos_token_id=[8, 9]), dict(eos_token_id=3), {8, 9, 3}),
    (dict(eos_token_id=None), {}, set()), (None, dict(eos_token_id=[320, 2]), {320, 2})])
def test_a_text_ends_where_the_models_own_files_say_so_too(made, tmp_path, config, generation, ends):
    (tmp_path / "tokenizer.model").write_bytes(made("v1").read_bytes())
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).ends == {1, 2} | ends


@pytest.mark.parametrize("end", [-1, [2, -1], 999_999_999_999])
def test_an_end_that_is_no_token_is_refused(made, tmp_path, end):
    (tmp_path / "tokenizer.model").write_bytes(made("v1").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(dict(eos_token_id=end)))
    with pytest.raises(UserError, match="eos_token_id .* is no token: repair config.json"):
        load_tokenizer(tmp_path)


def test_bytes_that_a_vocabulary_lacks_are_left_out_as_the_library_leaves_them_out(tmp_path):
    own = train_byte_level("smollm2", alphabet=[*map(chr, range(33, 127)), "Ġ", "Ċ", "ĉ"])
    own.save(str(tmp_path / "tokenizer.json"))
    tokenizer, text = load_tokenizer(tmp_path), "a \U000c2000 b"    # it was trained on no 0xf3
    assert b"\xf3" not in tokenizer.pieces
    assert tokenizer.encode(text) == own.encode(text, add_special_tokens=False).ids
    assert max(tokenizer.encode(text)) < tokenizer.vocab_size


@pytest.mark.parametrize("tokenizer", ["v1", "v3", "tekken", "words"], indirect=True)
def test_markers_start_from_an_em_dash(tokenizer):
    assert tokenizer.decode([dash_id(tokenizer)]).strip() == "—"


def test_a_lone_space_before_the_em_dash_is_not_where_markers_start():
    content = train_tokenizer([line.replace(" — ", "—") for line in LINES], 330)
    tokenizer = tokenizers.SentencePieceTokenizer(content)
    space, dash = tokenizer.encode("—")
    assert tokenizer.pieces[space] == b" " and dash_id(tokenizer) == dash


def test_markers_start_from_a_hyphen_where_the_em_dash_is_in_pieces(tmp_path):
    spec = tekken_file()
    spec["config"].update(default_vocab_size=10 + 256)          # the single bytes and no more
    (tmp_path / "tekken.json").write_text(json.dumps(spec))
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer.encode("—")) == 3 and tokenizer.decode([dash_id(tokenizer)]) == "-"


def test_words_are_split_at_white_space_and_an_unknown_one_is_named(made):
    tokenizer = load_tokenizer(made("words"))
    assert tokenizer.encode(" ball\n a  : . ") == [0, 1, 3, 5]
    assert tokenizer.decode([0, 1, 3, 5]) == "ball a : ."
    with pytest.raises(UserError, match="'dog' is not one of the 6 words of .*words.json"):
        tokenizer.encode("a dog")
    with pytest.raises(UserError, match="startthought"):
        tokenizer.encode(START_THOUGHT)


def test_a_folder_means_the_first_of_the_known_names(tmp_path):
    assert not has_tokenizer(tmp_path)
    for name in reversed(tokenizers.TOKENIZER_FILES):
        (tmp_path / name).touch()
        assert has_tokenizer(tmp_path)
        with pytest.raises(UserError, match=f"^{tmp_path / name} is no"):     # it is empty
            load_tokenizer(tmp_path)


def test_a_file_of_another_name_is_read_by_its_content(made, tmp_path):
    for kind, name in (("v3", "tokenizer.model.v7"), ("tekken", "nemo.json"), ("words", "w.json")):
        (tmp_path / name).write_bytes(made(kind).read_bytes())
        found, expected = load_tokenizer(tmp_path / name), load_tokenizer(made(kind))
        assert found.encode("a b") == expected.encode("a b")


@pytest.mark.parametrize("tokenizer", KINDS + ["words"], indirect=True)
def test_a_copy_is_found_beside_the_weights_and_is_the_same_file(tokenizer, tmp_path):
    tokenizer.copy_to(tmp_path)
    (copied,) = tmp_path.iterdir()
    assert load_tokenizer(str(tmp_path)).path == str(copied)
    assert tokenizer.sha256 == hashlib.sha256(copied.read_bytes()).hexdigest()
    load_tokenizer(tmp_path).copy_to(tmp_path)                            # onto itself
    assert load_tokenizer(tmp_path).sha256 == tokenizer.sha256


def test_a_copy_of_another_name_gets_a_name_that_is_found_in_a_folder(made, tmp_path):
    (tmp_path / "game.json").write_bytes(made("words").read_bytes())
    (tmp_path / "out").mkdir()
    load_tokenizer(tmp_path / "game.json").copy_to(tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").path == str(tmp_path / "out" / "words.json")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 493443\n"


@pytest.mark.parametrize("name, content, message", [
    ("tokenizer.model", POINTER, "of a known kind .*download it again .*git-lfs pointer"),
    ("tokenizer.model", b"", "no tokenizer of a known kind"),
    ("tokenizer.model", b"<html>404</html>", "no tokenizer of a known kind"),
    ("tokenizer.model", b"IQ== 0\nIg== 1\n", "or else another .* tokenizer.json"),    # Llama 3's
    ("tekken.json", POINTER, "no tokenizer .*: download it again if .* a git-lfs pointer"),
    ("tokenizer.json", b'{"model": {"type": "BPE"', "known kind .Expecting .*: download it again"),
    ("tokenizer.json", b"\x80", "no tokenizer of a known kind .*utf-8"),
    ("tokenizer.json", b"[]", "no tokenizer of a known kind"),
    ("tokenizer.json", b'{"version": "1.0"}', "no tokenizer of a known kind"),
    ("words.json", b'{"words": ["a", "a"], "bos": null, "eos": null}', "words repeat"),
    ("words.json", b'{"words": ["a b"], "bos": null, "eos": null}', "hold white space"),
    ("words.json", b'{"words": ["a"], "bos": null, "eos": "."}', "eos is not among them"),
    ("words.json", b'{"words": ["a", 3], "bos": null, "eos": null}', "known kind .*expected str")])
def test_a_bad_file_is_refused_in_one_line_that_names_it(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(tmp_path)
    assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)


def test_a_sentencepiece_model_cut_off_anywhere_is_refused(made, tmp_path):
    content = made("v1").read_bytes()
    for n in range(0, len(content), 23):
        (tmp_path / "tokenizer.model").write_bytes(content[:n])
        with pytest.raises(UserError, match="truncated"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize("options", [
    dict(normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True),
    dict(byte_fallback=False, vocab_size=100)])
def test_a_sentencepiece_model_that_loses_text_is_refused(tmp_path, options):
    (tmp_path / "tokenizer.model").write_bytes(trained(**options))
    with pytest.raises(UserError, match="tokenizer.model .*plain text comes back changed"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("damage, message", [
    (lambda spec: spec["vocab"][5].update(rank=7),
     "vocab does not begin with .* ranks.: download it again"),
    (lambda spec: spec.update(vocab=spec["vocab"][:200]), "vocab does not begin with 278 entries"),
    (lambda spec: spec["config"].pop("default_vocab_size"), "default_vocab_size is absent"),
    (lambda spec: spec["vocab"][5].pop("token_bytes"), "'token_bytes'"),
    (lambda spec: spec["config"].update(pattern=r"\p{L}+"), "plain text comes back changed")])
def test_a_damaged_tekken_is_refused(tmp_path, damage, message):
    spec = tekken_file()
    damage(spec)
    (tmp_path / "tekken.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=f"tekken.json.*{message}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("change, message", [
    (dict(default_vocab_size=10**30), "default_vocab_size"),
    (dict(default_num_special_tokens=-10**30), "default_num_special_tokens"),
    (dict(default_vocab_size=10**9), "at most"), (dict(default_vocab_size=5), "at most"),
    (dict(default_num_special_tokens=10**9), "at most"),
    (dict(default_num_special_tokens=-10**9), "at most"),
    (dict(pattern=""), "'' matches empty text"),
    (dict(pattern=r"\p{L}*|\s|."), "matches empty text"),
    (dict(pattern="("), "no tokenizer of a known kind"),
    (None, "some token_bytes repeat")])
def test_settings_of_a_tekken_that_would_end_the_program_are_refused(tmp_path, change, message):
    """Some took all memory; an empty match ended in a panic, which is no Exception."""
    spec = tekken_file()
    spec["config"] |= change or {}
    if change is None:
        spec["vocab"][257]["token_bytes"] = spec["vocab"][256]["token_bytes"]
    (tmp_path / "tekken.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_many_blanks_in_a_long_text_take_no_time(made):
    tokenizer, text = load_tokenizer(made("tekken")), "a" + " " * 100_000 + "b c" * 170_000
    start = time.monotonic()
    assert tokenizer.decode(tokenizer.encode(text)) == text        # 11 s when it was quadratic
    assert time.monotonic() - start < 4
    with pytest.raises(UserError, match="has 400000 blanks in a row"):
        tokenizer.encode("a" + "\n" * 400_000)


@pytest.mark.parametrize("name", ["tokenizer.model", "tekken.json", "words.json", "model.gguf"])
def test_a_pipe_in_place_of_a_tokenizer_does_not_hang(tmp_path, name):
    os.mkfifo(tmp_path / name)
    for path in (tmp_path / name, tmp_path)[:1 if name == "model.gguf" else 2]:
        with pytest.raises(UserError, match=f"{name} is not a file"):
            load_tokenizer(path)


@pytest.mark.parametrize("special", [True, False])
def test_an_added_token_that_takes_a_letter_away_is_refused(made, tmp_path, special):
    spec = json.loads(made("qwen2").read_text())
    letter = "Ã"                                                   # the byte 0xc3, as of "é"
    added = spec["added_tokens"][0] | dict(content=letter, special=special)
    spec["added_tokens"].append(added | {"id": spec["model"]["vocab"][letter]})
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match="the added token 'Ã' is a letter of plain text"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("change, message", [
    (dict(pre_tokenizer={"type": "Metaspace"}), "NFC.*Metaspace.*BPE"),
    (dict(pre_tokenizer=None), "NFC.*None.*BPE"),
    (dict(normalizer={"type": "Lowercase"}), "Lowercase.*Split.*ByteLevel.*BPE"),
    (dict(model={"type": "Unigram", "vocab": [["a", -1.0]]}),
     "ByteLevel.*Unigram.*: .* another of the model's tokenizer.model"),
    ("merges", "merges are not in the order of their ids.*another of the model's tokenizer.model"),
    ("letters", "no tokenizer of a known kind")])
def test_a_tokenizer_json_of_another_shape_is_refused_by_name(made, tmp_path, change, message):
    spec = json.loads(made("qwen2").read_text())
    if change == "merges":
        spec["model"]["merges"].reverse()
    elif change == "letters":
        spec["model"]["vocab"]["▁the"] = 5000
    else:
        spec |= change
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=f"tokenizer.json.*{message}"):
        load_tokenizer(tmp_path)


def test_a_missing_tokenizer_is_one_line_that_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="cannot read .*no.model .No such file.*: name one of toke"):
        load_tokenizer(tmp_path / "no.model")
    with pytest.raises(UserError, match=f"cannot read {tmp_path} .*: name one of .* or a f"):
        load_tokenizer(tmp_path)


def test_training_is_deterministic_lossless_and_keeps_newlines_and_digits_apart():
    content = train_tokenizer(iter(["\n".join(LINES), "77 77 77 " * 1000]), 320)
    assert content == train_tokenizer(iter(["\n".join(LINES), "77 77 77 " * 1000]), 320)
    tokenizer = tokenizers.SentencePieceTokenizer(content)
    assert tokenizer.vocab_size == 320 and (tokenizer.bos, tokenizer.eos) == (1, 2)
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in TEXTS)
    newlines = [piece for piece in tokenizer.pieces if b"\n" in piece]
    assert newlines == [b"\n"] and not any(b"77" in piece for piece in tokenizer.pieces)


def test_a_document_longer_than_sentencepieces_own_limit_is_learnt_from():
    content = train_tokenizer(["umbrella " * 2000 + " ".join(LINES)], 360)
    tokenizer = tokenizers.SentencePieceTokenizer(content)
    assert len(tokenizer.encode("umbrella")) == 1


@pytest.mark.parametrize("texts, vocab_size, message", [
    (LINES, 100_000,
     "cannot make 100000 tokens of this text: give more of it.*Vocabulary size too high.* <= "),
    (LINES, 20, "cannot make 20 tokens of this text: give more of it.*Vocabulary size is smaller"),
    ([], 300, "cannot make 300 tokens of this text: give more of it.*sentences_.empty")])
def test_training_refuses_what_cannot_be_in_one_line(texts, vocab_size, message):
    with pytest.raises(UserError, match=message) as error:
        train_tokenizer(texts, vocab_size)
    assert "\n" not in str(error.value)


def test_the_command_line_trains_on_the_named_fields(tmp_path, monkeypatch, call):
    rows = [dict(question=line, answer="umbrella " * 9, other="zyzzyva " * 9) for line in LINES]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    status, printed, _ = call(data, "--input=a.jsonl", "--field=question,answer",
                              "--vocab_size=360", "--train_tokenizer=new/tokenizer.model")
    assert status == 0 and printed == "new/tokenizer.model: 360 tokens\n"
    tokenizer = load_tokenizer("new")
    assert len(tokenizer.encode("umbrella")) == 1 < len(tokenizer.encode("zyzzyva"))


@pytest.mark.parametrize("options, message", [
    (["--input=none.jsonl"], "none.jsonl"), (["--input=empty.txt"], "sentences_.empty"),
    ([], "needs --input"),
    (["--input=a.jsonl"], "--field=text does not name"),
    (["--vocab=9"], "did you mean --vocab_size?")])
def test_a_mistake_on_the_command_line_is_one_line(tmp_path, monkeypatch, call, options, message):
    (tmp_path / "a.jsonl").write_text('{"question": "why?"}')
    (tmp_path / "empty.txt").touch()
    monkeypatch.chdir(tmp_path)
    status, _, complaint = call(data, "--train_tokenizer=new.model", *options)
    assert status == 2 and complaint.count("\n") == 1
    assert complaint.startswith("error: ") and message in complaint


# The real files, where they are installed, against the libraries they were made for.

def mistral_file(name: str) -> Path:
    return Path(pytest.importorskip("mistral_common").__file__).parent / "data" / name


def gsm8k(n_rows: int | None) -> list[str]:
    path = DATA / "gsm8k_train.jsonl"
    if not path.exists():
        return []
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines()[:n_rows])
    return [f"Q: {row['question']}\nA: {row['answer']}\n" for row in rows]


def own_encoder(path: Path):
    if path.suffix == ".json":
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer
        own = Tekkenizer.from_file(path)
        return lambda text: own.encode(text, bos=False, eos=False)
    return sentencepiece.SentencePieceProcessor(model_file=str(path)).encode


REAL = {"tokenizer.model.v1": (32000, 1040),                # tokens, id of the em dash
        "mistral_instruct_tokenizer_240323.model.v3": (32768, 1808),
        "tekken_240911.json": (131072, 1674)}


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("n_rows", [200, pytest.param(None, marks=pytest.mark.slow)])
def test_mistrals_own_tokenizers_give_mistrals_own_ids(name, n_rows):
    path = mistral_file(name)
    tokenizer, own_encode = load_tokenizer(path), own_encoder(path)
    for text in TEXTS + SPECIALS + LINES + gsm8k(n_rows):
        assert tokenizer.encode(text) == own_encode(text), repr(text)
        assert tokenizer.decode(tokenizer.encode(text, bos=True)) == text
    assert (tokenizer.vocab_size, dash_id(tokenizer)) == REAL[name]
    assert (tokenizer.bos, tokenizer.eos) == (1, 2)
    assert tokenizer.decode([tokenizer.vocab_size]) == f"<|{tokenizer.vocab_size}|>"


def test_ids_that_the_official_evaluation_relies_on():
    tokenizer = load_tokenizer(mistral_file("tokenizer.model.v1"))
    # newline 13; " A" .. " E"; digits
    assert tokenizer.encode("a\n")[-1] == 13
    assert [tokenizer.encode(letter) for letter in "ABCDE"] == [[330], [365], [334], [384], [413]]
    assert [tokenizer.encode(f"x{digit}")[-1] for digit in "0123456789"] == [
        28734, 28740, 28750, 28770, 28781, 28782, 28784, 28787, 28783, 28774]
