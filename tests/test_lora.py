"""LoRA: nothing changes at the start, only adapters learn, and their base is known by its hash."""
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import sample
import train
from checkpoint import find_checkpoint, load_model
from config import UserError
from formats.lora import Adapter, add_adapter, merge_adapter
from test_distributed import launch, ranks
from test_train import assert_same_run_but_for_rounding, assert_same_weights, rows, toy
from toys import texts, tiny_quiet

NEW = "start_thought", "end_thought", "mixing_head"


def adapted(rank=3, **thought):
    """A tiny QuietSTaR with adapters; B is still zero."""
    quiet = tiny_quiet(**thought)
    add_adapter(quiet.model, Adapter(rank, "base", ""), torch.Generator().manual_seed(5))
    return quiet


def train_b(quiet):
    """Make every B as large as what training could give it."""
    generator = torch.Generator().manual_seed(6)
    for name, p in quiet.named_parameters():
        if name.endswith("lora_B"):
            p.data = torch.randn(p.shape, generator=generator) * 0.02
    return quiet


@pytest.fixture(scope="module")
def base(game, tmp_path_factory):
    """A small model that has learnt something."""
    out = tmp_path_factory.mktemp("base") / "run"
    options = [*toy(game, out, "--objective=plain"), "--save_every=6"]
    (job,) = launch(ranks(1, *options))
    assert job["status"] == [0], job
    return out


def start(game, base, out, *changes):
    return toy(game, out, f"--init_from={base}", "--lora=4", *changes)


def test_a_new_adapter_predicts_exactly_as_its_base():
    ids_BL = texts(2, 9)
    for ours, theirs in zip(adapted().predict(ids_BL), tiny_quiet().predict(ids_BL)):
        assert torch.equal(ours, theirs)


def test_merged_predicts_as_unmerged():
    ids_BL, quiet = texts(2, 9), train_b(adapted())
    before = quiet.predict(ids_BL)
    assert not torch.allclose(before[1], tiny_quiet().predict(ids_BL)[1], atol=0.01)
    merge_adapter(quiet.model)
    torch.testing.assert_close(quiet.predict(ids_BL)[1], before[1], rtol=1e-5, atol=1e-5)
    assert quiet.state_dict().keys() == tiny_quiet().state_dict().keys()
    assert all(p.requires_grad for p in quiet.parameters())


@pytest.mark.parametrize("one_pass", [False, True])
def test_only_adapters_markers_and_mixing_head_have_gradients(one_pass):
    """Which are those that the same model has with its weights free."""
    quiet, ids_BL = train_b(adapted(one_pass=one_pass)), texts(2, 9)
    found = {}
    for free in (False, True):
        quiet.model.requires_grad_(free)
        for name, p in quiet.named_parameters():
            p.requires_grad_(free or "lora" in name or name.startswith(NEW))
        quiet.zero_grad()
        quiet(ids_BL, ids_BL >= 0).loss.backward()
        found[free] = {name: p.grad for name, p in quiet.named_parameters() if p.grad is not None}
    learning = {name for name in found[True] if "lora" in name or name.startswith(NEW)}
    assert found[False].keys() == learning and len(learning) == 2 * 7 * 2 + 7
    for name in learning:
        torch.testing.assert_close(found[False][name], found[True][name])


