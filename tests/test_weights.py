"""Checkpoints in and out: the oracle is the library `transformers`, and files made by hand."""
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from formats import tensors as files
from formats import huggingface as formats
import distributed as parallel
import weights
from model import CausalContext, KVCache, Mistral, ModelConfig, rope, rotate
from thoughts import QuietSTaR, ThoughtConfig
from toys import tiny_mistral, tiny_quiet

ROOT = Path(__file__).parents[1]
GOLDEN = sorted((ROOT / "tests" / "golden").iterdir())
SIZES = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=16)
FAMILIES = {
    "mistral-v0.1 window": ("Mistral", dict(sliding_window=5)),
    "mistral-v0.3": ("Mistral", dict(sliding_window=None, rope_parameters=dict(
        rope_type="default", rope_theta=1e6))),
    "nemo head_dim": ("Mistral", dict(sliding_window=None, head_dim=12)),
    "llama-2": ("Llama", dict(rms_norm_eps=1e-5)),
    "llama-2 long": ("Llama", dict(rope_parameters=dict(
        rope_type="linear", rope_theta=1e4, factor=4.0))),
    "llama-3": ("Llama", dict(rope_parameters=LLAMA3)),
    "smollm2 tied": ("Llama", dict(tie_word_embeddings=True)),
    "qwen2 biased tied": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2 window": ("Qwen2", dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)),
    "ministral ragged": ("Ministral", dict(sliding_window=4, head_dim=8, layer_types=[
        "full_attention", "sliding_attention", "sliding_attention"])),
}


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda name: name.replace(" ", "-"))
def oracle(request, tmp_path_factory):
    """A tiny random model of transformers, and the folder it was saved to."""
    transformers = pytest.importorskip("transformers")
    family, changes = FAMILIES[request.param]
    theirs = their_model(transformers, family, **changes)
    folder = tmp_path_factory.mktemp("oracle")
    theirs.save_pretrained(folder)
    return theirs, folder


def their_model(transformers, family: str, **changes):
    torch.manual_seed(0)
    shape = getattr(transformers, family + "Config")(**{**SIZES, **changes})
    theirs = getattr(transformers, family + "ForCausalLM")(shape).eval()
    with torch.no_grad():              # their own initialisation is too small for a mistake to show
        for p in theirs.parameters():
            p.copy_(torch.randn(p.shape) * 0.2 + (p.dim() == 1))
    return theirs


IDS_BL = torch.randint(61, (3, 21), generator=torch.Generator().manual_seed(1))
LENGTH_B = torch.tensor([21, 9, 14])
VALID_BL = torch.arange(21) < LENGTH_B[:, None]


@torch.no_grad()
def their_logits(theirs, ids_BL=IDS_BL, valid_BL=VALID_BL):
    return theirs(ids_BL, attention_mask=valid_BL.long()).logits


@torch.no_grad()
def logits(model, ids_BL=IDS_BL):
    base = model.model if isinstance(model, QuietSTaR) else model
    return base.head(base(ids_BL, CausalContext(torch.arange(ids_BL.shape[1]).expand_as(ids_BL))))


@torch.no_grad()
def decoded_logits(model: Mistral, prompt_len: int):
    """Right-padded prompts at once, then one token at a time, each row at its own position."""
    B, L = IDS_BL.shape
    cache, out = KVCache(model.config, B, L), torch.zeros(B, L, model.config.vocab_size)
    start_B = LENGTH_B.clamp(max=prompt_len) - torch.arange(B)
    position_BL = torch.arange(prompt_len).expand(B, prompt_len)
    prompt_BL = IDS_BL[:, :prompt_len].masked_fill(position_BL >= start_B[:, None], 0)
    prompt = CausalContext(position_BL, cache, prompt_len)
    out[:, :prompt_len] = model.head(model(prompt_BL, prompt))
    for step in range(L):
        position_B1 = (start_B + step).clamp(max=L - 1)[:, None]
        hidden_B1D = model(IDS_BL.gather(1, position_B1), CausalContext(position_B1, cache, L))
        out[torch.arange(B), position_B1[:, 0]] = model.head(hidden_B1D)[:, 0]
    return out


def assert_close(a_BLV, b_BLV, valid_BL=VALID_BL):
    assert b_BLV[valid_BL].std() > 0.3                     # or the comparison would prove nothing
    assert (a_BLV - b_BLV)[valid_BL].abs().max() < 1e-5


