"""Checkpoints in and out: the oracle is the library `transformers`, and files made by hand."""
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
import config
from checkpoint import load_model, save_model
from distributed import SINGLE, parallelize
from formats import huggingface
from layouts import add_settings, save_mistral, save_official
from model import CausalContext, KVCache, Mistral, ModelConfig, rope, rotate
from thoughts import QuietSTaR, ThoughtConfig
from tokenizer import load_tokenizer
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
    assert_close(logits(load_model(folder)), their_logits(theirs))


def test_decoding_with_the_cache_has_the_logits_of_transformers(oracle):
    theirs, folder = oracle
    assert_close(decoded_logits(load_model(folder), prompt_len=8), their_logits(theirs))


def test_a_model_saved_here_is_whole_for_transformers(oracle, tmp_path):
    from transformers import AutoModelForCausalLM
    model = load_model(oracle[1])
    save_model(model, tmp_path)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert_close(logits(model), their_logits(theirs))
    assert_same_parameters(model, load_model(tmp_path))


def test_the_mistral_layout_of_the_same_weights_has_the_same_logits(oracle, tmp_path):
    theirs, folder = oracle
    model = load_model(folder)
    if model.config.rope_type != "default":
        pytest.skip("params.json cannot express it")
    save_mistral(model, tmp_path)
    stored = load_file(tmp_path / "consolidated.safetensors")["layers.0.attention.wq.weight"]
    assert not torch.equal(stored, model.layers[0].attention.q.weight)
    again = load_model(tmp_path)
    assert_close(logits(again), their_logits(theirs))
    assert torch.equal(again.layers[0].attention.q.weight, model.layers[0].attention.q.weight)


def test_a_thinking_checkpoint_is_an_ordinary_model_to_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    quiet, auto = tiny_quiet(), transformers.AutoModelForCausalLM
    save_model(quiet, tmp_path)
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
    save_mistral(model, tmp_path)
    stored, shape = load_file(tmp_path / "consolidated.safetensors"), model.config
    model = load_model(tmp_path)
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
    save_mistral(model, tmp_path)
    model = load_model(tmp_path)
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
    found, _ = huggingface.from_config(given | {"model_type": family}, Path("config.json"))
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
    new, _ = checkpoint.read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(
        {**SIZES, "model_type": family, "rms_norm_eps": theirs.config.rms_norm_eps, **V4[family]}))
    old, _ = checkpoint.read_config(tmp_path)
    assert old == new
    assert_close(logits(load_model(tmp_path)), their_logits(theirs))


# ------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("case", GOLDEN, ids=lambda path: path.name)
def test_official_checkpoints_are_read_and_survive_ours_bit_for_bit(case, tmp_path):
    settings = json.loads((case / "case.json").read_text())
    settings = ThoughtConfig(thought_len=settings["thought_len"], n_true=settings["n_true"])
    model = load_model(case, thought_config=settings)
    stored = load_file(case / "model.safetensors")
    assert isinstance(model, QuietSTaR) and model.config.marker_ids == (78, 79)
    assert torch.equal(model.start_thought, stored["start_embedding"][0] * 100)
    assert torch.equal(model.end_thought, stored["end_embedding"][0] * 100)
    for i in (0, 2, 4):
        assert torch.equal(model.mixing_head[i].weight, stored[f"talk_head.0.{i}.weight"])
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert_same_parameters(model, again)
    assert (again.config, again.model.config) == (model.config, model.model.config)
    before = json.loads((case / "config.json").read_text())
    after = json.loads((tmp_path / "config.json").read_text())
    for key in before.keys() & after.keys():
        assert after[key] == before[key], key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_markers_of_an_official_checkpoint_are_exact_in_float32(dtype, tmp_path):
    quiet = tiny_quiet(model=dict(dim=512, n_heads=4)).to(dtype)
    save_official(quiet, tmp_path / "0", dtype)
    first = load_model(tmp_path / "0", dtype=None)
    save_model(first, tmp_path / "1")
    assert_same_parameters(first, load_model(tmp_path / "1", dtype=None))
    assert first.start_thought.dtype == torch.float32
    assert torch.allclose(first.start_thought, quiet.start_thought.float(), rtol=1e-2, atol=0)


def test_an_official_checkpoint_of_ours_keeps_the_settings_that_its_config_holds(tmp_path):
    """Until November 2026 this project wrote the official layout, with a quiet_star section."""
    quiet = tiny_quiet(thought_len=5)
    save_official(quiet, tmp_path)
    assert load_model(tmp_path).config == ThoughtConfig(marker_ids=(23, 24))
    add_settings(tmp_path, quiet)
    assert load_model(tmp_path).config == replace(quiet.config, marker_ids=(23, 24))


