"""Generation, as a person would use it."""
import io
import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluate
import sample
from checkpoint import save_model
from inference import Generator, row_generators, sample_next
from model import CausalContext
from tokenizer import Tokenizer, load_tokenizer
from tools import show
from tools.gate import Gate
from tools.show import TextStream, Token, take_steps
from toys import texts, tiny_quiet

PROMPT = "ball c : ab cd ce ad now"
BYTES = Tokenizer([b"a", b"b", b"ab", b"ba", b"\n", "é".encode()[:1], "é".encode()[1:],
                   *(bytes([b]) for b in "🎲".encode()), b"."], None, eos=11)


@pytest.fixture(scope="module")
def checkpoint(game, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_model(tiny_quiet(model=dict(vocab_size=20, max_seq_len=64)), folder)
    load_tokenizer(game).copy_to(folder)
    return folder


def gain_of(step):
    """Nats per row: log p of the emitted token with the thought, minus without."""
    gain_BV = step.mixed_logp_BV - step.base_logp_BV
    return gain_BV.gather(1, step.token_B[:, None])[:, 0]


def grow(quiet, ids_BL, length_B, n: int = 6, **options):
    """What `n` steps emit, stacked: token, mixing weight, gain, thought, whether it thinks."""
    stream = Generator(quiet, ids_BL, length_B, max_new_tokens=n, **options)
    steps = [stream.step() for _ in range(n)]
    rows = [(step.token_B, step.mixing_weight_B, gain_of(step), step.thought_BT, step.thinks_B)
            for step in steps]
    return [torch.stack(column, dim=1) for column in zip(*rows)]


def test_without_thoughts_it_is_the_base_model_decoded_greedily():
    quiet, text = tiny_quiet(), texts(1, 5)
    stream = Generator(quiet, text, torch.tensor([5]), max_new_tokens=6, temperature=0, think=False)
    for _ in range(6):
        position_BL = torch.arange(text.shape[1])[None]
        logits_V = quiet.model.head(quiet.model(text, CausalContext(position_BL))[0, -1])
        emitted = stream.step()
        assert int(emitted.token_B) == int(logits_V.argmax()) and float(gain_of(emitted)) == 0
        text = torch.cat((text, emitted.token_B[:, None]), dim=1)


@pytest.mark.parametrize("options", [
    dict(temperature=0), dict(temperature=0, think=False), dict(temperature=0, gate=Gate(2.2)),
    dict(temperature=1.0), dict(top_k=5, temperature=2.0, gate=Gate(2.2)),
    dict(top_p=0.7, temperature=1.0, think=False)])
def test_a_batch_of_unequal_prompts_equals_one_by_one(options):
    quiet, ids_BL, length_B = tiny_quiet(), texts(4, 7), torch.tensor([7, 3, 1, 5])
    together = grow(quiet, ids_BL, length_B, generators=row_generators(3, range(4)), **options)
    for b, n in enumerate(length_B.tolist()):
        alone = grow(quiet, ids_BL[b:b + 1, :n], torch.tensor([n]),
                     generators=row_generators(3, [b]), **options)
        assert together[0][b].tolist() == alone[0][0].tolist()
        for one, other in zip(together, alone):
            torch.testing.assert_close(one[b], other[0], atol=1e-4, rtol=1e-4)
    if "gate" in options:
        assert 0 < together[4].float().mean() < 1           # else it would be no gate


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("marker_ids", [(), (21, 22)])
def test_a_gate_at_0_is_always_and_at_infinity_is_never_token_for_token(temperature, marker_ids):
    quiet, ids_BL, length_B = tiny_quiet(marker_ids=marker_ids), texts(5, 6), torch.full((5,), 6)

    def run(**options):
        return grow(quiet, ids_BL, length_B, temperature=temperature,
                    generators=row_generators(0, range(5)), **options)
    always, never = run(), run(think=False)
    assert not torch.equal(always[0], never[0])
    for gate, (token, weight, gain, *_) in ((Gate(0.0), always), (Gate(torch.inf), never)):
        gated = run(gate=gate)
        assert torch.equal(gated[0], token)
        torch.testing.assert_close(gated[1:3], [weight, gain], atol=1e-4, rtol=1e-4)
    assert run(gate=Gate(0.0))[4].all() and not run(gate=Gate(torch.inf))[4].any()


def test_a_gate_at_0_opens_even_where_the_base_is_certain():
    logits_RV = torch.tensor([[0.0, -torch.inf, -torch.inf], [0.0, -200.0, -200.0]])
    assert Gate(0.0).score(None, logits_RV).tolist() == [0, 0]
    assert Gate(0.0).opens(None, logits_RV).all() and not Gate(1e-9).opens(None, logits_RV).any()


def test_the_gate_sees_the_base_alone_and_what_it_shuts_costs_one_pass():
    quiet, ids_BL, length_B = tiny_quiet(thought_len=4), texts(6, 5), torch.full((6,), 5)
    hidden_BD = quiet.model(ids_BL, CausalContext(torch.arange(5).expand(6, -1)))[:, -1]
    p_BV = quiet.model.head(hidden_BD).softmax(-1)
    entropy_B = -(p_BV * p_BV.log()).sum(-1)
    median = entropy_B.median().item()
    stream, passes = Generator(quiet, ids_BL, length_B, 1, gate=Gate(median)), []
    quiet.model.norm.register_forward_hook(lambda module, args, out: passes.append(out.shape[:2]))
    emitted = stream.step()
    assert emitted.thinks_B.tolist() == (entropy_B >= median).tolist()
    thinkers = int(emitted.thinks_B.sum())
    assert 0 < thinkers < 6 and passes == [(6, 1), *[(thinkers, 1)] * 4, (thinkers, 2)]
    assert (emitted.thought_BT[~emitted.thinks_B] == -1).all()
    assert (emitted.mixing_weight_B[~emitted.thinks_B] == 0).all()
    passes.clear()
    Generator(quiet, ids_BL, length_B, 1, gate=Gate(99.0)).step()
    assert passes == [(6, 5), (6, 1)]                       # the prompt, and one token


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (3, 1.0), (0, 0.6), (2, 0.99), (1, 1.0),
                                          (0, 1e-9)])