def assert_same_parameters(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


# ------------------------------------------------------------------------------------ the oracle


def test_a_model_saved_by_transformers_has_the_same_logits_here(oracle):
    theirs, folder = oracle
    assert_close(logits(weights.load(folder)), their_logits(theirs))


def test_decoding_with_the_cache_has_the_logits_of_transformers(oracle):
    theirs, folder = oracle
    assert_close(decoded_logits(weights.load(folder), prompt_len=8), their_logits(theirs))


def test_a_model_saved_here_is_whole_for_transformers(oracle, tmp_path):
    from transformers import AutoModelForCausalLM
    model = weights.load(oracle[1])
    weights.save(model, tmp_path)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert_close(logits(model), their_logits(theirs))
    assert_same_parameters(model, weights.load(tmp_path))


def test_the_mistral_layout_of_the_same_weights_has_the_same_logits(oracle, tmp_path):
    theirs, folder = oracle
    model = weights.load(folder)
    if model.config.rope_type != "default":
        with pytest.raises(ValueError, match=f"params.json has no rope '{model.config.rope_type}'"):
            weights.save(model, tmp_path, layout="mistral")
        return
    weights.save(model, tmp_path, layout="mistral")
    assert sorted(os.listdir(tmp_path)) == ["consolidated.safetensors", "params.json"]
    stored = load_file(tmp_path / "consolidated.safetensors")["layers.0.attention.wq.weight"]
    assert not torch.equal(stored, model.layers[0].attention.q.weight)
    again = weights.load(tmp_path)
    assert_close(logits(again), their_logits(theirs))
    assert torch.equal(again.layers[0].attention.q.weight, model.layers[0].attention.q.weight)


def test_a_thinking_checkpoint_is_an_ordinary_model_to_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    quiet, auto = tiny_quiet(), transformers.AutoModelForCausalLM
    weights.save(quiet, tmp_path)
    theirs, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(theirs, transformers.MistralForCausalLM)
    assert not info["missing_keys"]
    assert set(info["unexpected_keys"]) == {"start_thought", "end_thought", *(
        f"mixing_head.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias", "4.weight"))}
    ids_BL = torch.arange(20).view(2, 10)
    assert_close(logits(quiet, ids_BL), their_logits(theirs, ids_BL, ids_BL > -1), ids_BL > -1)