def test_our_own_checkpoints_survive_bit_for_bit_with_their_settings(tmp_path):
    for i, quiet in enumerate((tiny_quiet(thought_len=5), tiny_quiet(model=dict(tied=True)),
                               tiny_quiet(marker_ids=(21, 22), model=dict(windows=(4, 0))))):
        save_model(quiet, tmp_path / str(i), shard_bytes=3000)
        again = load_model(tmp_path / str(i))
        assert_same_parameters(quiet, again)
        assert (again.config, again.model.config) == (quiet.config, quiet.model.config)
        assert (again.model.head.weight is again.model.embed.weight) == quiet.model.config.tied


def test_settings_can_be_replaced_but_the_markers_keep_their_rows(tmp_path):
    save_model(tiny_quiet(marker_ids=(21, 22)), tmp_path)
    quiet = load_model(tmp_path, thought_config=ThoughtConfig(thought_len=7))
    assert quiet.config == ThoughtConfig(thought_len=7, marker_ids=(21, 22))


def test_a_checkpoint_thinks_if_its_tensors_do_whatever_its_config_says(tmp_path):
    quiet = tiny_quiet(thought_len=5)
    save_model(quiet, tmp_path)
    path = tmp_path / "config.json"
    given = json.loads(path.read_text())
    assert given.pop("quiet_star")["thought_len"] == 5
    path.write_text(json.dumps(given))
    again = load_model(tmp_path)
    assert again.config == ThoughtConfig()
    assert_same_parameters(quiet, again)


def test_old_settings_of_ours_still_load(tmp_path):
    """Every setting that a quiet_star section of ours ever had."""
    save_model(tiny_quiet(marker_ids=(21, 22)), tmp_path)
    section = dict(thought_len=8, n_thoughts=3, n_true=2, policy_weight=1e6, policy_temperature=3.0,
                   base_weight=0.5, filler=True, marker_ids=[21, 22])
    given = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(given | {"quiet_star": section}))
    found = load_model(tmp_path).config
    assert (found.thought_len, found.n_thoughts, found.n_true) == (8, 3, 2)
    assert found.filler and found.marker_ids == (21, 22)


def test_an_official_checkpoint_predicts_as_the_model_that_was_written(tmp_path):
    quiet = tiny_quiet()
    save_official(quiet, tmp_path)
    again, ids_BL = load_model(tmp_path), torch.arange(9)[None]
    assert torch.equal(logits(again, ids_BL)[..., :23], logits(quiet, ids_BL))


def test_a_model_that_starts_to_think_predicts_as_before():
    base = tiny_mistral().to(torch.bfloat16)
    quiet = checkpoint.add_thoughts(base, ThoughtConfig(), 5, torch.Generator().manual_seed(0))
    assert quiet.model is base and not quiet.mixing_head[4].weight.any()
    assert torch.equal(quiet.start_thought, base.embed.weight[5])
    assert torch.equal(quiet.end_thought, base.embed.weight[5])
    assert {p.dtype for p in base.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in quiet.mixing_head.parameters()} == {torch.float32}
    assert quiet.mixing_head[0].weight.std() > 0


def test_what_is_trained_from_bfloat16_files_is_exact_in_float32(tmp_path):
    """The markers of the official layout are multiplied, after they are cast."""
    save_official(tiny_quiet(), tmp_path / "official", torch.bfloat16)
    save_model(tiny_quiet(model=dict(tied=True)), tmp_path / "ours", torch.bfloat16)
    for layout, tied in (("official", False), ("ours", True)):
        stored = load_model(tmp_path / layout, dtype=None)
        trained = parallelize(stored, SINGLE)
        assert (trained.model.head.weight is trained.model.embed.weight) == tied
        exact = dict(load_model(tmp_path / layout).named_parameters())
        for name, p in trained.named_parameters():
            assert p.dtype == torch.float32 and torch.equal(p, exact[name]), name


