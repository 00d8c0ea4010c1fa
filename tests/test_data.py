"""data.py: no token changes on its way to disk and back; a batch is a function of its numbers."""
import datetime
import gzip
import json
import os
import sys
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import config
import data
from config import UserError


def numbers(vocab_size=1000, bos=None, eos=0):
    """A tokenizer whose text is token ids separated by spaces."""
    def encode(text, bos=False):
        first = [tokenizer.bos] if bos and tokenizer.bos is not None else []
        return first + [int(word) for word in text.split()]

    tokenizer = SimpleNamespace(vocab_size=vocab_size, bos=bos, eos=eos, encode=encode, sha256="0",
                                path="numbers.json", copy_to=lambda folder: None)
    return tokenizer


def folder_of(path, texts, val_share=0.0, **tokenizer):
    data.prepare(texts, numbers(**tokenizer), path, val_share, ["a test"])
    return path


@pytest.fixture
def documents(tmp_path):
    """Document i holds i * 20 + 1, i * 20 + 2, ... and is i + 1 tokens long, then eos."""
    texts = [" ".join(str(i * 20 + j) for j in range(1, i + 2)) for i in range(12)]
    return data.TokenFile(folder_of(tmp_path / "documents", texts), "train")


# ---------------------------------------------------------------------- text to tokens on disk

@pytest.mark.parametrize("vocab_size, dtype",
                         [(65536, "uint16"), (65537, "uint32"), (70000, "uint32")])
def test_no_token_id_ever_wraps(tmp_path, vocab_size, dtype):
    ids = [0, 4464, 65535, vocab_size - 1]                      # 70000 in uint16 is 4464
    folder = folder_of(tmp_path, [" ".join(map(str, ids))], vocab_size=vocab_size, eos=None)
    file = data.TokenFile(folder, "train")
    assert file.meta["dtype"] == dtype and file.document(0).tolist() == ids


def test_an_id_beyond_the_vocabulary_is_refused_with_its_position(tmp_path):
    with pytest.raises(OverflowError, match="70000 out of bounds"):     # a tokenizer that is wrong
        folder_of(tmp_path, ["1 2", "3 70000"], vocab_size=50000)
    folder_of(tmp_path, ["1 2 3", "4 999 5"])
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"vocab_size": 500}))
    batches = data.Batches(data.TokenFile(tmp_path, "train"), 8)  # the whole file at any draw
    with pytest.raises(UserError, match="token id 999 at position 5 >= vocab_size 500"):
        batches.batch(0, [0])


@pytest.mark.parametrize("bos, eos", [(None, None), (1, None), (None, 2), (1, 2), (0, 0)])
def test_documents_are_bos_tokens_eos_as_far_as_the_tokenizer_has_them(tmp_path, bos, eos):
    file = data.TokenFile(folder_of(tmp_path, ["5 6 7", " \n", "8"], bos=bos, eos=eos), "train")
    around = [i for i in [bos] if i is not None], [i for i in [eos] if i is not None]
    found = [file.document(i).tolist() for i in range(file.n_docs)]
    assert found == [around[0] + [5, 6, 7] + around[1], around[0] + [8] + around[1]]


def test_gzip_is_read_like_plain_and_fields_are_joined_by_newlines(tmp_path):
    rows = b'{"q": "one", "a": "\\u00e9"}\n{"a": "4", "q": "half \\ud83d", "more": [1]}\n'
    (tmp_path / "a.jsonl").write_bytes(rows)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows))
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(rows[:20]) + gzip.compress(rows[20:]))
    for name in ("a.jsonl", "a.jsonl.gz", "a.json.gz"):
        assert list(data.read_texts([f"{tmp_path}/{name}"], ("q", "a"))) == ["one\né", "half ?\n4"]


