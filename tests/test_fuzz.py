"""Files that are JSON, but not as they should be: one line, or what another program reads in them.

Each case changes a good file at random (types, depth, sizes, unicode). Nothing may end in a
traceback or take five seconds; what loads predicts as transformers does, and gives the ids of
`tokenizers`, where these load it, or else as the good file did.
"""
import copy
import json
import os
import random
import shutil
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from checkpoint import load_model, read_config, save_model
from config import UserError
from data import Batches, TokenFile, read_rows, read_texts
from formats.huggingface import KEYS
from layouts import save_mistral
from model import CausalContext
from tasks.bootstrap import ResultsFile, paired_differences
from tasks.qa import read_questions
from test_tokenizer import TEXTS, WORDS, tekken_file, train_byte_level
from thoughts import base_model, every_position
from tokenizer import load_tokenizer
from tools.figures import by_name, logged
from tools.gate import read_gate
from toys import tiny_mistral, tiny_quiet

DEEP = [[[[{"a": [[[[0]]]]}]]]]
ODD = [None, True, False, 0, 1, -1, 2, 3, 7, 64, 1.5, -0.5, 1e-40, 1e308, 10**30, float("nan"),
       float("inf"), "", "false", "5", "../x", "/etc/passwd", ".", "model.safetensors", "\ud800",
       "\u202e", "\x00", "x" * 5000, [], [1], ["x"], [None], {}, {"a": {}}, {"": 1}, DEEP]
SHAPES = {"mistral": dict(windows=(3,)), "qwen2": dict(qkv_bias=True),
          "llama3": dict(rope_type="llama3", rope_factor=8.0, rope_old_context=16)}


def changed(rng, value, n: int = 1):
    """A copy with `n` values replaced, deleted, or put one level deeper."""
    root = [copy.deepcopy(value)]
    for _ in range(n):
        places = [(root, 0)]
        for holder, key in places:                # grows on the way: every place in the tree
            inner = holder[key]
            if isinstance(inner, (dict, list)):
                keys = list(inner if isinstance(inner, dict) else range(len(inner)))
                places += [(inner, k) for k in rng.sample(keys, min(8, len(keys)))]
        holder, key = rng.choice(places)
        match rng.randrange(4):
            case 0 if holder is not root:
                del holder[key]
            case 1:
                holder[key] = [holder[key]]
            case _:
                holder[key] = copy.deepcopy(rng.choice(ODD))
    return root[0]


class Hang(BaseException):
    pass


def outcome(read):
    """What `read` returns; None if it refuses in one line, within five seconds."""
    def too_long(*_):
        raise Hang
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(5)
    try:
        return read()
    except UserError as error:
        assert str(error).strip()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def cases(name: str, good, n: int, at_once=(1, 1, 2)):
    """Yield n changed copies of `good`, as text; some are no whole JSON."""
    rng = random.Random(name)
    for i in range(n):
        value = changed(rng, good, rng.choice(at_once))
        if value == good:
            continue
        text = json.dumps(value)
        yield text[:rng.randrange(len(text))] if i % 20 == 0 else text


def logits(model):
    ids_BL = torch.arange(14).reshape(2, 7) % 20
    base = base_model(model)
    with torch.no_grad():
        return base.head(base(ids_BL, CausalContext(every_position(ids_BL, last=True))))


def theirs(folder):
    """The logits of transformers, or None if it does not read the folder."""
    library = pytest.importorskip("transformers")
    library.logging.set_verbosity(50)
    try:
        with warnings.catch_warnings(action="ignore"), torch.no_grad():
            model = library.AutoModelForCausalLM.from_pretrained(
                folder, attn_implementation="eager", dtype=torch.float32)
            return model(torch.arange(14).reshape(2, 7) % 20).logits
    except Exception:                             # whatever it is: it says no
        return None


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_a_config_loads_as_transformers_reads_it_or_not_at_all(tmp_path, name):
    model = tiny_mistral(max_seq_len=64, **SHAPES[name])
    save_model(model, tmp_path)
    path, loaded = tmp_path / "config.json", 0
    for text in cases(name, json.loads(path.read_text()), 300):
        path.write_text(text)
        found = outcome(lambda: load_model(tmp_path))
        if found is not None:
            loaded += 1
            expected = theirs(tmp_path)
            expected = logits(model) if expected is None else expected
            assert torch.allclose(logits(found), expected, atol=1e-4), text
    assert 10 < loaded < 140