def test_loading_casts_to_the_asked_dtype_or_keeps_each_tensors_own(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "CONVERTED_BYTES", 100)     # several, the last one shorter
    model = tiny_mistral()
    save_model(model, tmp_path, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for dtype in (None, torch.float32, torch.float16):
        again, kept = load_model(tmp_path, dtype=dtype), dtype or torch.bfloat16
        for p, q in zip(model.parameters(), again.parameters(), strict=True):
            assert q.dtype == kept and q.requires_grad and torch.equal(p.bfloat16().to(kept), q)


def test_a_loaded_model_can_be_trained_in_place_without_touching_its_file(tmp_path):
    save_model(tiny_mistral(), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = load_model(tmp_path)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    save_model(model, tmp_path)                          # over the file that it is mapped from
    assert_same_parameters(model, load_model(tmp_path))


# ------------------------------------------------------------------------------------ other files


def hf_state(model: Mistral) -> dict:
    return {huggingface.file_name(name, "ours"): p.detach()
            for name, p in model.named_parameters()}


def write_config(folder: Path, model: Mistral, **changes):
    given = huggingface.to_config(model.config, None, torch.float32)
    (folder / "config.json").write_text(json.dumps({**given, **changes}))


@pytest.mark.parametrize("given, windows, theta", [
    ({"sliding_window": 4096}, (4096,), 1e4), ({"sliding_window": "4096"}, (4096,), 1e4),
    ({"_sliding_window": [131072, 32768, 32768, 32768]}, (131072, 32768, 32768, 32768), 1e4),
    ({"_sliding_window": "131072,32768", "rope_theta": 1e8}, (131072, 32768), 1e8),
    ({"sliding_window": None}, (0,), 1e6), ({}, (0,), 1e6)])
def test_params_json_spells_windows_in_many_ways_and_leaves_theta_to_a_rule(given, windows, theta):
    params = dict(dim=16, n_layers=4, head_dim=8, hidden_dim=24, n_heads=2, n_kv_heads=1,
                  norm_eps=1e-5, vocab_size=23, **given)
    found, _ = huggingface.from_config(params, Path("params.json"))
    assert [found.window(i) or 0 for i in range(4)] == [windows[i % len(windows)] for i in range(4)]
    assert found.rope_theta == theta and found.max_seq_len == 32768


def test_windows_that_one_number_cannot_say_are_refused_unless_they_span_the_context(tmp_path):
    ragged = dict(n_layers=4, windows=(64, 4, 4, 4))
    save_model(tiny_mistral(**ragged, max_seq_len=64), tmp_path)
    found, _ = checkpoint.read_config(tmp_path)
    assert found.windows == (0, 4, 4, 4)
    with pytest.raises(config.UserError, match=r"one sliding_window, not \[4, 64\]"):
        save_model(tiny_mistral(**ragged), tmp_path / "b")
    save_mistral(tiny_mistral(**ragged), tmp_path / "b")
    assert load_model(tmp_path / "b").config.windows == (64, 4, 4, 4)


def test_hugging_face_files_win_over_mistrals_own(tmp_path):
    model, other = tiny_mistral(), tiny_mistral(seed=1)
    save_mistral(other, tmp_path)
    shutil.copytree(tmp_path, tmp_path / "both")
    save_model(model, tmp_path / "hf")
    shutil.copytree(tmp_path / "hf", tmp_path / "both", dirs_exist_ok=True)
    assert_same_parameters(model, load_model(tmp_path / "both"))
    (tmp_path / "both" / "model.safetensors").unlink()      # half a download does not count
    assert_same_parameters(other, load_model(tmp_path / "both"))


def test_shards_are_bounded_and_every_tensor_is_in_the_index(tmp_path):
    model = tiny_mistral()
    save_model(model, tmp_path, shard_bytes=4000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    sizes = [sum(t.nbytes for t in load_file(tmp_path / shard).values()) for shard in shards]
    assert max(sizes) <= 4000 and sum(sizes) == index["metadata"]["total_size"]
    assert_same_parameters(model, load_model(tmp_path))


def test_rotary_frequencies_and_a_spare_tied_head_on_disk_are_ignored(tmp_path):
    model = tiny_mistral(tied=True)
    write_config(tmp_path, model)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
             "lm_head.weight": model.embed.weight.detach().clone()}
    save_file(hf_state(model) | extra, tmp_path / "model.safetensors")
    assert_same_parameters(model, load_model(tmp_path))


def test_a_runs_folder_stands_for_its_newest_checkpoint(tmp_path):
    for step in (1, 2):
        save_model(tiny_quiet(seed=step), tmp_path / f"step-{step}")
    assert checkpoint.find_checkpoint(tmp_path / "step-1") == tmp_path / "step-1"
    (tmp_path / "latest").write_text("step-1\n")
    assert checkpoint.find_checkpoint(tmp_path) == tmp_path / "step-1"
    assert_same_parameters(load_model(checkpoint.find_checkpoint(tmp_path)), tiny_quiet(seed=1))
    (tmp_path / "latest").write_text("step-3")
    assert checkpoint.find_checkpoint(tmp_path) == tmp_path / "step-2"
    for step in (1, 2):
        shutil.rmtree(tmp_path / f"step-{step}")
    with pytest.raises(config.UserError, match="latest names no checkpoint beside it, and there is no other"):
        checkpoint.find_checkpoint(tmp_path)


@pytest.mark.parametrize("pointer", [b"", b"\0", b"..", b"/etc", b"step-1/../step-1", b"step-9",
                                     b"global_step100", b"\xff\xfe", b"step-1" * 10**6])
def test_a_pointer_is_checked_before_it_is_used(tmp_path, pointer):
    run, model = tmp_path / "run", tmp_path / "model"
    save_model(tiny_mistral(), run / "step-1")
    save_model(tiny_mistral(), model)
    for folder in (run, model):
        (folder / "latest").write_bytes(pointer)
    assert checkpoint.find_checkpoint(run) == run / "step-1"
    assert checkpoint.find_checkpoint(model) == model        # DeepSpeed has a file of this name too


# ------------------------------------------------------------------------------------ atomic saves


def test_a_killed_save_never_looks_whole(tmp_path, monkeypatch):
    old, new, replaced = tiny_quiet(), tiny_quiet(seed=5), []
    real_replace = os.replace

    def killed(source, target):
        if len(replaced) == survive:
            raise KeyboardInterrupt
        replaced.append(Path(target).name)
        real_replace(source, target)
    monkeypatch.setattr(os, "replace", killed)
    survive = None
    save_model(old, tmp_path, shard_bytes=3000)
    n_files = len(replaced)
    assert replaced[-1] == "config.json" and n_files >= 2
    for survive in range(n_files):
        replaced.clear()
        with pytest.raises(KeyboardInterrupt):
            save_model(new, tmp_path, shard_bytes=3000)
        with pytest.raises(config.UserError, match="holds no whole checkpoint"):
            load_model(tmp_path)
        assert not list(tmp_path.glob("*.tmp"))
    survive = None
    save_model(new, tmp_path, shard_bytes=3000)
    assert_same_parameters(load_model(tmp_path), new)


def test_an_atomic_write_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "a.txt"
    with config.atomic_write(path) as temporary:
        temporary.write_text("whole")
    with pytest.raises(config.UserError, match="disk full"):
        with config.atomic_write(path) as temporary:
            temporary.write_text("ha")
            raise OSError("disk full")
    assert path.read_text() == "whole" and os.listdir(tmp_path) == ["a.txt"]


def test_a_save_never_mixes_with_another_checkpoint(tmp_path):
    model = tiny_mistral()
    save_model(model, tmp_path, shard_bytes=4000)
    with pytest.raises(config.UserError, match="holds another checkpoint .*choose an empty folder"):
        save_model(tiny_mistral(seed=1), tmp_path)
    assert_same_parameters(model, load_model(tmp_path))
    save_mistral(model, tmp_path / "mistral")
    with pytest.raises(config.UserError, match="holds another checkpoint .*choose an empty folder"):
        save_model(model, tmp_path / "mistral")


def test_saved_files_are_as_readable_as_their_folder(tmp_path):
    tmp_path.chmod(0o755)
    save_model(tiny_mistral(), tmp_path)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}


# ------------------------------------------------------------------------------------ bad files


@pytest.fixture
def whole(tmp_path):
    save_model(tiny_mistral(), tmp_path, shard_bytes=4000)
    return tmp_path


@pytest.fixture
def single(tmp_path):
    save_model(tiny_mistral(), tmp_path)
    return tmp_path


def error_of(folder) -> str:
    with pytest.raises(config.UserError) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kept", [0, 3, 100, 0.5, -5])
def test_a_truncated_file_is_named_with_the_remedy(kept, single):
    file = single / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:int(len(content) * kept) if isinstance(kept, float) else kept])
    message = error_of(single)
    assert message.startswith(f"cannot read {file} as safetensors: Error while deserializing")
    assert "download it again" in message


