"""Generation, as a person would use it."""
import io

import pytest
import torch

import sample
import tokenizer as tokenizers
import weights
from model import CausalContext
from sample import Generator
from toys import texts, tiny_quiet

PROMPT = "ball c : ab cd ce ad now"


@pytest.fixture(scope="module")
def checkpoint(game, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    weights.save(tiny_quiet(model=dict(vocab_size=20, max_seq_len=64)), folder)
    tokenizers.load(game).copy_to(folder)
    return folder


def test_without_thoughts_it_is_the_base_model_decoded_greedily():
    quiet, text = tiny_quiet(), texts(1, 5)
    stream = Generator(quiet, text, torch.tensor([5]), max_new=6, temperature=0, think=False)
    for _ in range(6):
        position_BL = torch.arange(text.shape[1])[None]
        logits_V = quiet.model.head(quiet.model(text, CausalContext(position_BL))[0, -1])
        emitted = stream.step()
        assert int(emitted.token_B) == int(logits_V.argmax()) and float(emitted.gain_B) == 0
        text = torch.cat((text, emitted.token_B[:, None]), dim=1)


@pytest.mark.parametrize("think", [True, False])
def test_a_batch_of_unequal_prompts_equals_one_by_one(think):
    quiet, ids_BL, length_B = tiny_quiet(), texts(3, 7), torch.tensor([7, 3, 1])

    def run(ids, lengths):
        stream = Generator(quiet, ids, lengths, max_new=5, temperature=0, think=think)
        return torch.stack([stream.step().token_B for _ in range(5)], dim=1)
    together = run(ids_BL, length_B)
    for b, n in enumerate(length_B.tolist()):
        assert together[b].tolist() == run(ids_BL[b:b + 1, :n], torch.tensor([n]))[0].tolist()


@pytest.mark.parametrize("thought_len", [0, 1, 4])
def test_a_token_costs_one_pass_more_than_its_thought_has_tokens(thought_len):
    quiet, passes = tiny_quiet(thought_len=thought_len), []
    stream = Generator(quiet, texts(1, 9), torch.tensor([9]), max_new=1, temperature=0)
    quiet.model.norm.register_forward_hook(lambda module, args, out: passes.append(out.shape[1]))
    emitted = stream.step()
    assert emitted.thought_BT.shape == (1, thought_len)
    assert len(passes) == max(2, thought_len + 1) and sum(passes) == thought_len + 3


def test_markers_are_never_emitted_nor_thought():
    quiet = tiny_quiet(marker_ids=(21, 22))
    with torch.no_grad():
        quiet.model.head.weight[21:] *= 100                         # the likeliest, if they could
    stream = Generator(quiet, texts(4, 5), torch.full((4,), 5), max_new=8, temperature=1.0)
    for _ in range(8):
        emitted = stream.step()
        assert (emitted.token_B < 21).all() and (emitted.thought_BT < 21).all()


def test_showing_thoughts_changes_no_token(call, checkpoint):
    argv = (f"--checkpoint={checkpoint}", f"--prompt={PROMPT}", "--max_new=6", "--temperature=1",
            "--seed=3")
    plain = call(sample, *argv)[1]
    shown = call(sample, *argv, "--show-thoughts")[1]
    assert plain == call(sample, *argv)[1]                               # the seed decides
    tokens = [line.split()[0] for line in shown.splitlines() if line.startswith("    ")]
    assert tokens[0] == "token" and " ".join([PROMPT, *tokens[1:]]) == plain.strip()
    thoughts = [line.split()[3:] for line in shown.splitlines() if line.startswith("    ")][1:]
    assert all(len(thought) == 3 for thought in thoughts)


def test_the_prompt_may_come_from_standard_input(call, checkpoint, monkeypatch):
    argv = (f"--checkpoint={checkpoint}", "--max_new=4")
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT + "\n"))
    assert call(sample, *argv)[1] == call(sample, *argv, f"--prompt={PROMPT}")[1]


def test_a_mistake_is_one_line(call, checkpoint, game, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    weights.save(tiny_quiet(model=dict(vocab_size=20)).model, tmp_path / "base")
    tokenizers.load(game).copy_to(tmp_path / "base")
    given, long = f"--checkpoint={checkpoint}", " ".join([PROMPT] * 9)
    for argv, words in (([given], "the prompt is empty"),
                        ([given, f"--prompt={long}"], "context is 64 with 5 kept for thoughts"),
                        ([given, "--prompt=ball z"], "'z'"),
                        ([f"--checkpoint={tmp_path}/base", "--prompt=ball", "--show-thoughts"],
                         "has no thoughts to show"),
                        ([given, "--show-thoughts", "--no-thoughts"], "contradict"),
                        ([f"--checkpoint={tmp_path}/none", "--prompt=ball"], "none is missing")):
        status, _, stderr = call(sample, *argv)
        assert status == 2 and words in stderr and stderr.count("\n") == 1