def test_a_params_json_gives_the_numbers_in_it_or_none(tmp_path):
    save_mistral(tiny_mistral(windows=(3,)), tmp_path)
    path, loaded = tmp_path / "params.json", 0
    for text in cases("params", json.loads(path.read_text()), 300):
        path.write_text(text)
        if outcome(lambda: load_model(tmp_path)) is not None:
            loaded += 1
            given, (shape, _) = json.loads(text), read_config(tmp_path)
            for ours, _, key in KEYS:
                value = given.get(key)
                assert value is None or (value == getattr(shape, ours) and value is not True), text
    assert loaded > 10


def test_settings_of_thoughts_are_those_in_the_file_or_it_is_refused(tmp_path):
    quiet = tiny_quiet(marker_ids=(21, 22))
    save_model(quiet, tmp_path)
    path = tmp_path / "config.json"
    good, loaded = json.loads(path.read_text()), 0
    for text in cases("thoughts", good["quiet_star"], 300):
        section = outcome(lambda: json.loads(text)) if text.endswith("}") else None
        path.write_text(json.dumps(good | {"quiet_star": section}))
        found = outcome(lambda: load_model(tmp_path))
        if found is not None and section:
            loaded += 1
            quiet = found.config
            for name, value in section.items():
                own = getattr(quiet, name)
                own = list(own) if isinstance(own, tuple) else own
                same = value == own or (type(value) in (int, str) and own == float(value))
                assert value is None or same, text
    assert loaded > 10


def test_an_index_leads_to_the_same_weights_or_nowhere(tmp_path):
    model = tiny_mistral()
    save_model(model, tmp_path / "good", shard_bytes=4000)
    path = tmp_path / "good" / "model.safetensors.index.json"
    (tmp_path / "x").write_bytes((tmp_path / "good" / "config.json").read_bytes())
    for text in cases("index", json.loads(path.read_text()), 200):
        path.write_text(text)
        found = outcome(lambda: load_model(tmp_path / "good"))
        assert found is None or torch.equal(logits(found), logits(model)), text


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2", "smollm2"])
def test_a_tokenizer_json_gives_the_ids_of_tokenizers_or_none(tmp_path, kind):
    library = pytest.importorskip("tokenizers")
    good = json.loads(train_byte_level(kind).to_str())
    path, texts = tmp_path / "tokenizer.json", [text for text in TEXTS if "\ufffd" not in text]
    for text in cases(kind, good, 300):
        path.write_text(text)
        found = outcome(lambda: load_tokenizer(path))
        if found is None:
            continue
        try:
            own = library.Tokenizer.from_str(text)
        except Exception:
            own = library.Tokenizer.from_str(json.dumps(good))
        own.no_truncation()
        for sample in texts:
            expected = own.encode(sample, add_special_tokens=False).ids
            assert found.encode(sample) == expected, (sample, text)


@pytest.mark.parametrize("name, good", [("words.json", WORDS), ("tekken.json", tekken_file())])
def test_other_vocabularies_lose_no_text_or_are_refused(tmp_path, name, good):
    path = tmp_path / name
    for text in cases(name, good, 200):
        path.write_text(text)
        found = outcome(lambda: load_tokenizer(path))
        for sample in (["a ball : b ."] if name == "words.json" else TEXTS) if found else ():
            ids = outcome(lambda: found.encode(sample))
            assert ids is None or found.decode(ids) == sample, text