def test_a_git_lfs_pointer_and_an_html_page_are_named_with_the_remedy(single):
    file = single / "model.safetensors"
    for content in (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
                    b"\n<!DOCTYPE html><html>404</html>"):
        file.write_bytes(content)
        message = error_of(single)
        assert message.startswith(f"cannot read {file} as safetensors: ")
        assert message.endswith("download it again, with 'git lfs pull' if git cloned it")


def test_a_missing_shard_is_named(whole):
    n = len(list(whole.glob("model-*")))
    shard = whole / f"model-00002-of-{n:05d}.safetensors"
    shard.unlink()
    assert error_of(whole).startswith(f"cannot read {shard} as safetensors: No such file")


def test_a_tensor_that_the_files_of_an_index_lack_is_named(whole):
    path = whole / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    file = index["weight_map"]["lm_head.weight"]
    tensors = load_file(whole / file)
    del tensors["lm_head.weight"]
    save_file(tensors, whole / file)
    assert error_of(whole) == f"{path} names lm_head.weight, but {file} lacks it"


@pytest.mark.parametrize("config_name, pickled", [
    ("config.json", "pytorch_model.bin"), ("config.json", "pytorch_model-00001-of-00002.bin"),
    ("params.json", "consolidated.00.pth")])
def test_pickles_are_refused_unread_and_the_remedy_named(config_name, pickled, tmp_path):
    (tmp_path / config_name).write_text("{}")
    (tmp_path / pickled).write_bytes(b"whatever")
    message = error_of(tmp_path)
    assert message.startswith(f"{tmp_path} holds no whole checkpoint: ")
    assert message.endswith("see docs/CHECKPOINTS.md for .bin files")