def test_openwebmath_and_c4_become_token_files_under_their_own_field_names(call, game, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [f"ball c : ab cd now {cup} ." for cup in "abcde"]
    when = datetime.datetime(2023, 3, 1)
    parquet.write_table(pyarrow.Table.from_pylist(
        [dict(url="http://x", text=text, date=when, metadata="{}") for text in texts]),
        tmp_path / "train-00000-of-00114-5fee.parquet")
    lines = "".join(json.dumps(dict(text=text, timestamp="2019-04-25T12:57:54Z", url="http://x"))
                    + "\n" for text in texts)
    (tmp_path / "c4-train.00000-of-01024.json.gz").write_bytes(gzip.compress(lines.encode()))
    found = []
    for path in tmp_path.glob("*-of-*"):
        out = tmp_path / f"to {path.suffix}"
        argv = f"--input={path}", f"--tokenizer={game}/without_reasoning", f"--out={out}"
        assert call(data, *argv, "--val_share=0")[0] == 0
        found.append((out / "train.bin").read_bytes())
    assert found[0] == found[1] and data.TokenFile(out, "train").n_docs == 5


def test_a_txt_file_is_one_document_whatever_its_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\n\n\r\ntwo\n")
    assert list(data.read_texts([f"{tmp_path}/a.txt"], ("answer",))) == ["one\n\n\ntwo\n"]


def test_newlines_in_a_row_are_plain_as_in_a_txt_file(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one\r\ntwo\rthree\n"}))
    assert list(data.read_texts([f"{tmp_path}/a.jsonl"], ("text",))) == ["one\ntwo\nthree\n"]


def test_parquet_is_read_like_jsonl(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist([{"text": "one", "n": 1}, {"text": "two", "n": 2}])
    parquet.write_table(table, tmp_path / "a.parquet")
    assert list(data.read_texts([f"{tmp_path}/a.parquet"], ("text",))) == ["one", "two"]
    with pytest.raises(UserError, match="a.parquet:1: --field=url does not name .*'text': 'one'"):
        list(data.read_texts([f"{tmp_path}/a.parquet"], ("url",)))


def test_the_same_document_is_never_in_both_splits_whatever_the_order(tmp_path):
    texts = [f"{i} {i + 1}" for i in range(500)]
    folder_of(tmp_path / "a", texts + texts[::-1], val_share=0.2)
    folder_of(tmp_path / "b", texts[::7] + ["600"], val_share=0.2)
    held = {}
    for name in "ab":
        for split in ("train", "val"):
            file = data.TokenFile(tmp_path / name, split)
            held[name, split] = {tuple(file.document(i)) for i in range(file.n_docs)}
    assert not held["a", "train"] & held["a", "val"]
    assert not held["b", "train"] & held["a", "val"] and not held["a", "train"] & held["b", "val"]
    assert 60 < len(held["a", "val"]) < 140                     # 100 expected, 9 is one sigma


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    tokenizer, ids = numbers(), list(range(1, 900)) * 10
    tokenizer.encode = lambda text, bos: ids
    tracemalloc.start()
    data.prepare((f"{i}" * 5000 for i in range(500)), tokenizer, tmp_path, 0.5, [])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "train.bin").stat().st_size > 2_000_000 and peak < 1_000_000


def test_a_killed_prepare_leaves_no_meta_json(tmp_path):
    def killed():
        yield "1 2 3"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder_of(tmp_path, killed())
    assert not {"meta.json", "train.bin", "val.bin"} & {path.name for path in tmp_path.iterdir()}


def test_a_prepare_killed_over_an_older_one_leaves_it_whole_or_no_meta_json(tmp_path, monkeypatch):
    def kill_at(call):
        calls = iter(range(100))

        def replace(*paths):
            if next(calls) == call:
                raise KeyboardInterrupt
            rename(*paths)
        return replace

    rename = config.os.replace
    for call in range(5):                                       # two .bin, two .idx.npy, meta.json
        folder_of(tmp_path, ["1 2 3"])
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(config.os, "replace", kill_at(call))
            folder_of(tmp_path, ["4 5 6 7"])
        assert not (tmp_path / "meta.json").exists()
    folder_of(tmp_path, ["1 2 3"])
    with pytest.raises(ValueError):
        folder_of(tmp_path, ["4 5", "6 and no number"])
    assert data.TokenFile(tmp_path, "train").document(0).tolist() == [1, 2, 3, 0]


def test_no_text_at_all_is_refused_and_leaves_the_former_corpus(tmp_path):
    folder_of(tmp_path, ["1 2 3"])
    with pytest.raises(UserError, match=f"a test: no text, so {tmp_path} stays as it is"):
        folder_of(tmp_path, [" ", "\n"])
    assert data.TokenFile(tmp_path, "train").document(0).tolist() == [1, 2, 3, 0]


def test_a_folder_never_holds_another_tokenizer_than_that_of_its_tokens(tmp_path):
    """A second name once stayed beside the first, which then read the second's tokens."""
    words, folder = {"words": ["a", "b"], "bos": None, "eos": None}, tmp_path / "out"
    (tmp_path / "words.json").write_text(json.dumps(words))
    tokenizer = data.load_tokenizer(tmp_path)
    data.prepare(["a b"], tokenizer, folder, 0.0, [])
    (folder / "words.json").write_text(json.dumps(words | {"words": ["b", "a"]}))
    with pytest.raises(UserError, match="its tokenizer is another .*: prepare it again"):
        data.TokenFile(folder, "train")
    data.prepare(["a b"], tokenizer, folder, 0.0, [])
    former = {path.name: path.read_bytes() for path in folder.iterdir()}
    tokenizer.name = "tokenizer.json"
    with pytest.raises(UserError, match="holds another tokenizer, words.json: choose another"):
        data.prepare(["b"], tokenizer, folder, 0.0, [])
    assert former == {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------------- tokens on disk to batches

@pytest.mark.parametrize("mode", ["document", "stream"])
def test_a_row_depends_on_seed_step_and_row_alone(documents, mode):
    batches = data.Batches(documents, 6, mode, seed=3)
    together = batches.batch(7, range(16))
    for row in reversed(range(16)):
        alone = data.Batches(documents, 6, mode, seed=3).batch(7, [row])
        assert all(torch.equal(a[row], b[0]) for a, b in zip(together, alone))
    others = [data.Batches(documents, 6, mode, seed=4).batch(7, range(16)),
              batches.batch(8, range(16)), batches.batch(7, range(16, 32))]
    assert not any(torch.equal(together[0], other[0]) for other in others)
    assert not torch.equal(together[0][1:], batches.batch(8, range(15))[0])     # not of step + row


@pytest.mark.parametrize("mode", ["document", "stream"])
def test_resumed_data_equal_uninterrupted_data(documents, mode):
    batches = data.Batches(documents, 6, mode)
    uninterrupted = [batches.batch(step, range(4))[0] for step in range(6)]
    batches = data.Batches(documents, 6, mode)
    resumed = [batches.batch(step, range(4))[0] for step in range(3, 6)]
    assert torch.equal(torch.cat(resumed), torch.cat(uninterrupted[3:]))


@pytest.mark.parametrize("mode", ["document", "stream"])
def test_one_rank_sees_what_two_ranks_with_two_micro_batches_see(documents, mode):
    batches = data.Batches(documents, 6, mode)
    parts = [batches.batch(2, range(first, first + 2)) for first in (0, 2, 4, 6)]
    for one, of_parts in zip(batches.batch(2, range(8)), zip(*parts)):
        assert torch.equal(one, torch.cat(of_parts))


def test_documents_come_whole_or_as_a_window_of_one_document_never_across(documents):
    batches, seen = data.Batches(documents, 6, "document"), set()
    for ids, valid in zip(*batches.batch(0, range(600))):
        window = ids[valid].tolist()
        i = (window[0] - 1) // 20 if window[0] else (window[-2] - 1) // 20
        document = documents.document(i).tolist()
        start = document.index(window[0])
        assert window == document[start:start + 6] and len(window) == min(6, len(document))
        seen.add((i, start))
    assert seen == {(i, start) for i in range(12) for start in range(max(1, i + 2 - 6 + 1))}


def test_padding_is_on_the_right_is_eos_and_is_not_valid(tmp_path):
    for eos, pad in ((9, 9), (None, 0)):
        file = data.TokenFile(folder_of(tmp_path, ["1 2 3"], eos=eos), "train")
        ids_BL, valid_BL = data.Batches(file, 6, "document").batch(0, [0])
        n = file.n_tokens
        assert ids_BL.dtype == torch.int64 and valid_BL.dtype == torch.bool
        assert ids_BL.tolist() == [[1, 2, 3] + [pad] * 3]
        assert valid_BL.tolist() == [[True] * n + [False] * (6 - n)]


def test_the_stream_is_drawn_from_its_first_window_to_its_last(tmp_path):
    file = data.TokenFile(folder_of(tmp_path, ["1 2 3", "4 5", "6"], eos=None), "train")
    ids_BL, valid_BL = data.Batches(file, 4).batch(0, range(100))
    assert valid_BL.all()
    assert {tuple(row) for row in ids_BL.tolist()} == {(1, 2, 3, 4), (2, 3, 4, 5), (3, 4, 5, 6)}


# ---------------------------------------------------------------------- errors

GZ = gzip.compress(b'{"text": "x"}\n' * 9, mtime=0)


def prepared(tmp_path):
    return folder_of(tmp_path / "tokens", ["1 2 3"])


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", b'{"text": "x"}\n{"body": "y", "n": 3}\n',
     "a.jsonl:2: --field=text does not name texts of .'body': 'y', 'n': 3"),
    ("a.jsonl", b'{"text": null}\n',
     "a.jsonl:1: --field=text does not name texts of .'text': None"),
    ("a.jsonl", b'["x"]\n', "a.jsonl:1: --field=text does not name texts"),
    ("a.jsonl", b'"text"\n', "a.jsonl:1: --field=text does not name texts of text"),
    ("none.jsonl", None, "none.jsonl:1: damaged or absent .*No such file"),
    ("a.jsonl", b'{"text": "x"}\n{"text": \n',
     "a.jsonl:2: damaged or absent .Expecting value.*: replace it"),
    ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl:1: damaged .*utf-8"),
    ("a.txt", b"\xff\xfe\x00", "cannot read .*a.txt: it is not UTF-8"),
    ("a.jsonl.gz", GZ[:-9], "a.jsonl.gz:10: damaged .*ended.*: replace it"),
    ("a.jsonl.gz", GZ[:10] + b"\xff" * 40, "a.jsonl.gz:.*invalid.*: replace it"),
    ("a.jsonl.gz", b'{"text": "x"}\n', "a.jsonl.gz:1: .*Not a gzipped file .*: replace it"),
])
def test_bad_text_is_named_in_one_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        list(data.read_texts([f"{tmp_path}/{name}"], ("text",)))
    assert "\n" not in str(error.value)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="a.parquet: reading parquet needs pyarrow: pip"):
        list(data.read_texts([f"{tmp_path}/a.parquet"], ("text",)))


