"""Every layout, base or thinking, goes through every script."""
import json

import pytest
import torch

import eval as evaluation
import sample
import tokenizer as tokenizers
import train
import weights
from toys import tiny_quiet

THINKING = ("ours", "official")


@pytest.fixture(params=["ours", "base", "official", "mistral"])
def checkpoint(request, game, tmp_path):
    """A folder in one of the layouts, of a model with the shell game's 20 words."""
    folder = tmp_path / request.param
    weights.save(tiny_quiet(model=dict(vocab_size=20, max_seq_len=128)), folder, request.param,
                 tokenizer=tokenizers.load(game))
    return folder


def test_sampling(call, checkpoint):
    argv = (f"--checkpoint={checkpoint}", "--prompt=ball c : ab cd", "--max_new_tokens=4")
    status, plain, stderr = call(sample, *argv)
    assert (status, stderr) == (0, "") and plain.startswith("ball c : ab cd")
    status, shown, stderr = call(sample, *argv, "--show-thoughts")
    if checkpoint.name in THINKING:
        assert status == 0 and "weight" in shown
    else:
        assert status == 2 and "has no thoughts to show" in stderr
    assert call(sample, *argv, "--think=never")[0] == 0


def test_evaluating(call, checkpoint, game, tmp_path):
    argv = (f"--checkpoint={checkpoint}", f"--data={game}/silent", "--texts=10")
    status, _, stderr = call(evaluation, *argv, f"--out={tmp_path}/told.json")
    told = json.loads((tmp_path / "told.json").read_text())
    assert (status, stderr) == (0, "") and told["tokens"] == 10
    assert (told["nll_mixed-nll_base"]["mean"] != 0) == (checkpoint.name in THINKING)


@pytest.mark.parametrize("objective", ["plain", "quiet"])
def test_training(call, checkpoint, game, tmp_path, objective):
    status, stdout, stderr = call(
        train, f"--init_from={checkpoint}", f"--data={game}/silent", f"--out={tmp_path}/run",
        f"--objective={objective}", "--steps=2", "--batch_size=2", "--seq_len=12", "--thought_len=2",
        "--n_true=1", "--policy_weight=1", "--eval_every=1", "--eval_texts=4")
    assert (status, stderr) == (0, "") and "done:" in stdout
    trained = weights.load(weights.find_checkpoint(str(tmp_path / "run")))
    assert hasattr(trained, "start_thought") == (objective == "quiet")
    if objective == "quiet" and checkpoint.name == "official":
        assert trained.config.marker_ids == (20, 21) and trained.config.thought_len == 2


def test_every_layout_thinks_the_same(game, tmp_path, call):
    """The two that hold thoughts, and ours through official and back."""
    folder, argv = tmp_path / "ours", ("--prompt=ball c : ab cd", "--max_new_tokens=6", "--show-thoughts")
    weights.save(tiny_quiet(model=dict(vocab_size=20, max_seq_len=128)), folder,
                 tokenizer=tokenizers.load(game))
    b, c = tmp_path / "b", tmp_path / "c"
    assert call(weights, f"--checkpoint={folder}", f"--out={b}", "--layout=official")[0] == 0
    assert call(weights, f"--checkpoint={b}", f"--out={c}")[0] == 0
    shown = [call(sample, f"--checkpoint={path}", *argv)[1] for path in (folder, b, c)]
    assert shown[0] == shown[1] == shown[2]


def test_markers_can_be_reset_as_the_released_evaluation_does(game, tmp_path, call):
    quiet, tokenizer = tiny_quiet(model=dict(vocab_size=20)), tokenizers.load(game)
    weights.save(quiet, tmp_path / "a", "official", tokenizer=tokenizer)
    argv = (f"--checkpoint={tmp_path}/a", f"--out={tmp_path}/b", "--reset_markers")
    assert call(weights, *argv)[0] == 0
    dash_D = quiet.model.embed.weight[tokenizers.dash_id(tokenizer)]
    reset = weights.load(tmp_path / "b")
    for marker_D in (reset.start_thought, reset.end_thought):
        assert (marker_D - dash_D).abs().max() < 1e-6
        assert not torch.equal(marker_D, quiet.start_thought)


def test_a_tokenizer_of_another_model_is_refused(call, checkpoint, game, tmp_path):
    (tmp_path / "data").mkdir()
    for file in (game / "silent").iterdir():
        (tmp_path / "data" / file.name).write_bytes(file.read_bytes())
    words = json.loads((game / "silent" / "words.json").read_text())
    words["words"] = words["words"][::-1]
    (tmp_path / "data" / "words.json").write_text(json.dumps(words))
    argv = (f"--data={tmp_path}/data", "--texts=4")
    status, _, stderr = call(evaluation, f"--checkpoint={checkpoint}", *argv)
    assert status == 2 and "is another tokenizer than" in stderr and stderr.count("\n") == 1