def test_a_run_saves_what_learns_and_its_moments_alone(call, game, base, tmp_path):
    assert call(train, *start(game, base, tmp_path / "run"))[0] == 0
    folder = find_checkpoint(tmp_path / "run")
    assert not (folder / "model.safetensors").exists()
    stored = load_file(folder / "adapter_model.safetensors")
    assert all("lora_" in name or name.startswith(NEW) for name in stored)
    moments = set()
    for path in (folder / "optimizer").glob("*.safetensors"):
        moments |= {name.rpartition(".exp_avg")[0] for name in load_file(path)}
    model = load_model(folder)
    assert moments == {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(moments) == len(stored)
    # the base is as it was, and the adapter not
    before = load_model(find_checkpoint(base)).state_dict()
    for name, p in model.model.named_parameters():
        assert "lora_" in name or torch.equal(p, before[name]), name
    assert model.model.layers[0].attention.q.lora_B.abs().max() > 0


@pytest.mark.parametrize("options", [(), ("--weights=bf16", "--dtype=bfloat16", "--moments=8bit"),
                                     ("--objective=plain",)])
def test_a_resumed_run_of_adapters_equals_an_uninterrupted_one_bit_for_bit(
        call, game, base, tmp_path, options):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert call(train, *start(game, base, whole, *options))[0] == 0
    assert call(train, *start(game, base, cut, *options, "--steps=3"))[0] == 0
    assert call(train, "--init_from=resume", f"--out={cut}", "--steps=6")[0] == 0
    assert_same_weights(cut, whole)
    assert rows(cut) == rows(whole)


def test_a_converted_adapter_is_a_model_of_its_own_that_predicts_the_same(
        call, game, base, tmp_path):
    assert call(train, *start(game, base, tmp_path / "run"))[0] == 0
    convert = f"--convert={tmp_path / 'run'}", f"--out={tmp_path / 'merged'}"
    assert call(checkpoint, *convert)[0] == 0
    merged, unmerged = load_model(tmp_path / "merged"), load_model(find_checkpoint(tmp_path / "run"))
    ids_BL = texts(2, 9, 15)
    torch.testing.assert_close(merged.predict(ids_BL)[1], unmerged.predict(ids_BL)[1],
                               rtol=1e-5, atol=1e-5)
    prompt = "--prompt=ball c : ab cd ce now", "--max-new-tokens=3"
    said = [call(sample, f"--checkpoint={tmp_path / name}", *prompt) for name in ("run", "merged")]
    assert said[0] == said[1] and said[0][0] == 0


def test_an_adapter_on_another_or_a_missing_base_is_refused_by_name(call, game, base, tmp_path):
    own = tmp_path / "base"
    shutil.copytree(find_checkpoint(base), own)
    assert call(train, *start(game, own, tmp_path / "run"))[0] == 0
    prompt = f"--checkpoint={tmp_path / 'run'}", "--prompt=ball c", "--max-new-tokens=1"
    assert call(sample, *prompt)[0] == 0
    weights = bytearray((own / "model.safetensors").read_bytes())
    weights[-1] ^= 64
    (own / "model.safetensors").write_bytes(weights)
    status, _, stderr = call(sample, *prompt)
    assert status == 2 and f"{own} is not the base of the adapter" in stderr
    own.rename(tmp_path / "moved")
    status, _, stderr = call(sample, *prompt)
    assert status == 2 and f"adapter of {own}, which is missing" in stderr
    assert "adapter_config.json" in stderr and stderr.count("\n") == 1


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.write_text("")])
def test_a_base_that_is_no_checkpoint_is_refused(call, game, base, tmp_path, make):
    own = tmp_path / "base"
    shutil.copytree(find_checkpoint(base), own)
    assert call(train, *start(game, own, tmp_path / "run"))[0] == 0
    shutil.rmtree(own)
    make(own)
    status, _, stderr = call(sample, f"--checkpoint={tmp_path / 'run'}", "--prompt=ball c")
    assert status == 2 and str(own) in stderr and stderr.count("\n") == 1


def test_the_base_of_an_adapter_stays_when_its_own_run_goes_on(call, game, tmp_path):
    base, out = tmp_path / "base", tmp_path / "run"
    assert call(train, *toy(game, base, "--objective=plain"))[0] == 0
    assert call(train, *start(game, base, out))[0] == 0
    more = "--init_from=resume", f"--out={base}", "--steps=15"
    assert call(train, *more)[0] == 0
    assert (base / "step-000006").is_dir() and not (base / "step-000009").exists()
    load_model(find_checkpoint(out))


def test_an_adapter_is_one_file_whatever_its_size_and_whoever_froze_it(tmp_path):
    quiet, ids_BL = train_b(adapted()), texts(2, 9)
    checkpoint.save_model(tiny_quiet().model, tmp_path / "base")
    base = checkpoint.as_base(tmp_path / "base", 3)
    quiet.model.adapter = base
    quiet.requires_grad_(False)
    checkpoint.save_model(quiet, tmp_path / "adapter", shard_bytes=2000)
    found = load_model(tmp_path / "adapter")
    assert torch.equal(found.predict(ids_BL)[1], quiet.predict(ids_BL)[1])
    # an adapter is no base, and a base is not written over
    quiet.model.adapter = Adapter(3, str(tmp_path / "adapter"),
                                  checkpoint.fingerprint(tmp_path / "adapter"))
    checkpoint.save_model(quiet, tmp_path / "second")
    with pytest.raises(UserError, match="is an adapter: merge it"):
        load_model(tmp_path / "second")
    before = checkpoint.fingerprint(tmp_path / "base")
    with pytest.raises(UserError, match="holds another checkpoint"):
        checkpoint.save_model(quiet, tmp_path / "base")
    assert checkpoint.fingerprint(tmp_path / "base") == before