@pytest.mark.parametrize("name, content, message", [
    ("train.bin", b"", "train.bin has 0.0 tokens.*meta.json 4.: prepare it again"),
    ("train.bin", b"1234567", "train.bin has 3.5 tokens.*meta.json 4.: prepare it again"),
    ("train.bin", b"123456", "train.bin has 3.0 tokens.*meta.json 4.: prepare it again"),
    ("train.bin", None, "train.bin.*: prepare it again"),
    ("train.idx.npy", None, "train.idx.npy.*: prepare it again"),
    ("train.idx.npy", b"x", "no whole train split .*: prepare it again"),
    ("train.idx.npy", b"", "no whole train split .*: prepare it again"),
    ("meta.json", None, "meta.json.*: prepare it again"),
    ("meta.json", b"{", "meta.json is not JSON.*: prepare it again"),
    ("meta.json", b"{}", "no whole train split .*dtype is absent.*: prepare it again"),
])
def test_a_damaged_folder_is_named_in_one_line(tmp_path, name, content, message):
    path = prepared(tmp_path) / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        data.TokenFile(tmp_path / "tokens", "train")
    assert "\n" not in str(error.value)


def test_an_index_of_other_tokens_is_refused(tmp_path):
    np.save(prepared(tmp_path) / "train.idx.npy", np.array([0, 3]))
    with pytest.raises(UserError, match="train.bin has 4.0 tokens, its index 3, meta.json 4"):
        data.TokenFile(tmp_path / "tokens", "train")