def changed(folder: Path, change) -> str:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return error_of(folder)


def test_missing_unknown_and_misshapen_tensors_are_named(single):
    backup = (single / "model.safetensors").read_bytes()
    for change, message in (
            (lambda t: [t.pop(name) for name in ("model.norm.weight", "lm_head.weight")],
             f"{single} lacks tensors: lm_head.weight (2 in all)"),
            (lambda t: t.update({"model.layers.1.self_attn.q_norm.weight": torch.ones(4)}),
             f"{single} has unknown tensors: model.layers.1.self_attn.q_norm.weight (1 in all)"),
            (lambda t: [t.update({"language_model." + n: t.pop(n)}) for n in list(t)],
             f"{single} has unknown tensors: language_model.lm_head.weight (21 in all)"),
            (lambda t: t.update({"lm_head.weight": torch.ones(25, 16)}),
             f"lm_head.weight: checkpoint (25, 16), {single / 'config.json'} implies (23, 16)"),
            (lambda t: t.update({"model.layers.0.self_attn.q_proj.weight": torch.ones(24, 16)}),
             "model.layers.0.self_attn.q_proj.weight: checkpoint (24, 16), "
             f"{single / 'config.json'} implies (16, 16)"),
            (lambda t: t.update({"model.norm.weight": torch.ones(16, dtype=torch.int8)}),
             "model.safetensors: quantised torch.int8 is not supported"),
            (lambda t: t.update({"model.norm.weight": torch.ones(16).to(torch.float8_e4m3fn)}),
             "model.safetensors: quantised torch.float8_e4m3fn is not supported")):
        (single / "model.safetensors").write_bytes(backup)
        assert changed(single, change).endswith(message)


def test_half_a_thinking_checkpoint_is_not_taken_for_a_base(tmp_path):
    save_model(tiny_quiet(), tmp_path)
    assert "lacks tensors: end_thought (2 in all)" in changed(
        tmp_path, lambda t: [t.pop(name) for name in ("start_thought", "end_thought")])
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN[0] / name, tmp_path)
    assert "lacks tensors: talk_head.0.2.bias (1 in all)" in changed(
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
     "rope_scaling 'yarn' is not supported (default, linear, llama3)"),
    (dict(rope_parameters={"rope_type": "dynamic", "factor": 4.0}), "rope_scaling 'dynamic'"),
    (dict(rope_parameters={"full_attention": {"rope_theta": 1e6}}), "full_attention = {'rope_"),
    (dict(rope_scaling={"type": "linear"}), "rope_scaling of type 'linear' lacks factor"),
    (dict(model_type="ministral", sliding_window=4, layer_types=["chunked_attention"] * 2),
     "layer_types"),
    (dict(model_type="qwen2", use_sliding_window=True, sliding_window=4), "layer_types"),
    (dict(hidden_size=None), "config.json lacks hidden_size"),
    (dict(vocab_size=None), "config.json lacks vocab_size"),
    (dict(num_key_value_heads=3), "n_kv_heads=3"),
    (dict(head_dim=8), "config.json implies ("),
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
    save_mistral(tiny_mistral(), tmp_path)
    given = json.loads((tmp_path / "params.json").read_text())
    (tmp_path / "params.json").write_text(json.dumps(given | changes))
    assert message in error_of(tmp_path)


