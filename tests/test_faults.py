"""What real inputs and a hostile reading found: damaged or odd files end in one line, or are read
for what they are."""
import gzip
import io
import json
import os
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