@pytest.mark.parametrize("index", [
    np.array([0.0, 4.0]), np.array([[0], [4]], np.uint64), np.array([0, 4], object),
    np.array([0, 4], np.uint8), np.array(4), "pipe", "archive"])
def test_an_index_that_is_no_row_of_whole_numbers_is_refused(tmp_path, index):
    path = prepared(tmp_path) / "train.idx.npy"
    path.unlink()
    if isinstance(index, np.ndarray):
        np.save(path, index)
    elif index == "pipe":                                       # reading it would never end
        os.mkfifo(path)
    else:
        with open(path, "wb") as file:
            np.savez(file, np.array([0, 4]))
    with pytest.raises(UserError, match="no whole train split .*: prepare it again"):
        data.TokenFile(tmp_path / "tokens", "train")


def test_a_vocabulary_without_tokens_is_refused(tmp_path):
    path = folder_of(tmp_path, ["1 2 3"], eos=None) / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 0}))
    with pytest.raises(UserError, match="no whole train split .*: prepare it again"):
        data.TokenFile(tmp_path, "train")


def test_windows_that_cannot_be_cut_are_refused(tmp_path):
    folder = prepared(tmp_path)
    with pytest.raises(UserError, match="train.bin has 4 tokens, one window needs 5"):
        data.Batches(data.TokenFile(folder, "train"), 5, "stream")
    with pytest.raises(UserError, match="val.bin has 0.0 tokens.*empty.* another --val_share"):
        data.TokenFile(folder, "val")