def test_an_adapter_on_bf16_is_merged_in_fp32_unless_told_otherwise(call, game, base, tmp_path):
    assert call(checkpoint, f"--convert={base}", f"--out={tmp_path / 'b'}", "--dtype=bfloat16")[0] == 0
    run = tmp_path / "run"
    assert call(train, *start(game, tmp_path / "b", run, "--dtype=bfloat16", "--weights=bf16"))[0] == 0
    for words, dtype in ((), torch.float32), (("--dtype=bfloat16",), torch.bfloat16):
        out = tmp_path / str(dtype)
        assert call(checkpoint, f"--convert={run}", f"--out={out}", *words)[0] == 0
        assert {p.dtype for p in load_model(out, dtype=None).parameters()} == {dtype}


def test_ranks_that_do_not_fit_are_refused(call, game, base, tmp_path):
    status, _, stderr = call(train, *toy(game, tmp_path / "scratch", "--lora=4"))
    assert status == 2 and "--init_from" in stderr
    assert call(train, *start(game, base, tmp_path / "run"))[0] == 0
    more = toy(game, tmp_path / "more", f"--init_from={tmp_path / 'run'}")
    for other in ("--lora=0", "--lora=8"):
        status, _, stderr = call(train, *more, other)
        assert status == 2 and "--lora=4" in stderr and "--convert" in stderr
    assert call(train, *more, "--lora=4")[0] == 0
    stored = json.loads((find_checkpoint(tmp_path / "more") / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == str(find_checkpoint(base).resolve())


@pytest.mark.slow
def test_every_layout_learns_the_same_adapters(game, base, tmp_path):
    names = dict(one=(1,), accumulated=(1, "--grad_accum=2"), ddp=(2,),
                 fsdp=(2, "--parallel=fsdp"), recomputed=(2, "--parallel=fsdp", "--recompute=1"))
    done = launch(*(ranks(world, *start(game, base, tmp_path / name, *more))
                    for name, (world, *more) in names.items()))
    assert all(set(job["status"]) == {0} for job in done), done
    for name in names:
        assert_same_run_but_for_rounding(tmp_path / name, tmp_path / "one")


@pytest.mark.slow
def test_frozen_bf16_weights_are_sharded_beside_fp32_adapters(game, base, tmp_path):
    options = "--weights=bf16", "--dtype=bfloat16"
    done = launch(*(ranks(2, *start(game, base, tmp_path / name, *options, f"--parallel={name}"))
                    for name in ("ddp", "fsdp")))
    assert all(set(job["status"]) == {0} for job in done), done
    ddp, fsdp = (load_file(find_checkpoint(tmp_path / name) / "adapter_model.safetensors")
                 for name in ("ddp", "fsdp"))
    assert {tensor.dtype for tensor in fsdp.values()} == {torch.float32}
    for name in ddp:
        assert (ddp[name] - fsdp[name]).abs().max() < 1e-3, name


@pytest.mark.slow
def test_peft_reads_an_adapter_and_predicts_the_same(call, game, base, tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "run"
    assert call(train, *start(game, base, out, "--objective=plain", "--lr=2e-2"))[0] == 0
    ours, ids_BL = load_model(find_checkpoint(out)), texts(2, 9, 15)
    plain = transformers.AutoModelForCausalLM.from_pretrained(find_checkpoint(base))
    theirs = peft.PeftModel.from_pretrained(plain, find_checkpoint(out))
    from thoughts import PlainObjective
    loss = PlainObjective(ours)(ids_BL, ids_BL >= 0).loss
    found = theirs(ids_BL, labels=ids_BL).loss
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-5)
    with theirs.disable_adapter():
        assert abs(theirs(ids_BL, labels=ids_BL).loss - loss) > 1e-3
