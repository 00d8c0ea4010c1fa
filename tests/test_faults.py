"""What real inputs and a hostile reading found: damaged or odd files end in one line, or are read
for what they are."""
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import config
import data
import sample
import train
from config import UserError
from test_data import folder_of
from test_train import toy
from tokenizer import load_tokenizer
from toys import tiny_quiet

ROOT = Path(__file__).parents[1]


def rows_of(path):
    return list(data.read_rows(str(path)))


# ------------------------------------------------------------------------------------ text comes in


@pytest.mark.parametrize("content", [
    b"one\ntwo\n", b"\xef\xbb\xbfone\ntwo\n", b"one\r\ntwo\r\n", b"one\rtwo\r"])
def test_text_is_the_same_from_a_file_a_pipe_a_prompt_or_a_corpus(tmp_path, monkeypatch, content):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    assert config.read_text(path) == "one\ntwo\n"
    assert list(data.read_texts([str(path)], ["text"])) == ["one\ntwo\n"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    settings = dict(checkpoint="x")
    assert list(sample.texts_of(sample.SampleConfig(**settings))) == ["one\ntwo"]
    prompt = content.decode()
    assert list(sample.texts_of(sample.SampleConfig(prompt=prompt, **settings))) == ["one\ntwo\n"]
    assert list(sample.texts_of(sample.SampleConfig(text_file=str(path), **settings))) == ["one\ntwo"]


@pytest.mark.parametrize("content", [b"\xff\xfeo\0", b"caf\xe9", b"\xed\xa0\x80"])
def test_bytes_that_are_not_utf8_are_one_line_from_everywhere(tmp_path, monkeypatch, content):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    for read in (lambda: config.read_text(path), lambda: rows_of(path),
                 lambda: list(sample.texts_of(sample.SampleConfig(checkpoint="x"))),
                 lambda: list(sample.texts_of(sample.SampleConfig(
                     checkpoint="x", prompt=content.decode(errors="surrogateescape"))))):
        with pytest.raises(UserError, match="not UTF-8"):
            read()


def test_blank_lines_are_skipped_and_what_is_no_text_is_named_with_its_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n\n  \n{"text": "two"}\n')
    assert list(data.read_texts([str(path)], ["text"])) == ["one", "two"]
    for bad in ('{"text": null}', '["one"]', "3", '{"other": "x"}'):
        path.write_text(f'{{"text": "one"}}\n\n{bad}\n')
        with pytest.raises(UserError, match="rows.jsonl:3: --field=text does not name texts"):
            list(data.read_texts([str(path)], ["text"]))


def test_rows_that_nest_without_end_are_one_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one", "more": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with pytest.raises(UserError, match="rows.jsonl:1: damaged"):
        rows_of(path)


def test_a_line_that_a_small_file_blows_up_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_LINE", 1000)
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wb") as file:
        file.write(b'{"text": "short"}\n{"text": "' + b"a" * 10**6 + b'"}\n')
    with pytest.raises(UserError, match="rows.jsonl.gz:2: .*a line of more than 1000 bytes"):
        rows_of(path)


@pytest.mark.slow
def test_a_million_blanks_are_one_line_and_no_panic(tmp_path):
    from test_tokenizer import train_byte_level
    for kind in ("smollm2", "qwen2"):
        train_byte_level(kind).save(str(tmp_path / "tokenizer.json"))
        tokenizer = load_tokenizer(tmp_path)
        text = "a table" + " " * 399_999 + "its end"
        assert tokenizer.decode(tokenizer.encode(text)) == text
        for n_blanks in (400_000, 1_100_000):
            with pytest.raises(UserError, match="blanks in a row"):
                tokenizer.encode("a table" + " " * n_blanks + "its end")


def test_a_single_document_is_split_at_a_token(tmp_path):
    folder = folder_of(tmp_path, [" ".join(map(str, range(1, 100)))], val_share=0.1)
    train_ids = data.TokenFile(folder, "train").document(0).tolist()
    val_ids = data.TokenFile(folder, "val").document(0).tolist()
    assert train_ids + val_ids == [*range(1, 100), 0] and len(val_ids) == 10


def test_without_evaluations_no_held_out_text_is_needed(call, game, tmp_path):
    tokenizer = load_tokenizer(game)
    data.prepare(["ball a : ab now b"] * 30, tokenizer, tmp_path / "data", 0.0, ["a test"])
    options = toy(game, tmp_path / "run", f"--data={tmp_path / 'data'}", "--steps=1")
    assert call(train, *options, "--eval_every=0")[0] == 0


@pytest.mark.parametrize("dtype", ["object", "int16", "uint64", "float32", "O", ">u2", None, ["u2"]])
def test_token_files_are_of_two_types_and_no_others(tmp_path, dtype):
    folder = folder_of(tmp_path, ["1 2 3"])
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"dtype": dtype}))
    with pytest.raises(UserError, match="is neither uint16 nor uint32|dtype is "):
        data.TokenFile(folder, "train")