def test_a_visible_token_has_the_probability_that_top_k_and_top_p_leave_it(top_k, top_p):
    logits_V, temperature, n = torch.tensor([0.3, 2.0, -torch.inf, 1.0, 1.5, -1.0]), 0.7, 10_000
    p = np.exp(logits_V.numpy() / temperature)
    order, kept = np.argsort(-p), np.zeros(6)
    for rank, i in enumerate(order):
        before = p[order[:rank]].sum() / p.sum()
        kept[i] = p[i] * (before < top_p and (top_k == 0 or rank < top_k))
    uniform_R = (torch.arange(n) + 0.5) / n
    found = sample_next(logits_V.expand(n, -1), uniform_R, temperature, top_k, top_p)
    assert np.abs(torch.bincount(found, minlength=6).numpy() / n - kept / kept.sum()).max() < 2e-4
    edges = sample_next(logits_V.expand(2, -1), torch.tensor([0, 1 - 2**-24]), temperature,
                           top_k, top_p)
    assert (kept[edges.numpy()] > 0).all()


@pytest.mark.parametrize("thought_len", [0, 1, 4])
def test_a_token_costs_one_pass_more_than_its_thought_has_tokens(thought_len):
    quiet, passes = tiny_quiet(thought_len=thought_len), []
    stream = Generator(quiet, texts(1, 9), torch.tensor([9]), max_new_tokens=1, temperature=0)
    quiet.model.norm.register_forward_hook(lambda module, args, out: passes.append(out.shape[1]))
    emitted = stream.step()
    assert emitted.thought_BT.shape == (1, thought_len)
    assert len(passes) == max(2, thought_len + 1) and sum(passes) == thought_len + 3


@pytest.mark.parametrize("think", [True, False])
def test_markers_are_never_emitted_nor_thought(think):
    quiet = tiny_quiet(marker_ids=(21, 22))
    with torch.no_grad():
        quiet.model.head.weight[21:] *= 100                         # the likeliest, if they could
    stream = Generator(quiet, texts(4, 5), torch.full((4,), 5), max_new_tokens=8,
                       temperature=1.0, think=think)
    for _ in range(8):
        emitted = stream.step()
        assert (emitted.token_B < 21).all() and (emitted.thought_BT < 21).all()


# -------------------------------------------------------------------------------- tokens to text

@pytest.mark.parametrize("stop", ["", "b", "aba", "\n", "é", "🎲", "bab\n", "a🎲b"])
def test_streamed_text_never_breaks_a_character_nor_shows_a_part_of_the_stop_string(stop):
    random = np.random.default_rng(0)
    pieces = [*([i] for i in range(11)), [5, 6], [7, 8, 9, 10]]
    for _ in range(300):
        ids = sum((pieces[i] for i in random.integers(len(pieces), size=random.integers(1, 9))), [])
        whole = BYTES.decode(ids)
        expected = whole.split(stop)[0] if stop else whole
        stream = TextStream(BYTES, [], stop=stop)
        for i in ids:
            if not stream.ended:
                stream.push(Token(i))
            assert expected.startswith("".join(token.text for token in stream.tokens))
        stream.end()
        assert "".join(token.text for token in stream.tokens) == expected