def test_rows_are_read_or_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    gsm8k = {"question": "How many?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}
    choices = [{"label": label, "text": label} for label in "ABCDE"]
    csqa = {"answerKey": "B", "question": {"stem": "Where?", "choices": choices}}
    for name, good in (("gsm8k", gsm8k), ("commonsense_qa", csqa)):
        for text in cases(name, good, 300):
            path.write_text(json.dumps(good) + "\n" + text + "\n")
            outcome(lambda: read_questions(name, str(path)))
            outcome(lambda: [*read_texts([str(path)], ["question", "answer"])])
            outcome(lambda: [*read_rows(str(path))])


def test_what_the_project_wrote_itself_is_checked_too(tmp_path, game, call, monkeypatch):
    """meta.json, state.json, gate.json and results."""
    folder, quiet = game / "without_reasoning", tiny_quiet()
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    data = tmp_path / "data"
    data.mkdir()
    for name, content in kept.items():
        (data / name).write_bytes(content)
    for text in cases("meta", json.loads(kept["meta.json"]), 200):
        (data / "meta.json").write_text(text)
        batch = outcome(lambda: Batches(TokenFile(data, "train"), 8).batch(0, range(4)))
        assert batch is None or 0 <= batch[0].min() <= batch[0].max() < 20
    gate = dict(threshold=0.5, probe=[0.1] * 16, bias=0.0, end_thought=quiet.end_thought.tolist())
    for text in cases("gate", gate, 200):
        (tmp_path / "gate.json").write_text(text)
        found = outcome(lambda: read_gate(str(tmp_path / "gate.json"), quiet))
        assert found is None or found.probe_D.shape == (16,)
    result = {"nll_base": {"mean": 1.0}, "dataset_id": {"task": "none"},
              "clusters": {"count": [2.0, 3.0], "nll_base": [1.0, 2.0]}}
    for text in cases("result", result, 200):
        path = tmp_path / "0-base.json"
        path.write_text(text)
        outcome(lambda: by_name([str(path)]))
        outcome(lambda: paired_differences(result, str(path)))


def test_lines_that_a_run_or_an_evaluation_appended_are_checked_too(tmp_path):
    """log.jsonl, and answers to questions: only whole rows of one kind are used."""
    rows = [{"step": step, "loss": 0.5, "eval/accuracy/base": 0.25} for step in range(3)]
    settings = {"task": "gsm8k", "votes": 0}
    answers = [{"number": n, "settings": settings, "scores": {"nll_base": [1.0, 2.0]}}
               for n in range(3)]
    path = tmp_path / "log.jsonl"
    for good in (rows, answers):
        for text in cases("lines", good[1], 300):
            lines = [json.dumps(good[0]), text, json.dumps(good[2])]
            path.write_text("\n".join(lines) + "\n")
            log = outcome(lambda: train.RunLog(tmp_path, 5, is_main=True))
            found = outcome(lambda: logged([str(path)], "eval/accuracy/base"))
            assert found is None or found[1].dtype == float
            path.write_text("\n".join(lines) + "\n")
            found = outcome(lambda: ResultsFile(path, settings))
            shapes = {np.array(row["scores"]["nll_base"]).shape for row in found.rows.values()} \
                if found else {(2,)}
            assert shapes <= {(2,)}
            del log


def test_a_state_resumes_the_run_that_it_describes_or_none(tmp_path, game, call):
    options = (f"--data={game / 'without_reasoning'}", f"--out={tmp_path}/run", "--dim=16",
               "--n_layers=1", "--n_heads=2", "--n_kv_heads=1", "--ffn_dim=16", "--steps=1",
               "--batch_size=2", "--seq_len=12", "--objective=plain", "--eval_every=0")
    assert call(train, *options)[0] == 0
    run, kept = tmp_path / "run", tmp_path / "kept"
    run.rename(kept)
    state = Path("step-000001", "state.json")
    for text in cases("state", json.loads((kept / state).read_text()), 300):
        shutil.copytree(kept, run)         # with more steps a run goes on, and its first save goes
        (run / state).write_text(text)
        status, _, error = call(train, "--init_from=resume", f"--out={run}")
        assert status in (0, 2) and len(error.splitlines()) <= 1, text
        shutil.rmtree(run)
    kept.rename(run)
    assert call(train, "--init_from=resume", f"--out={run}")[0] == 0


def test_a_pipe_or_a_million_layers_is_no_hang(tmp_path):
    save_model(tiny_mistral(), tmp_path)
    path = tmp_path / "config.json"
    given = json.loads(path.read_text())
    for key in ("num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size"):
        for size in (10**6, 10**9, 10**30):
            path.write_text(json.dumps(given | {key: size}))
            assert outcome(lambda: load_model(tmp_path)) is None
    path.unlink()
    os.mkfifo(path)
    assert outcome(lambda: load_model(tmp_path)) is None


@pytest.mark.slow
def test_a_gguf_file_with_changed_bytes_is_read_or_refused_in_one_line(tmp_path):
    pytest.importorskip("gguf")
    from test_gguf import FAMILIES, their_model, transformers, write
    family, options = FAMILIES["mistral window"]
    path = tmp_path / "model.gguf"
    write(path, their_model(transformers, family, **options))
    good, rng, refused = path.read_bytes(), random.Random("gguf"), 0
    n_header = good.index(b"blk.1.ffn_down") + 200         # names, numbers and sizes come first
    for i in range(300):
        bad = bytearray(good)
        for _ in range(rng.choice((1, 1, 4))):
            bad[rng.randrange(n_header)] = rng.choice((0, 1, 2, 255, rng.randrange(256)))
        name = tmp_path / f"{i}.gguf"                      # files that were opened are remembered
        name.write_bytes(bad)
        refused += outcome(lambda: load_model(name)) is None
        name.unlink()
    assert 100 < refused < 300