def test_mistrals_own_files_turn_neighbouring_rows(tmp_path):
    """Mistral's program sees a head as complex numbers x[2e] + i x[2e + 1], turned by position."""
    model = tiny_mistral(qkv_bias=True, head_dim=8)
    weights.save(model, tmp_path, "mistral")
    stored, shape = load_file(tmp_path / "consolidated.safetensors"), model.config
    x_BSD = torch.randn(1, 7, shape.dim, generator=torch.Generator().manual_seed(0))
    position_BS, attention = torch.arange(7)[None], model.layers[1].attention
    angle = position_BS[..., None, None] * shape.rope_theta ** -(
        torch.arange(0, shape.head_dim, 2) / shape.head_dim)
    scores = {"ours": [], "theirs": []}
    for ours, theirs in ((attention.q, "wq"), (attention.k, "wk")):
        weight, bias = (stored[f"layers.1.attention.{theirs}.{x}"] for x in ("weight", "bias"))
        pairs = (x_BSD @ weight.T + bias).unflatten(-1, (-1, shape.head_dim // 2, 2)).contiguous()
        turned = torch.view_as_complex(pairs) * torch.polar(torch.ones(angle.shape), angle)
        scores["theirs"].append(torch.view_as_real(turned).flatten(-2))
        scores["ours"].append(rotate(ours(x_BSD).unflatten(-1, (-1, shape.head_dim)),
                                     *rope(position_BS, shape)))
    group = shape.n_heads // shape.n_kv_heads
    ours, theirs = (torch.einsum("bqhe,bkhe->bhqk", q, k.repeat_interleave(group, dim=2))
                    for q, k in scores.values())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert ours.std() > 1


V4 = {
    "mistral": dict(sliding_window=5, rope_theta=1e6, torch_dtype="bfloat16"),
    "llama": dict(rope_theta=5e5, hidden_act="silu", rope_scaling=dict(
        type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=16)),
    "qwen2": dict(rope_theta=1e6, use_sliding_window=False, sliding_window=4, max_window_layers=3,
                  tie_word_embeddings=True)}
V5 = {
    "mistral": dict(sliding_window=5, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    "llama": dict(rope_parameters=LLAMA3),
    "qwen2": dict(rope_parameters=dict(rope_type="default", rope_theta=1e6),
                  tie_word_embeddings=True)}


def test_mistrals_own_files_have_mistrals_own_names(tmp_path):
    model = tiny_mistral(n_layers=1)
    weights.save(model, tmp_path, "mistral")
    stored, block = load_file(tmp_path / "consolidated.safetensors"), model.layers[0]
    attention, ffn = block.attention, block.ffn
    expected = {"tok_embeddings": model.embed, "norm": model.norm, "output": model.head,
                "layers.0.attention_norm": block.attention_norm,
                "layers.0.attention.wv": attention.v, "layers.0.attention.wo": attention.o,
                "layers.0.ffn_norm": block.ffn_norm, "layers.0.feed_forward.w1": ffn.gate,
                "layers.0.feed_forward.w2": ffn.down, "layers.0.feed_forward.w3": ffn.up}
    for name, module in expected.items():
        assert torch.equal(stored.pop(name + ".weight"), module.weight), name
    assert set(stored) == {"layers.0.attention.wq.weight", "layers.0.attention.wk.weight"}


@pytest.mark.parametrize("family", ["mistral", "llama", "qwen2"])
def test_what_a_config_leaves_out_is_what_transformers_supposes(family):
    transformers = pytest.importorskip("transformers")
    given = dict(SIZES)
    if family == "llama":              # the others suppose a number that fits their largest model
        del given["num_key_value_heads"]
    theirs = getattr(transformers, family.capitalize() + "Config")(**given)
    found, _ = formats.from_config(given | {"model_type": family}, Path("config.json"))
    assert (found.norm_eps, found.head_dim) == (theirs.rms_norm_eps, 8)
    assert found.n_kv_heads == theirs.num_key_value_heads
    assert found.rope_theta == theirs.rope_parameters["rope_theta"]
    assert found.window(0) == getattr(theirs, "sliding_window", None)
    assert found.tied == theirs.tie_word_embeddings


@pytest.mark.parametrize("family", V4)
def test_both_spellings_of_config_json_mean_the_same_model(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = their_model(transformers, family.capitalize(), **V5[family])
    theirs.save_pretrained(tmp_path)
    spelled_5 = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in spelled_5 and "rope_theta" not in spelled_5
    new, _ = weights.read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(
        {**SIZES, "model_type": family, "rms_norm_eps": theirs.config.rms_norm_eps, **V4[family]}))
    old, _ = weights.read_config(tmp_path)
    assert old == new
    assert_close(logits(weights.load(tmp_path)), their_logits(theirs))


# ------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("case", GOLDEN, ids=lambda path: path.name)
def test_released_checkpoints_survive_ours_and_released_bit_for_bit(case, tmp_path):
    told = json.loads((case / "case.json").read_text())
    settings = ThoughtConfig(thought_len=told["thought_len"], n_true=told["n_true"])
    model = weights.load(case, thought_config=settings)
    stored = load_file(case / "model.safetensors")
    assert isinstance(model, QuietSTaR) and model.config.marker_ids == (78, 79)
    assert torch.equal(model.start_thought, stored["start_embedding"][0] * 100)
    for layout in ("ours", "official"):
        weights.save(model, tmp_path / layout, layout)
        again = weights.load(tmp_path / layout)
        assert_same_parameters(model, again)
        assert (again.config, again.model.config) == (model.config, model.model.config)
    again = load_file(tmp_path / "official" / "model.safetensors")
    assert again.keys() == stored.keys()
    assert all(again[name].shape == stored[name].shape for name in stored)
    before = json.loads((case / "config.json").read_text())
    after = json.loads((tmp_path / "official" / "config.json").read_text())
    for key in before.keys() - {"bos_token_id", "eos_token_id"}:           # the tokenizer's to say
        assert after[key] == before[key], key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_markers_of_a_released_checkpoint_do_not_drift(dtype, tmp_path):
    quiet = tiny_quiet(model=dict(dim=512, n_heads=4)).to(dtype)
    weights.save(quiet, tmp_path / "0", "official")
    first = weights.load(tmp_path / "0", dtype=None)
    weights.save(first, tmp_path / "1", "official")
    assert_same_parameters(first, weights.load(tmp_path / "1", dtype=None))
    assert torch.allclose(first.start_thought, quiet.start_thought.float(), rtol=1e-2, atol=0)


def test_our_own_checkpoints_survive_bit_for_bit_with_their_settings(tmp_path):
    for i, quiet in enumerate((tiny_quiet(thought_len=5), tiny_quiet(model=dict(tied=True)),
                               tiny_quiet(marker_ids=(21, 22), model=dict(windows=(4, 0))))):
        weights.save(quiet, tmp_path / str(i), shard_bytes=3000)
        again = weights.load(tmp_path / str(i))
        assert_same_parameters(quiet, again)
        assert (again.config, again.model.config) == (quiet.config, quiet.model.config)
        assert (again.model.head.weight is again.model.embed.weight) == quiet.model.config.tied


def test_settings_can_be_replaced_but_the_markers_keep_their_rows(tmp_path):
    weights.save(tiny_quiet(marker_ids=(21, 22)), tmp_path)
    quiet = weights.load(tmp_path, thought_config=ThoughtConfig(thought_len=7))
    assert quiet.config == ThoughtConfig(thought_len=7, marker_ids=(21, 22))


def test_a_checkpoint_thinks_if_its_tensors_do_whatever_its_config_says(tmp_path):
    quiet = tiny_quiet(thought_len=5)
    weights.save(quiet, tmp_path)
    path = tmp_path / "config.json"
    given = json.loads(path.read_text())
    assert given.pop("quiet_star")["thought_len"] == 5
    path.write_text(json.dumps(given))
    again = weights.load(tmp_path)
    assert again.config == ThoughtConfig()
    assert_same_parameters(quiet, again)


def test_exporting_as_released_adds_two_rows_that_are_the_markers(tmp_path):
    quiet = tiny_quiet()
    weights.save(quiet, tmp_path, "official")
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["model.embed_tokens.weight"].shape == (25, 16)
    assert torch.equal(stored["model.embed_tokens.weight"][23], quiet.start_thought)
    assert torch.equal(stored["model.embed_tokens.weight"][24], quiet.end_thought)
    assert torch.equal(stored["model.embed_tokens.weight"][:23], quiet.model.embed.weight)
    assert not stored["lm_head.weight"][23:].any()
    assert torch.equal(stored["start_embedding"][0], quiet.start_thought / 100)
    spread_D = quiet.model.embed.weight.std(dim=0)
    assert torch.allclose(stored["end_embedding"][1], (spread_D * 1e-4).log())
    again = weights.load(tmp_path)
    assert again.config == replace(quiet.config, marker_ids=(23, 24))
    ids_BL = torch.arange(9)[None]
    assert torch.equal(logits(again, ids_BL)[..., :23], logits(quiet, ids_BL))


def test_base_and_mistral_layouts_leave_the_thoughts_out(tmp_path):
    quiet = tiny_quiet()
    for layout in ("base", "mistral"):
        weights.save(quiet, tmp_path / layout, layout)
        again = weights.load(tmp_path / layout)
        assert isinstance(again, Mistral)
        assert_same_parameters(quiet.model, again)


def test_reset_markers_forgets_training_as_the_released_evaluation_does():
    model = weights.load(GOLDEN[0], reset_markers=True, dash_id=7)
    dash_D = model.model.embed.weight[7]
    assert torch.allclose(model.start_thought, dash_D, rtol=1e-6)
    assert torch.equal(model.start_thought, model.end_thought)
    assert not torch.equal(weights.load(GOLDEN[0]).start_thought, model.start_thought)
    with pytest.raises(ValueError, match="dash_id=None"):
        weights.load(GOLDEN[0], reset_markers=True)


def test_a_model_that_starts_to_think_predicts_as_before():
    base = tiny_mistral().to(torch.bfloat16)
    quiet = weights.add_thoughts(base, ThoughtConfig(), 5, torch.Generator().manual_seed(0))
    assert quiet.model is base and not quiet.mixing_head[4].weight.any()
    assert torch.equal(quiet.start_thought, base.embed.weight[5])
    assert torch.equal(quiet.end_thought, base.embed.weight[5])
    assert {p.dtype for p in base.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in quiet.mixing_head.parameters()} == {torch.float32}
    assert quiet.mixing_head[0].weight.std() > 0
    with pytest.raises(ValueError, match="dash_id=23"):
        weights.add_thoughts(base, ThoughtConfig(), 23, torch.Generator())


def test_what_is_trained_from_bfloat16_files_is_exact_in_float32(tmp_path):
    """The markers of the official layout are multiplied, after they are cast."""
    for layout, tied in (("official", False), ("ours", True)):
        weights.save(tiny_quiet(model=dict(tied=tied)), tmp_path / layout, layout, torch.bfloat16)
        stored = weights.load(tmp_path / layout, dtype=None)
        trained = parallel.spread(stored, parallel.Place(0, 1, torch.device("cpu")))
        assert (trained.model.head.weight is trained.model.embed.weight) == tied
        exact = dict(weights.load(tmp_path / layout).named_parameters())
        for name, p in trained.named_parameters():
            assert p.dtype == torch.float32 and torch.equal(p, exact[name]), name


def test_loading_casts_to_the_asked_dtype_or_keeps_each_tensors_own(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIECE", 100)             # several pieces, the last one shorter
    model = tiny_mistral()
    weights.save(model, tmp_path, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for dtype in (None, torch.float32, torch.float16):
        again, kept = weights.load(tmp_path, dtype=dtype), dtype or torch.bfloat16
        for p, q in zip(model.parameters(), again.parameters(), strict=True):
            assert q.dtype == kept and q.requires_grad and torch.equal(p.bfloat16().to(kept), q)


def test_a_loaded_model_can_be_trained_in_place_without_touching_its_file(tmp_path):
    weights.save(tiny_mistral(), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = weights.load(tmp_path)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    weights.save(model, tmp_path)                          # over the file that it is mapped from
    assert_same_parameters(model, weights.load(tmp_path))


# ------------------------------------------------------------------------------------ other files


def hf_state(model: Mistral) -> dict:
    return {formats.file_name(name, "base"): p.detach() for name, p in model.named_parameters()}


def write_config(folder: Path, model: Mistral, **changes):
    config = formats.to_config(model.config, "base", None, torch.float32)
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_shards_are_read_with_and_without_mapping(legacy, tmp_path):
    model = tiny_mistral()
    write_config(tmp_path, model)
    state, shards = hf_state(model), [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    index = {name: shards[i % 2] for i, name in enumerate(state)}
    for file in shards:
        part = {name: state[name] for name in state if index[name] == file}
        torch.save(part, tmp_path / file, _use_new_zipfile_serialization=not legacy)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "training_args.bin").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    assert_same_parameters(model, weights.load(tmp_path))


def test_a_single_pickle_and_the_old_pth_of_mistral_are_read(tmp_path):
    model = tiny_mistral()
    for name in ("hf", "mistral"):
        (tmp_path / name).mkdir()
    write_config(tmp_path / "hf", model)
    torch.save(hf_state(model), tmp_path / "hf" / "pytorch_model.bin")
    assert_same_parameters(model, weights.load(tmp_path / "hf"))
    weights.save(model, tmp_path / "mistral", "mistral")
    source = tmp_path / "mistral" / "consolidated.safetensors"
    torch.save(load_file(source), tmp_path / "mistral" / "consolidated.00.pth")
    source.unlink()
    assert_same_parameters(model, weights.load(tmp_path / "mistral"))


@pytest.mark.parametrize("given, windows, theta", [
    ({"sliding_window": 4096}, (4096,), 1e4), ({"sliding_window": "4096"}, (4096,), 1e4),
    ({"_sliding_window": [131072, 32768, 32768, 32768]}, (131072, 32768, 32768, 32768), 1e4),
    ({"_sliding_window": "131072,32768", "rope_theta": 1e8}, (131072, 32768), 1e8),
    ({"sliding_window": None}, (0,), 1e6), ({}, (0,), 1e6)])
def test_params_json_spells_windows_in_many_ways_and_leaves_theta_to_a_rule(given, windows, theta):
    params = dict(dim=16, n_layers=4, head_dim=8, hidden_dim=24, n_heads=2, n_kv_heads=1,
                  norm_eps=1e-5, vocab_size=23, **given)
    found, _ = formats.from_config(params, Path("params.json"))
    assert [found.window(i) or 0 for i in range(4)] == [windows[i % len(windows)] for i in range(4)]
    assert found.rope_theta == theta and found.max_seq_len == 32768


def test_windows_that_one_number_cannot_say_are_refused_unless_they_span_the_context(tmp_path):
    ragged = dict(n_layers=4, windows=(64, 4, 4, 4))
    weights.save(tiny_mistral(**ragged, max_seq_len=64), tmp_path)
    found, _ = weights.read_config(tmp_path)
    assert found.windows == (0, 4, 4, 4)
    with pytest.raises(ValueError, match=r"one sliding_window, not \[4, 64\]: use --layout=mist"):
        weights.save(tiny_mistral(**ragged), tmp_path / "b")
    weights.save(tiny_mistral(**ragged), tmp_path / "b", "mistral")
    assert weights.load(tmp_path / "b").config.windows == (64, 4, 4, 4)


def test_hugging_face_files_win_over_mistrals_own(tmp_path, capsys):
    model, other = tiny_mistral(), tiny_mistral(seed=1)
    weights.save(other, tmp_path, "mistral")
    shutil.copytree(tmp_path, tmp_path / "both")
    weights.save(model, tmp_path / "hf")
    shutil.copytree(tmp_path / "hf", tmp_path / "both", dirs_exist_ok=True)
    assert_same_parameters(model, weights.load(tmp_path / "both"))
    assert capsys.readouterr().out == "ignoring consolidated.safetensors\n"
    (tmp_path / "both" / "model.safetensors").unlink()      # half a download does not count
    assert_same_parameters(other, weights.load(tmp_path / "both"))


def test_shards_are_bounded_and_every_tensor_is_in_the_index(tmp_path):
    model = tiny_mistral()
    weights.save(model, tmp_path, shard_bytes=4000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    sizes = [sum(t.nbytes for t in load_file(tmp_path / shard).values()) for shard in shards]
    assert max(sizes) <= 4000 and sum(sizes) == index["metadata"]["total_size"]
    assert_same_parameters(model, weights.load(tmp_path))


def test_rotary_frequencies_and_a_spare_tied_head_on_disk_are_ignored(tmp_path):
    model = tiny_mistral(tied=True)
    write_config(tmp_path, model)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
             "lm_head.weight": model.embed.weight.detach().clone()}
    save_file(hf_state(model) | extra, tmp_path / "model.safetensors")
    assert_same_parameters(model, weights.load(tmp_path))


def test_a_runs_folder_stands_for_its_newest_checkpoint(tmp_path):
    for step in (1, 2):
        weights.save(tiny_quiet(seed=step), tmp_path / f"step-{step}")
    assert weights.find_checkpoint(tmp_path / "step-1") == tmp_path / "step-1"
    (tmp_path / "latest").write_text("step-1\n")
    assert weights.find_checkpoint(tmp_path) == tmp_path / "step-1"
    assert_same_parameters(weights.load(weights.find_checkpoint(tmp_path)), tiny_quiet(seed=1))
    (tmp_path / "latest").write_text("step-3")
    assert weights.find_checkpoint(tmp_path) == tmp_path / "step-2"
    for step in (1, 2):
        shutil.rmtree(tmp_path / f"step-{step}")
    with pytest.raises(FileNotFoundError, match="names step-3, which is gone"):
        weights.find_checkpoint(tmp_path)


# ------------------------------------------------------------------------------------ atomic saves


@pytest.mark.parametrize("layout", ["ours", "mistral"])
def test_a_killed_save_never_looks_whole(layout, tmp_path, monkeypatch):
    old, new, replaced = tiny_quiet(), tiny_quiet(seed=5), []
    real_replace = os.replace

    def killed(source, target):
        if len(replaced) == survive:
            raise KeyboardInterrupt
        replaced.append(Path(target).name)
        real_replace(source, target)
    monkeypatch.setattr(os, "replace", killed)
    survive = None
    weights.save(old, tmp_path, layout, shard_bytes=3000)
    n_files = len(replaced)
    assert replaced[-1] in ("config.json", "params.json") and n_files >= 2
    for survive in range(n_files):
        replaced.clear()
        with pytest.raises(KeyboardInterrupt):
            weights.save(new, tmp_path, layout, shard_bytes=3000)
        with pytest.raises(FileNotFoundError, match="holds no whole checkpoint"):
            weights.load(tmp_path)
        assert not list(tmp_path.glob("*.tmp"))
    survive = None
    weights.save(new, tmp_path, layout, shard_bytes=3000)
    assert torch.equal(weights.load(tmp_path).state_dict().popitem()[1], torch.as_tensor(
        (new if layout == "ours" else new.model).state_dict().popitem()[1]))


def test_write_atomically_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "a.txt"
    weights.atomic_write(path, lambda temporary: temporary.write_text("whole"))

    def half(temporary):
        temporary.write_text("ha")
        raise OSError("disk full")
    with pytest.raises(OSError, match="disk full"):
        weights.atomic_write(path, half)
    assert path.read_text() == "whole" and os.listdir(tmp_path) == ["a.txt"]


def test_a_save_never_mixes_with_another_checkpoint(tmp_path):
    model = tiny_mistral()
    weights.save(model, tmp_path, shard_bytes=4000)
    for arguments in (dict(), dict(layout="mistral")):
        with pytest.raises(ValueError, match="holds another checkpoint .*choose an empty folder"):
            weights.save(tiny_mistral(seed=1), tmp_path, **arguments)
    assert_same_parameters(model, weights.load(tmp_path))


def test_saved_files_are_as_readable_as_their_folder(tmp_path):
    tmp_path.chmod(0o755)
    weights.save(tiny_mistral(), tmp_path)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}


# ------------------------------------------------------------------------------------ bad files


class Evil:
    """A pickle that would make a file."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def whole(tmp_path):
    weights.save(tiny_mistral(), tmp_path, shard_bytes=4000)
    return tmp_path


@pytest.fixture
def single(tmp_path):
    weights.save(tiny_mistral(), tmp_path)
    return tmp_path


def error_of(folder, kind=ValueError, **arguments) -> str:
    with pytest.raises(kind) as caught:
        weights.load(folder, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kept", [3, 100, 0.5, -5])
def test_a_truncated_file_says_how_long_it_should_be(kept, single):
    file = single / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:int(len(content) * kept) if isinstance(kept, float) else kept])
    message = error_of(single)
    assert message.startswith(f"{file} is incomplete ({file.stat().st_size} bytes; header expects ")
    assert message.endswith("download it again")
    if kept in (0.5, -5):
        assert f"header expects {len(content)})" in message


def test_a_git_lfs_pointer_and_an_html_page_are_named(single):
    file = single / "model.safetensors"
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert error_of(single) == (f"{file} is a git-lfs pointer (63 bytes), not weights: "
                                "run 'git lfs pull'")
    file.write_bytes(b"\n<!DOCTYPE html><html>404</html>")
    assert error_of(single) == f"{file} is an HTML page (32 bytes), not weights: download it again"


def test_missing_shards_are_counted_and_the_first_is_named(whole):
    n = len(list(whole.glob("model-*")))
    (whole / f"model-00002-of-{n:05d}.safetensors").unlink()
    assert error_of(whole, FileNotFoundError).endswith(
        f"model.safetensors.index.json names 1 of {n} files that are missing: "
        f"model-00002-of-{n:05d}.safetensors")


def test_an_index_that_its_files_contradict_is_refused(whole):
    path = whole / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shards = sorted(set(index["weight_map"].values()))
    index["weight_map"]["lm_head.weight"] = shards[0]
    path.write_text(json.dumps(index))
    assert error_of(whole) == f"lm_head.weight is in the index but not in {whole / shards[0]}"


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(zipped, tmp_path):
    write_config(tmp_path, tiny_mistral())
    torch.save({"a": Evil(tmp_path / "ran")}, tmp_path / "pytorch_model.bin",
               _use_new_zipfile_serialization=zipped)
    assert error_of(tmp_path) == (
        f"{tmp_path / 'pytorch_model.bin'} holds objects other than tensors (posix.system); "
        "refusing to run code from a checkpoint")
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "ran"), protocol=2))
    assert "refusing to run code" in error_of(tmp_path)
    assert not (tmp_path / "ran").exists()
    os.system(f"touch {tmp_path / 'ran'}")                 # it would have worked
    assert (tmp_path / "ran").exists()


def test_a_pickle_of_other_things_or_cut_short_is_refused(tmp_path):
    write_config(tmp_path, tiny_mistral())
    file = tmp_path / "pytorch_model.bin"
    torch.save({"model": {"a": torch.ones(2)}}, file)
    assert error_of(tmp_path).endswith("holds objects other than tensors: it is not a state_dict")
    for zipped in (True, False):
        torch.save({"a": torch.ones(5000)}, file, _use_new_zipfile_serialization=zipped)
        for n_bytes in (15000, 60, 0):
            file.write_bytes(file.read_bytes()[:n_bytes])
            assert "pytorch_model.bin is not a readable checkpoint" in error_of(tmp_path)


def changed(folder: Path, change) -> str:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return error_of(folder)


def test_missing_unknown_and_misshapen_tensors_are_named(single):
    backup = (single / "model.safetensors").read_bytes()
    for change, message in (
            (lambda t: [t.pop(name) for name in ("model.norm.weight", "lm_head.weight")],
             f"{single}: checkpoint lacks 2 tensors, first lm_head.weight"),
            (lambda t: t.update({"model.layers.1.self_attn.q_norm.weight": torch.ones(4)}),
             f"{single}: checkpoint has 1 unknown tensors, "
             "first model.layers.1.self_attn.q_norm.weight"),
            (lambda t: [t.update({"language_model." + n: t.pop(n)}) for n in list(t)],
             "first language_model.lm_head.weight"),
            (lambda t: t.update({"lm_head.weight": torch.ones(25, 16)}),
             "lm_head.weight: checkpoint (25, 16), config implies (23, 16)"),
            (lambda t: t.update({"model.layers.0.self_attn.q_proj.weight": torch.ones(24, 16)}),
             "model.layers.0.self_attn.q_proj.weight has 24 rows, n_heads * head_dim = 16: "
             f"wrong head_dim in {single / 'config.json'}"),
            (lambda t: t.update({"model.norm.weight": torch.ones(16, dtype=torch.int8)}),
             "model.safetensors: checkpoint dtype torch.int8 is quantised, not supported"),
            (lambda t: t.update({"model.norm.weight": torch.ones(16).to(torch.float8_e4m3fn)}),
             "checkpoint dtype torch.float8_e4m3fn is quantised, not supported")):
        (single / "model.safetensors").write_bytes(backup)
        assert changed(single, change).endswith(message)


def test_half_a_thinking_checkpoint_is_not_taken_for_a_base(tmp_path):
    weights.save(tiny_quiet(), tmp_path)
    assert "lacks 2 tensors, first end_thought" in changed(
        tmp_path, lambda t: [t.pop(name) for name in ("start_thought", "end_thought")])
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN[0] / name, tmp_path)
    assert "lacks 1 tensors, first talk_head.0.2.bias" in changed(
        tmp_path, lambda t: t.pop("talk_head.0.2.bias"))


@pytest.mark.parametrize("changes, message", [
    (dict(model_type="qwen3"),
     "model_type 'qwen3' is not supported (mistral, llama, qwen2, ministral)"),
    (dict(model_type=None), "model_type 'None' is not supported"),
    (dict(architectures=["MixtralForCausalLM"]), "'mixtral' is not supported"),
    (dict(architectures=["LlamaForSequenceClassification"]), "is not supported"),
    (dict(hidden_act="gelu"), "hidden_act = gelu is not supported"),
    (dict(quantization_config={"bits": 4}), "quantization_config = {'bits': 4} is not supported"),
    (dict(num_local_experts=8), "num_local_experts = 8 is not supported"),
    (dict(moe={"num_experts": 8}), "moe = {'num_experts': 8} is not supported"),
    (dict(mlp_bias=True), "mlp_bias = True is not supported"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor = 0.5 is not supported"),
    (dict(rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor = 0.5"),
    (dict(vision_encoder={"width": 4}), "vision_encoder = {'width': 4} is not supported"),
    (dict(rope_scaling={"type": "yarn", "factor": 4.0}),
     "rope_scaling type 'yarn' is not supported (default, linear, llama3)"),
    (dict(rope_parameters={"rope_type": "dynamic", "factor": 4.0}), "rope_scaling type 'dynamic'"),
    (dict(rope_parameters={"full_attention": {"rope_theta": 1e6}}), "for each layer type are not"),
    (dict(rope_scaling={"type": "linear"}), "rope_scaling of type 'linear' lacks factor"),
    (dict(model_type="ministral", sliding_window=4, layer_types=["chunked_attention"] * 2),
     "layer_types"),
    (dict(model_type="qwen2", use_sliding_window=True, sliding_window=4), "layer_types"),
    (dict(hidden_size=None), "config.json lacks hidden_size"),
    (dict(vocab_size=None), "config.json lacks vocab_size"),
    (dict(num_key_value_heads=3), "n_kv_heads=3"),
    (dict(head_dim=8), "q_proj.weight has 16 rows, n_heads * head_dim = 32: wrong head_dim in"),
    (dict(quiet_star={"thought_length": 3}), "quiet_star has the unknown setting 'thought_length'"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_what_is_not_supported_is_refused_by_name(changes, message, single):
    given = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps(given | changes))
    assert message in error_of(single)


@pytest.mark.parametrize("changes, message", [
    (dict(moe={"num_experts": 8}), "moe = "), (dict(vision_encoder={"a": 1}), "vision_encoder = "),
    (dict(lora={"rank": 8}), "lora = "), (dict(model_type="mamba"), "'mamba' is not supported"),
    (dict(yarn={"factor": 16}), "yarn = "),
    (dict(hidden_dim=None), "params.json lacks hidden_dim")])
def test_what_is_not_supported_in_params_json_is_refused_by_name(changes, message, tmp_path):
    weights.save(tiny_mistral(), tmp_path, "mistral")
    given = json.loads((tmp_path / "params.json").read_text())
    (tmp_path / "params.json").write_text(json.dumps(given | changes))
    assert message in error_of(tmp_path)


def test_a_checkpoint_split_for_tensor_parallelism_is_refused(tmp_path):
    weights.save(tiny_mistral(), tmp_path, "mistral")
    (tmp_path / "consolidated.safetensors").unlink()
    for i in range(2):
        torch.save({}, tmp_path / f"consolidated.0{i}.pth")
    assert error_of(tmp_path) == f"{tmp_path} is split for tensor parallelism: not supported"


def test_a_folder_without_a_checkpoint_or_with_a_broken_config_is_one_line(single):
    assert "holds no whole checkpoint" in error_of(single / "nowhere", FileNotFoundError)
    (single / "config.json").write_text("{")
    assert error_of(single).startswith(f"{single / 'config.json'} is not JSON (")
    (single / "config.json").unlink()
    assert "holds no whole checkpoint" in error_of(single, FileNotFoundError)


def test_save_refuses_what_a_layout_cannot_hold(tmp_path):
    for layout in ("official", "onnx"):
        with pytest.raises(ValueError, match=f"layout '{layout}' is not one of"):
            weights.save(tiny_mistral(), tmp_path, layout)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------ command, size


def test_the_command_converts_and_brings_the_tokenizer(tmp_path):
    quiet = tiny_quiet()
    weights.save(quiet, tmp_path / "ours")
    words = json.dumps(dict(words=[f"w{i}" for i in range(22)], bos=None, eos="w3"))
    (tmp_path / "ours" / "words.json").write_text(words)
    options = [f"--checkpoint={tmp_path / 'ours'}", f"--out={tmp_path / 'out'}",
               "--layout=official", "--dtype=bfloat16"]
    subprocess.run([sys.executable, ROOT / "weights.py", *options], check=True)
    assert (tmp_path / "out" / "words.json").read_text() == words
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 3
    again = weights.load(tmp_path / "out", dtype=None)
    assert again.config.marker_ids == (23, 24)
    assert torch.equal(again.mixing_head[0].weight, quiet.mixing_head[0].weight.bfloat16())


def test_the_command_keeps_the_stored_dtype_and_needs_no_tokenizer(tmp_path, monkeypatch, capsys):
    quiet = tiny_quiet().to(torch.bfloat16)
    weights.save(quiet, tmp_path / "ours")
    monkeypatch.setattr(sys, "argv", ["weights.py", "--layout=base", "--checkpoint",
                                      str(tmp_path / "ours"), f"--out={tmp_path / 'out'}"])
    weights.main()
    assert capsys.readouterr().out.startswith("no tokenizer is copied: ")
    assert_same_parameters(weights.load(tmp_path / "out", dtype=None), quiet.model)


@pytest.mark.parametrize("options, message", [
    ([], "--checkpoint=FOLDER and --out=FOLDER are needed"),
    (["--checkpoint=a", "--out=b", "--dtype=int8"], "--dtype=int8 is not one of float32, bfloat16"),
    (["--checkpoint=nowhere", "--out=b"], "nowhere is missing")])
def test_the_command_ends_mistakes_in_one_line(options, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["weights.py", *options])
    with pytest.raises(SystemExit) as end:
        weights.config.run(weights.main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and error.startswith("error: ")
    assert message in error


MEASURE = """
import resource, sys, time
import torch, weights
from safetensors import safe_open
from pathlib import Path

def ours():
    return list(weights.load(folder, dtype=dtype).parameters())

def theirs():
    tensors = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors += [opened.get_tensor(name).to(dtype) for name in opened.keys()]
    return tensors

def measured(read):                # in seconds of this process: others may keep the machine busy
    start = time.process_time()
    tensors = read()
    total = sum(float(t.detach().sum()) for t in tensors)              # or nothing would be read
    return time.process_time() - start, total, sum(t.nbytes for t in tensors)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

folder, dtype, before = Path(sys.argv[1]), getattr(torch, sys.argv[2]), peak()
runs = [measured(ours)]
used = peak() - before
runs += [measured(read) for read in [ours, theirs] * 6]                # in turns, the best of each
assert len(set(total for _, total, _ in runs)) == 1
print(runs[0][2], used, min(t for t, *_ in runs[1::2]), min(t for t, *_ in runs[2::2]))
"""


@pytest.fixture(scope="module")
def two_gigabytes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("big")
    model = Mistral(ModelConfig(dim=2048, ffn_dim=5632, n_layers=9, n_heads=32, n_kv_heads=4))
    weights.save(model, folder, shard_bytes=0.56e9)
    assert len(list(folder.glob("*.safetensors"))) == 4
    yield folder, sum(p.nbytes for p in model.parameters())
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_gigabytes_in_four_shards_load_in_little_more_than_their_size(dtype, two_gigabytes):
    folder, n_bytes = two_gigabytes
    # all memory fresh from the system: else whoever is given the other's pages wins
    alone = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", MEASURE, folder, dtype], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, check=True, env=alone)
    size, used, ours, theirs = map(float, done.stdout.split())
    assert size == n_bytes / (1 if dtype == "float32" else 2) > 1e9
    assert used < size + 300e6, f"{used / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"
    assert ours < 1.5 * theirs, f"{ours:.2f} s, safetensors alone {theirs:.2f} s"