def test_the_end_of_text_ends_it_and_is_not_shown():
    stream = TextStream(BYTES, [0])
    for i in (1, 11):
        stream.push(Token(i))
    assert [token.text for token in stream.tokens] == ["b"]
    assert stream.ended and not stream.waiting


@pytest.mark.parametrize("n_true", [1, 3])
@pytest.mark.parametrize("gate", [None, Gate(2.2)])
def test_a_generated_text_read_again_under_teacher_forcing_shows_the_same(gate, n_true, game):
    quiet, tokenizer = tiny_quiet(model=dict(vocab_size=20), n_true=n_true), load_tokenizer(game)
    tokenizer.eos, ids = None, tokenizer.encode(PROMPT)
    grown = Generator(quiet, torch.tensor([ids]), torch.tensor([len(ids)]), 9, temperature=0,
                      gate=gate)
    stream = TextStream(tokenizer, ids)
    for _ in take_steps(grown, [stream], 9):
        pass
    wrote = stream.tokens
    again = sample.teacher_forced(quiet, tokenizer, ids + [t.id for t in wrote], gate=gate)
    read = again.prompt + again.tokens
    assert "".join(t.text for t in read) == " ".join([PROMPT, *(t.text.strip() for t in wrote)])
    assert (gate is None) == all(t.thinks for t in wrote)
    for one, other in zip(wrote, read[len(ids):]):
        assert (one.id, one.text, one.thought, one.thinks) == (
            other.id, other.text, other.thought, other.thinks)
        numbers = ("gain", "logp", "entropy", "mixing_weight")
        assert [getattr(one, n) for n in numbers] == pytest.approx(
            [getattr(other, n) for n in numbers], abs=1e-4)
        for ours, theirs in ((one.base, other.base), (one.mixed, other.mixed)):
            probability = {(i, text): p for i, text, p in ours}
            assert probability == pytest.approx({(i, text): p for i, text, p in theirs}, abs=1e-4)
    if n_true == 1:                       # the reward of one true token is its gain
        assert [t.reward for t in read if t.thinks] == pytest.approx(
            [t.gain for t in read if t.thinks], abs=1e-4)


def test_a_model_that_cannot_think_reads_a_text_without_thoughts(game):
    model, tokenizer = tiny_quiet(model=dict(vocab_size=20)).model, load_tokenizer(game)
    stream = sample.teacher_forced(model, tokenizer, tokenizer.encode(PROMPT))
    assert len(stream.tokens) == len(tokenizer.encode(PROMPT)) - 1
    for token in stream.tokens:
        assert token.gain == 0 and not token.thinks and token.base == token.mixed != ()


# ------------------------------------------------------------------------------------ as it is used

def test_however_it_is_shown_the_seed_decides_the_text(call, checkpoint, tmp_path):
    argv = (f"--checkpoint={checkpoint}", f"--prompt={PROMPT}", "--max_new_tokens=6",
            "--temperature=1", "--seed=3")
    plain = call(sample, *argv)[1]
    assert plain == call(sample, *argv)[1] == call(sample, *argv, f"--html={tmp_path}/a.html")[1]
    assert plain != call(sample, *argv[:-1], "--seed=4")[1]
    shown = call(sample, *argv, "--show-thoughts")[1]
    rows = [line.split() for line in shown.splitlines() if line.startswith("    ")]
    assert rows[0][0] == "token" and " ".join([PROMPT, *(row[0] for row in rows[1:])]) == (
        plain.strip())
    assert all(len(row[3:]) == 3 for row in rows[1:])


def test_a_sample_is_the_same_beside_others_and_they_are_shown_in_turn(call, checkpoint):
    argv = (f"--checkpoint={checkpoint}", f"--prompt={PROMPT}", "--max_new_tokens=9",
            "--temperature=1")
    three = call(sample, *argv, "--samples=3")[1].splitlines()
    assert three[::2] == [f"--- {n} of 3" for n in (1, 2, 3)] and len(set(three)) == 6
    assert three[1] + "\n" == call(sample, *argv)[1]
    assert call(sample, *argv, "--samples=2")[1].splitlines() == [
        line.replace("of 3", "of 2") for line in three[:4]]
    assert all(line.startswith(PROMPT) for line in three[1::2])


def standard_input(content: bytes):
    return io.TextIOWrapper(io.BytesIO(content))