@pytest.mark.parametrize("options", [
    "", "--tokenizer=words.json --out=out", "--input=a.txt --out=out", "--input=a.txt",
    "--input=a.txt --tokenizer=words.json", "--input=a.txt --train_tokenizer=new --out=out",
    "--input=a.txt --tokenizer=words.json --out=words.json/under",
    "--input=missing.jsonl --tokenizer=words.json --out=out",
    "--input=a.txt --tokenizer=missing.json --out=out",
    "--input=a.txt --tokenizer=words.json --out=out --field=",
    f"--input=a.txt --train_tokenizer=new --vocab_size={10**30}"])
def test_a_user_mistake_is_one_line_and_exit_status_2(tmp_path, monkeypatch, capsys, options):
    (tmp_path / "words.json").write_text('{"words": ["a"], "bos": null, "eos": null}')
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["data.py", *options.split()])
    with pytest.raises(SystemExit) as end:
        config.run(data.main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1


def test_the_command_writes_a_folder_that_batches_can_be_drawn_from(tmp_path, monkeypatch):
    (tmp_path / "words.json").write_text('{"words": ["a", "b", "."], "bos": null, "eos": "."}')
    (tmp_path / "a.jsonl").write_text('{"text": "a b"}\n' * 3)
    (tmp_path / "b.txt").write_text("b b b")
    monkeypatch.chdir(tmp_path)
    options = "--input=a.jsonl,b.txt --tokenizer=words.json --out=out --val_share=0"
    monkeypatch.setattr(sys, "argv", ["data.py", *options.split()])
    config.run(data.main)
    ids_BL, _ = data.Batches(data.TokenFile("out", "train"), 13).batch(0, [0])
    assert ids_BL.tolist() == [[0, 1, 2] * 3 + [1, 1, 1, 2]]
    assert json.loads((tmp_path / "out/meta.json").read_text())["sources"] == ["a.jsonl", "b.txt"]
    assert (tmp_path / "out/words.json").read_bytes() == (tmp_path / "words.json").read_bytes()