# -------------------------------------------------------------------------------- where it runs


def run_sample(folder, *words, **options):
    return subprocess.run([sys.executable, "sample.py", f"--checkpoint={folder}", *words],
                          cwd=ROOT, capture_output=True, timeout=60, **options)


@pytest.fixture(scope="module")
def folder(game, tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    quiet = tiny_quiet(model=dict(vocab_size=20, max_seq_len=64))
    checkpoint.save_model(quiet, folder, tokenizer=load_tokenizer(game))
    return folder


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii", "utf-8"])
def test_an_output_of_any_encoding_shows_the_text(folder, encoding):
    done = run_sample(folder, "--prompt=ball — a", "--show-thoughts",
                      env=os.environ | {"PYTHONIOENCODING": encoding})
    assert done.returncode == 0 and done.stderr == b""
    assert ("—".encode(encoding, "backslashreplace")) in done.stdout


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_closed_stream_is_no_traceback(folder, closed):
    words = [] if closed == 0 else ["--prompt=ball a"]
    done = run_sample(folder, *words, preexec_fn=lambda: os.close(closed))
    assert b"Traceback" not in done.stderr and done.returncode == (2 if closed == 0 else 0)
    if closed == 0:
        assert b"standard input is closed: give --prompt" in done.stderr


def test_a_full_device_is_one_line(folder):
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "sample.py", f"--checkpoint={folder}", "--prompt=a"],
                              cwd=ROOT, stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"No space" in done.stderr


def test_an_old_torch_is_one_line(monkeypatch, capsys):
    for version, status in (("2.10.1+cu128", 2), ("1.13.0", 2), ("2.11.0a0+git", 0), ("3.0", 0)):
        monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(__version__=version))
        try:
            config.run(lambda: None)
            found = 0
        except SystemExit as end:
            found = end.code
        assert found == status
        assert (f"torch {version} is older than 2.11" in capsys.readouterr().err) == bool(status)


@pytest.mark.parametrize("recompute", [0, 1])
def test_the_sampled_path_has_gradients_under_autocast(recompute):
    """As 7B is trained: bf16 products, thoughts sampled, blocks computed again."""
    gradients = []
    for dtype in (torch.bfloat16, None):
        quiet, ids_BL = tiny_quiet(), torch.arange(18).view(2, 9)
        quiet.model.recompute = recompute
        uniform_BNPT = torch.rand(2, 2, 8, 3, generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            quiet(ids_BL, ids_BL >= 0, uniform_BNPT=uniform_BNPT).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in quiet.parameters()]))
    rounded, exact = gradients
    assert rounded.isfinite().all() and (rounded - exact).norm() < 0.1 * exact.norm()
    assert np.corrcoef(rounded, exact)[0, 1] > 0.99


# ------------------------------------------------------------------------- what a run finds in --out


@pytest.fixture
def run(game, tmp_path, call):
    """A run of two steps, with a checkpoint after each; run("--steps=3") goes on with it."""
    out = tmp_path / "run"
    assert call(train, *toy(game, out, "--steps=2", "--save_every=1", "--eval_every=0"))[0] == 0

    def go_on(*words):
        return call(train, f"--out={out}", "--init_from=resume", *words)
    go_on.out = out
    return go_on


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_stands_where_a_checkpoint_goes_moves_aside(run, tmp_path, kind):
    place = run.out / "step-000003"
    if kind == "folder":
        place.mkdir()
        (place / "notes").write_text("mine")
    elif kind == "file":
        place.write_text("mine")
    else:
        place.symlink_to(tmp_path / "elsewhere")
    assert run("--steps=3")[0] == 0 and checkpoint.find_checkpoint(run.out) == place
    assert (place / "state.json").is_file() and not place.is_symlink()
    assert os.path.lexists(run.out / "step-000003.old0")
    assert run("--steps=4")[0] == 0 and os.path.lexists(run.out / "step-000003.old0")


def test_a_folder_named_latest_moves_aside(run):
    (run.out / "latest").unlink()
    (run.out / "latest").mkdir()
    assert run("--steps=3")[0] == 0 and (run.out / "latest").read_text() == "step-000003"
    assert (run.out / "latest.old0").is_dir()


def test_a_draft_that_no_run_wrote_is_refused_and_kept(run, tmp_path):
    (run.out / "draft").mkdir()
    (run.out / "draft" / "notes.txt").write_text("mine")
    status, _, error = run("--steps=3")
    assert status == 2 and "notes.txt" in error and (run.out / "draft" / "notes.txt").is_file()
    (run.out / "draft" / "notes.txt").rename(tmp_path / "notes.txt")
    assert run("--steps=3")[0] == 0 and not (run.out / "draft").exists()


def test_the_log_of_a_run_whose_checkpoints_are_gone_moves_aside(game, tmp_path, call):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n' * 9)
    assert call(train, *toy(game, tmp_path / "run", "--steps=1", "--eval_every=0"))[0] == 0
    assert len((tmp_path / "run" / "log.jsonl.old0").read_text().splitlines()) == 9