def test_a_prompt_may_come_from_standard_input(call, checkpoint, monkeypatch):
    argv = (f"--checkpoint={checkpoint}", "--max_new_tokens=4")
    monkeypatch.setattr("sys.stdin", standard_input(PROMPT.encode() + b"\n"))
    assert call(sample, *argv)[1] == call(sample, *argv, f"--prompt={PROMPT}")[1]


def test_a_given_text_is_shown_whole_with_the_reward_of_each_thought(call, checkpoint, tmp_path):
    (tmp_path / "text.txt").write_text(PROMPT + " a .\n")
    argv = f"--checkpoint={checkpoint}", f"--text-file={tmp_path}/text.txt"
    rows = call(sample, *argv, f"--html={tmp_path}/a.html")[1].splitlines()
    assert rows[:2] == [show.NOTE, "ball"]
    assert " ".join(["ball", *(row.split()[0] for row in rows[3:])]) == PROMPT + " a ."
    assert all(len(row.split()) == 6 for row in rows[3:])
    html = (tmp_path / "a.html").read_text()
    assert html.count('tabindex="0"') == html.count("reward ahead") == len(rows) - 3


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_in_a_terminal_the_text_flows_around_its_thoughts(monkeypatch):
    stream = TextStream(BYTES, [1])
    for text, gain in ((" a", 0.5), ("\x1b]\u202e", -0.5), (" c", 0.05)):
        stream.tokens.append(Token(0, text, True, "x\n\x1b[31m", 0.25, gain))
    stream.ended = True
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for colour in (True, False):
        out = Terminal()
        monkeypatch.setattr("sys.stdout", out)
        show.show([stream], None, thoughts=True)
        plain = out.getvalue()
        for code in ("\x1b[32m", "\x1b[33m", "\x1b[2m", "\x1b[0m"):
            assert (code in plain) == colour
            plain = plain.replace(code, "")
        thought = r"x\n\x1b[31m w 0.25"    # neither thought nor text reach the terminal's controls
        assert plain == (f"{show.NOTE}\nb [{thought} +0.50] a [{thought} -0.50]\\x1b]\\u202e "
                         f"[{thought} +0.05] c\n")
        monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal()
    out.isatty = lambda: False
    monkeypatch.setattr("sys.stdout", out)
    show.show([stream], None)
    assert out.getvalue() == "b a\x1b]\u202e c\n"             # a file has the text itself


@pytest.mark.slow
def test_a_person_at_a_terminal_asks_again_and_again(checkpoint):
    parent, child = pty.openpty()
    command = [sys.executable, "sample.py", f"--checkpoint={checkpoint}", "--max_new_tokens=3"]
    person = subprocess.Popen(command, stdin=child, stdout=child, stderr=child,
                              cwd=Path(__file__).parents[1])
    os.close(child)

    def read_until(words: bytes):
        seen, deadline = b"", time.monotonic() + 60
        while words not in seen:
            assert select.select([parent], [], [], deadline - time.monotonic())[0], seen
            seen += os.read(parent, 4096)
        return seen
    read_until(b"> ")
    os.write(parent, b"ball c : ab\n")
    assert read_until(b"\n> ").count(b"ball c : ab") == 2              # typed, and continued
    os.write(parent, b"ball z\n")
    assert b"error: 'z' is not one of the 20 words" in read_until(b"> ")
    os.write(parent, b"ball a\n")
    assert b"ball a" in read_until(b"\n> ")
    os.write(parent, b"\x04")                                           # Ctrl-D
    assert person.wait(timeout=30) == 0
    os.close(parent)