def test_a_folder_without_a_checkpoint_or_with_a_broken_config_is_one_line(single):
    assert "holds no whole checkpoint" in error_of(single / "nowhere")
    (single / "config.json").write_text("{")
    assert error_of(single).startswith(f"{single / 'config.json'} is not JSON (")
    (single / "config.json").unlink()
    assert "holds no whole checkpoint" in error_of(single)


# ------------------------------------------------------------------------------------ command, size


def test_a_loaded_checkpoint_is_saved_in_our_layout_with_its_tokenizer(tmp_path):
    """Reading one layout and writing ours is two calls."""
    quiet = tiny_quiet()
    save_official(quiet, tmp_path / "official")
    words = json.dumps(dict(words=[f"w{i}" for i in range(22)], bos=None, eos="w3"))
    (tmp_path / "official" / "words.json").write_text(words)
    model = load_model(tmp_path / "official", dtype=None)
    save_model(model, tmp_path / "out", torch.bfloat16,
               tokenizer=load_tokenizer(tmp_path / "official"))
    assert (tmp_path / "out" / "words.json").read_text() == words
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 3
    again = load_model(tmp_path / "out", dtype=None)
    assert again.config.marker_ids == (23, 24)
    assert torch.equal(again.mixing_head[0].weight, quiet.mixing_head[0].weight.bfloat16())


def test_a_copy_keeps_the_stored_dtype_and_needs_no_tokenizer(tmp_path):
    model = tiny_mistral().to(torch.bfloat16)
    save_mistral(model, tmp_path / "mistral")
    save_model(load_model(tmp_path / "mistral", dtype=None), tmp_path / "out")
    assert_same_parameters(load_model(tmp_path / "out", dtype=None), model)


MEASURE = """
import resource, sys, time
import torch
from checkpoint import load_model
from safetensors import safe_open
from pathlib import Path

def ours():
    return list(load_model(folder, dtype=dtype).parameters())

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
    save_model(model, folder, shard_bytes=0.56e9)
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


def test_mistral_with_layer_types_has_the_windows_that_these_name(tmp_path):
    transformers = pytest.importorskip("transformers")
    family, changes = FAMILIES["ministral ragged"]
    theirs = their_model(transformers, family, **changes)
    theirs.save_pretrained(tmp_path)
    given = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "mistral"}
    (tmp_path / "config.json").write_text(json.dumps(given))
    assert_close(logits(load_model(tmp_path)), their_logits(theirs))


def test_a_tied_head_that_is_not_the_embedding_is_refused_and_an_equal_one_is_not(tmp_path):
    model = tiny_mistral(tied=True)
    save_model(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, tmp_path / "model.safetensors")
    assert_same_parameters(load_model(tmp_path), model)
    save_file(tensors | {"lm_head.weight": embedding + 1}, tmp_path / "model.safetensors")
    with pytest.raises(config.UserError, match="tie_word_embeddings is true, but the head"):
        load_model(tmp_path)


def test_of_two_copies_of_a_tensor_the_index_decides_and_what_it_names_must_be_there(tmp_path):
    model = tiny_mistral()
    save_model(model, tmp_path, shard_bytes=2000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    for name in sorted({*index["weight_map"].values()}):         # a copy of other values, everywhere
        tensors = load_file(tmp_path / name)
        others = {n: torch.zeros(3) for n in index["weight_map"] if n not in tensors}
        save_file(tensors | others, tmp_path / name)
    assert_same_parameters(load_model(tmp_path), model)
    index["weight_map"]["model.absent.weight"] = name
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(config.UserError, match="names model.absent.weight, but .* lacks it"):
        load_model(tmp_path)


def test_a_saved_model_keeps_all_ids_that_end_a_text(tmp_path):
    """As of a fine-tune for chat: the end of its turns is not the tokenizer's own end."""
    source, saved = tmp_path / "source", tmp_path / "saved"
    source.mkdir()
    (source / "words.json").write_text(json.dumps(dict(words=[*"abcdefghij"], bos=None, eos="a")))
    (source / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    tokenizer = load_tokenizer(source)
    save_model(tiny_mistral(vocab_size=tokenizer.vocab_size), saved, tokenizer=tokenizer)
    assert {5, 7} <= load_tokenizer(saved).ends == tokenizer.ends