def test_a_run_goes_on_with_its_text_wherever_that_lies_and_with_no_other(run, game, tmp_path):
    shutil.copytree(game / "without_reasoning", tmp_path / "moved")
    assert run("--steps=3", f"--data={tmp_path}/moved")[0] == 0
    status, _, error = run("--steps=4", f"--data={game}/with_reasoning")
    assert status == 2 and "other text" in error


def test_what_was_saved_last_is_known_by_its_state_and_not_by_its_name(run):
    shutil.copytree(run.out / "step-000001", run.out / "step-000009")
    (run.out / "latest").unlink()
    assert checkpoint.find_checkpoint(run.out).name == "step-000002"


def test_advice_names_checkpoints_of_the_same_run_alone(run, tmp_path):
    (run.out / "mine").mkdir()
    (run.out / "mine" / "config.json").write_text("{")
    (run.out / "mine" / "model.safetensors").write_text("")
    with pytest.raises(UserError) as error:
        checkpoint.load_model(run.out / "mine")
    assert "to go on from" not in str(error.value)


def test_converting_never_writes_into_a_folder_in_use(folder, tmp_path, call):
    (tmp_path / "notes").write_text("mine")
    status, _, error = call(checkpoint, f"--convert={folder}", f"--out={tmp_path}")
    assert status == 2 and "is not empty" in error
    assert call(checkpoint, f"--convert={folder}", f"--out={tmp_path / 'new'}")[0] == 0


def test_ends_that_a_model_names_survive_training_and_converting(game, tmp_path, call):
    model = tiny_quiet(model=dict(vocab_size=20, max_seq_len=64)).model
    checkpoint.save_model(model, tmp_path / "chat", tokenizer=load_tokenizer(game))
    (tmp_path / "chat" / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    words = toy(game, tmp_path / "run", f"--init_from={tmp_path}/chat", "--steps=1", "--eval_every=0",
                "--objective=plain")
    assert call(train, *words)[0] == 0
    assert call(checkpoint, f"--convert={tmp_path}/run", f"--out={tmp_path}/copy")[0] == 0
    for name in ("run", "copy"):
        assert {2, 7} <= load_tokenizer(checkpoint.find_checkpoint(tmp_path / name)).ends


# --------------------------------------------------------------------------- numbers without sense


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("text", [False, True])
def test_weights_that_overflow_stop_with_one_line(game, tmp_path, call, bad, text):
    quiet = tiny_quiet(model=dict(vocab_size=20, max_seq_len=64))
    quiet.model.head.weight.data[3] = bad
    checkpoint.save_model(quiet, tmp_path / "m", tokenizer=load_tokenizer(game))
    (tmp_path / "a.txt").write_text("ball a : ab")
    words = [f"--text-file={tmp_path}/a.txt"] if text else ["--prompt=ball a", "--temperature=1"]
    status, _, error = call(sample, f"--checkpoint={tmp_path}/m", *words)
    assert status == 2 and "nan or infinity" in error


def test_the_likeliest_token_is_kept_however_small_top_p_is(folder, call):
    options = f"--checkpoint={folder}", "--prompt=ball a", "--max_new_tokens=5"
    greedy = call(sample, *options)[1]
    assert call(sample, *options, "--temperature=1", "--top_p=1e-300")[1] == greedy


@pytest.mark.parametrize("script, option", [
    (train, "--lr=0"), (train, "--min_lr=1"), (train, "--marker_lr=1e300"), (train, "--n_true=100000000"),
    (train, "--policy_weight=1e300"), (train, f"--n_thoughts={10**30}"), (train, f"--batch_size={10**30}"),
    (train, "--windows=1000000000000"), (train, "--rope_theta=1e300"), (train, "--marker_ids=500"),
    (sample, "--samples=100000000"), (sample, "--temperature=1e39")])
def test_numbers_beyond_all_sense_are_one_line(game, folder, tmp_path, call, script, option):
    words = toy(game, tmp_path / "run", "--eval_every=0") if script is train else (
        f"--checkpoint={folder}", "--prompt=a", "--temperature=1")
    status, _, error = call(script, *words, option)
    assert status == 2 and error.count("\n") == 1, error


@pytest.mark.parametrize("variables", [
    dict(RANK="5", WORLD_SIZE="2", MASTER_PORT="29512"), dict(RANK="0", WORLD_SIZE="abc"),
    dict(RANK="0", WORLD_SIZE="2", MASTER_PORT="xyz"), dict(LOCAL_RANK="abc")])
def test_ranks_that_cannot_be_are_one_line(game, tmp_path, call, monkeypatch, variables):
    for name, value in (dict(MASTER_ADDR="localhost", MASTER_PORT="1") | variables).items():
        monkeypatch.setenv(name, value)
    status, _, error = call(train, *toy(game, tmp_path / "run", "--eval_every=0"))
    assert status == 2 and error.count("\n") == 1