def test_a_mistake_is_one_line(call, checkpoint, game, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", standard_input(b""))
    save_model(tiny_quiet(model=dict(vocab_size=20)).model, tmp_path / "base")
    load_tokenizer(game).copy_to(tmp_path / "base")
    given, long = f"--checkpoint={checkpoint}", " ".join([PROMPT] * 9)
    base, text = f"--checkpoint={tmp_path}/base", tmp_path / "text.txt"
    for name, content in (("text.txt", long.encode()), ("latin.txt", b"\xe9"), ("one.txt", b"ball"),
                          ("gate.json", b'{"threshold": 1, "probe": [0.5], "bias": 0}'),
                          ("other.json", b'{"threshold": 1, "probe": [0.5], "bias": 0, '
                                         b'"end_thought": [0.5]}')):
        (tmp_path / name).write_bytes(content)
    for argv, words in (
            ([given], "the prompt is empty"), ([given, "--prompt="], "the prompt is empty"),
            ([given, f"--prompt={long}"], "context is 64 with 5 kept for thoughts"),
            ([given, f"--text-file={text}"], "exceed the context of 64"),
            ([given, f"--text-file={tmp_path}/one.txt"], "the text is 1 token, and one predicts no other"),
            ([given, f"--text-file={tmp_path}/latin.txt"], "latin.txt: it is not UTF-8 text"),
            ([given, f"--text-file={tmp_path}/none.txt"], "none.txt"),
            ([given, f"--text-file={text}", "--prompt=ball"], "give one of"),
            ([given, "--prompt=ball z"], "'z'"),
            ([base, "--prompt=ball", "--show-thoughts"], "has no thoughts to show"),
            ([base, "--prompt=ball", f"--html={tmp_path}/a.html"], "has no thoughts to show"),
            ([base, "--prompt=ball", "--think=gate", "--gate=1"], "has no thoughts to show"),
            ([given, "--think=sometimes"], "is not one of always, never, gate"),
            ([given, "--think=gate"], "need each other"), ([given, "--gate=1"], "need each other"),
            ([given, "--prompt=ball", "--think=gate", "--gate=x"], "cannot read x"),
            ([given, "--prompt=ball", "--think=gate", f"--gate={tmp_path}/gate.json"],
             "gate.json: end_thought is absent"),
            ([given, "--prompt=ball", "--think=gate", f"--gate={tmp_path}/other.json"],
             "other.json is not a gate of this checkpoint: fit one"),
            ([given, "--top_p=0"], "not above 0"),
            ([given, "--temperature=-1"], "is below 0"),
            ([given, "--max_new_tokens=0"], "is below 1"),
            ([f"--checkpoint={tmp_path}/none", "--prompt=ball"], "none is missing")):
        status, _, stderr = call(sample, *argv)
        assert status == 2 and words in stderr and stderr.count("\n") == 1, (argv, stderr)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_weights_stop_with_one_line_instead_of_junk(call, game, tmp_path, temperature):
    quiet = tiny_quiet(model=dict(vocab_size=20))
    quiet.model.layers[1].ffn.down.weight.data[0, 0] = torch.nan
    save_model(quiet, tmp_path, tokenizer=load_tokenizer(game))
    status, out, error = call(sample, f"--checkpoint={tmp_path}", "--prompt=ball a",
                              f"--temperature={temperature}")
    assert status == 2 and "the model predicts nan" in error
    status, _, error = call(evaluate, f"--checkpoint={tmp_path}", f"--data={game}/without_reasoning")
    assert status == 2 and "the model predicts nan" in error


def test_a_filler_model_shows_the_markers_that_it_reads_and_no_tokens(call, game, tmp_path):
    quiet = tiny_quiet(model=dict(vocab_size=20, max_seq_len=64), filler=True)
    save_model(quiet, tmp_path, tokenizer=load_tokenizer(game))
    (tmp_path / "a.txt").write_text("ball a : ab")
    for option in ("--prompt=ball a", f"--text-file={tmp_path / 'a.txt'}"):
        status, out, _ = call(sample, f"--checkpoint={tmp_path}", option, "--show-thoughts",
                              "--max_new_tokens=2")
        assert status == 0
        thoughts = [line.split()[3:] for line in out.splitlines() if "startthought" in line]
        assert len(thoughts) >= 2
        assert all("".join(thought) == 3 * "<|startthought|>" for thought in thoughts)


def test_bf16_on_a_cpu_says_what_fp32_says_but_for_rounding(call, checkpoint, game):
    """As a 7B model on a laptop of 24 GB needs; the measures of an evaluation barely move."""
    argv = f"--checkpoint={checkpoint}", f"--prompt={PROMPT}", "--max_new_tokens=3", "--device=cpu"
    assert call(sample, *argv, "--dtype=bfloat16")[0] == 0
    means = {}
    for dtype in ("float32", "bfloat16"):
        out = checkpoint.parent / f"{dtype}.json"
        status, _, stderr = call(
            evaluate, f"--checkpoint={checkpoint}", f"--data={game}/without_reasoning",
            "--texts=20", f"--dtype={dtype}", "--device=cpu", f"--out={out}")
        assert status == 0, stderr
        means[dtype] = json.loads(out.read_text())["nll_mixed"]["mean"]
    assert means["bfloat16"] != means["float32"]
    assert means["bfloat16"] == pytest.approx(means["float32"], rel=0.02)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is one")
def test_a_device_that_is_not_there_is_refused(call, checkpoint):
    for script, source in (sample, "--prompt=ball"), (evaluate, "--data=x"):
        status, _, stderr = call(script, f"--checkpoint={checkpoint}", source, "--device=mps")
        assert status == 2 and "--device=mps, but this PyTorch sees no such device" in stderr
